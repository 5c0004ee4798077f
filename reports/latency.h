// Latency: step times of two configurations compared.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "reports/statistics.h"
#include "reports/table.h"

namespace mixlora {

struct LatencyComparison {
  MedianSummary first, second;                 // ms a token
  double ratio = 1;                            // second / first
  Interval interval;                           // of the ratio, bootstrap
  double p = 1;                                // Mann-Whitney
  Verdict verdict = Verdict::not_enough_data;  // better: the second is faster
};
/// same: the (1 - 2 alpha) interval of the ratio lies within 1 / (1 + margin) ... 1 + margin;
/// better, worse: p below alpha. Below nine steps a side there is not enough data, as for Google
/// Benchmark's U test.
LatencyComparison compare_latency(std::span<const double> first, std::span<const double> second,
                                  const Certainty& certainty, double margin);
inline constexpr std::int64_t kLatencySteps = 9;
inline constexpr double kLatencyMargin = 0.05;

std::vector<std::string> latency_columns();
TableRow latency_row(const std::string& label, const LatencyComparison& c);
std::string latency_caption(const Certainty& certainty, double margin);

}  // namespace mixlora
