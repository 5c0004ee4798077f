// Adapter files: PEFT's layout for LoRA and DoRA, MoE-PEFT's for MixLoRA, with magnitudes where
// there are any.
#include <algorithm>

#include <nlohmann/json.hpp>

#include "engine/adapter.h"
#include "engine/atomic_file.h"
#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/safetensors.h"

namespace mixlora {
namespace {

Json target_list(const Targets& targets) {
  Json list = Json::array();
  for (std::size_t p = 0; p < kProjections; ++p)
    if (targets.at(p)) list.push_back(name_of(static_cast<Projection>(p)));
  return list;
}

const char* activation_name(Activation a) {
  switch (a) {
    case Activation::silu:
      return "silu";
    case Activation::gelu:
      return "gelu";
    case Activation::gelu_new:
      return "gelu_new";
    case Activation::relu:
      return "relu";
  }
  return "";
}

Json config_of(const AdapterSpec& s, const std::string& base_model) {
  Json j = {
      {"peft_type", has_router(s) ? "MIXLORA" : "LORA"},
      {"task_type", "CAUSAL_LM"},
      {"base_model_name_or_path", base_model},
      {"r", s.r},
      {"lora_alpha", s.lora_alpha},
      {"lora_dropout", s.lora_dropout},
      {"target_modules", target_list(s.target_modules)},
      {"bias", "none"},
      {"use_rslora", s.use_rslora},
      {"use_dora", attention_dora(s)},
      {"fan_in_fan_out", false},
      {"inference_mode", true},
      {"init_lora_weights", s.lora_init == LoraInit::gaussian ? Json("gaussian") : Json(true)}};
  if (!has_router(s)) return j;
  j["num_experts"] = s.num_experts;
  j["act_fn"] = s.act_fn ? Json(activation_name(*s.act_fn)) : Json(nullptr);
  j["router_init_range"] = router_init_range(s);
  j["jitter_noise"] = jitter_noise(s);
  j["router_aux_loss_coef"] = s.router_aux_loss_coef;
  switch (s.routing_strategy) {
    case Routing::mixlora:
      j["routing_strategy"] = "mixlora";
      j["top_k"] = s.top_k;
      break;
    case Routing::mixlora_dynamic:
      j["routing_strategy"] = "mixlora-dynamic";
      j["top_p"] = s.top_p;
      j["temperature"] = s.temperature;
      break;
    case Routing::mixlora_switch:
      j["routing_strategy"] = "mixlora-switch";
      j["expert_capacity"] = s.expert_capacity;
      j["router_z_loss_coef"] = s.router_z_loss_coef;
      j["sparse_step"] = 1;
      break;
  }
  Json expert = Json::object();
  if (s.expert_lora.r) expert["r"] = *s.expert_lora.r;
  if (s.expert_lora.lora_alpha) expert["lora_alpha"] = *s.expert_lora.lora_alpha;
  if (s.expert_lora.lora_dropout) expert["lora_dropout"] = *s.expert_lora.lora_dropout;
  if (s.expert_lora.use_dora) expert["use_dora"] = *s.expert_lora.use_dora;
  if (!expert.empty()) j["expert_lora"] = expert;
  return j;
}

/// The config must describe this very adapter: reading numbers into another shape would be silent
/// nonsense.
void check_config(const Json& found, const AdapterSpec& s, const std::string& file) {
  const Json expected = config_of(s, "");
  require(found.is_object(), "{}: expected an object", file);
  for (const char* key : {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "num_experts",
                          "routing_strategy", "top_k", "expert_lora"}) {
    if (!expected.contains(key)) continue;
    const Json fallback = std::string(key).starts_with("use_") ? Json(false) : Json(nullptr);
    const Json value = found.contains(key) ? found[key] : fallback;
    require(value == expected[key], "{}: \"{}\" is {}; this adapter has {}", file, key,
            shown(value), shown(expected[key]));
  }
  for (const char* key :
       {"rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save"})
    require(!found.contains(key) || found[key].is_null() || found[key].empty(),
            "{}: \"{}\" is {}; it is not supported", file, key,
            found.contains(key) ? shown(found[key]) : "");
}

}  // namespace

void Adapter::save(const std::filesystem::path& directory, const std::string& base_model) const {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  require(!error, "{}: cannot be made: {}", directory.string(), error.message());
  std::vector<WriteTensor> tensors;
  for (const FileTensor& t : file_tensors()) tensors.push_back({t.name, t.shape, t.view});
  AtomicFile weights(directory / "adapter_model.safetensors"),
      config(directory / "adapter_config.json");
  write_safetensors(weights, tensors);
  config.write(config_of(spec_, base_model).dump(2) + "\n");
  weights.sync();
  config.sync();
  weights.commit();
  config.commit();
}

void Adapter::load(const std::filesystem::path& directory) {
  const auto config = directory / "adapter_config.json";
  check_config(read_json(config, 1 << 20), spec_, config.string());
  const TensorFiles files = TensorFiles::open_file(directory / "adapter_model.safetensors");
  const auto wanted = file_tensors();
  for (const FileTensor& t : wanted) {
    std::vector<float> numbers(static_cast<std::size_t>(t.view.numel()));
    files.read_f32(t.name, numbers, t.shape);
    for (std::int64_t i = 0; i < t.view.rows(); ++i)
      std::copy_n(numbers.begin() + i * t.view.cols(), t.view.cols(), t.view.row<float>(i));
  }
  require(files.tensors().size() == wanted.size(), "{}: {} tensors; this adapter has {}",
          directory.string(), files.tensors().size(), wanted.size());
}

}  // namespace mixlora
