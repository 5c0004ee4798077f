// Wrong sweep files: what each one's message says, approved in golden/sweep-errors.txt.
#include "engine/error.h"
#include "experiments/sweep.h"
#include "tests/support/golden.h"

using namespace mixlora;

namespace {

struct Case {
  const char* what;
  const char* text;
};

// A good sweep but for the part named: %s stands where a case's text goes.
const char* const kGoodHead =
    R"("name": "s", "model": "shape:smollm2-135m", "base": {"train": {"tasks": ["starter-blank"]},
       "evaluate": {"suites": ["starter-blank"]}})";

const Case kWhole[] = {
    {"not JSON", "{\"name\": "},
    {"no object", "[1, 2]"},
    {"a key twice", R"({"name": "a", "name": "b"})"},
    {"empty", "{}"},
    {"no tasks", R"({"name": "a", "model": "m"})"},
    {"a name that is no file name", R"({"name": "../a"})"},
    {"a misspelt key", R"({"name": "a", "modle": "m"})"},
};

const Case kParts[] = {
    {"base is a list", R"("base": [])"},
    {"a misspelt key in base", R"("base": {"adapter": {"lora_alfa": 8}})"},
    {"a misspelt group in base", R"("base": {"adaptr": {"r": 8}})"},
    {"a misspelt key with null", R"("base": {"adapter": {"num_expert": null}})"},
    {"text for a number", R"("base": {"adapter": {"r": "16"}})"},
    {"a fraction for a whole number", R"("base": {"adapter": {"r": 1.5}})"},
    {"a number past 64 bits", R"("base": {"train": {"batch_size": 99999999999999999999}})"},
    {"a number near 64 bits", R"("base": {"train": {"batch_size": 9223372036854775807}})"},
    {"a number past a double", R"("base": {"train": {"lr": 1e999}})"},
    {"a negative seed", R"("base": {"train": {"seed": -1}})"},
    {"an unknown method", R"("base": {"adapter": {"method": "mixlra"}})"},
    {"an unknown projection", R"("base": {"adapter": {"target_modules": ["q_prj"]}})"},
    {"an unknown task", R"("base": {"train": {"tasks": ["starter-blnk"]}})"},
    {"an unknown suite", R"("base": {"evaluate": {"suites": "starter-blank;arc"}})"},
    {"no suite and no task", R"("base": {"train": {"tasks": []}, "evaluate": {"suites": []}})"},
    {"an empty task list", R"("base": {"train": {"tasks": []}})"},
    {"axes is an object", R"("axes": {})"},
    {"an axis without a name", R"("axes": [{"values": [1]}])"},
    {"an axis name twice", R"("axes": [{"name": "a", "path": "/train/seed", "values": [1]},
                                       {"name": "a", "path": "/train/lr", "values": [1]}])"},
    {"an axis without values", R"("axes": [{"name": "a", "values": []}])"},
    {"a bare value without a path", R"("axes": [{"name": "a", "values": [1]}])"},
    {"a value without a label", R"("axes": [{"name": "a", "values": [{"adapter": {"r": 8}}]}])"},
    {"a label twice", R"("axes": [{"name": "a", "values": [{"label": "x"}, {"label": "x"}]}])"},
    {"a misspelt key in a value",
     R"("axes": [{"name": "a", "values": [{"label": "x", "adapter": {"top_kk": 8}}]}])"},
    {"a wrong type in a value",
     R"("axes": [{"name": "a", "values": [{"label": "x", "train": {"lr": "fast"}}]}])"},
    {"a path to nowhere", R"("axes": [{"name": "a", "path": "/train/sede", "values": [1]}])"},
    {"a path that is no pointer",
     R"("axes": [{"name": "a", "path": "train.seed", "values": [1]}])"},
    {"a path to a group",
     R"("axes": [{"name": "a", "path": "/adapter/expert_lora", "values": [1]}])"},
    {"a path below a value", R"("axes": [{"name": "a", "path": "/train/seed/x", "values": [1]}])"},
    {"a wrong type at a path",
     R"("axes": [{"name": "a", "path": "/train/seed", "values": ["x"]}])"},
    {"an object at a path",
     R"("axes": [{"name": "a", "path": "/train/seed", "values": [{"x": 1}]}])"},
    {"when names no axis",
     R"("axes": [{"name": "method", "values": [{"label": "A"}]},
                 {"name": "b", "when": {"metod": "A"}, "path": "/train/seed", "values": [1]}])"},
    {"when on the first axis",
     R"("axes": [{"name": "b", "when": {"a": "A"}, "path": "/train/seed", "values": [1]}])"},
    {"when names no label",
     R"("axes": [{"name": "method", "values": [{"label": "MixLoRA"}]},
                 {"name": "b", "when": {"method": ["MixLora"]}, "path": "/train/seed", "values": [1]}])"},
    {"an empty when",
     R"("axes": [{"name": "b", "when": {}, "path": "/train/seed", "values": [1]}])"},
    {"exclude names no label",
     R"("axes": [{"name": "seed", "path": "/train/seed", "values": [1, 2]}], "exclude": [{"seed": 3}])"},
    {"everything excluded",
     R"("axes": [{"name": "seed", "path": "/train/seed", "values": [1, 2]}], "exclude": [{"seed": [1, 2]}])"},
    {"include without a label", R"("include": [{"adapter": {"r": 4}}])"},
    {"too many experts a token",
     R"("axes": [{"name": "method", "values": [{"label": "MixLoRA", "adapter": {"method": "mixlora"}}]},
                 {"name": "k", "path": "/adapter/top_k", "values": [2, 9]}])"},
    {"a router on LoRA",
     R"("axes": [{"name": "method", "values": [{"label": "LoRA"}]},
                 {"name": "k", "path": "/adapter/top_k", "values": [2]}])"},
    {"experts without a feed-forward projection",
     R"("base": {"adapter": {"method": "mixlora", "target_modules": ["q_proj"]}})"},
    {"a rank of zero", R"("include": [{"label": "x", "adapter": {"r": 0}}])"},
    {"an unknown device", R"("run": {"device": "gpu"})"},
    {"an unknown precision", R"("run": {"precision": "fp16"})"},
    {"a misspelt run key", R"("run": {"memory_limit": 24})"},
    {"a memory limit of nothing", R"("run": {"memory_limit_gib": 0})"},
    {"a pack of nothing", R"("run": {"pack": 0})"},
    {"an unknown table", R"("tables": ["accurcy"])"},
    {"one table, not a list", R"("tables": "accuracy")"},
};

std::string message_of(const std::string& text) {
  try {
    parse_sweep(parse_json(text, "s.json"), "s.json");
  } catch (const InputError& e) {
    return e.what();
  }
  return "no error";
}

/// The good sweep with a case's part merged over it.
std::string with_part(const std::string& part) {
  Json good = parse_json(fmt::format("{{{}}}", kGoodHead), "good");
  Json own;
  try {
    own = parse_json("{" + part + "}", "part");
  } catch (const InputError&) {  // what does not parse is given as it is
    return fmt::format("{{{}}}", part);
  }
  for (const auto& [key, value] : own.items())
    if (key == "base" && value.is_object())
      for (const auto& [group, fields] : value.items())
        for (const auto& [name, field] : fields.items()) good["base"][group][name] = field;
    else
      good[key] = value;
  return good.dump();
}

}  // namespace

TEST_CASE("a good sweep makes one trial", "[experiments][approval]") {
  CHECK(message_of(with_part("")) == "no error");
}

TEST_CASE("every wrong sweep names its place and what would be right", "[experiments][approval]") {
  std::string all;
  for (const Case& c : kWhole) all += fmt::format("# {}\n{}\n", c.what, message_of(c.text));
  for (const Case& c : kParts)
    all += fmt::format("# {}\n{}\n", c.what, message_of(with_part(c.text)));
  CHECK(all.find("no error") == std::string::npos);
  require_golden("sweep-errors.txt", all);
}
