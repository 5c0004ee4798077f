#include "experiments/commands/workload.h"

#include <sstream>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "engine/batch.h"
#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/specs_json.h"
#include "engine/tokenizer.h"
#include "experiments/plan.h"
#include "kernels/random.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

/// "8x512": so many sequences of so many random tokens a step.
Workload random_workload(const WorkloadOptions& o, const ModelConfig& config, std::int64_t rows) {
  Workload w;
  std::int64_t count = 0, length = 0;
  char cross = 0;
  std::istringstream text(o.shape);
  text >> count >> cross >> length;
  require(text && text.eof() && cross == 'x' && count > 0 && length > 1,
          "--shape \"{}\": expected SEQUENCESxTOKENS such as 8x512", o.shape);
  w.name = o.shape + " random";
  w.job.train.batch_size = count;
  w.job.train.cutoff_len = length;
  const RandomKey key = random_key(1, Purpose::test);
  const auto draw = [&](std::int64_t i, std::int64_t j) {
    return static_cast<std::int32_t>(
        philox(static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(j), 0, 0, key.k0, key.k1)
            .v[0] %
        static_cast<std::uint32_t>(config.vocab));
  };
  for (std::int64_t i = 0; i < count; ++i) {
    TrainItem item;
    for (std::int64_t j = 0; j < length; ++j) item.tokens.push_back(draw(i, j));
    w.job.items.push_back(std::move(item));
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    LabelRequest r;
    for (std::int64_t j = 0; j < length; ++j) r.prompt.push_back(draw(i, j));
    for (std::int32_t label = 0; label < 4; ++label) r.labels.push_back(label);
    w.requests.push_back(std::move(r));
  }
  return w;
}

/// A suite's own rows, by `tokenizer`; ids past a shape's vocabulary wrap around.
Workload real_workload(const WorkloadOptions& o, const ModelConfig& config, std::int64_t rows) {
  Workload w;
  const std::string source = o.tokenizer.empty() ? o.model : o.tokenizer;
  require(!source.starts_with("shape:"),
          "\"{}\" has no tokenizer: name one with --tokenizer, or random tokens with --shape 8x512",
          source);
  const Tokenizer tokenizer(source);
  TrialSpec trial;
  trial.train.tasks = {o.task};
  w.name = fmt::format("{} questions of {}", o.batch_size, o.task);
  if (!o.tokenizer.empty()) w.name += fmt::format(" cut by {}", o.tokenizer);
  w.job.items = Texts(&tokenizer).training(trial);
  w.job.train.batch_size = o.batch_size;
  const Task task = find_task(o.task);
  LabelRequests maker(task, tokenizer, {}, w.job.train.cutoff_len);
  if (rows > 0)
    for (const Row& row : load_split(task, false, rows).rows)
      w.requests.push_back(maker.request(row));
  const auto wrap = [&](std::vector<std::int32_t>& ids) {
    for (auto& id : ids) id %= static_cast<std::int32_t>(config.vocab);
  };
  for (TrainItem& item : w.job.items) wrap(item.tokens);
  for (LabelRequest& r : w.requests) wrap(r.prompt), wrap(r.labels);
  return w;
}

}  // namespace

void add_workload_options(CLI::App& command, WorkloadOptions& o) {
  command.add_option("--model", o.model, "Hugging Face directory, or shape:llama-2-7b");
  command.add_option("--tokenizer", o.tokenizer,
                     "directory whose tokenizer reads the task; --model's");
  command.add_option("--shape", o.shape,
                     "random tokens instead of a task: 8x512, sequences by tokens");
  command.add_option("--task", o.task, "suite whose rows are trained and scored");
  command.add_option("--batch-size", o.batch_size, "questions a step")->check(CLI::PositiveNumber);
  command.add_option("--rank", o.rank, "r of every adapter, lora_alpha twice as much")
      ->check(CLI::PositiveNumber);
  command.add_option("--adapter", o.adapter,
                     "further fields of every adapter: {\"top_k\": 1, \"lora_dropout\": 0}");
}

Workload make_workload(const WorkloadOptions& o, const ModelConfig& config, std::int64_t steps,
                       std::int64_t rows) {
  Workload w = o.shape.empty() ? real_workload(o, config, rows) : random_workload(o, config, rows);
  if (!o.adapter.empty()) w.name += ", adapter " + o.adapter;
  w.job.train.max_steps = steps;
  w.job.train.num_epochs = static_cast<double>(steps);  // an epoch has a step at least
  const SampleOrder order(w.job.train, w.job.items);
  w.steps = order.steps();
  for (std::int64_t s = 0; s < order.steps(); ++s)
    for (const auto& micro : order.micro_batches(s))
      for (auto i : micro) {
        const TrainItem& item = w.job.items[static_cast<std::size_t>(i)];
        w.tokens += static_cast<double>(item.tokens.size()) / static_cast<double>(w.steps);
        w.labels += static_cast<double>(label_count(item, w.job.train.train_on)) /
                    static_cast<double>(w.steps);
      }
  return w;
}

std::vector<TrainJob> jobs_of(const std::string& methods, const TrainJob& job,
                              const WorkloadOptions& o) {
  Json fields{{"r", o.rank}, {"lora_alpha", 2 * o.rank}};
  if (!o.adapter.empty()) {
    const Json own = parse_json(o.adapter, "--adapter");
    require(own.is_object() && !own.contains("method"),
            "--adapter: {}; expected a JSON object of an adapter's fields but its method, such as "
            "{{\"top_k\": 1}}",
            o.adapter);
    fields.update(own);
  }
  std::vector<TrainJob> jobs;
  std::istringstream names(methods);
  for (std::string name; std::getline(names, name, '+');) {
    TrainJob j = job;
    Json adapter = fields;
    adapter["method"] = name;
    read(adapter, j.adapter, o.adapter.empty() ? "--methods" : "--methods " + name + ", --adapter");
    j.train.seed += jobs.size();
    jobs.push_back(std::move(j));
  }
  require(!jobs.empty(), "--methods: an empty name; expected lora, dora, mixlora, mixdora or base");
  return jobs;
}

}  // namespace mixlora
