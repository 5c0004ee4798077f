// Tables in the paper's form, its numbers beside ours.
#include <algorithm>
#include <set>

#include "reports/published.h"
#include "reports/report.h"

namespace mixlora {
namespace {

bool trains_on(const StudyTrial& t, const std::string& suite) {
  const Json::json_pointer at("/train/tasks");
  if (!t.spec.contains(at)) return false;
  const Json& tasks = t.spec[at];
  return std::find(tasks.begin(), tasks.end(), Json(suite)) != tasks.end();
}
std::size_t tasks_of(const StudyTrial& t) {
  const Json::json_pointer at("/train/tasks");
  return t.spec.contains(at) ? t.spec[at].size() : 0;
}

/// One row to be: its label and the configurations its cells come from.
struct Setting {
  std::string label;
  std::vector<Configuration> configurations;
  bool base = false;
};

/// Trials of a study that agree in everything but seed, task and suites, split by configuration;
/// those for which keep(trial) is false are left out.
template <class Keep> std::vector<Setting> settings_of(const Study& study, Keep&& keep) {
  std::vector<Setting> out;
  const std::vector<std::string> free{"/train/seed", "/train/tasks", "/evaluate/suites"};
  for (const Configuration& group : group_by_spec(study, free)) {
    Study part;
    part.axes = study.axes;
    for (const StudyTrial* t : group.trials)
      if (keep(*t)) part.trials.push_back(*t);
    if (part.trials.empty()) continue;
    Setting s{group.label, {}, group.first().is_base()};
    // The copies in `part` go; their originals stay.
    for (const Configuration& c : configurations(part)) {
      Configuration original{c.label, {}};
      for (const StudyTrial* copy : c.trials)
        for (const StudyTrial* t : group.trials)
          if (t->key == copy->key) original.trials.push_back(t);
      s.configurations.push_back(std::move(original));
    }
    out.push_back(std::move(s));
  }
  return out;
}

/// The score of a suite in a setting: of the configuration that learned the suite, else any.
std::optional<Summary> score_in(const Setting& s, const std::string& suite, const Variant& v,
                                double confidence) {
  std::optional<Summary> out;
  for (const Configuration& c : s.configurations)
    if (s.base || trains_on(c.first(), suite))
      if (auto found = summarise(c, suite, v, confidence)) out = std::move(found);
  return out;
}

TableRow own_row(const Setting& s, const std::vector<std::string>& suites, const Variant& v,
                 double confidence, bool& incomplete) {
  TableRow row({s.label}, s.base ? RowKind::reference : RowKind::own);
  std::vector<Summary> present;
  for (const auto& suite : suites) {
    const auto score = score_in(s, suite, v, confidence);
    row.cells.push_back(score ? score_cell(score->level, score->interval) : Cell("-"));
    if (score) present.push_back(*score);
  }
  if (suites.size() > 1) row.cells.push_back(average_cell(present, suites.size(), confidence));
  incomplete = incomplete || row.cells.back().text.ends_with("†");
  return row;
}

std::vector<std::string> scored_suites(const std::vector<Setting>& settings, const Study& study,
                                       const Variant& v) {
  std::vector<std::string> out;
  for (const auto& suite : suites_of(study))
    for (const Setting& s : settings)
      if (!s.base && score_in(s, suite, v, 0.95)) {
        out.push_back(suite);
        break;
      }
  return out;
}

/// Source, and a word of caution when the source's model is not ours.
std::string source_text(const std::vector<Published>& rows, const Study& study) {
  std::set<std::string> sources, models;
  for (const Published& p : rows) {
    sources.insert(p.source);
    models.insert(p.model);
  }
  std::string out;
  for (const auto& s : sources) out += " Published: " + s + ".";
  for (const auto& m : models)
    if (published("single-task", model_name(study), false).empty())
      out += fmt::format(
          " Published rows are of {}: another model than ours, {}; compare the "
          "differences between rows, not their height.",
          m, model_name(study));
  return out;
}

std::vector<Configuration> all_of(const std::vector<Setting>& settings) {
  std::vector<Configuration> out;
  for (const Setting& s : settings)
    out.insert(out.end(), s.configurations.begin(), s.configurations.end());
  return out;
}

/// A table of settings, then the published rows that `label` names ("" leaves one out).
template <class Label>
Tables paper_table(const Study& study, const ReportOptions& o, const char* name,
                   const std::string& title, const std::vector<Setting>& settings, Label&& label) {
  Tables out;
  for (const Variant& v : variants(study)) {
    Table t;
    t.name = variant_name(name, study, v);
    t.title = title;
    const auto suites = scored_suites(settings, study, v);
    if (suites.empty()) continue;
    t.columns = {"trial"};
    for (const auto& s : suites) t.columns.push_back(column_of(s));
    if (suites.size() > 1) t.columns.emplace_back("AVG");
    bool incomplete = false;
    for (const bool base : {true, false})
      for (const Setting& s : settings)
        if (s.base == base)
          t.rows.push_back(own_row(s, suites, v, o.certainty.confidence, incomplete));
    const auto rows = published(name, model_name(study), true);
    for (const Published& p : rows)
      if (const std::string text = label(p); !text.empty())
        t.rows.push_back(published_row(p, "published: " + text, suites, suites.size() > 1));
    mark_best(t);
    t.caption = protocol_text(all_of(settings), v) +
                " ± is one standard error over questions, and seeds where there are several." +
                (incomplete ? kIncomplete : "") + source_text(rows, study);
    out.push_back(std::move(t));
  }
  return out;
}

std::string with_params(const Published& p) {
  return fmt::format("{}, {} ({:.1f} % params)", method_title(p.method), p.model,
                     p.params_percent.value_or(0));
}

/// The table of one numeric field of the router's methods, when it took two values or more.
Tables ablation(const Study& study, const ReportOptions& o, const char* name, const char* title,
                const char* field, const char* symbol) {
  std::set<std::string> values;
  const auto keep = [&](const StudyTrial& t) {
    return t.method() == "mixlora" || t.method() == "mixdora";
  };
  for (const StudyTrial& t : study.trials)
    if (keep(t)) values.insert(t.text(field));
  if (values.size() < 2) return {};
  auto settings = settings_of(study, keep);
  std::stable_sort(settings.begin(), settings.end(), [&](const Setting& a, const Setting& b) {
    const StudyTrial &x = a.configurations.front().first(), &y = b.configurations.front().first();
    const Json::json_pointer at(field);
    return std::pair(y.method(), x.spec[at].get<double>()) <
           std::pair(x.method(), y.spec[at].get<double>());  // MixLoRA first, rising
  });
  for (Setting& s : settings)
    s.label = fmt::format("{} {} {} ({})", method_title(s.configurations.front().first().method()),
                          symbol, s.configurations.front().first().text(field), s.label);
  return paper_table(study, o, name, title, settings, [&](const Published& p) {
    return fmt::format("{} {} {}", method_title(p.method), symbol, p.value.value_or(0));
  });
}

}  // namespace

Tables single_task_tables(const Study& study, const ReportOptions& options) {
  const auto settings =
      settings_of(study, [](const StudyTrial& t) { return t.is_base() || tasks_of(t) == 1; });
  return paper_table(study, options, "single-task", "Single task: one adapter a suite (%)",
                     settings, with_params);
}

Tables multi_task_tables(const Study& study, const ReportOptions& options) {
  const auto settings =
      settings_of(study, [](const StudyTrial& t) { return t.is_base() || tasks_of(t) > 1; });
  return paper_table(study, options, "multi-task", "Multi task: one adapter for all suites (%)",
                     settings, with_params);
}

Tables rank_tables(const Study& study, const ReportOptions& options) {
  return ablation(study, options, "rank", "Rank (%)", "/adapter/r", "r");
}

Tables router_coef_tables(const Study& study, const ReportOptions& options) {
  return ablation(study, options, "router-coef", "Router loss coefficient (%)",
                  "/adapter/router_aux_loss_coef", "coefficient");
}

Tables paper_efficiency_tables(const Study& study, const ReportOptions& /*options*/) {
  Table t;
  t.name = "paper-efficiency";
  t.title = "Time and memory, as the paper counts them";
  t.columns = {"trial", "train µs/token", "train peak GB", "score µs/token"};
  std::string device;
  for (const Configuration& c : configurations(study)) {
    const StudyTrial& trial = c.first();
    const auto train = trial.measured("train_ms_per_token"),
               peak = trial.measured("measured_peak_bytes"),
               score = trial.measured("eval_tokens_per_s");
    if (!train && !score) continue;
    if (device.empty()) device = trial.device;
    t.rows.push_back(
        TableRow({c.label, number_cell(train ? std::optional(*train * 1000) : std::nullopt, 1),
                  number_cell(peak, 2, 1e9),
                  number_cell(score ? std::optional(1e6 / *score) : std::nullopt, 1)},
                 trial.is_base() ? RowKind::reference : RowKind::own));
  }
  if (t.rows.empty()) return {};
  const auto rows = published("efficiency", model_name(study), true);
  for (const Published& p : rows) {
    const auto at = [&](const char* key) { return std::optional(p.scores.at(key)); };
    t.rows.push_back(TableRow(
        {"published: " + p.label,
         number_cell(p.scores.at("train_forward_us") + p.scores.at("train_backward_us"), 1),
         number_cell(at("train_gb"), 1), number_cell(at("infer_forward_us"), 1)},
        RowKind::published));
  }
  t.caption =
      fmt::format(
          "Ours: median over training steps (forward, backward and optimizer) on {}, first seed; "
          "peak "
          "of everything the engine takes; scoring by all its tokens. The paper adds forward and "
          "backward and does not state GPU, batch and length.",
          device) +
      setting_text(study) + source_text(rows, study);
  return {t};
}

}  // namespace mixlora
