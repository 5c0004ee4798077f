// The JSON schema: what is committed is what the field table says, and shipped sweeps satisfy it.
#include "experiments/sweep_schema.h"

#include <filesystem>
#include <fstream>

#include "engine/error.h"
#include "experiments/sweep.h"
#include "tests/support/golden.h"

using namespace mixlora;

namespace {

bool has_type(const Json& value, const std::string& type) {
  if (type == "integer") return value.is_number_integer();
  if (type == "number") return value.is_number();
  if (type == "string") return value.is_string();
  if (type == "boolean") return value.is_boolean();
  if (type == "array") return value.is_array();
  if (type == "object") return value.is_object();
  if (type == "null") return value.is_null();
  throw std::logic_error("type " + type);
}

/// Just as much of JSON Schema as sweep_schema() uses; anything else is an error of the test.
bool valid(const Json& value, const Json& schema, const Json& root) {
  for (const auto& [word, rule] : schema.items()) {
    if (word == "$ref") {
      if (!valid(value, root.at(Json::json_pointer(rule.get<std::string>().substr(1))), root))
        return false;
    } else if (word == "type") {
      const Json types = rule.is_array() ? rule : Json::array({rule});
      bool any = false;
      for (const Json& t : types) any = any || has_type(value, t.get<std::string>());
      if (!any) return false;
    } else if (word == "enum") {
      if (std::find(rule.begin(), rule.end(), value) == rule.end()) return false;
    } else if (word == "const") {
      if (value != rule) return false;
    } else if (word == "anyOf") {
      bool any = false;
      for (const Json& form : rule) any = any || valid(value, form, root);
      if (!any) return false;
    } else if (word == "minimum" || word == "maximum") {
      if (value.is_number() && (word == "minimum" ? value < rule : value > rule)) return false;
    } else if (word == "required") {
      for (const Json& key : rule)
        if (value.is_object() && !value.contains(key.get<std::string>())) return false;
    } else if (word == "minItems") {
      if (value.is_array() && value.size() < rule.get<std::size_t>()) return false;
    } else if (word == "items") {
      if (!value.is_array()) continue;
      for (const Json& v : value)
        if (!valid(v, rule, root)) return false;
    } else if (word == "propertyNames") {
      if (!value.is_object()) continue;
      for (const auto& [key, v] : value.items())
        if (!valid(key, rule, root)) return false;
    } else if (word == "additionalProperties" || word == "properties") {
      if (!value.is_object()) continue;
      for (const auto& [key, v] : value.items()) {
        const bool named = schema.contains("properties") && schema["properties"].contains(key);
        if (word == "properties" && named && !valid(v, rule[key], root)) return false;
        if (word == "additionalProperties" && !named && (rule == false || !valid(v, rule, root)))
          return false;
      }
    } else if (word != "description" && word != "default" && word != "title" && word != "$defs" &&
               word != "$schema") {
      throw std::logic_error("keyword " + word);
    }
  }
  return true;
}

}  // namespace

TEST_CASE("the committed schema is what the fields say", "[experiments][approval]") {
  require_golden("../../experiments/sweep.schema.json", sweep_schema().dump(2) + "\n");
}

TEST_CASE("every shipped sweep satisfies the schema and makes trials", "[experiments][schema]") {
  const Json schema = sweep_schema();
  int seen = 0;
  for (const auto& entry : std::filesystem::directory_iterator(
           std::filesystem::path(MIXLORA_SOURCE_DIR) / "experiments/sweeps")) {
    if (entry.path().extension() != ".json") continue;
    INFO(entry.path().string());
    CHECK(valid(read_json(entry.path()), schema, schema));
    CHECK(read_sweep(entry.path()).trials.size() >= 2);
    ++seen;
  }
  CHECK(seen >= 2);
}

TEST_CASE("the schema takes what the reader takes and refuses what it refuses",
          "[experiments][schema]") {
  const Json schema = sweep_schema();
  const auto both = [&](const char* text, bool good) {
    INFO(text);
    Json sweep = parse_json(text, "s");
    CHECK(valid(sweep, schema, schema) == good);
    sweep["model"] = "shape:smollm2-135m";
    sweep["base"]["train"]["tasks"] = "starter-blank";
    if (good)
      CHECK_NOTHROW(parse_sweep(sweep, "s"));
    else
      CHECK_THROWS_AS(parse_sweep(sweep, "s"), InputError);
  };
  both(R"({"name": "a"})", true);
  both(R"({"name": "a", "base": {"adapter": {"r": null, "target_modules": ["q_proj"]}}})", true);
  both(R"({"name": "a", "run": {"pack": 4}, "include": [{"label": "x", "train": {"lr": 1e-3}}]})",
       true);
  both(R"({"name": "a", "axes": [{"name": "x", "path": "/train/seed", "values": [1]}]})", true);
  both(R"({"nam": "a"})", false);
  both(R"({"name": 1})", false);
  both(R"({"name": "a", "run": {"pack": "all"}})", false);
  both(R"({"name": "a", "run": {"device": "gpu"}})", false);
  both(R"({"name": "a", "base": {"adapter": {"rank": 4}}})", false);
  both(R"({"name": "a", "base": {"train": {"seed": -1}}})", false);
  both(R"({"name": "a", "include": [{"train": {"lr": 1e-3}}]})", false);
  both(R"({"name": "a", "axes": [{"name": "x"}]})", false);
}
