#include "experiments/expand.h"

#include <algorithm>
#include <map>

#include "engine/error.h"
#include "engine/nearest.h"

namespace mixlora {
namespace {

constexpr std::size_t kMostTrials = 100000;

/// A label of an axis and the merge patch it stands for.
struct Choice {
  std::string label, place;  // "axes[0].values[2]"
  Json patch;
};
struct ReadAxis {
  std::string name, place;
  const Selection* when = nullptr;
  std::vector<Choice> choices;
};
/// A trial in the making.
struct Draft {
  Json json;
  std::vector<std::pair<std::string, std::string>> labels;  // axis, label
  std::vector<const Choice*> applied;
};

std::string joined(const Draft& d) {
  std::string text;
  for (const auto& [axis, label] : d.labels) text += (text.empty() ? "" : " / ") + label;
  return text.empty() ? "base" : text;
}

std::string label_of(const Json& value, const std::string& where) {
  const auto label = value.find("label");
  require(label != value.end() && label->is_string() && !label->get<std::string>().empty(),
          "{}: expected {{\"label\": \"...\", ...}} with a name for the tables", where);
  return label->get<std::string>();
}

Choice read_choice(const Json& value, const std::optional<std::string>& pointer,
                   const std::string& file, const std::string& place) {
  const std::string where = file + ": " + place;
  if (!pointer) {
    require(value.is_object(),
            "{}: expected {{\"label\": \"...\", ...}}, found {}; or give the axis a \"path\"",
            where, value.dump());
    Choice out{label_of(value, where), place, value};
    out.patch.erase("label");
    check_patch(out.patch, where);
    return out;
  }
  const bool labelled = value.is_object() && value.contains("label") && value.contains("value");
  require(!value.is_object() || (labelled && value.size() == 2),
          "{}: expected a value for {}, or {{\"label\": \"...\", \"value\": ...}}, found {}", where,
          *pointer, value.dump());
  const Json& plain = labelled ? value["value"] : value;
  Choice out{labelled ? label_of(value, where) : label_text(plain), place, {}};
  out.patch = patch_at(*pointer, plain, where);
  try {
    check_patch(out.patch, "");
  } catch (const InputError& e) {  // ".train.seed: expected ...": the place is the value's own
    const std::string text = e.what();
    fail("{} ({}){}", where, *pointer, text.substr(std::min(text.find(": "), text.size())));
  }
  return out;
}

/// Names and labels of a selection must be there: a misspelt one would silently select nothing.
void check_selection(const Selection& s, const std::vector<ReadAxis>& axes,
                     const std::string& where) {
  std::vector<std::string> names;
  for (const ReadAxis& a : axes) names.push_back(a.name);
  for (const auto& [name, labels] : s.axes) {
    const auto axis = std::find(names.begin(), names.end(), name);
    if (axis == names.end() && names.empty())
      fail("{}: no axis \"{}\"; there is none before this one", where, name);
    if (axis == names.end()) fail("{}: no axis \"{}\"; {}", where, name, nearest(name, names));
    std::vector<std::string> known;
    for (const Choice& c : axes[static_cast<std::size_t>(axis - names.begin())].choices)
      known.push_back(c.label);
    for (const auto& label : labels)
      if (std::find(known.begin(), known.end(), label) == known.end())
        fail("{}.{}: no label \"{}\"; {}", where, name, label, nearest(label, known));
  }
}

bool selects(const Selection& s, const Draft& d) {
  return std::all_of(s.axes.begin(), s.axes.end(), [&](const auto& wanted) {
    const auto own = std::find_if(d.labels.begin(), d.labels.end(),
                                  [&](const auto& l) { return l.first == wanted.first; });
    return own != d.labels.end() && std::find(wanted.second.begin(), wanted.second.end(),
                                              own->second) != wanted.second.end();
  });
}

std::vector<ReadAxis> read_axes(const SweepFile& sweep, const std::string& file) {
  std::vector<ReadAxis> out;
  for (std::size_t i = 0; i < sweep.axes.size(); ++i) {
    const Axis& axis = sweep.axes[i];
    ReadAxis read{axis.name, fmt::format("axes[{}]", i), &axis.when, {}};
    const std::string where = file + ": " + read.place;
    require(!axis.name.empty(), "{}.name: expected a name", where);
    for (const ReadAxis& before : out)
      require(before.name != axis.name, "{}.name: \"{}\" stands twice", where, axis.name);
    check_selection(axis.when, out, where + ".when");
    if (axis.path) patch_at(*axis.path, nullptr, where + ".path");
    require(!axis.values.empty(), "{}.values: expected a list with one value or more", where);
    for (std::size_t v = 0; v < axis.values.size(); ++v) {
      Choice choice = read_choice(axis.values[v].json, axis.path, file,
                                  fmt::format("{}.values[{}]", read.place, v));
      for (const Choice& before : read.choices)
        require(before.label != choice.label, "{}: {}: the label \"{}\" stands twice", file,
                choice.place, choice.label);
      read.choices.push_back(std::move(choice));
    }
    out.push_back(std::move(read));
  }
  return out;
}

std::vector<Draft> product(const Draft& first, const std::vector<ReadAxis>& axes,
                           const std::string& file) {
  std::vector<Draft> drafts{first};
  for (const ReadAxis& axis : axes) {
    std::vector<Draft> next;
    for (const Draft& d : drafts) {
      if (!selects(*axis.when, d)) {
        next.push_back(d);
        continue;
      }
      for (const Choice& c : axis.choices) {
        Draft& grown = next.emplace_back(d);
        grown.json.merge_patch(c.patch);
        grown.labels.emplace_back(axis.name, c.label);
        grown.applied.push_back(&c);
        require(next.size() <= kMostTrials, "{}: {}: more than {} trials", file, axis.place,
                kMostTrials);
      }
    }
    drafts = std::move(next);
  }
  return drafts;
}

/// "adapter.top_k" -> "/adapter/top_k"; list indices are cut off.
Json::json_pointer pointer_of(std::string dotted) {
  dotted = dotted.substr(0, dotted.find('['));
  std::replace(dotted.begin(), dotted.end(), '.', '/');
  return Json::json_pointer("/" + dotted);
}

/// A router's key on a method without one would be silently ignored.
void check_router(const Json& json, const TrialSpec& spec) {
  if (has_router(spec.adapter) || !json.contains("adapter")) return;
  for (const char* key :
       {"routing_strategy", "num_experts", "top_k", "top_p", "temperature", "router_init_range",
        "jitter_noise", "router_loss", "router_aux_loss_coef", "router_aux_loss_scope",
        "router_z_loss_coef", "expert_capacity", "overflow", "expert_lora"})
    if (json["adapter"].contains(key))
      fail(
          ".adapter.{}: {} on method \"{}\", which has no router; set it where the method is "
          "mixlora or mixdora (\"when\" limits an axis)",
          key, json["adapter"][key].dump(), write(spec.adapter.method).get<std::string>());
}

Trial make_trial(const Draft& d, const std::string& file) {
  Trial t;
  t.label = joined(d);
  t.labels.insert(d.labels.begin(), d.labels.end());
  try {
    const Json json = resolved(d.json);
    read(json, t.spec, "");
    check_router(json, t.spec);
    check(t.spec, "");
  } catch (const InputError& e) {  // ".adapter.top_k: 9 of 8 experts; ..."
    std::string text = e.what();
    std::string place;
    const std::size_t end = text.find(':');
    if (text.starts_with('.') && end != std::string::npos) {
      text = text.substr(1);
      const auto pointer = pointer_of(text.substr(0, end - 1));
      for (const Choice* c : d.applied)
        if (c->patch.contains(pointer)) place = fmt::format(" (set at {})", c->place);
    }
    fail("{}: trial \"{}\": {}{}", file, t.label, text, place);
  }
  return t;
}

}  // namespace

Expansion expand(const SweepFile& sweep, const std::string& file) {
  Draft first{resolved(sweep.base.json), {}, {}};
  if (!sweep.model.empty()) first.json["model"] = sweep.model;
  const std::vector<ReadAxis> axes = read_axes(sweep, file);
  std::vector<Draft> drafts = product(first, axes, file);
  Expansion out;
  for (std::size_t i = 0; i < sweep.exclude.size(); ++i) {
    const std::string rule = fmt::format("exclude[{}]", i);
    check_selection(sweep.exclude[i], axes, file + ": " + rule);
    std::vector<Draft> kept;
    for (Draft& d : drafts) {
      if (selects(sweep.exclude[i], d))
        out.left_out.push_back({joined(d), "excluded by " + rule});
      else
        kept.push_back(std::move(d));
    }
    drafts = std::move(kept);
  }
  std::vector<Choice> single;
  single.reserve(sweep.include.size());  // drafts point into it
  for (std::size_t i = 0; i < sweep.include.size(); ++i) {
    const Choice& c = single.emplace_back(
        read_choice(sweep.include[i].json, std::nullopt, file, fmt::format("include[{}]", i)));
    Draft& d = drafts.emplace_back(first);
    d.json.merge_patch(c.patch);
    d.labels.emplace_back(axes.empty() ? "trial" : axes.front().name, c.label);
    d.applied.push_back(&c);
  }
  require(!drafts.empty(), "{}: no trial is left after exclude", file);
  std::map<std::string, std::string> seen;  // canonical spec -> label
  for (const Draft& d : drafts) {
    Trial t = make_trial(d, file);
    const auto [at, fresh] = seen.emplace(write(canonical(t.spec)).dump(), t.label);
    if (fresh)
      out.trials.push_back(std::move(t));
    else
      out.left_out.push_back({t.label, fmt::format("equal to \"{}\"", at->second)});
  }
  return out;
}

}  // namespace mixlora
