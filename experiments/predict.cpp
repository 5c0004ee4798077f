#include "experiments/predict.h"

#include <algorithm>

#include "engine/adapter.h"
#include "engine/model.h"
#include "engine/scorer.h"
#include "experiments/timing.h"

namespace mixlora {
namespace {

std::string method_of(const AdapterSpec& a) { return write(a.method).get<std::string>(); }

struct Seconds {
  double train = 0, score = 0;  // of one step, of one scoring pass
};

/// The fastest of some steps and scoring passes; the first of each warms up.
Seconds time_steps(Backend& ops, const Model& model, TrainJob job,
                   const std::vector<LabelRequest>& requests) {
  Seconds out;
  std::unique_ptr<Adapter> adapter;
  if (job.adapter.method != Method::base) {
    constexpr std::int64_t kSteps = 3;
    job.train.max_steps = kSteps;
    job.train.num_epochs = kSteps;
    out.train = INFINITY;
    TrainObserver observer;
    observer.on_step = [&](const StepRecord& r) {
      if (r.step > 1) out.train = std::min(out.train, r.ms / 1000);
    };
    adapter = std::move(train(ops, model, {job}, {}, observer).adapters.front());
  }
  constexpr std::int64_t kTokens = 1024;
  Scorer scorer(ops, model, adapter.get(), kTokens);
  out.score = INFINITY;
  for (int i = 0; i < 3; ++i) {
    const auto start = Clock::now();
    scorer.labels(requests);
    if (i > 0) out.score = std::min(out.score, seconds_since(start));
  }
  return out;
}

}  // namespace

Rates measured_rates(Database& db, const std::string& model_hash, const std::string& device) {
  std::map<std::string, std::vector<double>> train, score;
  Statement(db,
            "SELECT json_extract(t.spec, '$.adapter.method'), m.name, m.value FROM measurement m "
            "JOIN attempt a ON a.id = m.attempt JOIN trial t ON t.key = a.trial "
            "WHERE a.outcome = 'done' AND a.device = ? AND t.model_hash = ? "
            "AND m.name IN ('train_tokens_per_s', 'eval_tokens_per_s')")
      .rows<std::string, std::string, double>(
          [&](const std::string& method, const std::string& name, double value) {
            if (value > 0) (name.starts_with("train") ? train : score)[method].push_back(value);
          },
          device, model_hash);
  Rates out;
  for (auto& [method, values] : train) out.train[method] = median(std::move(values));
  for (auto& [method, values] : score) out.score[method] = median(std::move(values));
  if (!out.train.empty() || !out.score.empty()) out.source = "measured in this store";
  return out;
}

void calibrate(Rates& rates, const Sweep& sweep, const Plan& plan, const ModelConfig& model,
               Backend& ops, Texts& texts) {
  bool any = false;
  std::unique_ptr<Model> one_layer, some_layers;
  for (std::size_t i = 0; i < sweep.trials.size(); ++i) {
    const TrialSpec& spec = sweep.trials[i].spec;
    const std::string method = method_of(spec.adapter);
    const bool trains = spec.adapter.method != Method::base;
    if (!plan.trials[i].runs || !plan.trials[i].fits || rates.score.count(method) != 0) continue;
    constexpr std::int64_t kStepTokens = 800;
    TrainJob job{spec.adapter, spec.train, {}};
    std::int64_t tokens = 0;
    if (trains) {
      for (const TrainItem& item : texts.training(spec)) {
        if (tokens >= kStepTokens ||
            job.items.size() == static_cast<std::size_t>(spec.train.batch_size))
          break;
        job.items.push_back(item);
        tokens += static_cast<std::int64_t>(item.tokens.size());
      }
    }
    constexpr std::int64_t kPrompts = 8, kPrompt = 80;
    const std::vector<LabelRequest> requests(kPrompts,
                                             {std::vector<std::int32_t>(kPrompt, 1), {0, 1}});
    constexpr std::int64_t kDeep = 4;
    const auto shallow = [&](std::unique_ptr<Model>& m, std::int64_t layers) -> const Model& {
      ModelConfig config = model;
      config.layers = layers;
      if (m == nullptr) m = Model::random_weights(ops, config);
      return *m;
    };
    const Seconds one = time_steps(ops, shallow(one_layer, 1), job, requests),
                  deep = time_steps(ops, shallow(some_layers, kDeep), job, requests);
    // A layer takes no less than nothing and no more than its share of the deeper model.
    const auto all = [&](double first, double more) {
      const double layer = std::clamp((more - first) / (kDeep - 1), 0.0, more / kDeep);
      return more + static_cast<double>(model.layers - kDeep) * layer;
    };
    if (trains) rates.train[method] = static_cast<double>(tokens) / all(one.train, deep.train);
    rates.score[method] = static_cast<double>(kPrompts * kPrompt) / all(one.score, deep.score);
    any = true;
  }
  if (any)
    rates.source +=
        fmt::format("{}timed now on one and four layers", rates.source.empty() ? "" : ", else ");
}

std::optional<double> predicted_seconds(const Rates& rates, const TrialSpec& spec,
                                        const TrialPlan& plan) {
  const std::string method = method_of(spec.adapter);
  const auto train = rates.train.find(method), score = rates.score.find(method);
  if (plan.train_tokens > 0 && train == rates.train.end()) return std::nullopt;
  if (plan.scored_tokens > 0 && score == rates.score.end()) return std::nullopt;
  double seconds = 0;
  if (plan.train_tokens > 0) seconds += static_cast<double>(plan.train_tokens) / train->second;
  if (plan.scored_tokens > 0) seconds += static_cast<double>(plan.scored_tokens) / score->second;
  return seconds;
}

}  // namespace mixlora
