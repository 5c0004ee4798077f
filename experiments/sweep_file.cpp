#include "experiments/sweep_file.h"

#include <algorithm>

namespace mixlora {
namespace {

constexpr std::int64_t kMostPacked = 64;

std::vector<std::string> keys_of(const Json& object) {
  std::vector<std::string> names;
  for (const auto& [key, value] : object.items()) names.push_back(key);
  return names;
}

/// Every key of `patch` must be one of `known`, which is the spec with all its fields written out.
void check_names(const Json& patch, const Json& known, const std::string& path) {
  require(patch.is_object(), "{}: expected an object, found {}", path, patch.dump());
  for (const auto& [key, value] : patch.items()) {
    const auto field = known.find(key);
    if (field == known.end())
      fail("{}: unknown key \"{}\"; {}", path, key, nearest(key, keys_of(known)));
    if (field->is_object() && !value.is_null()) check_names(value, *field, path + "." + key);
  }
}

const Json& all_fields() {
  static const Json kFields = write(TrialSpec{});
  return kFields;
}

void split_list(Json& spec, const char* part, const char* key) {
  if (!spec.contains(part) || !spec[part].is_object() || !spec[part].contains(key)) return;
  Json& value = spec[part][key];
  if (!value.is_string()) return;
  const auto text = value.get<std::string>();
  Json list = Json::array();
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(';', begin), text.size());
    if (end > begin) list.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  value = std::move(list);
}

}  // namespace

void read_field(const Json& j, Pack& out, const std::string& path) {
  if (j == "auto") {
    out.most = 0;
  } else if (j == "off") {
    out.most = 1;
  } else {
    require(j.is_number_integer() && j >= 1 && j <= kMostPacked,
            "{}: expected \"auto\", \"off\" or a number from 1 to {}, found {}", path, kMostPacked,
            j.dump());
    out.most = j.get<std::int64_t>();
  }
}
Json write_field(const Pack& in) {
  if (in.most == 0) return "auto";
  if (in.most == 1) return "off";
  return in.most;
}

void read_field(const Json& j, Patch& out, const std::string& path) {
  check_patch(j, path);
  out.json = j;
}
Json write_field(const Patch& in) { return in.json; }

// What a value may be depends on its axis's path: expand() checks it.
void read_field(const Json& j, AxisValue& out, const std::string& /*path*/) { out.json = j; }
Json write_field(const AxisValue& in) { return in.json; }

void read_field(const Json& j, Selection& out, const std::string& path) {
  require(j.is_object() && !j.empty(),
          "{}: expected {{axis: label}} or {{axis: [labels]}}, found {}", path, j.dump());
  out.axes.clear();
  for (const auto& [axis, labels] : j.items()) {
    auto& own = out.axes.emplace_back(axis, std::vector<std::string>{}).second;
    if (!labels.is_array()) {
      require(!labels.is_object() && !labels.is_null(),
              "{}.{}: expected a label or a list of labels, found {}", path, axis, labels.dump());
      own.push_back(label_text(labels));
      continue;
    }
    require(!labels.empty(), "{}.{}: expected a label or more, found an empty list", path, axis);
    for (const Json& label : labels) own.push_back(label_text(label));
  }
}
Json write_field(const Selection& in) {
  Json out = Json::object();
  for (const auto& [axis, labels] : in.axes) out[axis] = labels;
  return out;
}

void check_patch(const Json& patch, const std::string& path) {
  check_names(patch, all_fields(), path);
  TrialSpec types;
  read(resolved(patch), types, path);
}

Json resolved(const Json& patch) {
  Json out = Json::object();
  out.merge_patch(patch);
  split_list(out, "train", "tasks");
  split_list(out, "evaluate", "suites");
  return out;
}

Json patch_at(const std::string& pointer, const Json& value, const std::string& path) {
  require(pointer.size() > 1 && pointer.front() == '/',
          "{}: \"{}\": expected a JSON pointer such as \"/train/seed\"", path, pointer);
  const Json* known = &all_fields();
  std::vector<std::string> names;
  for (std::size_t begin = 1; begin <= pointer.size();) {
    const std::size_t end = std::min(pointer.find('/', begin), pointer.size());
    names.push_back(pointer.substr(begin, end - begin));
    require(known->is_object(), "{}: \"{}\": there is nothing below \"{}\"", path, pointer,
            pointer.substr(0, begin - 1));
    const auto field = known->find(names.back());
    if (field == known->end())
      fail("{}: \"{}\": no field \"{}\"; {}", path, pointer, names.back(),
           nearest(names.back(), keys_of(*known)));
    known = &*field;
    begin = end + 1;
  }
  require(!known->is_object(), "{}: \"{}\": is a group of fields; name one of {}", path, pointer,
          fmt::join(keys_of(*known), ", "));
  Json patch = value;
  for (auto name = names.rbegin(); name != names.rend(); ++name)
    patch = Json::object({{*name, std::move(patch)}});
  return patch;
}

std::string label_text(const Json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump();
}

const std::vector<std::string>& table_names() {
  static const std::vector<std::string> kNames{
      "warnings",           "accuracy",         "paired",        "seeds",
      "intervals",          "single-task",      "multi-task",    "rank",
      "router-coef",        "paper-efficiency", "grid",          "params",
      "efficiency",         "accuracy-memory",  "accuracy-time", "expert-load",
      "expert-load-layers", "learning-curves"};
  return kNames;
}

}  // namespace mixlora
