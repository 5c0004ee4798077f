// The JSON form of the specs: names of methods.md section 5.
#pragma once
#include <array>
#include <string>
#include <utility>

#include "engine/fields.h"
#include "engine/specs.h"

namespace mixlora {

inline auto enum_names(Method /*of*/) {
  return std::array<std::pair<Method, const char*>, 5>{{{Method::base, "base"},
                                                        {Method::lora, "lora"},
                                                        {Method::dora, "dora"},
                                                        {Method::mixlora, "mixlora"},
                                                        {Method::mixdora, "mixdora"}}};
}
inline auto enum_names(LoraInit /*of*/) {
  return std::array<std::pair<LoraInit, const char*>, 2>{
      {{LoraInit::original, "original"}, {LoraInit::gaussian, "gaussian"}}};
}
inline auto enum_names(Routing /*of*/) {
  return std::array<std::pair<Routing, const char*>, 3>{
      {{Routing::mixlora, "mixlora"},
       {Routing::mixlora_dynamic, "mixlora-dynamic"},
       {Routing::mixlora_switch, "mixlora-switch"}}};
}
inline auto enum_names(AuxScope /*of*/) {
  return std::array<std::pair<AuxScope, const char*>, 2>{
      {{AuxScope::global, "global"}, {AuxScope::layer, "layer"}}};
}
inline auto enum_names(Overflow /*of*/) {
  return std::array<std::pair<Overflow, const char*>, 2>{
      {{Overflow::base, "base"}, {Overflow::input, "input"}}};
}
inline auto enum_names(Activation /*of*/) {
  return std::array<std::pair<Activation, const char*>, 4>{{{Activation::silu, "silu"},
                                                            {Activation::gelu, "gelu"},
                                                            {Activation::gelu_new, "gelu_new"},
                                                            {Activation::relu, "relu"}}};
}
inline auto enum_names(Optim /*of*/) {
  return std::array<std::pair<Optim, const char*>, 2>{
      {{Optim::adamw, "adamw"}, {Optim::sgd, "sgd"}}};
}
inline auto enum_names(Schedule /*of*/) {
  return std::array<std::pair<Schedule, const char*>, 7>{
      {{Schedule::constant, "constant"},
       {Schedule::linear, "linear"},
       {Schedule::cosine, "cosine"},
       {Schedule::cosine_with_restarts, "cosine_with_restarts"},
       {Schedule::polynomial, "polynomial"},
       {Schedule::constant_with_warmup, "constant_with_warmup"},
       {Schedule::inverse_sqrt, "inverse_sqrt"}}};
}
inline auto enum_names(TrainOn /*of*/) {
  return std::array<std::pair<TrainOn, const char*>, 2>{
      {{TrainOn::all, "all"}, {TrainOn::answer, "answer"}}};
}
inline auto enum_names(Recompute /*of*/) {
  return std::array<std::pair<Recompute, const char*>, 4>{{{Recompute::automatic, "auto"},
                                                           {Recompute::none, "none"},
                                                           {Recompute::gate_up, "gate-up"},
                                                           {Recompute::layer, "layer"}}};
}

/// "all-linear", a list of projections, or {"q_proj": true, ...}.
void read_field(const Json& j, Targets& out, const std::string& path);
Json write_field(const Targets& in);

template <class V> void fields(V& v, ExpertLora& s) {
  v("r", s.r);
  v("lora_alpha", s.lora_alpha);
  v("lora_dropout", s.lora_dropout);
  v("use_dora", s.use_dora);
}
template <class V> void fields(V& v, AdapterSpec& s) {
  v("method", s.method);
  v("r", s.r);
  v("lora_alpha", s.lora_alpha);
  v("lora_dropout", s.lora_dropout);
  v("target_modules", s.target_modules);
  v("use_rslora", s.use_rslora);
  v("lora_init", s.lora_init);
  v("routing_strategy", s.routing_strategy);
  v("num_experts", s.num_experts);
  v("top_k", s.top_k);
  v("top_p", s.top_p);
  v("temperature", s.temperature);
  v("router_init_range", s.router_init_range);
  v("jitter_noise", s.jitter_noise);
  v("router_loss", s.router_loss);
  v("router_aux_loss_coef", s.router_aux_loss_coef);
  v("router_aux_loss_scope", s.router_aux_loss_scope);
  v("router_z_loss_coef", s.router_z_loss_coef);
  v("expert_capacity", s.expert_capacity);
  v("overflow", s.overflow);
  v("ffn_dropout", s.ffn_dropout);
  v("act_fn", s.act_fn);
  v("expert_lora", s.expert_lora);
}
template <class V> void fields(V& v, TrainSpec& s) {
  v("tasks", s.tasks);
  v("optim", s.optim);
  v("lr", s.lr);
  v("loraplus_lr_ratio", s.loraplus_lr_ratio);
  v("momentum", s.momentum);
  v("weight_decay", s.weight_decay);
  v("scheduler_type", s.scheduler_type);
  v("warmup_steps", s.warmup_steps);
  v("warmup_ratio", s.warmup_ratio);
  v("num_epochs", s.num_epochs);
  v("max_steps", s.max_steps);
  v("batch_size", s.batch_size);
  v("micro_batch_size", s.micro_batch_size);
  v("group_by_length", s.group_by_length);
  v("cutoff_len", s.cutoff_len);
  v("max_grad_norm", s.max_grad_norm);
  v("train_on", s.train_on);
  v("limit", s.limit);
  v("seed", s.seed);
}

/// What one field list cannot say: ranges and combinations. Throws InputError naming the key under
/// `path`.
void check(const AdapterSpec& s, const std::string& path);
void check(const TrainSpec& s, const std::string& path);

}  // namespace mixlora
