// Learning curves and the other pictures of a study.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

#include <fmt/format.h>

#include "reports/costs.h"
#include "reports/report.h"

namespace mixlora {
namespace {

/// The mean of finite losses around a place of the run, 0 ... 1: a twentieth of the steps.
std::optional<double> loss_at(const StudyTrial& t, double place) {
  const auto n = static_cast<std::int64_t>(t.steps.size());
  if (n == 0) return std::nullopt;
  const std::int64_t width = std::max<std::int64_t>(1, n / 20);
  const auto begin =
      static_cast<std::int64_t>(std::llround(place * static_cast<double>(n - width)));
  double sum = 0;
  for (std::int64_t i = begin; i < begin + width; ++i) {
    const auto& loss = t.steps[static_cast<std::size_t>(i)].loss;
    if (!loss) return std::nullopt;
    sum += *loss;
  }
  return sum / static_cast<double>(width);
}
/// Mean over the seeds that have one.
std::optional<double> loss_at(const Configuration& c, double place) {
  double sum = 0;
  int n = 0;
  for (const StudyTrial* t : c.trials)
    if (const auto loss = loss_at(*t, place)) {
      sum += *loss;
      ++n;
    }
  return n == 0 ? std::nullopt : std::optional(sum / n);
}

/// A configuration's method: its place in the study is the colour.
struct Hue {
  int colour = 0;
  std::string method;
};
Hue hue_of(const std::vector<Kin>& methods, const std::string& label) {
  for (std::size_t i = 0; i < methods.size(); ++i)
    for (const Configuration* c : methods[i].members)
      if (c->label == label) return {static_cast<int>(i) + 1, methods[i].label};
  return {};
}

Chart learning_chart(const std::vector<Configuration>& all, const std::vector<Kin>& methods) {
  constexpr int kPlaces = 60;
  Chart chart{"learning-curves", "Learning curves",
              "Training loss (nats a token), mean over seeds and a twentieth of the steps.",
              "share of the run (%)", "loss"};
  for (const Configuration& c : all) {
    const Hue hue = hue_of(methods, c.label);
    Series s{c.label, {}, hue.colour, hue.method};
    for (int i = 0; i <= kPlaces; ++i) {
      const double place = static_cast<double>(i) / kPlaces;
      if (const auto loss = loss_at(c, place)) s.points.push_back({100 * place, *loss, 0, 0, ""});
    }
    if (!s.points.empty()) chart.series.push_back(std::move(s));
  }
  return chart;
}

Chart trade_off_chart(const char* name, const char* title, const char* x_label,
                      const std::vector<Kin>& methods, const std::vector<TradeOff>& all) {
  Chart chart{name,
              title,
              "Mean over suites with its interval; lower left to upper right is what "
              "more cost buys.",
              x_label,
              "accuracy (%)",
              ChartForm::points};
  for (const TradeOff& t : all) {
    const Hue hue = hue_of(methods, t.configuration.label);
    chart.series.push_back({t.configuration.label,
                            {{t.cost, 100 * t.level.mean, 100 * t.level.interval.low,
                              100 * t.level.interval.high, t.configuration.label}},
                            hue.colour,
                            hue.method});
  }
  return chart;
}

/// Mean accuracy of each configuration with its interval, one row each; under a suite that each
/// method was asked once, a row goes by its method.
Chart accuracy_chart(const Study& study, const std::vector<Kin>& methods, const Variant& v,
                     double confidence) {
  Chart chart{"accuracy", "Accuracy with intervals", "", "accuracy (%)", "", ChartForm::ranges};
  const auto suites = suites_of(study);
  const auto all = configurations(study);
  for (const auto& suite : suites) {
    Series s{column_of(suite), {}};
    std::set<std::string> seen;
    bool once = true;
    for (const Configuration& c : all)
      if (const auto score = summarise(c, suite, v, confidence)) {
        const Hue hue = hue_of(methods, c.label);
        once = seen.insert(hue.method).second && once;
        s.points.push_back({100 * score->level.mean, 0, 100 * score->interval.low,
                            100 * score->interval.high, c.label, hue.colour});
      }
    if (once)
      for (Point& p : s.points) p.label = hue_of(methods, p.label).method;
    if (!s.points.empty()) chart.series.push_back(std::move(s));
  }
  chart.caption =
      fmt::format("{:.0f} % interval: Wilson's for one seed, over questions and seeds for more.",
                  100 * confidence);
  return chart;
}

Chart load_chart(const Configuration& c) {
  Chart chart{"expert-load",
              "Expert load: " + c.label,
              "Share of router choices in training, by layer; the fuller the colour, the more.",
              "expert",
              "layer",
              ChartForm::heat};
  std::map<std::pair<std::int64_t, std::int64_t>, std::pair<double, int>> cells;
  for (const StudyTrial* t : c.trials)
    for (const StudyLoad& l : t->loads) {
      auto& [sum, n] = cells[{l.layer, l.expert}];
      sum += l.share;
      ++n;
    }
  Series s;
  for (const auto& [at, value] : cells)
    s.points.push_back({static_cast<double>(at.second), static_cast<double>(at.first),
                        100 * value.first / value.second, 0, ""});
  chart.series.push_back(std::move(s));
  return chart;
}

}  // namespace

Tables curve_tables(const Study& study, const ReportOptions& /*options*/) {
  constexpr std::array<double, 6> kPlaces{0, 0.1, 0.25, 0.5, 0.75, 1};
  Table t{"learning-curves",
          "Learning curves",
          "Training loss (nats a token) around these shares of the run: the mean over a twentieth "
          "of the steps, and over seeds. Router entropy in nats: the mean over the last tenth." +
              setting_text(study),
          {"trial", "steps"},
          {}};
  for (const double p : kPlaces) t.columns.push_back(fmt::format("{:.0f} %", 100 * p));
  t.columns.emplace_back("router entropy");
  for (const Configuration& c : configurations(study)) {
    const auto& steps = c.first().steps;
    if (steps.empty()) continue;
    TableRow row({c.label, number_cell(static_cast<double>(steps.size()), 0)});
    for (const double p : kPlaces) row.cells.push_back(number_cell(loss_at(c, p), 4));
    const std::size_t tail = std::max<std::size_t>(1, steps.size() / 10);
    double entropy = 0;
    for (std::size_t i = steps.size() - tail; i < steps.size(); ++i)
      entropy += steps[i].entropy / static_cast<double>(tail);
    row.cells.push_back(c.first().loads.empty() ? Cell("-") : number_cell(entropy, 3));
    t.rows.push_back(std::move(row));
  }
  return t.rows.empty() ? Tables{} : Tables{t};
}

std::vector<Chart> build_charts(const Study& study, const ReportOptions& options) {
  std::vector<Chart> out;
  const auto all = configurations(study);
  const auto methods = kin_of(study, all);
  const auto confidence = options.certainty.confidence;
  if (const auto v = variants(study); !v.empty()) {
    out.push_back(accuracy_chart(study, methods, v.front(), confidence));
    for (const auto& [name, title, x, cost] :
         {std::tuple{"accuracy-memory", "Accuracy against memory", "peak MiB", &peak_mib},
          std::tuple{"accuracy-time", "Accuracy against time", "training ms a token",
                     &ms_per_token}})
      if (const auto points = trade_offs(study, v.front(), confidence, cost); points.size() > 1)
        out.push_back(trade_off_chart(name, title, x, methods, points));
  }
  if (Chart c = learning_chart(all, methods); !c.series.empty()) out.push_back(std::move(c));
  for (const Configuration& c : all)
    if (!c.first().loads.empty()) out.push_back(load_chart(c));
  return out;
}

}  // namespace mixlora
