// Goldens of methods.md's equations in float64 (scripts/mixlora_oracle.py): MixLoRA and MixDoRA
// under each router, forward, losses and every gradient.
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/batch.h"
#include "engine/device_adapter.h"
#include "engine/json_file.h"
#include "engine/model.h"
#include "engine/pass.h"
#include "engine/scorer.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

const std::filesystem::path kMixtures = MIXLORA_GOLDEN_DIR;
// Float32 against float64: of the largest entry of a tensor.
constexpr double kRelative = 1e-5;

/// The numbers of one tensor of an adapter file, row by row.
std::vector<float> read(const Tensor& view) {
  std::vector<float> x;
  for (std::int64_t i = 0; i < view.rows(); ++i)
    x.insert(x.end(), view.row<float>(i), view.row<float>(i) + view.cols());
  return x;
}
void write(const Tensor& view, const std::vector<float>& x) {
  for (std::int64_t i = 0; i < view.rows(); ++i)
    std::copy_n(x.begin() + i * view.cols(), view.cols(), view.row<float>(i));
}

void check_close(const std::vector<float>& found, const std::vector<double>& expected) {
  REQUIRE(found.size() == expected.size());
  double largest = 0, error = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    error = std::max(error, std::abs(static_cast<double>(found[i]) - expected[i]));
  }
  INFO("largest " << largest);
  CHECK(error <= kRelative * largest);
}

AdapterSpec spec_of(const Json& g, const Json& c) {
  AdapterSpec s;
  s.method = c["method"] == "mixdora" ? Method::mixdora : Method::mixlora;
  const std::string routing = c["routing_strategy"].get<std::string>();
  s.routing_strategy = routing == "mixlora-switch"    ? Routing::mixlora_switch
                       : routing == "mixlora-dynamic" ? Routing::mixlora_dynamic
                                                      : Routing::mixlora;
  s.num_experts = g["num_experts"].get<std::int64_t>();
  s.top_k = g["top_k"].get<std::int64_t>();
  s.top_p = g["top_p"].get<double>();
  s.expert_capacity = g["expert_capacity"].get<std::int64_t>();
  s.r = g["r"].get<std::int64_t>();
  s.lora_alpha = g["lora_alpha"].get<double>();
  s.router_aux_loss_coef = g["router_aux_loss_coef"].get<double>();
  s.router_z_loss_coef = g["router_z_loss_coef"].get<double>();
  s.lora_dropout = 0;
  s.jitter_noise = 0;
  return s;
}

}  // namespace

TEST_CASE("MixLoRA and MixDoRA are their equations, gradients and router losses included",
          "[engine][golden]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::load(*ops, (kMixtures / "mixlora-model").string());
  const Json g = read_json(kMixtures / "mixlora.json", std::size_t{8} << 20);
  const auto recompute = GENERATE(Recompute::none, Recompute::gate_up, Recompute::layer);
  REQUIRE(g["cases"].size() == 6);

  for (const Json& c : g["cases"]) {
    INFO(c["method"] << " " << c["routing_strategy"]);
    const AdapterSpec spec = spec_of(g, c);
    Adapter adapter(model->config, spec);
    REQUIRE(adapter.file_tensors().size() == c["adapter"].size());
    for (const auto& t : adapter.file_tensors())
      write(t.view, c["adapter"].at(t.name).get<std::vector<float>>());

    HostBatch batch;
    std::vector<float> logits;
    std::int64_t targets = 0, sample = 0;
    Scorer scorer(*ops, *model, &adapter, 64);
    for (const Json& s : g["sequences"]) targets += static_cast<std::int64_t>(s.size()) - 1;
    batch.begin_part(0);
    for (const Json& s : g["sequences"]) {
      const auto ids = s.get<std::vector<std::int32_t>>();
      add_item(batch, {ids, 0}, sample++, 1, TrainOn::all, 1.0F / static_cast<float>(targets));
      const auto rows = scorer.logits(ids);
      logits.insert(logits.end(), rows.begin(), rows.end());
    }
    batch.end_part();
    check_close(logits, c["logits"].get<std::vector<double>>());

    DeviceAdapter device(*ops, model->config, spec, 1, DeviceAdapter::Update::after_backward);
    device.upload(*ops, adapter.numbers());
    Pass pass(*ops, *model, {&device}, batch, true, recompute);
    pass.train(batch, {1.0F});
    const auto losses = pass.losses(batch);
    CHECK(losses.at(0).loss == Approx(c["loss"].get<double>()).epsilon(kRelative));
    CHECK(losses.at(0).aux == Approx(c["aux"].get<double>()).epsilon(kRelative));

    Adapter gradient(model->config, spec);  // its tensors' names for the gradients' numbers
    ops->download(gradient.numbers().data(), device.grads);
    for (const auto& t : gradient.file_tensors()) {
      INFO(t.name);
      check_close(read(t.view), c["gradient"].at(t.name).get<std::vector<double>>());
    }
  }
}
