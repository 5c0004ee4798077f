// Rows without a label: the last block leaves them out behind its attention, and nothing shows it.
#include <algorithm>

#include "engine/batch.h"
#include "engine/model.h"
#include "engine/pass.h"
#include "tests/support/catch.h"
#include "tests/support/device.h"

using namespace mixlora;

namespace {

ModelConfig small() {
  ModelConfig c;
  c.hidden = 32;
  c.layers = 3;
  c.ffn = 48;
  c.vocab = 50;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 8;
  c.max_positions = 64;
  c.tied_embeddings = true;
  return c;
}

AdapterSpec spec_named(const std::string& name) {
  AdapterSpec s;
  s.method = name == "lora" ? Method::lora : name == "dora" ? Method::dora : Method::mixlora;
  if (name == "mixdora") s.method = Method::mixdora;
  s.r = 4;
  s.lora_dropout = 0.1;
  s.num_experts = 4;
  s.router_loss = true;
  if (name == "top-p") s.routing_strategy = Routing::mixlora_dynamic;
  if (name.starts_with("switch")) {
    s.routing_strategy = Routing::mixlora_switch;
    s.expert_capacity = name == "switch-free" ? 0 : 2;
    s.jitter_noise = 0.1;
  }
  if (name == "switch-input") {
    s.overflow = Overflow::input;
    s.ffn_dropout = 0.1;
  }
  return s;
}

const auto kNames = {"lora",  "dora",   "mixlora",     "mixdora",
                     "top-p", "switch", "switch-free", "switch-input"};

/// Two jobs of three texts each; the last two tokens of each are learned. `every`: all other rows
/// have a label too, of weight 0.
HostBatch two_jobs(bool every) {
  HostBatch b;
  std::int32_t token = 3;
  for (std::size_t j = 0; j < 2; ++j) {
    b.begin_part(j);
    for (std::int32_t sample = 0; sample < 3; ++sample) {
      std::vector<std::int32_t> text;
      for (std::int32_t t = 0; t < 7 + sample; ++t) text.push_back(token = (token * 17 + 5) % 50);
      const std::int32_t begin = b.add_sequence(text, sample, 1);
      const auto length = static_cast<std::int32_t>(text.size());
      for (std::int32_t t = 0; t < length - 1; ++t) {
        const bool learned = t >= length - 3;
        if (learned || every)
          b.add_label(begin + t, text[static_cast<std::size_t>(t + 1)], learned ? 1.0F / 6 : 0.0F);
      }
    }
    b.end_part();
  }
  return b;
}

/// The two jobs' adapters: LoRA, and one of `spec`.
struct Adapters {
  Adapters(Backend& ops, const Model& model, const AdapterSpec& spec,
           DeviceAdapter::Update update) {
    AdapterSpec other;
    other.r = 6;
    for (const AdapterSpec& s : {other, spec}) {
      Adapter start(model.config, s);
      std::uint32_t i = 0;
      for (float& x : start.numbers())
        x += 0.05F * static_cast<float>(static_cast<std::int32_t>(i++ * 2654435761U) % 1000) / 1000;
      owned.push_back(std::make_unique<DeviceAdapter>(ops, model.config, s, 9, update));
      owned.back()->upload(ops, start.numbers());
      pointers.push_back(owned.back().get());
    }
  }
  std::vector<std::unique_ptr<DeviceAdapter>> owned;
  std::vector<DeviceAdapter*> pointers;
};

/// Losses and gradients of both jobs.
struct Outcome {
  std::vector<double> losses;
  std::vector<float> gradients;
};
Outcome outcome(Backend& ops, const Model& model, const AdapterSpec& spec, const HostBatch& batch,
                Recompute recompute) {
  const Adapters adapters(ops, model, spec, DeviceAdapter::Update::after_backward);
  Pass pass(ops, model, adapters.pointers, batch, true, recompute);
  pass.train(batch, {1, 1});
  Outcome out;
  for (const auto& l : pass.losses(batch)) {
    out.losses.push_back(l.loss);
    out.losses.push_back(l.aux);
  }
  for (const DeviceAdapter* a : adapters.pointers) {
    std::vector<float> own(static_cast<std::size_t>(a->grads.numel()));
    ops.download(own.data(), a->grads);
    out.gradients.insert(out.gradients.end(), own.begin(), own.end());
  }
  return out;
}

/// Losses and gradients of a batch, of whose rows few have a label, with and without the others in
/// the last feed-forward half.
void require_same(Backend& ops, float bound) {
  const auto model = Model::random_weights(ops, small());
  const HostBatch few = two_jobs(false), every = two_jobs(true);
  REQUIRE(selected_rows(few).has_value());
  REQUIRE_FALSE(selected_rows(every).has_value());
  for (const auto recompute : {Recompute::none, Recompute::gate_up, Recompute::layer}) {
    for (const std::string name : kNames) {
      INFO(name << " " << static_cast<int>(recompute));
      const AdapterSpec spec = spec_named(name);
      const Outcome some = outcome(ops, *model, spec, few, recompute),
                    all = outcome(ops, *model, spec, every, recompute);
      for (std::size_t i = 0; i < all.losses.size(); ++i)
        CHECK(some.losses[i] == Approx(all.losses[i]).epsilon(1e-5));
      REQUIRE(some.gradients.size() == all.gradients.size());
      float largest = 0, off = 0;
      for (std::size_t i = 0; i < all.gradients.size(); ++i) {
        largest = std::max(largest, std::abs(all.gradients[i]));
        off = std::max(off, std::abs(some.gradients[i] - all.gradients[i]));
      }
      CHECK(largest > 1e-3F);
      CHECK(off < bound * std::max(1.0F, largest));
    }
  }
}

/// Of each learned label its log softmax and the logits of three columns.
std::vector<float> scores(Pass& pass, const HostBatch& batch) {
  std::vector<float> out, log_prob, greedy;
  pass.log_probs(batch, log_prob, greedy);
  const std::vector<std::int32_t> columns{2, 11, 43};
  const std::vector<float> logits = pass.label_logits(batch, columns);
  for (std::size_t m = 0; m < log_prob.size(); ++m) {
    if (batch.weights[m] == 0) continue;
    out.push_back(log_prob[m]);
    for (std::size_t c = 0; c < columns.size(); ++c) out.push_back(logits[m * columns.size() + c]);
  }
  return out;
}

/// The same for scores.
void require_same_scores(Backend& ops, float bound) {
  const auto model = Model::random_weights(ops, small());
  const HostBatch few = two_jobs(false), every = two_jobs(true);
  for (const std::string name : kNames) {
    INFO(name);
    const Adapters adapters(ops, *model, spec_named(name), DeviceAdapter::Update::none);
    Pass pass(ops, *model, adapters.pointers, every, false, Recompute::none);
    CHECK(pass.bytes() ==
          Pass::planned_bytes(ops, *model, adapters.pointers, every, false, Recompute::none));
    const std::vector<float> some = scores(pass, few), all = scores(pass, every);
    REQUIRE(some.size() == std::size_t{2} * 3 * 2 * 4);
    REQUIRE(some.size() == all.size());
    float largest = 0, off = 0;
    for (std::size_t i = 0; i < all.size(); ++i) {
      largest = std::max(largest, std::abs(all[i]));
      off = std::max(off, std::abs(some[i] - all[i]));
    }
    CHECK(largest > 0.1F);
    CHECK(off <= bound * std::max(1.0F, largest));
  }
}

}  // namespace

TEST_CASE("rows without a label may leave before the last experts", "[engine][selected]") {
  require_same(*make_cpu_backend(Precision::fp32), 2e-6F);
}

TEST_CASE("scoring leaves them behind the last attention, to the bit", "[engine][selected]") {
  require_same_scores(*make_cpu_backend(Precision::fp32), 0);
}

TEST_CASE("the same on CUDA", "[engine][selected][cuda]") {
  if (no_cuda()) return;
  require_same(*make_cuda_backend(Precision::fp32), 2e-6F);
  require_same_scores(*make_cuda_backend(Precision::fp32), 2e-6F);
}

TEST_CASE("the rows of labels, each once, by part", "[engine][selected]") {
  HostBatch b;
  for (std::size_t j = 0; j < 2; ++j) {
    b.begin_part(j);
    const auto begin = b.add_sequence({1, 2, 3, 4, 5, 6}, static_cast<std::int32_t>(10 + j), 4);
    for (const std::int32_t row : {4, 1, 4}) b.add_label(begin + row, 7, 1);
    b.end_part();
  }
  const auto s = selected_rows(b);
  REQUIRE(s.has_value());
  CHECK(s->rows == std::vector<std::int32_t>{1, 4, 1, 4});
  CHECK(s->begin == std::vector<std::int64_t>{0, 2, 4});
  CHECK(s->label_rows == std::vector<std::int32_t>{1, 0, 1, 3, 2, 3});
  CHECK(std::vector<std::int32_t>(s->ids.begin() + 8, s->ids.begin() + 12) ==
        std::vector<std::int32_t>{11, 1, 4, 1});
  b.begin_part(2);  // a part that asks for nothing: all rows go on
  b.add_sequence({1, 2}, 0, 0);
  b.end_part();
  CHECK_FALSE(selected_rows(b).has_value());
}
