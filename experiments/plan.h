// Plan: what a run would do with each trial, and why; nothing is loaded or allocated for it.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/model_config.h"
#include "engine/tokenizer.h"
#include "engine/train.h"
#include "experiments/store/store.h"
#include "experiments/sweep.h"

namespace mixlora {

/// The tokens of what trials learn and are asked; each data set is read and cut up once. Without a
/// tokenizer (a shape), four bytes count as a token.
class Texts {
 public:
  explicit Texts(const Tokenizer* tokenizer) : tokenizer_(tokenizer) {}
  /// All its tasks' train splits, one after the other.
  const std::vector<TrainItem>& training(const TrialSpec& spec);
  /// Prompt tokens of all its suites' test splits.
  std::int64_t scored_tokens(const TrialSpec& spec);

 private:
  const Tokenizer* tokenizer_;
  std::map<std::string, std::vector<TrainItem>> items_;
  std::map<std::string, std::int64_t> scored_;
};

struct TrialPlan {
  bool runs = false, fits = true;
  std::string state, why;
  std::int64_t samples = 0, steps = 0, train_tokens = 0, scored_tokens = 0;  // tokens: all epochs
  std::size_t peak_bytes = 0;                                                // at `recompute`
  Recompute recompute = Recompute::none;
};

/// Trials that train in one step over one base; most are alone.
struct PackPlan {
  std::vector<std::size_t> trials;  // places in the sweep
  std::size_t peak_bytes = 0;
};

struct Plan {
  std::vector<TrialPlan> trials;  // as in the sweep
  std::vector<PackPlan> packs;    // in the order they run; what does not run is in none
  std::size_t memory_limit = 0;   // bytes; 0: unknown, what the device has
  std::string memory_source;      // "run.memory_limit_gib" or "free memory"
};

struct PlanOptions {
  std::function<TrialState(const std::string& key)> state;  // of the store
  bool retry_failed = false;
  bool size_all = true;  // also of trials that do not run
};

/// Keys must be set. `ops` gives types and sizes only.
Plan make_plan(const Sweep& sweep, const ModelConfig& model, Backend& ops, Texts& texts,
               const PlanOptions& options);

}  // namespace mixlora
