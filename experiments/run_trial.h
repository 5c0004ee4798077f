// One trial for real: train its adapter, ask its suites, write every row as it happens.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "engine/model.h"
#include "engine/tokenizer.h"
#include "experiments/store/store.h"

namespace mixlora {

/// What trials of one sweep share: the device, the loaded model, its tokenizer.
struct Workbench {
  Backend& ops;
  const Model& model;
  const Tokenizer* tokenizer;  // null for a shape
  std::string model_source;
  std::filesystem::path adapters;  // where trained adapters go; empty: nowhere
};

struct TrialObserver {
  std::function<void(const StepRecord&)> on_step;
  std::function<void(const Evaluation&)> on_score;
  std::function<bool()> stop;
};

/// Throws what went wrong; the caller records it. Rows of `attempt` are written on the way.
void run_trial(const Workbench& bench, const Trial& trial, const RunSpec& run, Store& store,
               std::int64_t attempt, const TrialObserver& observer);

/// The texts a trial learns from, as tokens: all its tasks' train splits, concatenated.
std::vector<TrainItem> training_items(const TrialSpec& spec, const Tokenizer& tokenizer);

}  // namespace mixlora
