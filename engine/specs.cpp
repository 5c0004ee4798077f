#include "engine/specs.h"

#include <cmath>

namespace mixlora {

const char* name_of(Projection p) {
  constexpr std::array kNames{"q_proj",    "k_proj",  "v_proj",   "o_proj",
                              "gate_proj", "up_proj", "down_proj"};
  return kNames.at(static_cast<std::size_t>(p));
}

bool has_router(const AdapterSpec& a) {
  return a.method == Method::mixlora || a.method == Method::mixdora;
}
bool attention_dora(const AdapterSpec& a) {
  return a.method == Method::dora || a.method == Method::mixdora;
}
bool ffn_dora(const AdapterSpec& a) {
  return has_router(a) ? a.expert_lora.use_dora.value_or(attention_dora(a)) : attention_dora(a);
}
std::int64_t expert_rank(const AdapterSpec& a) {
  return has_router(a) ? a.expert_lora.r.value_or(a.r) : a.r;
}

namespace {
double scale(double alpha, std::int64_t rank, bool rslora) {
  const auto r = static_cast<double>(rank);
  return alpha / (rslora ? std::sqrt(r) : r);  // [Hu et al. 2021; Kalajdzievski 2023]
}
}  // namespace

double attention_scale(const AdapterSpec& a) { return scale(a.lora_alpha, a.r, a.use_rslora); }
double expert_scale(const AdapterSpec& a) {
  const double alpha =
      has_router(a) ? a.expert_lora.lora_alpha.value_or(a.lora_alpha) : a.lora_alpha;
  return scale(alpha, expert_rank(a), a.use_rslora);
}
double expert_dropout(const AdapterSpec& a) {
  return has_router(a) ? a.expert_lora.lora_dropout.value_or(a.lora_dropout) : a.lora_dropout;
}
double router_init_range(const AdapterSpec& a) {
  return a.router_init_range.value_or(a.routing_strategy == Routing::mixlora_switch ? 1.0 : 0.02);
}
double jitter_noise(const AdapterSpec& a) {
  return a.jitter_noise.value_or(a.routing_strategy == Routing::mixlora_switch ? 0.01 : 0.0);
}

Router router_of(const AdapterSpec& a) {
  Router r;
  if (!has_router(a)) return r;
  r.experts = a.num_experts;
  r.overflow = a.overflow;
  switch (a.routing_strategy) {
    case Routing::mixlora:
      r.kind = RouterKind::top_k;
      r.slots = a.top_k;
      break;
    case Routing::mixlora_dynamic:
      r.kind = RouterKind::top_p;
      r.slots = a.num_experts;
      r.top_p = static_cast<float>(a.top_p);
      r.temperature = static_cast<float>(a.temperature);
      break;
    case Routing::mixlora_switch:
      r.kind = RouterKind::switch_top1;
      r.slots = 1;
      r.capacity = a.expert_capacity;
      break;
  }
  return r;
}

}  // namespace mixlora
