// Gate: a study held against a baseline: accuracy, latency, memory, missing trials.
#pragma once
#include <string>
#include <vector>

#include "reports/baseline.h"
#include "reports/table.h"

namespace mixlora {

struct GateOptions {
  Certainty certainty;
  // A step time regresses when the medians' ratio passes this and Mann-Whitney's p is below
  // latency_alpha, as asv decides; 0: not checked.
  double latency_ratio = 1.25;
  double latency_alpha = 0.002;
  double memory_ratio = 1.02;  // 0: not checked
};

enum class Outcome : std::uint8_t { passed, failed, skipped };
struct Check {
  std::string trial, what;  // what: "finished", "accuracy ARC-e", "latency", "memory", "spec"
  Outcome outcome = Outcome::passed;
  std::string message;
};
struct GateResult {
  std::string sweep;
  std::vector<Check> checks;
  std::int64_t count(Outcome o) const;
  bool passed() const { return count(Outcome::failed) == 0; }
};

/// Trials meet by label, so that a changed spec is held against what it was; the change is named.
/// Accuracy fails when McNemar's p, corrected by Holm over all accuracy checks, is below alpha and
/// the drop passes the margin. Times and bytes are held against each other on one device only,
/// times on one kind of processor only.
GateResult run_gate(const Baseline& baseline, const Study& study, const GateOptions& options);

Table gate_table(const GateResult& result, bool only_notable);
std::string gate_junit(const GateResult& result);
std::string gate_summary(const GateResult& result);  // Markdown

}  // namespace mixlora
