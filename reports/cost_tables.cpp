// Tables of cost: parameters, time, memory, and accuracy against both.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "reports/costs.h"
#include "reports/report.h"

namespace mixlora {
namespace {

constexpr double kMib = 1024.0 * 1024.0;

Tables trade_off(const Study& study, const ReportOptions& options, const std::string& name,
                 const std::string& title, const std::string& column, int decimals,
                 const std::string& what, std::optional<double> (*cost)(const Configuration&)) {
  Tables out;
  for (const Variant& v : variants(study)) {
    const auto all = trade_offs(study, v, options.certainty.confidence, cost);
    if (all.size() < 2) continue;
    Table t;
    t.name = variant_name(name, study, v);
    t.title = title;
    t.columns = {"trial", "accuracy", column, "not beaten"};
    std::vector<Configuration> used;
    for (const TradeOff& one : all) {
      used.push_back(one.configuration);
      t.rows.push_back(TableRow({one.configuration.label, score_cell(one.level, one.level.interval),
                                 number_cell(one.cost, decimals), one.frontier ? "●" : ""}));
    }
    t.caption = protocol_text(used, v) + " Accuracy: mean over suites, ± one standard error. " +
                what + " ●: no other trial of the same suites is both cheaper and more accurate.";
    out.push_back(std::move(t));
  }
  return out;
}

}  // namespace

std::vector<double> step_times(const Configuration& c) {
  std::vector<double> out;
  for (const StudyTrial* t : c.trials) {
    // The first steps fill caches and choose algorithms.
    // A step's time is that of all trials in it; its tokens are this trial's.
    const double trials = t->measured("trials_in_step").value_or(1);
    const std::size_t skip = std::min<std::size_t>(3, t->steps.size() / 5);
    for (std::size_t i = skip; i < t->steps.size(); ++i)
      if (t->steps[i].tokens > 0)
        out.push_back(t->steps[i].ms / trials / static_cast<double>(t->steps[i].tokens));
  }
  return out;
}

std::optional<double> peak_mib(const Configuration& c) {
  std::optional<double> out;
  for (const StudyTrial* t : c.trials)
    if (const auto bytes = t->measured("measured_peak_bytes"))
      out = std::max(out.value_or(0), *bytes / kMib);
  return out;
}

std::optional<double> ms_per_token(const Configuration& c) {
  const auto times = step_times(c);
  return times.empty() ? std::nullopt : std::optional(median(times));
}

std::vector<TradeOff> trade_offs(const Study& study, const Variant& v, double confidence,
                                 std::optional<double> (*cost)(const Configuration&)) {
  std::vector<TradeOff> out;
  const auto suites = suites_of(study);
  std::size_t most = 0;
  for (const Configuration& c : configurations(study)) {
    const auto paid = cost(c);
    std::vector<Summary> scores;
    for (const auto& suite : suites)
      if (auto s = summarise(c, suite, v, confidence)) scores.push_back(std::move(*s));
    if (!paid || scores.empty()) continue;
    most = std::max(most, scores.size());
    std::string asked;
    for (const Summary& s : scores) asked += s.suite + " ";
    out.push_back({c, average_of(scores, confidence), *paid, scores.size(), asked, false});
  }
  // Averages over fewer suites are not comparable.
  out.erase(
      std::remove_if(out.begin(), out.end(), [&](const TradeOff& t) { return t.suites < most; }),
      out.end());
  for (TradeOff& t : out)
    t.frontier = std::none_of(out.begin(), out.end(), [&](const TradeOff& other) {
      return other.asked == t.asked && other.cost <= t.cost && other.level.mean >= t.level.mean &&
             (other.cost < t.cost || other.level.mean > t.level.mean);
    });
  return out;
}

Tables parameter_tables(const Study& study, const ReportOptions& /*options*/) {
  Table t{"params",
          "Trainable parameters",
          "Share of the base model's parameters." + setting_text(study),
          {"trial", "trainable", "base", "%"},
          {}};
  for (const Configuration& c : configurations(study)) {
    const auto trainable = c.first().measured("trainable_parameters"),
               base = c.first().measured("base_parameters");
    if (!base) continue;
    std::optional<double> share;
    if (trainable) share = 100 * *trainable / *base;
    t.rows.push_back(
        TableRow({c.label, number_cell(trainable, 0), number_cell(base, 0), number_cell(share, 2)},
                 c.first().is_base() ? RowKind::reference : RowKind::own));
  }
  return t.rows.empty() ? Tables{} : Tables{t};
}

Tables efficiency_tables(const Study& study, const ReportOptions& options) {
  Table t{"efficiency",
          "Efficiency",
          "",
          {"trial", "train ms/token", "interval", "train tokens/s", "score tokens/s", "planned MiB",
           "measured MiB"},
          {}};
  std::string device;
  double together = 1;
  for (const Configuration& c : configurations(study)) {
    const StudyTrial& first = c.first();
    together = std::max(together, first.measured("trials_in_step").value_or(1));
    if (first.measurements.empty()) continue;
    if (device.empty()) device = first.device;
    const auto times = step_times(c);
    Cell middle("-"), interval("-");
    if (!times.empty()) {
      const MedianSummary m = summarise_median(times, options.certainty.confidence);
      middle = number_cell(m.median, 3);
      if (std::isfinite(m.interval.low)) {
        interval = Cell(fmt::format("[{:.3f}, {:.3f}]", m.interval.low, m.interval.high));
        interval.low = m.interval.low;
        interval.high = m.interval.high;
      }
    }
    const auto peak = peak_mib(c);
    t.rows.push_back(
        TableRow({c.label, middle, interval, number_cell(first.measured("train_tokens_per_s"), 0),
                  number_cell(first.measured("eval_tokens_per_s"), 0),
                  number_cell(first.measured("planned_peak_bytes"), 1, kMib), number_cell(peak, 1)},
                 first.is_base() ? RowKind::reference : RowKind::own));
  }
  t.caption = fmt::format(
      "On {}. Training: median over steps of wall time a token (the first steps left out), its "
      "{:.0f} % interval by order statistics, and all tokens over all seconds; peak bytes as "
      "planned before loading and as allocated. Scoring: tokens through the model over seconds.",
      device, 100 * options.certainty.confidence);
  if (together > 1)
    t.caption += fmt::format(
        " Up to {:.0f} trials trained in one step over one base: times are a token of any of them, "
        "bytes are of all together.",
        together);
  t.caption += setting_text(study);
  return t.rows.empty() ? Tables{} : Tables{t};
}

Tables memory_tables(const Study& study, const ReportOptions& options) {
  return trade_off(study, options, "accuracy-memory", "Accuracy (%) against memory", "peak MiB", 1,
                   "Memory: peak of training as allocated.", peak_mib);
}

Tables time_tables(const Study& study, const ReportOptions& options) {
  return trade_off(study, options, "accuracy-time", "Accuracy (%) against time", "train ms/token",
                   3, "Time: median over training steps.", ms_per_token);
}

}  // namespace mixlora
