#include "reports/latency.h"

#include <algorithm>

#include <fmt/format.h>

namespace mixlora {

LatencyComparison compare_latency(std::span<const double> first, std::span<const double> second,
                                  const Certainty& certainty, double margin) {
  LatencyComparison out;
  out.first = summarise_median(first, certainty.confidence);
  out.second = summarise_median(second, certainty.confidence);
  out.ratio = out.second.median / out.first.median;
  out.interval = bootstrap_ratio(first, second, certainty);
  out.p = mann_whitney(first, second).p;
  if (std::min(out.first.n, out.second.n) < kLatencySteps) return out;
  Certainty narrow = certainty;
  narrow.confidence = 1 - 2 * certainty.alpha;
  const Interval equivalence = bootstrap_ratio(first, second, narrow);
  if (equivalence.low > 1 / (1 + margin) && equivalence.high < 1 + margin)
    out.verdict = Verdict::same;
  else if (out.p < certainty.alpha)
    out.verdict = out.ratio < 1 ? Verdict::better : Verdict::worse;
  return out;
}

std::vector<std::string> latency_columns() {
  return {"trial",    "steps", "first ms/token", "second ms/token", "ratio",
          "interval", "p",     "verdict"};
}

TableRow latency_row(const std::string& label, const LatencyComparison& c) {
  Cell ratio(fmt::format("{:.3f}", c.ratio), c.ratio);
  ratio.low = c.interval.low;
  ratio.high = c.interval.high;
  return TableRow({label, fmt::format("{}, {}", c.first.n, c.second.n),
                   number_cell(c.first.median, 4), number_cell(c.second.median, 4), ratio,
                   fmt::format("[{:.3f}, {:.3f}]", c.interval.low, c.interval.high),
                   Cell(c.p < 0.0001 ? "<0.0001" : fmt::format("{:.4f}", c.p), c.p),
                   name_of(c.verdict)});
}

std::string latency_caption(const Certainty& certainty, double margin) {
  return fmt::format(
      "Medians over training steps, the first left out. Ratio: second over first with its {:.0f} % "
      "bootstrap interval ({} resamples, seed {}). p: Mann-Whitney. same: the {:.0f} % interval of "
      "the ratio lies within {:.0f} % of 1; better (faster), worse: p below {}. Steps of one run "
      "share the machine's state: a difference below what two runs of one trial show is no "
      "finding.",
      100 * certainty.confidence, certainty.resamples, certainty.seed,
      100 * (1 - 2 * certainty.alpha), 100 * margin, certainty.alpha);
}

}  // namespace mixlora
