// Tables of accuracy: scores, their intervals, seeds.
#include <algorithm>
#include <cmath>
#include <set>

#include "reports/published.h"
#include "reports/report.h"

namespace mixlora {
namespace {

std::string percent(double share) { return fmt::format("{:.1f}", 100 * share); }
std::string interval_text(Interval i) {
  return fmt::format("[{:.1f}, {:.1f}]", 100 * i.low, 100 * i.high);
}

/// Suites that some trial scored, or was asked, in this way.
std::vector<std::string> suites_of(const Study& study, const Variant& v) {
  std::vector<std::string> out;
  for (const auto& suite : suites_of(study))
    for (const StudyTrial& t : study.trials)
      if (t.score(suite, v.protocol, v.metric) != nullptr ||
          (t.scores.empty() && t.text("/evaluate/protocol") == v.protocol &&
           t.text("/evaluate/suites").find('"' + suite + '"') != std::string::npos)) {
        out.push_back(suite);
        break;
      }
  return out;
}

std::vector<Variant> variants_or_planned(const Study& study) {
  auto v = variants(study);
  if (v.empty() && !study.trials.empty())
    v.push_back({study.trials.front().text("/evaluate/protocol"), "acc"});
  return v;
}

/// The rows of the commonest answer and of chance.
std::vector<TableRow> guess_rows(const Study& study, const Variant& v,
                                 const std::vector<std::string>& suites) {
  TableRow majority({"majority answer"}, RowKind::reference),
      chance({"chance"}, RowKind::reference);
  double sums[2] = {0, 0};
  bool all = true;
  for (const auto& suite : suites) {
    const StudyScore* s = nullptr;
    for (const StudyTrial& t : study.trials)
      if (s == nullptr) s = t.score(suite, v.protocol, v.metric);
    all = all && s != nullptr;
    const auto cell = [&](double share) { return Cell(percent(share), 100 * share); };
    majority.cells.push_back(s == nullptr ? Cell("-") : cell(s->majority));
    chance.cells.push_back(s == nullptr ? Cell("-") : cell(s->chance));
    sums[0] += s == nullptr ? 0 : s->majority;
    sums[1] += s == nullptr ? 0 : s->chance;
  }
  if (suites.size() > 1)
    for (TableRow* row : {&majority, &chance}) {
      const double mean = sums[row == &chance ? 1 : 0] / static_cast<double>(suites.size());
      row->cells.push_back(all ? Cell(percent(mean), 100 * mean) : Cell("-"));
    }
  return {majority, chance};
}

std::string state_of(const Configuration& c, const std::string& suite) {
  if (c.first().text("/evaluate/suites").find('"' + suite + '"') == std::string::npos) return "";
  for (const StudyTrial* t : c.trials)
    if (!t->done()) return t->status;
  return "-";
}

Table accuracy(const Study& study, const Variant& v, const ReportOptions& o) {
  Table t;
  t.name = variant_name("accuracy", study, v);
  t.title = "Accuracy (%)";
  const auto suites = suites_of(study, v);
  const auto all = configurations(study);
  t.columns = {"trial"};
  for (const auto& s : suites) t.columns.push_back(column_of(s));
  if (suites.size() > 1) t.columns.emplace_back("AVG");
  t.rows = guess_rows(study, v, suites);
  bool incomplete = false;
  std::vector<TableRow> own;
  std::string sizes;
  std::set<std::string> sized;
  for (const Configuration& c : all) {
    TableRow row({c.label}, c.first().is_base() ? RowKind::reference : RowKind::own);
    std::vector<Summary> present;
    for (const auto& suite : suites) {
      if (const auto s = summarise(c, suite, v, o.certainty.confidence)) {
        row.cells.push_back(score_cell(s->level, s->interval));
        if (s->by_seed.size() < c.trials.size()) {
          row.cells.back() = Cell(row.cells.back().text + "†");  // not to be ranked
          incomplete = true;
        }
        present.push_back(*s);
        if (sized.insert(suite).second)
          sizes += fmt::format("{}{} {}", sizes.empty() ? "" : ", ", column_of(suite), s->n);
      } else {
        row.cells.emplace_back(state_of(c, suite));
      }
    }
    if (suites.size() > 1) {
      Cell average = average_cell(present, suites.size(), o.certainty.confidence);
      const bool seeds_missing = std::any_of(present.begin(), present.end(), [&](const Summary& s) {
        return s.by_seed.size() < c.trials.size();
      });
      if (seeds_missing && average.value) average = Cell(average.text + "†");
      row.cells.push_back(std::move(average));
    }
    incomplete = incomplete || row.cells.back().text.ends_with("†");
    (row.kind == RowKind::own ? own : t.rows).push_back(row);
  }
  t.rows.insert(t.rows.end(), own.begin(), own.end());
  std::set<std::string> sources;
  for (const char* table : {"single-task", "multi-task"})
    for (const Published& p : published(table, model_name(study), false)) {
      t.rows.push_back(
          published_row(p, fmt::format("published: {}, {}", method_title(p.method), table), suites,
                        suites.size() > 1));
      sources.insert(p.source);
    }
  mark_best(t);
  const bool seeds =
      std::any_of(all.begin(), all.end(), [](const auto& c) { return c.trials.size() > 1; });
  t.caption = protocol_text(all, v) +
              (seeds ? " Scores are means over seeds; ± is one standard error over questions and "
                       "seeds."
                     : " ± is one standard error over questions.");
  if (!sizes.empty()) t.caption += " Questions: " + sizes + ".";
  if (incomplete) t.caption += kIncomplete;
  for (const auto& s : sources) t.caption += " Published: " + s + ".";
  return t;
}

}  // namespace

Tables accuracy_tables(const Study& study, const ReportOptions& options) {
  Tables out;
  for (const Variant& v : variants_or_planned(study)) out.push_back(accuracy(study, v, options));
  return out;
}

Tables interval_tables(const Study& study, const ReportOptions& options) {
  Tables out;
  const auto all = configurations(study);
  for (const Variant& v : variants(study)) {
    Table t;
    t.name = variant_name("intervals", study, v);
    t.title = fmt::format("{:.0f} % intervals of accuracy (%)", 100 * options.certainty.confidence);
    t.columns = {"trial", "suite", "n", "seeds", "accuracy", "se", "interval", "normal interval"};
    t.words = {1};
    for (const Configuration& c : all)
      for (const auto& suite : suites_of(study, v))
        if (const auto s = summarise(c, suite, v, options.certainty.confidence)) {
          Interval normal = s->level.interval;
          if (s->by_seed.size() == 1)
            normal = normal_interval(std::llround(s->level.mean * static_cast<double>(s->n)), s->n,
                                     options.certainty.confidence);
          Cell interval(interval_text(s->interval));
          interval.low = 100 * s->interval.low;
          interval.high = 100 * s->interval.high;
          Cell other(interval_text(normal));
          other.low = 100 * normal.low;
          other.high = 100 * normal.high;
          t.rows.push_back(
              TableRow({c.label, column_of(suite), number_cell(static_cast<double>(s->n), 0),
                        number_cell(static_cast<double>(s->by_seed.size()), 0),
                        number_cell(100 * s->level.mean, 1),
                        number_cell(100 * s->level.standard_error, 2), interval, other}));
        }
    t.caption = protocol_text(all, v) +
                " Interval: Wilson's for one seed; over questions and seeds (two-way components, "
                "Satterthwaite's t) for more. Normal: share ± z standard errors.";
    if (!t.rows.empty()) out.push_back(std::move(t));
  }
  return out;
}

Tables seed_tables(const Study& study, const ReportOptions& options) {
  Tables out;
  const auto all = configurations(study);
  for (const Variant& v : variants(study)) {
    Table t;
    t.name = variant_name("seeds", study, v);
    t.title = "Accuracy over seeds (%)";
    t.columns = {"trial", "suite", "seeds", "mean", "sd", "t interval", "each seed"};
    t.words = {1};
    for (const Configuration& c : all) {
      if (c.trials.size() < 2) continue;
      for (const auto& suite : suites_of(study, v)) {
        const auto s = summarise(c, suite, v, options.certainty.confidence);
        if (!s || s->by_seed.size() < 2) continue;
        SeedSummary k = summarise_seeds(s->by_seed, options.certainty.confidence);
        k.interval = {std::max(0.0, k.interval.low), std::min(1.0, k.interval.high)};
        std::string each;
        for (const double score : s->by_seed) each += (each.empty() ? "" : ", ") + percent(score);
        Cell interval(interval_text(k.interval));
        interval.low = 100 * k.interval.low;
        interval.high = 100 * k.interval.high;
        t.rows.push_back(
            TableRow({c.label, column_of(suite), number_cell(static_cast<double>(k.seeds), 0),
                      number_cell(100 * k.mean, 1), number_cell(100 * k.sd, 2), interval, each}));
      }
    }
    t.caption = protocol_text(all, v) +
                fmt::format(
                    " sd is one seed's; the {:.0f} % t interval is of the mean over seeds "
                    "on these very questions.",
                    100 * options.certainty.confidence);
    if (!t.rows.empty()) out.push_back(std::move(t));
  }
  return out;
}

}  // namespace mixlora
