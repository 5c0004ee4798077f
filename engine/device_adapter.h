// DeviceAdapter: an adapter's numbers on the device, with gradients and moments while it trains.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/adapter.h"
#include "engine/model.h"
#include "kernels/arena.h"
#include "kernels/backend.h"

namespace mixlora {

/// DoRA's column scales c = m / n and 1 / n of one block; absent where there is no magnitude.
struct DoraScales {
  std::array<Tensor, 3> qkv, qkv_inverse;     // (out) f32
  Tensor o, o_inverse;                        // (D) f32
  Tensor gate, gate_inverse, up, up_inverse;  // (E, F) f32
  Tensor down, down_inverse;                  // (E, D) f32
};

/// Not movable: the arenas' views point into it.
class DeviceAdapter {
 public:
  /// Declares and takes the memory; `trainable` adds gradients, moments and DoRA's gradient
  /// buffers.
  DeviceAdapter(Backend& ops, const ModelConfig& model, const AdapterSpec& spec, std::uint64_t seed,
                bool trainable);
  DeviceAdapter(const DeviceAdapter&) = delete;
  DeviceAdapter& operator=(const DeviceAdapter&) = delete;

  /// The numbers have changed: DoRA's scales are recomputed before their next use.
  void mark_changed() { stale_ = true; }
  void upload(Backend& ops, std::span<const float> numbers);
  void download(Backend& ops, std::span<float> numbers) const;
  /// Recomputes DoRA's scales when the numbers have changed since; all products through `ops`.
  void refresh_scales(Backend& ops, const Model& model, Scratch& scratch);
  /// One optimizer step over all numbers; the squared gradient norm must be in `norm_squared`.
  void step(Backend& ops, Optim optim, StepNumbers slow, StepNumbers fast);

  AdapterSpec spec;
  std::uint64_t seed;
  AdapterLayout layout;
  Router router;
  std::int64_t experts = 1, slots = 1, rank = 0;
  float attention_scale = 1, ffn_scale = 1, attention_p = 0, expert_p = 0;
  Tensor values, compute, grads, moment1, moment2;  // flat
  Tensor norm_squared;                              // (1) f32
  std::vector<DoraScales> scales;                   // one a layer; empty without DoRA
  DoraScales d_scales;                              // gradients of one layer's scales
  Tensor stats, fraction, aux;  // (L, 2E+2), (L, E), (2): router statistics of a step
  bool per_slot = false;        // DoRA on down_proj: the experts' outputs stay apart
  std::size_t bytes() const { return arena_.bytes(); }

 private:
  Arena arena_;
  bool stale_ = true;
};

}  // namespace mixlora
