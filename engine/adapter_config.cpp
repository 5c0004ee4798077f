#include "engine/adapter_config.h"

#include <array>
#include <utility>

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/specs_json.h"

namespace mixlora {
namespace {

template <class T> void take(const Json& j, const char* key, T& out, const std::string& file) {
  if (j.contains(key) && !j[key].is_null()) read(j[key], out, fmt::format("{}: \"{}\"", file, key));
}
bool flag(const Json& j, const char* key, const std::string& file) {
  bool value = false;
  take(j, key, value, file);
  return value;
}

/// What would make of the same numbers another adapter than the one this engine computes.
void refuse_unsupported(const Json& j, const std::string& file) {
  for (const char* key : {"rank_pattern", "alpha_pattern", "layers_to_transform",
                          "layer_replication", "modules_to_save", "target_parameters",
                          "trainable_token_indices", "alora_invocation_tokens"})
    require(!j.contains(key) || j[key].is_null() || (j[key].is_structured() && j[key].empty()),
            "{}: \"{}\" is {}; only null is supported", file, key,
            j.contains(key) ? shown(j[key]) : "");
  for (const char* key : {"fan_in_fan_out", "lora_bias", "use_qalora"})
    require(!flag(j, key, file), "{}: \"{}\": only false is supported", file, key);
  const Json bias = j.value("bias", Json("none")), start = j.value("init_lora_weights", Json(true));
  require(bias == "none", "{}: \"bias\" is {}; only \"none\" is supported", file, shown(bias));
  require(
      start.is_boolean() || start.is_null() || start == "gaussian" || start == "orthogonal" ||
          start == "eva",
      "{}: \"init_lora_weights\" is {}: it changes the base model's weights, so the adapter alone "
      "is not the model; expected true, false, \"gaussian\", \"orthogonal\" or \"eva\"",
      file, shown(start));
}

void read_router(const Json& j, AdapterSpec& s, const std::string& file) {
  take(j, "routing_strategy", s.routing_strategy, file);
  take(j, "num_experts", s.num_experts, file);
  take(j, "top_k", s.top_k, file);
  take(j, "top_p", s.top_p, file);
  take(j, "temperature", s.temperature, file);
  take(j, "expert_capacity", s.expert_capacity, file);
  take(j, "router_init_range", s.router_init_range, file);
  take(j, "jitter_noise", s.jitter_noise, file);
  take(j, "router_aux_loss_coef", s.router_aux_loss_coef, file);
  take(j, "router_z_loss_coef", s.router_z_loss_coef, file);
  take(j, "act_fn", s.act_fn, file);
  if (!j.contains("expert_lora") || j["expert_lora"].is_null()) return;
  const Json& e = j["expert_lora"];
  const std::string where = file + ": expert_lora";
  require(e.is_object(), "{}: expected an object, found {}", where, shown(e));
  take(e, "r", s.expert_lora.r, where);
  take(e, "lora_alpha", s.expert_lora.lora_alpha, where);
  take(e, "lora_dropout", s.expert_lora.lora_dropout, where);
  take(e, "use_dora", s.expert_lora.use_dora, where);
}

/// Everything that decides what an adapter's numbers mean; experts by what they come to.
std::vector<std::pair<const char*, Json>> identity(const AdapterSpec& s) {
  std::vector<std::pair<const char*, Json>> keys{{"peft_type", has_router(s) ? "MIXLORA" : "LORA"},
                                                 {"r", s.r},
                                                 {"lora_alpha", s.lora_alpha},
                                                 {"use_rslora", s.use_rslora},
                                                 {"use_dora", attention_dora(s)},
                                                 {"target_modules", write(s.target_modules)}};
  if (!has_router(s)) return keys;
  keys.emplace_back("num_experts", s.num_experts);
  keys.emplace_back("routing_strategy", write(s.routing_strategy));
  if (s.routing_strategy == Routing::mixlora) keys.emplace_back("top_k", s.top_k);
  if (s.routing_strategy == Routing::mixlora_dynamic) keys.emplace_back("top_p", s.top_p);
  keys.emplace_back("act_fn", write(s.act_fn));
  keys.emplace_back("expert_lora.r", expert_rank(s));
  keys.emplace_back("expert_lora.lora_alpha", s.expert_lora.lora_alpha.value_or(s.lora_alpha));
  keys.emplace_back("expert_lora.use_dora", ffn_dora(s));
  return keys;
}

}  // namespace

Json write_adapter_config(const AdapterSpec& s, const std::string& base_model) {
  Json j = {
      {"peft_type", has_router(s) ? "MIXLORA" : "LORA"},
      {"task_type", "CAUSAL_LM"},
      {"base_model_name_or_path", base_model},
      {"r", s.r},
      {"lora_alpha", s.lora_alpha},
      {"lora_dropout", s.lora_dropout},
      {"target_modules", write(s.target_modules)},
      {"bias", "none"},
      {"use_rslora", s.use_rslora},
      {"use_dora", attention_dora(s)},
      {"fan_in_fan_out", false},
      {"inference_mode", true},
      {"init_lora_weights", s.lora_init == LoraInit::gaussian ? Json("gaussian") : Json(true)}};
  if (!has_router(s)) return j;
  j["num_experts"] = s.num_experts;
  j["act_fn"] = write(s.act_fn);
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

AdapterSpec read_adapter_config(const Json& j, const std::string& file) {
  require(j.is_object(), "{}: expected an object, found {}", file, shown(j));
  const Json type = j.value("peft_type", Json());
  require(type == "LORA" || type == "MIXLORA",
          "{}: \"peft_type\" is {}; expected \"LORA\" or \"MIXLORA\"", file, shown(type));
  for (const char* key : {"r", "lora_alpha", "target_modules"})
    require(j.contains(key) && !j[key].is_null(), "{}: \"{}\" is missing", file, key);
  refuse_unsupported(j, file);
  AdapterSpec s;
  const bool dora = flag(j, "use_dora", file);
  if (type == "MIXLORA")
    s.method = dora ? Method::mixdora : Method::mixlora;
  else
    s.method = dora ? Method::dora : Method::lora;
  s.lora_dropout = 0;
  take(j, "r", s.r, file);
  take(j, "lora_alpha", s.lora_alpha, file);
  take(j, "lora_dropout", s.lora_dropout, file);
  take(j, "target_modules", s.target_modules, file);
  take(j, "use_rslora", s.use_rslora, file);
  if (type == "MIXLORA") read_router(j, s, file);
  check(s, file + ": adapter");
  return s;
}

void require_same_adapter(const AdapterSpec& found, const AdapterSpec& spec,
                          const std::string& file) {
  const auto a = identity(found), b = identity(spec);
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    if (a[i].first == b[i].first && a[i].second == b[i].second) continue;
    fail("{}: \"{}\" is {}; this adapter has {}", file, b[i].first,
         a[i].first == b[i].first ? shown(a[i].second) : "absent", shown(b[i].second));
  }
}

}  // namespace mixlora
