#include "experiments/sweep.h"

#include <algorithm>

#include "engine/error.h"
#include "engine/nearest.h"

namespace mixlora {
namespace {

/// A trial in the making: the merged JSON and the labels so far.
struct Draft {
  Json json;
  std::vector<std::pair<std::string, std::string>> labels;
};

void keys(const Json& j, const std::string& path, const std::vector<std::string>& known) {
  require(j.is_object(), "{}: expected an object, found {}", path, j.type_name());
  for (const auto& [key, value] : j.items())
    if (std::find(known.begin(), known.end(), key) == known.end())
      fail("{}: unknown key \"{}\"; {}", path, key, nearest(key, known));
}
std::string text_at(const Json& j, const char* key, const std::string& path) {
  require(j.contains(key) && j[key].is_string() && !j[key].get<std::string>().empty(),
          "{}.{}: expected a name", path, key);
  return j[key].get<std::string>();
}

struct AxisValue {
  std::string label;
  Json patch;
};

/// A value is {"label": ..., patch...}, or a bare number, string or boolean for the axis's `path`.
AxisValue read_value(const Json& value, const Json& axis, const std::string& path) {
  if (axis.contains("path")) {
    require(axis["path"].is_string() && axis["path"].get<std::string>().starts_with('/'),
            "{}: \"path\": expected a JSON pointer such as /train/seed", path);
    require(!value.is_object(), "{}: expected a plain value for {}, found an object", path,
            axis["path"].dump());
    Json patch;
    patch[Json::json_pointer(axis["path"].get<std::string>())] = value;
    return {value.is_string() ? value.get<std::string>() : value.dump(), patch};
  }
  require(value.is_object(), "{}: expected {{\"label\": ..., ...}}; or give the axis a \"path\"",
          path);
  AxisValue out{text_at(value, "label", path), value};
  out.patch.erase("label");
  return out;
}

/// Whether an axis with `when` applies to a draft: every named axis must have one of the listed
/// labels.
bool applies(const Json& axis, const Draft& draft, const std::vector<std::string>& names,
             const std::string& path) {
  if (!axis.contains("when")) return true;
  require(axis["when"].is_object(), "{}.when: expected {{axis: [labels]}}", path);
  for (const auto& [name, labels] : axis["when"].items()) {
    if (std::find(names.begin(), names.end(), name) == names.end())
      fail("{}.when: no earlier axis \"{}\"; {}", path, name, nearest(name, names));
    require(labels.is_array(), "{}.when.{}: expected a list of labels", path, name);
    const auto own = std::find_if(draft.labels.begin(), draft.labels.end(),
                                  [&name = name](const auto& l) { return l.first == name; });
    if (own == draft.labels.end() ||
        std::find(labels.begin(), labels.end(), Json(own->second)) == labels.end())
      return false;
  }
  return true;
}

std::string joined(const Draft& d) {
  std::string text;
  for (const auto& [axis, label] : d.labels) text += (text.empty() ? "" : " / ") + label;
  return text.empty() ? "base" : text;
}

bool excluded(const Json& rule, const Draft& d) {
  for (const auto& [axis, label] : rule.items()) {
    const std::pair<std::string, std::string> wanted{
        axis, label.is_string() ? label.get<std::string>() : label.dump()};
    if (std::find(d.labels.begin(), d.labels.end(), wanted) == d.labels.end()) return false;
  }
  return true;
}

}  // namespace

Sweep parse_sweep(const Json& json, const std::string& file) {
  keys(json, file,
       {"name", "model", "base", "axes", "include", "exclude", "run", "tables", "$schema"});
  Sweep sweep;
  sweep.file = file;
  sweep.json = json;
  sweep.name = text_at(json, "name", file);
  if (json.contains("run")) read(json["run"], sweep.run, file + ": run");
  const auto choice = [&](const std::string& v, const char* key,
                          const std::vector<std::string>& names) {
    if (std::find(names.begin(), names.end(), v) == names.end())
      fail("{}: run.{}: no such choice: \"{}\"; {}", file, key, v, nearest(v, names));
  };
  choice(sweep.run.device, "device", {"auto", "cpu", "cuda"});
  choice(sweep.run.precision, "precision", {"auto", "fp32", "bf16"});
  sweep.tables = {"accuracy", "params", "efficiency", "expert-load"};
  if (json.contains("tables")) read(json["tables"], sweep.tables, file + ": tables");
  for (const auto& t : sweep.tables)
    if (const std::vector<std::string> known{"accuracy", "params", "efficiency", "expert-load"};
        std::find(known.begin(), known.end(), t) == known.end())
      fail("{}: tables: no table \"{}\"; {}", file, t, nearest(t, known));

  Draft first{json.value("base", Json::object()), {}};
  require(first.json.is_object(), "{}: base: expected an object", file);
  if (json.contains("model")) first.json["model"] = json["model"];
  std::vector<Draft> drafts{first};
  std::vector<std::string> names;
  const Json axes = json.value("axes", Json::array());
  require(axes.is_array(), "{}: axes: expected a list", file);
  for (std::size_t i = 0; i < axes.size(); ++i) {
    const std::string path = fmt::format("{}: axes[{}]", file, i);
    keys(axes[i], path, {"name", "values", "path", "when"});
    const std::string name = text_at(axes[i], "name", path);
    require(std::find(names.begin(), names.end(), name) == names.end(),
            "{}: the name \"{}\" stands twice", path, name);
    require(
        axes[i].contains("values") && axes[i]["values"].is_array() && !axes[i]["values"].empty(),
        "{}.values: expected a list with one value or more", path);
    std::vector<Draft> next;
    for (const Draft& d : drafts) {
      if (!applies(axes[i], d, names, path)) {
        next.push_back(d);
        continue;
      }
      for (std::size_t v = 0; v < axes[i]["values"].size(); ++v) {
        const AxisValue value =
            read_value(axes[i]["values"][v], axes[i], fmt::format("{}.values[{}]", path, v));
        next.push_back(d);
        next.back().json.merge_patch(value.patch);
        next.back().labels.emplace_back(name, value.label);
      }
    }
    drafts = std::move(next);
    names.push_back(name);
    require(drafts.size() <= 100000, "{}: more than 100000 trials", path);
  }
  const Json exclude = json.value("exclude", Json::array()),
             include = json.value("include", Json::array());
  require(exclude.is_array() && include.is_array(), "{}: include and exclude: expected lists",
          file);
  for (const Json& rule : exclude) {
    require(rule.is_object() && !rule.empty(), "{}: exclude: expected {{axis: label}}", file);
    drafts.erase(std::remove_if(drafts.begin(), drafts.end(),
                                [&](const Draft& d) { return excluded(rule, d); }),
                 drafts.end());
  }
  for (std::size_t i = 0; i < include.size(); ++i) {
    const AxisValue value =
        read_value(include[i], Json::object(), fmt::format("{}: include[{}]", file, i));
    drafts.push_back(first);
    drafts.back().json.merge_patch(value.patch);
    drafts.back().labels.emplace_back(names.empty() ? "trial" : names.front(), value.label);
  }
  require(!drafts.empty(), "{}: no trial is left after exclude", file);
  std::vector<std::string> seen;
  for (const Draft& d : drafts) {
    Trial t;
    t.label = joined(d);
    t.labels.insert(d.labels.begin(), d.labels.end());
    const std::string path = fmt::format("{}: trial \"{}\"", file, t.label);
    read(d.json, t.spec, path);
    check(t.spec, path);
    const std::string canonical = write(t.spec).dump();
    if (std::find(seen.begin(), seen.end(), canonical) != seen.end()) continue;
    seen.push_back(canonical);
    sweep.trials.push_back(std::move(t));
  }
  return sweep;
}

Sweep read_sweep(const std::filesystem::path& file) {
  return parse_sweep(read_json(file, 16 << 20), file.string());
}

}  // namespace mixlora
