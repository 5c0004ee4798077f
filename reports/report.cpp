#include "reports/report.h"

#include <algorithm>
#include <set>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/nearest.h"

namespace mixlora {

const std::vector<TableKind>& table_kinds() {
  static const std::vector<TableKind> kKinds{
      {"warnings", "collapsed, unfinished or doubtful runs", true, warning_tables},
      {"accuracy", "scores with standard errors, majority and base rows, published numbers", true,
       accuracy_tables},
      {"paired", "every configuration tested against one, question by question", true,
       paired_tables},
      {"seeds", "mean, standard deviation and t interval over seeds", true, seed_tables},
      {"intervals", "confidence interval of every score", false, interval_tables},
      {"single-task", "the paper's table of adapters trained on one task each", false,
       single_task_tables},
      {"multi-task", "the paper's table of adapters trained on several tasks", false,
       multi_task_tables},
      {"rank", "the paper's table of ranks", false, rank_tables},
      {"router-coef", "the paper's table of router loss coefficients", false, router_coef_tables},
      {"paper-efficiency", "the paper's table of time and memory", false, paper_efficiency_tables},
      {"grid", "accuracy by routing, top-k and number of experts", true, grid_tables},
      {"params", "trainable parameters", true, parameter_tables},
      {"efficiency", "time a token, tokens a second, peak memory", true, efficiency_tables},
      {"accuracy-memory", "accuracy against peak memory", false, memory_tables},
      {"accuracy-time", "accuracy against training time", false, time_tables},
      {"expert-load", "share of router choices by expert", true, expert_load_tables},
      {"expert-load-layers", "share of router choices by expert and layer", false,
       layer_load_tables},
      {"learning-curves", "training loss along the way", false, curve_tables},
  };
  return kKinds;
}

const TableKind& find_table_kind(const std::string& name) {
  std::vector<std::string> names;
  for (const TableKind& k : table_kinds()) {
    if (name == k.name) return k;
    names.emplace_back(k.name);
  }
  fail("no table \"{}\"; {}", name, nearest(name, names));
}

void write_table(const Table& table, const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  require(!error, "{}: the folder cannot be made: {}", folder.string(), error.message());
  for (const Format f : {Format::markdown, Format::csv, Format::latex, Format::json})
    write_text(folder / (table.name + ending_of(f)), render(table, f));
}

std::string model_name(const Study& study) {
  if (study.trials.empty()) return "";
  std::string path = study.trials.front().text("/model");
  while (path.ends_with('/')) path.pop_back();
  return path.substr(path.find_last_of("/:") + 1);
}

std::string variant_name(const std::string& table, const Study& study, const Variant& v) {
  const auto all = variants(study);
  if (all.empty() || all.front() == v) return table;
  return table + "-" + v.protocol + "-" + v.metric;
}

std::string protocol_text(const std::vector<Configuration>& configurations, const Variant& v) {
  // Every setting of the scoring that is not the suites themselves, with all values it took.
  std::vector<std::string> keys;
  std::map<std::string, std::vector<std::string>> values;
  std::vector<std::string> seeds, limits;
  std::string model;
  const auto add = [](std::vector<std::string>& to, const std::string& value) {
    if (!value.empty() && std::find(to.begin(), to.end(), value) == to.end()) to.push_back(value);
  };
  for (const Configuration& c : configurations)
    for (const StudyTrial* t : c.trials) {
      if (model.empty()) model = t->text("/model");
      if (!t->is_base()) add(seeds, t->text("/train/seed"));
      if (!t->is_base()) add(limits, t->text("/train/limit"));
      if (!t->spec.contains("evaluate")) continue;
      for (const auto& [key, value] : t->spec["evaluate"].items()) {
        if (key == "suites" || key == "protocol" || value.is_null()) continue;
        if (values.count(key) == 0) keys.push_back(key);
        add(values[key], value.is_string() ? value.get<std::string>() : value.dump());
      }
    }
  const auto joined = [](const std::vector<std::string>& list) {
    std::string out;
    for (const auto& s : list) out += (out.empty() ? "" : ", ") + s;
    return out;
  };
  const auto rows = [&](const std::vector<std::string>& list, const char* of) {
    if (list.empty() || list == std::vector<std::string>{"0"})
      return fmt::format("all {} rows", of);
    return fmt::format("{} rows limited to {} (0: all)", of, joined(list));
  };
  std::string text = fmt::format("Model {}. Protocol {}, metric {}", model, v.protocol, v.metric);
  const auto& shots = values["few_shot"];
  text += shots.empty() || shots == std::vector<std::string>{"0"}
              ? ", zero-shot"
              : fmt::format(", {}-shot", joined(shots));
  text += ", " + rows(values["limit"], "test");
  for (const auto& key : keys) {
    if (key == "limit" || key == "few_shot") continue;
    text += key == "cutoff_len" ? fmt::format(", prompts to {} tokens", joined(values[key]))
                                : fmt::format(", {} {}", key, joined(values[key]));
  }
  if (!limits.empty()) text += ", " + rows(limits, "training");
  text += ".";
  if (!seeds.empty())
    text += fmt::format(" Seed{} {}.", seeds.size() > 1 ? "s" : "", joined(seeds));
  return text;
}

std::string setting_text(const Study& study) {
  const auto all = variants(study);
  return all.empty() ? "" : fmt::format(" {}", protocol_text(configurations(study), all.front()));
}

Cell score_cell(const TwoLevel& level, Interval interval) {
  Cell c(fmt::format("{:.1f} ± {:.1f}", 100 * level.mean, 100 * level.standard_error),
         100 * level.mean, 100 * level.standard_error);
  c.low = 100 * interval.low;
  c.high = 100 * interval.high;
  return c;
}

Cell average_cell(const std::vector<Summary>& suites, std::size_t asked, double confidence) {
  if (suites.empty()) return {"-"};
  if (suites.size() == 1 && asked > 1) return {""};  // the one score stands in its own column
  const TwoLevel level = average_of(suites, confidence);
  Cell c = score_cell(level, level.interval);
  if (suites.size() == asked) return c;
  return {c.text + "†"};
}

}  // namespace mixlora
