#include "engine/train.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <new>

#include "engine/adapter.h"
#include "engine/batch.h"
#include "engine/device_adapter.h"
#include "engine/error.h"
#include "engine/model.h"
#include "engine/pass.h"
#include "engine/plan_backend.h"
#include "kernels/trace.h"

namespace mixlora {
namespace {

constexpr std::int64_t kStepNumbers = 8;  // of StepNumbers

/// Jobs' next micro-batches, end to end. `micro` counts within the step.
struct MicroBatch {
  HostBatch batch;
  std::vector<float> aux_factors;  // by part
};

std::int64_t labels_of(const TrainJob& job,
                       const std::vector<std::vector<std::int64_t>>& micro_batches) {
  std::int64_t n = 0;
  for (const auto& micro : micro_batches)
    for (auto i : micro)
      n += label_count(job.items[static_cast<std::size_t>(i)], job.train.train_on);
  return n;
}
std::int64_t tokens_of(const TrainJob& job, const std::vector<std::int64_t>& samples) {
  std::int64_t n = 0;
  for (auto i : samples)
    n += static_cast<std::int64_t>(job.items[static_cast<std::size_t>(i)].tokens.size());
  return n;
}

MicroBatch make_micro_batch(const std::vector<TrainJob>& jobs,
                            const std::vector<SampleOrder>& orders, std::int64_t step,
                            std::size_t micro) {
  MicroBatch out;
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    if (step >= orders[j].steps()) continue;
    const auto& micros = orders[j].micro_batches(step);
    if (micro >= micros.size()) continue;
    // The loss is the mean over all trained tokens of the whole batch, however it is cut.
    const std::int64_t labels = labels_of(jobs[j], micros);
    std::int64_t tokens = 0;
    for (const auto& m : micros) tokens += tokens_of(jobs[j], m);
    out.batch.begin_part(j);
    for (auto i : micros[micro])
      add_item(out.batch, jobs[j].items[static_cast<std::size_t>(i)], i, step,
               jobs[j].train.train_on, labels > 0 ? 1.0F / static_cast<float>(labels) : 0.0F);
    out.batch.end_part();
    out.aux_factors.push_back(static_cast<float>(tokens_of(jobs[j], micros[micro])) /
                              static_cast<float>(tokens));
  }
  return out;
}

/// A batch as large as any step's micro-batch can be, for planning: every job at its own largest.
HostBatch largest_batch(const std::vector<TrainJob>& jobs, const std::vector<SampleOrder>& orders) {
  HostBatch b;
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    std::int64_t rows = 0, sequences = 0, labels = 0, longest = 1;
    for (std::int64_t s = 0; s < orders[j].steps(); ++s) {
      for (const auto& micro : orders[j].micro_batches(s)) {
        rows = std::max(rows, tokens_of(jobs[j], micro));
        sequences = std::max(sequences, static_cast<std::int64_t>(micro.size()));
        labels = std::max(labels, labels_of(jobs[j], {micro}));
      }
    }
    for (const auto& item : jobs[j].items)
      longest = std::max(longest, static_cast<std::int64_t>(item.tokens.size()));
    b.begin_part(j);
    const auto first =
        b.add_sequence(std::vector<std::int32_t>(static_cast<std::size_t>(rows)), 0, 0);
    for (std::int64_t i = 1; i < sequences; ++i) b.add_sequence({}, 0, 0);
    for (std::int64_t i = 0; i < labels; ++i)
      b.add_label(first + static_cast<std::int32_t>(i % rows), 0, 0);
    b.end_part();
    b.max_length = std::max(b.max_length, longest);
  }
  return b;
}

std::array<float, kStepNumbers> step_numbers(const TrainSpec& t, double lr, std::int64_t step) {
  const auto clip = static_cast<float>(t.max_grad_norm);
  const auto decay = static_cast<float>(t.weight_decay);
  if (t.optim == Optim::sgd)
    return {static_cast<float>(lr), decay, static_cast<float>(t.momentum), 0, 0, 0, 0, clip};
  constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
  const auto n = static_cast<double>(step);
  return {static_cast<float>(lr),
          decay,
          static_cast<float>(kBeta1),
          static_cast<float>(kBeta2),
          1e-8F,
          static_cast<float>(1 - std::pow(kBeta1, n)),
          static_cast<float>(1 - std::pow(kBeta2, n)),
          clip};
}

/// Sums of router statistics over training, for the expert load.
struct LoadCounter {
  std::vector<double> counts;  // (L, E)
  void add(const std::vector<float>& stats, std::int64_t layers, std::int64_t experts) {
    counts.resize(static_cast<std::size_t>(layers * experts));
    for (std::int64_t l = 0; l < layers; ++l)
      for (std::int64_t e = 0; e < experts; ++e)
        counts[static_cast<std::size_t>(l * experts + e)] +=
            static_cast<double>(stats[static_cast<std::size_t>(l * (2 * experts + 2) + e)]);
  }
  std::vector<ExpertLoad> shares(std::int64_t experts) const {
    std::vector<ExpertLoad> out;
    if (counts.empty()) return out;
    for (std::size_t at = 0; at < counts.size(); at += static_cast<std::size_t>(experts)) {
      double total = 0;
      for (std::int64_t e = 0; e < experts; ++e) total += counts[at + static_cast<std::size_t>(e)];
      for (std::int64_t e = 0; e < experts; ++e)
        out.push_back({static_cast<std::int64_t>(at) / experts, e,
                       total > 0 ? counts[at + static_cast<std::size_t>(e)] / total : 0});
    }
    return out;
  }
};

void check_jobs(const ModelConfig& model, const std::vector<TrainJob>& jobs) {
  for (const TrainJob& job : jobs) {
    require(!job.items.empty(), "train: no samples to learn from");
    for (std::size_t i = 0; i < job.items.size(); ++i) {
      const auto& tokens = job.items[i].tokens;
      require(!tokens.empty() && static_cast<std::int64_t>(tokens.size()) <= model.max_positions,
              "train: sample {} has {} tokens; expected 1 to {}", i, tokens.size(),
              model.max_positions);
      for (auto t : tokens)
        require(t >= 0 && t < model.vocab, "train: sample {} has token {}; the vocabulary has {}",
                i, t, model.vocab);
    }
  }
}

std::vector<SampleOrder> orders_of(const std::vector<TrainJob>& jobs) {
  std::vector<SampleOrder> orders;
  orders.reserve(jobs.size());
  for (const TrainJob& job : jobs) orders.emplace_back(job.train, job.items);
  return orders;
}

/// When a job's numbers are updated at a recompute level. By layer saves all layers' gradients but
/// one, and is as exact where nothing needs them together.
DeviceAdapter::Update update_of(const TrainSpec& t, Recompute level) {
  const bool one_pass = t.micro_batch_size == 0 || t.micro_batch_size >= t.batch_size;
  return level != Recompute::none && one_pass && t.max_grad_norm == 0
             ? DeviceAdapter::Update::by_layer
             : DeviceAdapter::Update::after_backward;
}

/// The jobs' adapters on a device, with the numbers of their steps.
struct DeviceJobs {
  DeviceJobs(Backend& ops, const ModelConfig& model, const std::vector<TrainJob>& jobs,
             Recompute level)
      : arena("step numbers"), numbers(jobs.size()) {
    for (std::size_t j = 0; j < jobs.size(); ++j) {
      const TrainSpec& t = jobs[j].train;
      adapters.push_back(std::make_unique<DeviceAdapter>(ops, model, jobs[j].adapter, t.seed,
                                                         update_of(t, level)));
      pointers.push_back(adapters.back().get());
      for (Tensor& n : numbers[j]) arena.declare("numbers", n, {kStepNumbers}, DType::f32);
    }
    arena.commit(ops);
  }
  DeviceJobs(const DeviceJobs&) = delete;
  DeviceJobs& operator=(const DeviceJobs&) = delete;
  std::size_t bytes() const {
    std::size_t n = arena.bytes();
    for (const auto& a : adapters) n += a->bytes();
    return n;
  }

  Arena arena;
  std::vector<std::array<Tensor, 2>> numbers;  // by job: slow, fast
  std::vector<std::unique_ptr<DeviceAdapter>> adapters;
  std::vector<DeviceAdapter*> pointers;
};

/// One run of training: adapters on the device, the pass, the step numbers.
class Training {
 public:
  Training(Backend& ops, const Model& model, const std::vector<TrainJob>& jobs)
      : ops_(ops),
        model_(model),
        jobs_(jobs),
        orders_(orders_of(jobs)),
        largest_(largest_batch(jobs, orders_)) {}
  std::size_t planned_bytes(Recompute level) const {
    PlanBackend plan(ops_);
    const DeviceJobs on_plan(plan, model_.config, jobs_, level);
    return model_.bytes() + on_plan.bytes() + ops_.workspace_bytes() +
           Pass::planned_bytes(ops_, model_, on_plan.pointers, largest_, true, level);
  }
  /// Throws std::bad_alloc, and then holds nothing.
  void take_memory(Recompute level) {
    auto on_device = std::make_unique<DeviceJobs>(ops_, model_.config, jobs_, level);
    pass_ = std::make_unique<Pass>(ops_, model_, on_device->pointers, largest_, true, level);
    device_ = std::move(on_device);
  }
  void initialise(std::vector<std::unique_ptr<Adapter>>& host);
  void run(TrainResult& result, const TrainObserver& observer, const TrainState* resume);

 private:
  TrainState state(std::int64_t step, Recompute level, const std::vector<LoadCounter>& loads) const;
  /// Throws InputError when the state is not of these jobs.
  void restore(const TrainState& from, std::vector<LoadCounter>& loads);
  void begin_step(std::size_t j, std::int64_t step);

  Backend& ops_;
  const Model& model_;
  const std::vector<TrainJob>& jobs_;
  std::vector<SampleOrder> orders_;
  HostBatch largest_;
  std::unique_ptr<DeviceJobs> device_;
  std::unique_ptr<Pass> pass_;
};

void Training::initialise(std::vector<std::unique_ptr<Adapter>>& host) {
  const auto fetch = [&](const Tensor& t) {
    std::vector<float> v(static_cast<std::size_t>(t.numel()));
    ops_.download(v.data(), t);
    return v;
  };
  for (std::size_t j = 0; j < jobs_.size(); ++j) {
    if (j >= host.size() || host[j] == nullptr) {
      auto a = std::make_unique<Adapter>(model_.config, jobs_[j].adapter);
      a->initialise(jobs_[j].train.seed);
      if (attention_dora(jobs_[j].adapter) || ffn_dora(jobs_[j].adapter))
        for (std::size_t i = 0; i < model_.layers.size(); ++i) {
          const LayerWeights& l = model_.layers[i];
          a->set_magnitudes(i, fetch(l.qkv_squared), fetch(l.o_squared), fetch(l.gate_up_squared),
                            fetch(l.down_squared));
        }
      host.resize(std::max(host.size(), j + 1));
      host[j] = std::move(a);
    }
    device_->adapters[j]->upload(ops_, host[j]->numbers());
  }
}

void Training::begin_step(std::size_t j, std::int64_t step) {
  const TrainSpec& t = jobs_[j].train;
  const double lr = learning_rate(t, step, orders_[j].steps());
  const auto slow = step_numbers(t, lr, step),
             fast = step_numbers(t, lr * t.loraplus_lr_ratio, step);
  const auto& numbers = device_->numbers[j];
  ops_.upload(numbers[0], slow.data());
  ops_.upload(numbers[1], fast.data());
  device_->adapters[j]->begin_step(ops_, t.optim, numbers[0], numbers[1]);
}

TrainState Training::state(std::int64_t step, Recompute level,
                           const std::vector<LoadCounter>& loads) const {
  TrainState out{level, step, {}};
  for (std::size_t j = 0; j < jobs_.size(); ++j) {
    const DeviceAdapter& a = *device_->adapters[j];
    TrainState::Job& job = out.jobs.emplace_back();
    for (auto [numbers, t] :
         {std::pair{&job.values, a.values}, {&job.moment1, a.moment1}, {&job.moment2, a.moment2}}) {
      numbers->resize(static_cast<std::size_t>(t ? t.numel() : 0));
      if (t) ops_.download(numbers->data(), t);
    }
    job.expert_counts = loads[j].counts;
  }
  return out;
}

void Training::restore(const TrainState& from, std::vector<LoadCounter>& loads) {
  require(from.jobs.size() == jobs_.size(), "a training state of {} jobs; expected {}",
          from.jobs.size(), jobs_.size());
  for (std::size_t j = 0; j < jobs_.size(); ++j) {
    DeviceAdapter& a = *device_->adapters[j];
    const TrainState::Job& job = from.jobs[j];
    for (auto [numbers, t] :
         {std::pair{&job.values, a.values}, {&job.moment1, a.moment1}, {&job.moment2, a.moment2}}) {
      const std::int64_t count = t ? t.numel() : 0;
      require(static_cast<std::int64_t>(numbers->size()) == count,
              "a training state of {} numbers; expected {}", numbers->size(), count);
      if (t && t.data != a.values.data) ops_.upload(t, numbers->data());
    }
    a.upload(ops_, job.values);
    loads[j].counts = job.expert_counts;
  }
}

void Training::run(TrainResult& result, const TrainObserver& observer, const TrainState* resume) {
  std::int64_t steps = 0;
  for (const auto& o : orders_) steps = std::max(steps, o.steps());
  std::vector<LoadCounter> loads(jobs_.size());
  if (resume != nullptr) restore(*resume, loads);
  const std::int64_t begin = resume != nullptr ? resume->step : 0;
  // Batches are made while the device works, and results are read when all of a step is enqueued.
  MicroBatch next = make_micro_batch(jobs_, orders_, begin, 0);
  for (std::int64_t step = begin; step < steps; ++step) {
    if (observer.stop && observer.stop()) {
      if (observer.on_state) observer.on_state(state(step, result.recompute, loads));
      throw Interrupted("stopped between training steps");
    }
    const trace::Range range(ops_, "step", step + 1);
    const auto start = std::chrono::steady_clock::now();
    std::vector<StepRecord> records(jobs_.size());
    std::size_t micros = 0;
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      if (step >= orders_[j].steps()) continue;
      micros = std::max(micros, orders_[j].micro_batches(step).size());
      begin_step(j, step + 1);
    }
    for (std::size_t micro = 0; micro < micros; ++micro) {
      const MicroBatch m = std::move(next);
      pass_->train(m.batch, m.aux_factors);
      const bool last = micro + 1 == micros;
      for (std::size_t j = 0; last && j < jobs_.size(); ++j)
        if (step < orders_[j].steps()) device_->adapters[j]->finish_step(ops_);
      next = last ? make_micro_batch(jobs_, orders_, step + 1, 0)
                  : make_micro_batch(jobs_, orders_, step, micro + 1);
      const auto losses = pass_->losses(m.batch);
      for (std::size_t i = 0; i < losses.size(); ++i) {
        const BatchPart& part = m.batch.parts[i];
        StepRecord& r = records[part.job];
        r.loss += losses[i].loss;
        r.aux_loss += losses[i].aux * static_cast<double>(m.aux_factors[i]);
        r.entropy += losses[i].entropy * static_cast<double>(m.aux_factors[i]);
        r.tokens += part.row_end - part.row_begin;
        if (!losses[i].stats.empty())
          loads[part.job].add(losses[i].stats, model_.config.layers,
                              device_->adapters[part.job]->experts);
      }
    }
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      if (step >= orders_[j].steps()) continue;
      float squared = 0;
      ops_.download(&squared, device_->adapters[j]->norm_squared);
      StepRecord& r = records[j];
      r.job = static_cast<std::int64_t>(j);
      r.step = step + 1;
      r.steps = orders_[j].steps();
      r.epoch = static_cast<double>(r.step) / static_cast<double>(orders_[j].steps_per_epoch());
      r.lr = learning_rate(jobs_[j].train, step + 1, r.steps);
      r.grad_norm = std::sqrt(static_cast<double>(squared));
    }
    const double ms =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      if (step >= orders_[j].steps()) continue;
      records[j].ms = ms;
      if (observer.on_step) observer.on_step(records[j]);
    }
    if (observer.wants_state && observer.wants_state())
      observer.on_state(state(step + 1, result.recompute, loads));
  }
  for (std::size_t j = 0; j < jobs_.size(); ++j) {
    device_->adapters[j]->download(ops_, result.adapters[j]->numbers());
    result.expert_load.push_back(loads[j].shares(device_->adapters[j]->experts));
  }
}

std::vector<Recompute> levels_of(Recompute asked) {
  if (asked != Recompute::automatic) return {asked};
  return {Recompute::none, Recompute::gate_up, Recompute::layer};
}

double gib(std::size_t bytes) { return static_cast<double>(bytes) / (1024.0 * 1024.0 * 1024.0); }

}  // namespace

TrainResult train(Backend& ops, const Model& model, const std::vector<TrainJob>& jobs,
                  const TrainOptions& options, const TrainObserver& observer,
                  std::vector<std::unique_ptr<Adapter>> initial) {
  check_jobs(model.config, jobs);
  TrainResult result;
  result.adapters = std::move(initial);
  Training training(ops, model, jobs);
  std::size_t least = 0;
  bool fits = false;
  const Recompute asked = options.resume != nullptr ? options.resume->recompute : options.recompute;
  for (const Recompute level : levels_of(asked)) {
    result.planned_bytes = least = training.planned_bytes(level);
    if (options.memory_limit > 0 && least > options.memory_limit) continue;
    try {
      training.take_memory(level);
    } catch (const std::bad_alloc&) {
      continue;
    }
    result.recompute = level;
    fits = true;
    break;
  }
  if (!fits)
    throw OutOfMemory(fmt::format(
        "training needs {:.2f} GiB at its cheapest recompute level; the limit is {}", gib(least),
        options.memory_limit > 0 ? fmt::format("{:.2f} GiB", gib(options.memory_limit))
                                 : std::string("what the device has free")));
  training.initialise(result.adapters);
  training.run(result, observer, options.resume);
  result.measured_bytes =
      ops.allocated_bytes();  // nothing was taken or given back since the first step
  return result;
}

std::size_t planned_training_bytes(Backend& ops, const ModelConfig& config,
                                   const std::vector<TrainJob>& jobs, Recompute level) {
  PlanBackend plan(ops);
  const auto model = Model::plan(plan, config);
  const Training training(plan, *model, jobs);
  return training.planned_bytes(level);
}

}  // namespace mixlora
