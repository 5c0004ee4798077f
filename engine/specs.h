// Specs: what a trial asks of the engine; names and defaults of methods.md section 5.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace mixlora {

enum class Method : std::uint8_t { base, lora, dora, mixlora, mixdora };
enum class LoraInit : std::uint8_t { original, gaussian };
enum class Routing : std::uint8_t { mixlora, mixlora_dynamic, mixlora_switch };
enum class AuxScope : std::uint8_t { global, layer };
enum class Optim : std::uint8_t { adamw, sgd };
enum class Schedule : std::uint8_t {
  constant,
  linear,
  cosine,
  cosine_with_restarts,
  polynomial,
  constant_with_warmup,
  inverse_sqrt
};
enum class TrainOn : std::uint8_t { all, answer };
enum class Recompute : std::uint8_t { automatic, none, gate_up, layer };

/// The seven projections of a Llama block that an adapter may target.
enum class Projection : std::uint8_t { q, k, v, o, gate, up, down };
inline constexpr std::size_t kProjections = 7;
/// "q_proj" ... "down_proj": Hugging Face's names.
const char* name_of(Projection p);

/// Which projections are adapted, by Projection. A type of its own, so that its JSON form is found.
struct Targets : std::array<bool, kProjections> {};
inline constexpr Targets kAllTargets{{true, true, true, true, true, true, true}};

/// Overlays the experts' own LoRA numbers; an absent one is the adapter's.
struct ExpertLora {
  std::optional<std::int64_t> r;
  std::optional<double> lora_alpha;
  std::optional<double> lora_dropout;
  std::optional<bool> use_dora;
};

struct AdapterSpec {
  Method method = Method::lora;
  std::int64_t r = 16;
  double lora_alpha = 32;
  double lora_dropout = 0.05;
  Targets target_modules = kAllTargets;
  bool use_rslora = false;
  LoraInit lora_init = LoraInit::original;
  // MixLoRA and MixDoRA
  Routing routing_strategy = Routing::mixlora;
  std::int64_t num_experts = 8;
  std::int64_t top_k = 2;
  double top_p = 0.8;
  double temperature = 0;
  std::optional<double> router_init_range;  // 0.02; switch 1.0
  std::optional<double> jitter_noise;       // 0; switch 0.01
  bool router_loss = true;
  double router_aux_loss_coef = 1e-3;
  AuxScope router_aux_loss_scope = AuxScope::global;
  double router_z_loss_coef = 1e-3;   // switch only
  std::int64_t expert_capacity = 32;  // switch only
  Overflow overflow = Overflow::base;
  double ffn_dropout = 0;            // switch only
  std::optional<Activation> act_fn;  // absent: the model's own
  ExpertLora expert_lora;
};

bool has_router(const AdapterSpec& a);      // MixLoRA or MixDoRA
bool attention_dora(const AdapterSpec& a);  // magnitudes on q, k, v, o
bool ffn_dora(const AdapterSpec& a);        // magnitudes on gate, up, down (of every expert)
std::int64_t expert_rank(const AdapterSpec& a);
double attention_scale(const AdapterSpec& a);  // s of q, k, v, o
double expert_scale(const AdapterSpec& a);     // s of gate, up, down
double expert_dropout(const AdapterSpec& a);
double router_init_range(const AdapterSpec& a);
double jitter_noise(const AdapterSpec& a);
/// The router of the kernels: kind, experts, slots (top_k; E for top-p; 1 for switch).
Router router_of(const AdapterSpec& a);

struct TrainSpec {
  std::vector<std::string> tasks;  // suites to learn from, concatenated; empty: no training
  Optim optim = Optim::adamw;
  double lr = 2e-4;
  double loraplus_lr_ratio = 1;
  double momentum = 0;
  double weight_decay = 0.01;
  Schedule scheduler_type = Schedule::constant;
  std::int64_t warmup_steps = 0;
  double warmup_ratio = 0;
  double num_epochs = 2;
  std::int64_t max_steps = 0;  // 0: by epochs
  std::int64_t batch_size = 16;
  std::int64_t micro_batch_size = 0;  // 0: batch_size
  bool group_by_length = false;
  std::int64_t cutoff_len = 512;
  double max_grad_norm = 0;  // 0: off
  TrainOn train_on = TrainOn::all;
  std::int64_t limit = 0;  // first n samples of every task; 0: all
  std::uint64_t seed = 42;
};

}  // namespace mixlora
