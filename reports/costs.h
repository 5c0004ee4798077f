// Costs: what a configuration took, and which are worth it.
#pragma once
#include <optional>
#include <vector>

#include "reports/study.h"

namespace mixlora {

/// Wall milliseconds a token of every training step but the first few, all seeds together.
std::vector<double> step_times(const Configuration& c);
std::optional<double> peak_mib(const Configuration& c);      // the highest seed's
std::optional<double> ms_per_token(const Configuration& c);  // median of step_times

struct TradeOff {
  Configuration configuration;
  TwoLevel level;  // mean over its suites
  double cost = 0;
  std::size_t suites = 0;
  std::string asked;      // its suites
  bool frontier = false;  // none of the same suites is cheaper and as accurate, or the reverse
};
/// Configurations with a cost and the most suites any of them has.
std::vector<TradeOff> trade_offs(const Study& study, const Variant& v, double confidence,
                                 std::optional<double> (*cost)(const Configuration&));

}  // namespace mixlora
