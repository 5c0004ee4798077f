// Goldens of transformers and PEFT (scripts/make_golden.py): logits, PEFT's own files, AdamW
// losses.
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/adapter.h"
#include "engine/json_file.h"
#include "engine/model.h"
#include "engine/scorer.h"
#include "engine/train.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

const std::filesystem::path kGolden = MIXLORA_GOLDEN_DIR;
// Float32 on both sides; the sums run in another order. transformers itself moves this much between
// attention implementations.
constexpr double kLogitsAbsolute = 1e-3, kLogitsRelativeRms = 1e-5;
constexpr double kLossRelative = 1e-4;

using Ids = std::vector<std::int32_t>;

Json golden(const std::string& name) { return read_json(kGolden / name, std::size_t{8} << 20); }

/// Largest difference, and root of the sum of squared differences over that of the expected ones.
struct Difference {
  double largest = 0, relative_rms = 0;
};
Difference difference(const std::vector<float>& found, const std::vector<double>& expected) {
  REQUIRE(found.size() == expected.size());
  Difference d;
  double wrong = 0, size = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double e = static_cast<double>(found[i]) - expected[i];
    d.largest = std::max(d.largest, std::abs(e));
    wrong += e * e;
    size += expected[i] * expected[i];
  }
  d.relative_rms = std::sqrt(wrong / size);
  return d;
}

std::string real_model() {
  if (const char* named = std::getenv("MIXLORA_MODEL")) return named;
  return MIXLORA_SOURCE_DIR "/models/smollm2-135m";
}

AdapterSpec peft_spec(const Json& g, Method method) {
  AdapterSpec s;
  s.method = method;
  s.r = g["r"].get<std::int64_t>();
  s.lora_alpha = g["lora_alpha"].get<double>();
  s.lora_dropout = 0;
  return s;
}

std::unique_ptr<Adapter> peft_adapter(const Model& model, const AdapterSpec& spec,
                                      const std::string& name) {
  auto a = std::make_unique<Adapter>(model.config, spec);
  a->load(kGolden / ("peft-" + name));
  return a;
}

}  // namespace

TEST_CASE("logits of a random Llama are those of transformers", "[engine][golden]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::load(*ops, (kGolden / "tiny-llama").string());
  const Json g = golden("tiny-llama.json");
  Scorer scorer(*ops, *model, nullptr, 64);
  const auto d =
      difference(scorer.logits(g["ids"].get<Ids>()), g["logits"].get<std::vector<double>>());
  CHECK(d.largest < kLogitsAbsolute);
  CHECK(d.relative_rms < kLogitsRelativeRms);
}

TEST_CASE("logits of SmolLM2-135M are those of transformers", "[engine][golden][slow]") {
  const std::string directory = real_model();
  if (!std::filesystem::exists(std::filesystem::path(directory) / "model.safetensors")) {
    WARN("skipped: no model at " << directory << " (scripts/fetch_model.sh, or MIXLORA_MODEL)");
    return;
  }
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::load(*ops, directory);
  const Json g = golden("logits.json");
  const auto columns = g["columns"].get<std::vector<std::size_t>>();
  Scorer scorer(*ops, *model, nullptr, 128);
  for (const Json& text : g["texts"]) {
    INFO(text["text"].get<std::string>());
    const auto ids = text["ids"].get<Ids>();
    const auto top = text["top"].get<std::vector<std::size_t>>();
    const auto logits = scorer.logits(ids);
    const std::size_t vocab = logits.size() / ids.size(), each = top.size() / ids.size();
    std::vector<float> at_top, at_columns;
    double squares = 0;
    for (const float x : logits) squares += static_cast<double>(x) * static_cast<double>(x);
    for (std::size_t t = 0; t < ids.size(); ++t) {
      for (std::size_t k = 0; k < each; ++k)
        at_top.push_back(logits[t * vocab + top[t * each + k]]);
      for (const std::size_t c : columns) at_columns.push_back(logits[t * vocab + c]);
    }
    const auto a = difference(at_top, text["top_logits"].get<std::vector<double>>());
    const auto b = difference(at_columns, text["column_logits"].get<std::vector<double>>());
    CHECK(a.largest < kLogitsAbsolute);
    CHECK(b.largest < kLogitsAbsolute);
    CHECK(a.relative_rms < kLogitsRelativeRms);
    CHECK(b.relative_rms < kLogitsRelativeRms);
    const double rms = std::sqrt(squares / static_cast<double>(logits.size()));
    CHECK(rms == Approx(text["rms"].get<double>()).epsilon(kLogitsRelativeRms));
  }
}

TEST_CASE("an adapter that PEFT wrote gives PEFT's logits", "[engine][golden]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::load(*ops, (kGolden / "tiny-llama").string());
  const Json g = golden("peft.json");
  const std::string name = GENERATE("lora", "dora");
  INFO(name);
  const auto method = name == "dora" ? Method::dora : Method::lora;
  const auto adapter = peft_adapter(*model, peft_spec(g, method), name);
  CHECK(adapter->trainable() == g[name]["trainable"].get<std::int64_t>());
  Scorer scorer(*ops, *model, adapter.get(), 64);
  const Ids ids = g["sequences"][g["logits_of"].get<std::size_t>()].get<Ids>();
  const auto d = difference(scorer.logits(ids), g[name]["logits"].get<std::vector<double>>());
  CHECK(d.largest < kLogitsAbsolute);
  CHECK(d.relative_rms < kLogitsRelativeRms);
}

TEST_CASE("twenty AdamW steps have PEFT's losses", "[engine][golden]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::load(*ops, (kGolden / "tiny-llama").string());
  const Json g = golden("peft.json");
  const std::string name = GENERATE("lora", "dora");
  const std::int64_t micro = GENERATE(0, 3);  // the whole batch, or three of its samples at a time
  INFO(name << ", micro-batches of " << micro);
  const auto expected = g[name]["losses"].get<std::vector<double>>();

  TrainJob job;
  job.adapter = peft_spec(g, name == "dora" ? Method::dora : Method::lora);
  for (const Json& s : g["sequences"]) job.items.push_back({s.get<Ids>(), 0});
  job.train.lr = g["lr"].get<double>();
  job.train.weight_decay = g["weight_decay"].get<double>();
  job.train.batch_size = static_cast<std::int64_t>(job.items.size());
  job.train.micro_batch_size = micro;
  job.train.num_epochs = static_cast<double>(expected.size());
  std::vector<std::unique_ptr<Adapter>> start;
  start.push_back(peft_adapter(*model, job.adapter, name));
  std::vector<double> losses;
  TrainObserver observer;
  observer.on_step = [&](const StepRecord& r) { losses.push_back(r.loss); };
  train(*ops, *model, {job}, {}, observer, std::move(start));
  REQUIRE(losses.size() == expected.size());
  for (std::size_t i = 0; i < losses.size(); ++i) {
    INFO("step " << i + 1);
    CHECK(losses[i] == Approx(expected[i]).epsilon(kLossRelative));
  }
}
