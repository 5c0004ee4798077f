// Training: several adapters, each with its own data and optimizer, over one frozen model.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/adapter.h"
#include "engine/specs.h"

namespace mixlora {

class Model;

/// One training text. Tokens from `answer_begin` on are the answer (train_on "answer" learns only
/// these).
struct TrainItem {
  std::vector<std::int32_t> tokens;
  std::int32_t answer_begin = 0;
};

/// One adapter's work.
struct TrainJob {
  AdapterSpec adapter;
  TrainSpec train;
  std::vector<TrainItem> items;
};

/// What one optimizer step of one job did.
struct StepRecord {
  std::int64_t job = 0, step = 0, steps = 0;  // step counts from 1
  double epoch = 0;
  double loss = 0;      // mean over the trained tokens of the batch, nats
  double aux_loss = 0;  // router losses, as added to the objective
  double lr = 0;
  double grad_norm = 0;  // before clipping
  double entropy = 0;    // mean router entropy, nats; 0 without a router
  std::int64_t tokens = 0;
  double ms = 0;  // wall time of the step (all jobs in it)
};
/// Share of router choices each expert got, by layer.
struct ExpertLoad {
  std::int64_t layer = 0, expert = 0;
  double share = 0;
};

/// Everything that training changes, between two steps: what it can go on from, to the bit.
struct TrainState {
  struct Job {
    std::vector<float> values, moment1, moment2;  // flat
    std::vector<double> expert_counts;            // (L, E): router choices so far
  };
  Recompute recompute = Recompute::none;
  std::int64_t step = 0;  // steps done
  std::vector<Job> jobs;
};

struct TrainObserver {
  std::function<void(const StepRecord&)> on_step;
  std::function<bool()> stop;  // asked between steps; true ends training early with Interrupted
  /// Asked behind each step; true, or a stop, hands the state to on_state.
  std::function<bool()> wants_state;
  std::function<void(const TrainState&)> on_state;
};

/// Training was asked to stop between two steps.
struct Interrupted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct TrainOptions {
  std::size_t memory_limit = 0;  // bytes; 0: what the device has
  Recompute recompute = Recompute::automatic;
  const TrainState* resume = nullptr;  // of the same jobs; `recompute` is then its own
};

struct TrainResult {
  std::vector<std::unique_ptr<Adapter>> adapters;    // one a job
  std::vector<std::vector<ExpertLoad>> expert_load;  // one a job, mean over training
  Recompute recompute = Recompute::none;             // what was used
  std::size_t planned_bytes = 0,
              measured_bytes = 0;  // peak of the device (CPU: of the engine's own blocks)
};

/// Trains all jobs together, one optimizer step of each in one pass over the model. A job that has
/// fewer steps ends earlier. `initial`
/// gives some or all jobs their starting adapter (null: a fresh one). Throws OutOfMemory when no
/// recompute level fits memory_limit.
TrainResult train(Backend& ops, const Model& model, const std::vector<TrainJob>& jobs,
                  const TrainOptions& options, const TrainObserver& observer,
                  std::vector<std::unique_ptr<Adapter>> initial = {});

/// Bytes that training these jobs takes at `level`, frozen model included; nothing is loaded or
/// allocated. `ops` gives types and sizes only.
std::size_t planned_training_bytes(Backend& ops, const ModelConfig& model,
                                   const std::vector<TrainJob>& jobs, Recompute level);

/// Optimizer steps a job takes.
std::int64_t step_count(const TrainSpec& spec, std::int64_t items);
/// The learning rate of step `step` (from 1) of `steps`: warm-up, then the schedule
/// (Hugging Face transformers' get_scheduler semantics).
double learning_rate(const TrainSpec& spec, std::int64_t step, std::int64_t steps);

}  // namespace mixlora
