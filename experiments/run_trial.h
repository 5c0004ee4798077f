// One trial for real: train its adapter, alone or with others in one step, ask its suites, write
// every row as it happens.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/adapter.h"
#include "engine/model.h"
#include "engine/tokenizer.h"
#include "experiments/plan.h"
#include "experiments/store/store.h"

namespace mixlora {

/// What trials of one sweep share: the device, the loaded model, its tokenizer.
struct Workbench {
  Backend& ops;
  const Model& model;
  const Tokenizer* tokenizer;  // null for a shape
  std::string model_source;
  std::filesystem::path adapters;  // where trained adapters go; empty: nowhere
  std::filesystem::path states;    // where unfinished trainings are saved; empty: nowhere
};

/// A trial that runs, under its attempt's rows.
struct RunningTrial {
  const Trial* trial;
  std::int64_t attempt;
};

/// What training a pack took, all its trials together.
struct TrainSummary {
  std::int64_t steps = 0, tokens = 0;
  double seconds = 0;
  std::size_t peak_bytes = 0;
  Recompute recompute = Recompute::none;
};

struct TrialObserver {
  std::function<void(const StepRecord&)> on_step;  // `job` is the place in the pack
  std::function<void(const TrainSummary&)> on_trained;
  std::function<void(const Trial&, const std::string& suite, std::size_t asked, std::size_t of)>
      on_asked;
  std::function<void(const Trial&, const Evaluation&)> on_score;
  std::function<void(const std::string&)> on_note;  // what a user should know and nothing fails by
  std::function<bool()> stop;  // asked between steps and between batches of questions
};

/// Where a pack's unfinished training is saved; empty when nowhere.
std::filesystem::path state_file(const Workbench& bench, std::span<const RunningTrial> pack);
/// Trains the adapters of `pack` (none of method base) in one step over one base, from where a
/// saved training of them ended; throws what went wrong. Rows of each attempt are written on the
/// way. The saved state stays: scoring may be killed too.
std::vector<std::unique_ptr<Adapter>> train_pack(const Workbench& bench,
                                                 std::span<const RunningTrial> pack,
                                                 const RunSpec& run, Texts& texts, Store& store,
                                                 const TrialObserver& observer);
/// Tokens of one scoring pass on a device.
std::int64_t scoring_pass_tokens(const Backend& ops);
/// Asks a trial's suites of the model with `adapter`, or without when that is null.
void score_trial(const Workbench& bench, const RunningTrial& running, const Adapter* adapter,
                 Store& store, const TrialObserver& observer);

}  // namespace mixlora
