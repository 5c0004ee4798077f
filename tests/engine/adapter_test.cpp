// Adapters: their files come back as they were, their parameters are counted as the paper counts
// them.
#include "engine/adapter.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <regex>

#include <nlohmann/json.hpp>

#include "engine/adapter_config.h"
#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/model.h"
#include "engine/safetensors.h"
#include "engine/scorer.h"
#include "tests/experiments/folder.h"
#include "tests/support/catch.h"
#include "tests/support/golden.h"
#include "tests/support/refusal.h"

using namespace mixlora;

namespace {

ModelConfig two_layers() {
  ModelConfig c = shape_config("smollm2-135m");
  c.layers = 2;
  return c;
}
ModelConfig golden_shape() {
  return read_model_config(std::filesystem::path(MIXLORA_GOLDEN_DIR) / "tiny-llama" /
                           "config.json");
}

}  // namespace

TEST_CASE("trainable parameters on Llama-2-7B are the paper's counts", "[engine][adapter]") {
  // reference: methods.md section 5
  const ModelConfig c = shape_config("llama-2-7b");
  const auto count = [&](Method m, std::int64_t r) {
    AdapterSpec s;
    s.method = m;
    s.r = r;
    return AdapterLayout(c, s).trainable;
  };
  CHECK(count(Method::lora, 80) == 199'884'800);
  CHECK(count(Method::mixlora, 16) == 203'423'744);
  CHECK(count(Method::dora, 80) - count(Method::lora, 80) == 1'359'872);
  CHECK(count(Method::mixdora, 16) - count(Method::mixlora, 16) == 7'208'960);
  CHECK(c.parameters() == 6'738'415'616);
}

TEST_CASE("an adapter's file gives the same numbers back", "[engine][adapter]") {
  const auto method = GENERATE(Method::lora, Method::dora, Method::mixlora, Method::mixdora);
  AdapterSpec s;
  s.method = method;
  s.num_experts = 3;
  s.r = 4;
  Adapter a(two_layers(), s), b(two_layers(), s);
  for (std::size_t i = 0; i < a.numbers().size(); ++i)
    a.numbers()[i] = static_cast<float>(i % 1013) - 500;
  const Folder folder;
  const auto& dir = folder.path;
  a.save(dir, "models/smollm2-135m");
  b.load(dir);
  for (const auto& t : a.file_tensors()) CHECK(t.view.numel() > 0);
  const auto ta = a.file_tensors(), tb = b.file_tensors();
  for (std::size_t i = 0; i < ta.size(); ++i)
    for (std::int64_t r = 0; r < ta[i].view.rows(); ++r)
      REQUIRE(std::equal(ta[i].view.row<float>(r), ta[i].view.row<float>(r) + ta[i].view.cols(),
                         tb[i].view.row<float>(r)));
  const auto files = TensorFiles::open_file(dir / "adapter_model.safetensors");
  if (method == Method::mixdora) {
    CHECK(files.has("mixlora.layers.1.mlp.down_proj.experts.2.lora_A.weight"));
    CHECK(files.has("mixlora.layers.1.mlp.down_proj.experts.2.lora_magnitude_vector"));
    CHECK(files.has("mixlora.layers.0.mlp.moe_gate.weight"));
    CHECK(files.has("mixlora.layers.0.self_attn.o_proj.lora_magnitude_vector"));
  }
  if (method == Method::lora)
    CHECK(files.has("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"));
}

TEST_CASE("every bit of an adapter comes back from its file", "[engine][adapter]") {
  AdapterSpec s;
  s.method = GENERATE(Method::lora, Method::dora, Method::mixlora, Method::mixdora);
  s.num_experts = 3;
  s.r = 4;
  s.lora_alpha = 8.5;
  s.routing_strategy =
      GENERATE(Routing::mixlora, Routing::mixlora_dynamic, Routing::mixlora_switch);
  s.expert_lora.r = 2;
  s.target_modules.at(static_cast<std::size_t>(Projection::k)) = false;
  Adapter a(golden_shape(), s), b(golden_shape(), s);
  std::uint32_t bits = 1;
  for (const auto& t : a.file_tensors())
    for (std::int64_t r = 0; r < t.view.rows(); ++r)
      for (std::int64_t c = 0; c < t.view.cols(); ++c)  // NaN, infinities and denormals too
        t.view.row<float>(r)[c] = std::bit_cast<float>(bits = bits * 1664525 + 1013904223);
  const Folder folder;
  const auto& dir = folder.path;
  a.save(dir, "m");
  b.load(dir);
  CHECK(std::memcmp(a.numbers().data(), b.numbers().data(), a.numbers().size_bytes()) == 0);
  const AdapterSpec found =
      read_adapter_config(read_json(dir / "adapter_config.json"), "adapter_config.json");
  CHECK(found.method == s.method);
  CHECK(found.target_modules == s.target_modules);
  CHECK(expert_rank(found) == expert_rank(s));
  CHECK(expert_scale(found) == expert_scale(s));
}

TEST_CASE("PEFT gives our files the logits that we give them", "[engine][adapter][golden]") {
  // scripts/make_adapter_golden.py had PEFT read the very files that are compared here byte by
  // byte.
  const std::string name = GENERATE("lora", "dora");
  const std::filesystem::path golden = MIXLORA_GOLDEN_DIR;
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::load(*ops, (golden / "tiny-llama").string());
  AdapterSpec s;
  s.method = name == "dora" ? Method::dora : Method::lora;
  s.r = 3;
  s.lora_alpha = 6;
  s.use_rslora = name == "lora";
  Adapter a(model->config, s);
  a.initialise(11);
  for (auto& layer : a.layout().layers)
    parameters(layer, [](ParameterKind kind, Projection, Parameter& p) {
      if (!p.present() || kind == ParameterKind::a) return;
      for (std::int64_t i = 0; i < p.value.numel(); ++i)
        p.value.ptr<float>()[i] = kind == ParameterKind::b
                                      ? 0.01F * static_cast<float>(i * 7 % 19 - 9)
                                      : 1 + 0.125F * static_cast<float>(i % 5);
    });
  const Folder folder;
  const auto& dir = folder.path;
  a.save(dir, "tests/golden/tiny-llama");
  for (const char* file : {"adapter_config.json", "adapter_model.safetensors"})
    require_golden("adapter-" + name + "/" + file, read_text(dir / file));
  const Json g = read_json(golden / "adapter-logits.json");
  const auto expected = g[name].get<std::vector<double>>();
  Scorer scorer(*ops, *model, &a, 64);
  const auto found = scorer.logits(g["ids"].get<std::vector<std::int32_t>>());
  REQUIRE(found.size() == expected.size());
  double largest = 0;
  for (std::size_t i = 0; i < found.size(); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(found[i]) - expected[i]));
  CHECK(largest < 1e-4);  // float32 on both sides, sums in another order; logits are about 1
}

TEST_CASE("m-LoRA's tensor names are read", "[engine][adapter]") {
  AdapterSpec s;
  s.method = GENERATE(Method::lora, Method::mixlora);
  s.num_experts = 12;
  s.r = 2;
  Adapter a(golden_shape(), s), b(golden_shape(), s);
  a.initialise(3);
  const Folder folder;
  const auto& dir = folder.path;
  a.save(dir, "m");
  std::vector<WriteTensor> tensors;
  for (const auto& t : a.file_tensors()) {
    std::string name = t.name;
    for (const auto& [now, then] : std::vector<std::pair<std::string, std::string>>{
             {"mlp\\.moe_gate", "gate"},
             {"mlp\\.gate_proj\\.experts\\.([0-9]+)", "experts.$1.w1_proj"},
             {"mlp\\.down_proj\\.experts\\.([0-9]+)", "experts.$1.w2_proj"},
             {"mlp\\.up_proj\\.experts\\.([0-9]+)", "experts.$1.w3_proj"},
             {"mlp\\.gate_proj", "self_attn.w1_proj"},
             {"mlp\\.down_proj", "self_attn.w2_proj"},
             {"mlp\\.up_proj", "self_attn.w3_proj"}})
      name = std::regex_replace(name, std::regex(now), then);
    CHECK((name == t.name) == (t.name.find(".mlp.") == std::string::npos));
    tensors.push_back({name, t.shape, t.view});
  }
  write_safetensors(dir / "adapter_model.safetensors", tensors);
  b.load(dir);
  CHECK(std::equal(a.numbers().begin(), a.numbers().end(), b.numbers().begin()));
}

TEST_CASE("a bad adapter is refused with what and where", "[engine][adapter][hostile]") {
  AdapterSpec s;
  s.r = 4;
  s.method = Method::mixlora;
  Adapter a(golden_shape(), s);
  const Json good = write_adapter_config(s, "m");
  struct Case {
    const char* patch;
    const char* message;
  };
  const std::vector<Case> cases{
      {R"([])", "expected an object, found []"},
      {R"({"peft_type": "IA3"})", "\"peft_type\" is \"IA3\"; expected \"LORA\" or \"MIXLORA\""},
      {R"({"peft_type": null})", "\"peft_type\" is null"},
      {R"({"r": null})", "\"r\" is missing"},
      {R"({"r": "4"})", "\"r\": expected a whole number, found \"4\""},
      {R"({"r": 4000000000})", "adapter.r: 4000000000; expected 1 to 4096"},
      {R"({"r": -1})", "adapter.r: -1; expected 1 to 4096"},
      {R"({"lora_alpha": 0})", "adapter.lora_alpha: 0; expected more than 0"},
      {R"({"target_modules": ".*proj"})", "expected \"all-linear\", a list of projections"},
      {R"({"target_modules": ["qkv"]})", "no projection \"qkv\""},
      {R"({"target_modules": []})", "adapter.target_modules: none"},
      {R"({"use_dora": 1})", "\"use_dora\": expected true or false, found 1"},
      {R"({"bias": "all"})", "\"bias\" is \"all\"; only \"none\" is supported"},
      {R"({"rank_pattern": {"q_proj": 8}})", "\"rank_pattern\" is {\"q_proj\":8}; only null"},
      {R"({"layers_to_transform": 3})", "\"layers_to_transform\" is 3; only null"},
      {R"({"lora_bias": true})", "\"lora_bias\": only false is supported"},
      {R"({"init_lora_weights": "pissa"})", "it changes the base model's weights"},
      {R"({"num_experts": 100000000})", "adapter.num_experts: 100000000; expected 1 to 128"},
      {R"({"top_k": 9})", "adapter.top_k: 9 of 8 experts"},
      {R"({"routing_strategy": "mixlora-switsh"})", "did you mean \"mixlora-switch\"?"},
      {R"({"expert_lora": 3})", "expert_lora: expected an object, found 3"},
      {R"({"expert_lora": {"r": 0}})", "adapter.expert_lora.r: 0; expected 1 to 4096"},
      {R"({"expert_lora": {"r": 8}})", "\"expert_lora.r\" is 8; this adapter has 4"},
      {R"({"act_fn": "tanh"})", "\"act_fn\": no such choice: \"tanh\""},
      {R"({"act_fn": "relu"})", "\"act_fn\" is \"relu\"; this adapter has null"},
      {R"({"num_experts": 4})", "\"num_experts\" is 4; this adapter has 8"},
      {R"({"use_dora": true})", "\"use_dora\" is true; this adapter has false"},
      {R"({"peft_type": "LORA"})", "\"peft_type\" is \"LORA\"; this adapter has \"MIXLORA\""},
  };
  const Folder folder;
  const auto& dir = folder.path;
  a.save(dir, "m");
  const auto config = dir / "adapter_config.json", weights = dir / "adapter_model.safetensors";
  for (const Case& c : cases) {
    Json json = good;
    json.merge_patch(Json::parse(c.patch));
    write_text(config, json.dump());
    require_refusal([&] { a.load(dir); }, config.string(), c.message);
  }
  write_text(config, good.dump());
  REQUIRE_NOTHROW(a.load(dir));
  std::vector<WriteTensor> tensors;
  for (const auto& t : a.file_tensors()) tensors.push_back({t.name, t.shape, t.view});
  tensors.back().name = "x";
  write_safetensors(weights, tensors);
  require_refusal([&] { a.load(dir); }, weights.string(), "is missing");
  tensors.back().name = a.file_tensors().back().name;
  tensors.push_back({"more\n", tensors[0].shape, tensors[0].view});
  write_safetensors(weights, tensors);
  require_refusal([&] { a.load(dir); }, dir.string(),
                  "the tensor \"more\\n\" is not of this adapter");
  std::filesystem::remove(weights);
  require_refusal([&] { a.load(dir); }, weights.string(), "no such file");
  require_refusal([&] { a.save(config / "below", "m"); }, (config / "below").string(),
                  "cannot be made");
}

TEST_CASE("an adapter of another kind is refused with the key that differs", "[engine][adapter]") {
  AdapterSpec s;
  s.r = 4;
  Adapter a(two_layers(), s);
  const Folder folder;
  const auto& dir = folder.path;
  a.save(dir, "m");
  AdapterSpec wider = s;
  wider.r = 8;
  Adapter b(two_layers(), wider);
  REQUIRE_THROWS_WITH(b.load(dir),
                      Catch::Matchers::ContainsSubstring("\"r\" is 4; this adapter has 8"));
  AdapterSpec fewer = s;
  fewer.target_modules.at(static_cast<std::size_t>(Projection::q)) = false;
  Adapter c(two_layers(), fewer);
  REQUIRE_THROWS_AS(c.load(dir), InputError);
}
