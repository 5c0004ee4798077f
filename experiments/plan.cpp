#include "experiments/plan.h"

#include <algorithm>
#include <array>

#include "experiments/environment.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

constexpr std::size_t kAutoPack = 8;
constexpr double kGib = 1024.0 * 1024.0 * 1024.0;

/// Four bytes a token: near enough to plan by, for English and a vocabulary of 32,000 and more.
TrainItem stand_in(const std::string& prompt, std::int64_t cutoff) {
  const auto tokens =
      std::min<std::int64_t>(static_cast<std::int64_t>(prompt.size()) / 4 + 1, cutoff);
  return {std::vector<std::int32_t>(static_cast<std::size_t>(tokens)),
          static_cast<std::int32_t>(tokens - 1)};
}

std::vector<Recompute> levels_of(Recompute asked) {
  if (asked != Recompute::automatic) return {asked};
  return {Recompute::none, Recompute::gate_up, Recompute::layer};
}

class Planner {
 public:
  Planner(const Sweep& sweep, const ModelConfig& model, Backend& ops, Texts& texts)
      : sweep_(sweep), model_(model), ops_(ops), texts_(texts) {
    if (sweep.run.memory_limit_gib) {
      plan_.memory_limit = sweep.run.memory_limit_bytes();
      plan_.memory_source = "run.memory_limit_gib";
    } else if (ops.device() == Device::cpu) {
      plan_.memory_limit = available_memory();
      plan_.memory_source = "the machine's free memory";
    }
  }
  void decide(const PlanOptions& options);
  void size_trials(bool all);
  void pack();
  Plan take() { return std::move(plan_); }

 private:
  bool fits(std::size_t bytes) const {
    return plan_.memory_limit == 0 || bytes <= plan_.memory_limit;
  }
  TrainJob job_of(const TrialSpec& spec) {
    return {spec.adapter, spec.train, texts_.training(spec)};
  }
  void size(const TrialSpec& spec, TrialPlan& t);
  std::string packed_with(const PackPlan& pack, std::size_t self) const;

  const Sweep& sweep_;
  const ModelConfig& model_;
  Backend& ops_;
  Texts& texts_;
  Plan plan_;
};

void Planner::decide(const PlanOptions& options) {
  for (const Trial& trial : sweep_.trials) {
    const TrialState s = options.state(trial.key);
    TrialPlan t;
    t.state = s.status;
    const bool failed = s.status == "failed" || s.status == "out_of_memory";
    t.runs = s.status != "done" && (!failed || options.retry_failed);
    if (s.status == "done")
      t.why = "done before, with the same spec, model and data";
    else if (failed)
      t.why = fmt::format("{} before ({}); {}", s.status == "failed" ? "failed" : "out of memory",
                          s.reason, t.runs ? "asked to try again" : "--retry-failed tries again");
    else if (s.status == "interrupted" || s.status == "running")
      t.why =
          "interrupted before: " + (s.reason.empty() ? std::string("it did not end") : s.reason);
    else
      t.why = "not run before";
    plan_.trials.push_back(std::move(t));
  }
}

void Planner::size(const TrialSpec& spec, TrialPlan& t) {
  t.scored_tokens = texts_.scored_tokens(spec);
  if (spec.adapter.method == Method::base) return;
  const TrainJob job = job_of(spec);
  t.samples = static_cast<std::int64_t>(job.items.size());
  t.steps = step_count(spec.train, t.samples);
  double tokens = 0;
  for (const auto& i : job.items) tokens += static_cast<double>(i.tokens.size());
  const double samples = static_cast<double>(std::min(
      t.steps * spec.train.batch_size,
      static_cast<std::int64_t>(static_cast<double>(t.samples) * spec.train.num_epochs + 0.5)));
  t.train_tokens = static_cast<std::int64_t>(
      t.samples > 0 ? tokens * samples / static_cast<double>(t.samples) : 0);
  for (const Recompute level : levels_of(sweep_.run.recompute)) {
    t.peak_bytes = planned_training_bytes(ops_, model_, {job}, level);
    t.recompute = level;
    t.fits = fits(t.peak_bytes);
    if (t.fits) return;
  }
  t.why = fmt::format("needs {:.2f} GiB at its cheapest recompute level; {} is {:.2f} GiB",
                      static_cast<double>(t.peak_bytes) / kGib, plan_.memory_source,
                      static_cast<double>(plan_.memory_limit) / kGib);
}

void Planner::size_trials(bool all) {
  for (std::size_t i = 0; i < plan_.trials.size(); ++i)
    if (all || plan_.trials[i].runs) size(sweep_.trials[i].spec, plan_.trials[i]);
}

std::string Planner::packed_with(const PackPlan& pack, std::size_t self) const {
  std::string others;
  for (const std::size_t i : pack.trials)
    if (i != self) others += (others.empty() ? "" : ", ") + sweep_.trials[i].label;
  return fmt::format("; one step with {} ({:.2f} GiB together)", others,
                     static_cast<double>(pack.peak_bytes) / kGib);
}

/// In order, a trial joins the pack before it while there is room and no member has to recompute
/// more than it would alone: packing must not cost time.
void Planner::pack() {
  const std::int64_t asked = sweep_.run.pack.most;
  const bool automatic = asked == 0;
  const std::size_t most = !automatic                     ? static_cast<std::size_t>(asked)
                           : ops_.device() == Device::cpu ? 1
                                                          : kAutoPack;
  std::vector<TrainJob> jobs;  // of the last pack
  for (std::size_t i = 0; i < plan_.trials.size(); ++i) {
    const TrialPlan& t = plan_.trials[i];
    if (!t.runs) continue;
    const TrialSpec& spec = sweep_.trials[i].spec;
    const bool trains = spec.adapter.method != Method::base && t.fits;
    if (trains && !jobs.empty() && jobs.size() < most) {
      PackPlan& last = plan_.packs.back();
      jobs.push_back(job_of(spec));
      const Recompute level = plan_.trials[last.trials.front()].recompute;
      if (level == t.recompute)
        if (const std::size_t bytes = planned_training_bytes(ops_, model_, jobs, level);
            fits(bytes)) {
          last.trials.push_back(i);
          last.peak_bytes = bytes;
          continue;
        }
    }
    jobs.clear();
    if (trains) jobs.push_back(job_of(spec));
    plan_.packs.push_back({{i}, t.peak_bytes});
  }
  for (const PackPlan& p : plan_.packs)
    if (p.trials.size() > 1)
      for (const std::size_t i : p.trials) plan_.trials[i].why += packed_with(p, i);
}

}  // namespace

const std::vector<TrainItem>& Texts::training(const TrialSpec& spec) {
  const std::string key = write(spec.train.tasks).dump() + std::to_string(spec.train.limit) + " " +
                          std::to_string(spec.train.cutoff_len);
  const auto [at, fresh] = items_.try_emplace(key);
  if (!fresh) return at->second;
  Truncation cut;
  for (const auto& name : mix_names(spec.train.tasks)) {
    const Task task = find_task(name);
    for (const Row& row : load_split(task, true, spec.train.limit).rows)
      at->second.push_back(tokenizer_ != nullptr
                               ? train_item(task, row, *tokenizer_, spec.train.cutoff_len, cut)
                               : stand_in(prompt_text(task, row), spec.train.cutoff_len));
  }
  return at->second;
}

std::int64_t Texts::scored_tokens(const TrialSpec& spec) {
  std::int64_t sum = 0;
  for (const auto& name : mix_names(spec.evaluate.suites)) {
    const auto [at, fresh] = scored_.try_emplace(
        fmt::format("{} {} {} {}", name, spec.evaluate.limit, spec.evaluate.cutoff_len,
                    write(static_cast<const ProtocolSpec&>(spec.evaluate)).dump()));
    if (fresh) {
      const Task task = find_task(name);
      const std::string few_shot = few_shot_of(task, spec.evaluate);
      for (const Row& row : load_split(task, false, spec.evaluate.limit).rows)
        at->second += static_cast<std::int64_t>(
            tokenizer_ != nullptr
                ? asked_tokens(task, row, *tokenizer_, spec.evaluate, spec.evaluate.cutoff_len,
                               few_shot)
                : stand_in(prompt_text(task, row), spec.evaluate.cutoff_len).tokens.size());
    }
    sum += at->second;
  }
  return sum;
}

Plan make_plan(const Sweep& sweep, const ModelConfig& model, Backend& ops, Texts& texts,
               const PlanOptions& options) {
  Planner planner(sweep, model, ops, texts);
  planner.decide(options);
  planner.size_trials(options.size_all);
  planner.pack();
  return planner.take();
}

}  // namespace mixlora
