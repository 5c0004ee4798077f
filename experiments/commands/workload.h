// Workload: what `bench` and `profile` train and score: random tokens of one shape, or a suite's
// rows.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/model_config.h"
#include "engine/score.h"
#include "engine/train.h"

namespace CLI {
class App;
}

namespace mixlora {

struct WorkloadOptions {
  std::string model = "models/smollm2-135m", tokenizer, task = "arc-e", shape;
  std::int64_t batch_size = 16, rank = 16;
  std::string adapter;  // a JSON object: fields of an adapter, as sweeps have them
};
/// Adds the options of this struct to a command.
void add_workload_options(CLI::App& command, WorkloadOptions& o);

/// A job without its adapter: `steps` steps of training, and `rows` requests to score.
struct Workload {
  std::string name;
  TrainJob job;
  std::vector<LabelRequest> requests;
  double tokens = 0, labels = 0;  // of a mean step
  std::int64_t steps = 0;
};
/// By --shape when there is one, else by --task. Throws InputError.
Workload make_workload(const WorkloadOptions& o, const ModelConfig& config, std::int64_t steps,
                       std::int64_t rows);

/// "mixlora", or "mixlora+lora" for adapters that train in one step: their jobs, of unlike seeds.
/// Throws InputError.
std::vector<TrainJob> jobs_of(const std::string& methods, const TrainJob& job,
                              const WorkloadOptions& o);

}  // namespace mixlora
