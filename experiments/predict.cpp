#include "experiments/predict.h"

#include <algorithm>

#include "engine/adapter.h"
#include "engine/model.h"
#include "engine/scorer.h"
#include "experiments/run_trial.h"
#include "experiments/timing.h"

namespace mixlora {
namespace {

std::string method_of(const AdapterSpec& a) { return write(a.method).get<std::string>(); }

constexpr std::int64_t kSmallWidth = 1024;

struct Seconds {
  double train = 0, score = 0;  // of one step, of one scoring pass
};

/// The fastest of some steps and scoring passes; the first of each warms up.
Seconds time_steps(Backend& ops, const Model& model, TrainJob job,
                   const std::vector<LabelRequest>& requests, std::int64_t tokens_a_pass) {
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
  Scorer scorer(ops, model, adapter.get(), tokens_a_pass);
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
  // As many layers as are soon there: what is not timed is multiplied, and its noise with it.
  const std::int64_t deep =
      std::min<std::int64_t>(model.layers, model.hidden <= kSmallWidth ? 12 : 4);
  std::unique_ptr<Model> one_layer, some_layers;
  for (std::size_t i = 0; i < sweep.trials.size(); ++i) {
    const TrialSpec& spec = sweep.trials[i].spec;
    const std::string method = method_of(spec.adapter);
    const bool trains = spec.adapter.method != Method::base;
    if (!plan.trials[i].runs || !plan.trials[i].fits || rates.score.count(method) != 0) continue;
    TrainJob job{spec.adapter, spec.train, {}};
    std::int64_t tokens = 0;
    if (trains) {  // one whole batch: small steps and large ones differ in tokens a second
      for (const TrainItem& item : texts.training(spec)) {
        if (job.items.size() == static_cast<std::size_t>(spec.train.batch_size)) break;
        job.items.push_back(item);
        tokens += static_cast<std::int64_t>(item.tokens.size());
      }
    }
    constexpr std::int64_t kPrompt = 80;
    const std::int64_t a_pass = scoring_pass_tokens(ops), prompts = a_pass / kPrompt;
    const std::vector<LabelRequest> requests(static_cast<std::size_t>(prompts),
                                             {std::vector<std::int32_t>(kPrompt, 1), {0, 1}});
    const auto shallow = [&](std::unique_ptr<Model>& m, std::int64_t layers) -> const Model& {
      ModelConfig config = model;
      config.layers = layers;
      if (m == nullptr) m = Model::random_weights(ops, config);
      return *m;
    };
    const Seconds one = time_steps(ops, shallow(one_layer, 1), job, requests, a_pass),
                  more = time_steps(ops, shallow(some_layers, deep), job, requests, a_pass);
    // A layer takes no less than nothing and no more than its share of the deeper model.
    const auto all = [&](double first, double later) {
      const auto n = static_cast<double>(deep);
      const double layer = n > 1 ? std::clamp((later - first) / (n - 1), 0.0, later / n) : later;
      return later + static_cast<double>(model.layers - deep) * layer;
    };
    if (trains) rates.train[method] = static_cast<double>(tokens) / all(one.train, more.train);
    rates.score[method] = static_cast<double>(prompts * kPrompt) / all(one.score, more.score);
    any = true;
  }
  if (any)
    rates.source +=
        fmt::format("{}timed now on 1 and {} layers", rates.source.empty() ? "" : ", else ", deep);
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
