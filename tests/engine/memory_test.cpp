// Memory: the plan is what is taken, all of it before the first step ends; dropout trains only.
#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "engine/adapter.h"
#include "engine/model.h"
#include "engine/scorer.h"
#include "engine/train.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

constexpr double kPlanError = 0.02;  // of the peak, between planned and measured

/// Texts of unlike lengths, so that steps differ in rows, labels and sequences.
std::vector<TrainItem> texts(std::int64_t vocab, int count, int longest) {
  std::vector<TrainItem> items(static_cast<std::size_t>(count));
  const RandomKey key = random_key(5, Purpose::test);
  for (int i = 0; i < count; ++i) {
    const int length = 2 + i * 7 % (longest - 1);
    for (int t = 0; t < length; ++t) {
      const Philox4 bits = philox(static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(t), 0,
                                  0, key.k0, key.k1);
      items[static_cast<std::size_t>(i)].tokens.push_back(
          static_cast<std::int32_t>(bits.v[0] % static_cast<std::uint32_t>(vocab)));
    }
  }
  return items;
}

TrainJob job_of(Method method, std::int64_t vocab, std::int64_t steps, int longest = 17) {
  TrainJob j;
  j.adapter.method = method;
  j.adapter.r = 4;
  j.adapter.num_experts = 4;
  j.train.batch_size = 3;
  j.train.max_steps = steps;
  j.items = texts(vocab, 12, longest);
  return j;
}

/// Trains and looks at the backend's blocks after every step.
void require_planned(Backend& ops, const Model& model, const TrainJob& job, Recompute level) {
  INFO("method " << static_cast<int>(job.adapter.method) << ", recompute level "
                 << static_cast<int>(level));
  TrainOptions options;
  options.recompute = level;
  std::vector<std::size_t> in_use, peaks;
  TrainObserver observer;
  observer.on_step = [&](const StepRecord&) {
    in_use.push_back(ops.allocated_bytes());
    peaks.push_back(ops.peak_bytes());
  };
  const TrainResult result = train(ops, model, {job}, options, observer);
  REQUIRE(in_use.size() == static_cast<std::size_t>(job.train.max_steps));
  const auto planned = static_cast<double>(result.planned_bytes);
  CHECK(static_cast<double>(result.measured_bytes) == Approx(planned).epsilon(kPlanError));
  CHECK(planned == static_cast<double>(planned_training_bytes(ops, model.config, {job}, level)));
  for (std::size_t i = 0; i < in_use.size(); ++i) {
    CHECK(in_use[i] == in_use[0]);  // nothing more is taken after the first step,
    CHECK(peaks[i] == peaks[0]);    // not even for a moment
  }
}

void require_planned_everywhere(Backend& ops, const Model& model, std::int64_t steps, int longest) {
  for (const auto method : {Method::lora, Method::dora, Method::mixlora, Method::mixdora})
    for (const auto level : {Recompute::layer, Recompute::gate_up, Recompute::none})
      require_planned(ops, model, job_of(method, model.config.vocab, steps, longest), level);
}

ModelConfig three_layers() {
  ModelConfig c;
  c.hidden = 48;
  c.layers = 3;
  c.ffn = 80;
  c.vocab = 50;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 12;
  c.max_positions = 64;
  c.tied_embeddings = true;
  return c;
}

}  // namespace

TEST_CASE("training takes what the plan says, before its second step", "[engine][memory]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::random_weights(*ops, three_layers());
  require_planned_everywhere(*ops, *model, 4, 17);
}

TEST_CASE("training SmolLM2-135M takes what the plan says", "[engine][memory][slow]") {
  const char* at = std::getenv("MIXLORA_MODEL");
  const std::filesystem::path directory =
      at != nullptr ? at : MIXLORA_SOURCE_DIR "/models/smollm2-135m";
  if (!std::filesystem::exists(directory / "model.safetensors")) {
    WARN("skipped: no model at " << directory << " (scripts/fetch_model.sh, or MIXLORA_MODEL)");
    return;
  }
  const auto ops = make_cpu_backend();
  const auto model = Model::load(*ops, directory.string());
  require_planned_everywhere(*ops, *model, 2, 6);
}

TEST_CASE("updating by layer learns the same bits in less memory", "[engine][memory]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::random_weights(*ops, three_layers());
  const auto trained = [&](const std::vector<TrainJob>& jobs, Recompute level) {
    TrainOptions options;
    options.recompute = level;
    return train(*ops, *model, jobs, options, {});
  };
  const auto require_same = [&](const std::vector<TrainJob>& jobs) {
    const TrainResult all = trained(jobs, Recompute::none),
                      by_layer = trained(jobs, Recompute::layer);
    for (std::size_t j = 0; j < jobs.size(); ++j) {
      const auto x = all.adapters[j]->numbers(), y = by_layer.adapters[j]->numbers();
      CHECK(std::equal(x.begin(), x.end(), y.begin(), y.end()));
    }
  };
  std::vector<TrainJob> pack;
  for (const auto method : {Method::lora, Method::dora, Method::mixlora, Method::mixdora}) {
    INFO("method " << static_cast<int>(method));
    TrainJob job = job_of(method, model->config.vocab, 4);
    job.train.loraplus_lr_ratio = 4;
    require_same({job});
    pack.push_back(job);
    // The gradients of all layers but one: what accumulation, or clipping, still needs.
    TrainJob clipped = job, cut = job;
    clipped.train.max_grad_norm = 1;
    cut.train.micro_batch_size = 2;
    require_same({clipped});
    const auto bytes = [&](const TrainJob& j) {
      return planned_training_bytes(*ops, model->config, {j}, Recompute::layer);
    };
    const AdapterLayout layout(model->config, job.adapter);
    const auto saved = static_cast<std::size_t>(layout.elements) * sizeof(float) *
                       static_cast<std::size_t>(three_layers().layers - 1) /
                       static_cast<std::size_t>(three_layers().layers);
    CHECK(bytes(clipped) - bytes(job) == saved);
    const std::size_t less_rows = bytes(clipped) - bytes(cut);  // both keep all gradients
    cut.train.max_grad_norm = 1;
    CHECK(bytes(clipped) - bytes(cut) == less_rows);
  }
  pack[1].train.max_grad_norm = 1;  // one of four waits for its norm
  pack[2].train.optim = Optim::sgd;
  require_same(pack);
}

TEST_CASE("evaluation drops nothing", "[engine][dropout]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::random_weights(*ops, three_layers());
  for (const auto method : {Method::lora, Method::dora, Method::mixlora, Method::mixdora}) {
    TrainJob job = job_of(method, model->config.vocab, 3);
    job.adapter.lora_dropout = 0.5;
    job.train.lr = 1e-2;
    const TrainResult result = train(*ops, *model, {job}, {}, {});
    const Adapter& trained = *result.adapters[0];
    AdapterSpec certain = trained.spec();
    certain.lora_dropout = 0;
    Adapter same(model->config, certain);
    std::copy(trained.numbers().begin(), trained.numbers().end(), same.numbers().begin());
    const std::vector<std::int32_t> text = job.items[5].tokens;
    Scorer with(*ops, *model, &trained, 64), without(*ops, *model, &same, 64),
        base(*ops, *model, nullptr, 64);
    const auto logits = with.logits(text);
    CHECK(logits == without.logits(text));
    CHECK(logits != base.logits(text));  // the adapter does say something
  }
}
