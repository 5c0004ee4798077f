// Adapters: their files come back as they were, their parameters are counted as the paper counts
// them.
#include "engine/adapter.h"

#include <filesystem>

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/safetensors.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

ModelConfig small() {
  ModelConfig c = shape_config("smollm2-135m");
  c.layers = 2;
  return c;
}
std::filesystem::path room(const std::string& name) {
  auto p = std::filesystem::temp_directory_path() / ("mixlora_adapter_test_" + name);
  std::filesystem::remove_all(p);
  return p;
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
  Adapter a(small(), s), b(small(), s);
  for (std::size_t i = 0; i < a.numbers().size(); ++i)
    a.numbers()[i] = static_cast<float>(i % 1013) - 500;
  const auto dir = room(std::to_string(static_cast<int>(method)));
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

TEST_CASE("an adapter of another kind is refused with the key that differs", "[engine][adapter]") {
  AdapterSpec s;
  s.r = 4;
  Adapter a(small(), s);
  const auto dir = room("other");
  a.save(dir, "m");
  AdapterSpec wider = s;
  wider.r = 8;
  Adapter b(small(), wider);
  REQUIRE_THROWS_WITH(b.load(dir),
                      Catch::Matchers::ContainsSubstring("\"r\" is 4; this adapter has 8"));
  AdapterSpec fewer = s;
  fewer.target_modules.at(static_cast<std::size_t>(Projection::q)) = false;
  Adapter c(small(), fewer);
  REQUIRE_THROWS_AS(c.load(dir), InputError);
}
