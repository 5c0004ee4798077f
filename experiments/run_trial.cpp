#include "experiments/run_trial.h"

#include <algorithm>
#include <chrono>

#include "engine/adapter.h"
#include "engine/scorer.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
double median(std::vector<double> v) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  return v.size() % 2 == 1 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}

}  // namespace

std::vector<TrainItem> training_items(const TrialSpec& spec, const Tokenizer& tokenizer) {
  std::vector<TrainItem> items;
  Truncation cut;
  for (const auto& name : spec.train.tasks) {
    const Task& task = find_task(name);
    for (const Row& row : load_split(task, true, spec.train.limit).rows)
      items.push_back(train_item(task, row, tokenizer, spec.train.cutoff_len, cut));
  }
  return items;
}

void run_trial(const Workbench& bench, const Trial& trial, const RunSpec& run, Store& store,
               std::int64_t attempt, const TrialObserver& observer) {
  const TrialSpec& spec = trial.spec;
  require(bench.tokenizer != nullptr,
          "model \"{}\" is a shape without a tokenizer; it can be measured, not trained on tasks",
          bench.model_source);
  std::unique_ptr<Adapter> adapter;
  store.measurement(attempt, "base_parameters",
                    static_cast<double>(bench.model.config.parameters()), "1");
  if (spec.adapter.method != Method::base) {
    TrainOptions options;
    options.recompute = run.recompute;
    if (run.memory_limit_gib)
      options.memory_limit = static_cast<std::size_t>(*run.memory_limit_gib * 1024 * 1024 * 1024);
    std::vector<double> ms_per_token;
    std::int64_t tokens = 0;
    TrainObserver train_observer{[&](const StepRecord& r) {
                                   store.step(attempt, r);
                                   tokens += r.tokens;
                                   ms_per_token.push_back(r.ms / static_cast<double>(r.tokens));
                                   if (observer.on_step) observer.on_step(r);
                                 },
                                 observer.stop};
    const auto start = std::chrono::steady_clock::now();
    const std::vector<TrainJob> jobs{
        {spec.adapter, spec.train, training_items(spec, *bench.tokenizer)}};
    TrainResult result = train(bench.ops, bench.model, jobs, options, train_observer);
    const double seconds = seconds_since(start);
    adapter = std::move(result.adapters.front());
    store.expert_load(attempt, "train", result.expert_load.front());
    store.measurement(attempt, "trainable_parameters", static_cast<double>(adapter->trainable()),
                      "1");
    store.measurement(attempt, "planned_peak_bytes", static_cast<double>(result.planned_bytes),
                      "B");
    store.measurement(attempt, "measured_peak_bytes", static_cast<double>(result.measured_bytes),
                      "B");
    store.measurement(attempt, "train_seconds", seconds, "s");
    store.measurement(attempt, "train_tokens", static_cast<double>(tokens), "1");
    store.measurement(attempt, "train_tokens_per_s", static_cast<double>(tokens) / seconds,
                      "tokens/s");
    store.measurement(attempt, "train_ms_per_token", median(ms_per_token), "ms/token");
    if (!bench.adapters.empty()) adapter->save(bench.adapters / trial.key, bench.model_source);
  }
  constexpr std::int64_t kScoreTokens = 1024;
  Scorer scorer(bench.ops, bench.model, adapter.get(), kScoreTokens);
  const auto start = std::chrono::steady_clock::now();
  for (const auto& name : spec.evaluate.suites) {
    if (observer.stop && observer.stop()) throw Interrupted("stopped between two suites");
    const Task& task = find_task(name);
    const Evaluation e =
        evaluate_labels(task, load_split(task, false, spec.evaluate.limit), *bench.tokenizer,
                        scorer.scoring(), spec.evaluate.cutoff_len);
    store.evaluation(attempt, e);
    if (observer.on_score) observer.on_score(e);
  }
  if (spec.evaluate.suites.empty()) return;
  const double seconds = seconds_since(start);
  store.measurement(attempt, "eval_seconds", seconds, "s");
  store.measurement(attempt, "eval_tokens_per_s", static_cast<double>(scorer.tokens()) / seconds,
                    "tokens/s");
}

}  // namespace mixlora
