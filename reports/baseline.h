// Baseline: what a study measured, in one JSON file that a repository can keep: every question's
// outcome, step times, peak bytes.
#pragma once
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "reports/study.h"

namespace mixlora {

struct BaselineScore {
  std::string suite, protocol, metric, bits;
  double value = 0;
  std::int64_t n = 0;
  std::vector<double> right;  // 1 or 0 by item; empty: not kept
};
struct BaselineTrial {
  std::string label, device, processor;
  Json spec;
  std::vector<BaselineScore> scores;
  std::vector<double> ms_per_token;  // at most kBaselineSteps, spread evenly over the run
  std::optional<double> peak_bytes;
};
struct Baseline {
  std::string sweep;
  std::map<std::string, std::vector<std::string>>
      items;  // by "suite/protocol": the questions' names
  std::vector<BaselineTrial> trials;
};
inline constexpr std::size_t kBaselineSteps = 200;

/// Throws InputError when a trial is not done or two trials' questions of one suite differ.
Baseline baseline_of(const Study& study);
Baseline read_baseline(const std::filesystem::path& file);
void write_baseline(const Baseline& baseline, const std::filesystem::path& file);

}  // namespace mixlora
