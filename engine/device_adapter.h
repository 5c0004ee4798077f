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

/// Columns [begin, end) of the joint rows q | k | v.
struct Span {
  std::int64_t begin, end;
};
std::array<Span, 3> qkv_spans(const ModelConfig& c);
/// Numbers [begin, end) of a flat tensor.
template <class T> T cut(T flat, Span s) {
  return flat.col_range(s.begin, s.end).reshaped({s.end - s.begin});
}

/// DoRA's column scales c = m / n and 1 / n of one block; absent where there is no magnitude.
struct DoraScales {
  Tensor qkv, qkv_inverse;                    // (q | k | v) f32; 1 where one has no magnitude
  Tensor o, o_inverse;                        // (D) f32
  Tensor gate, gate_inverse, up, up_inverse;  // (E, F) f32
  Tensor down, down_inverse;                  // (E, D) f32
};

/// Not movable: the arenas' views point into it.
class DeviceAdapter {
 public:
  /// When a layer's numbers are updated: after the whole backward pass, or right behind the layer's
  /// own, which needs memory for one layer's gradients only (and no clipping by the norm of all, no
  /// second pass that adds to them).
  enum class Update : std::uint8_t { none, after_backward, by_layer };
  /// Declares and takes the memory; an update adds gradients, moments and DoRA's gradient buffers.
  DeviceAdapter(Backend& ops, const ModelConfig& model, const AdapterSpec& spec, std::uint64_t seed,
                Update update);
  DeviceAdapter(const DeviceAdapter&) = delete;
  DeviceAdapter& operator=(const DeviceAdapter&) = delete;

  /// The numbers have changed: DoRA's scales are recomputed before their next use.
  void mark_changed() { stale_ = true; }
  void upload(Backend& ops, std::span<const float> numbers);
  void download(Backend& ops, std::span<float> numbers) const;
  /// Recomputes DoRA's scales when the numbers have changed since; all products through `ops`.
  void refresh_scales(Backend& ops, const Model& model, Scratch& scratch);
  /// Before a step's first pass: no gradients yet, and by what numbers they will be used.
  void begin_step(Backend& ops, Optim optim, StepNumbers slow, StepNumbers fast);
  /// Behind layer i's backward: its magnitudes' gradients, from its scales'; updates it when that
  /// is this adapter's way.
  void finish_layer(Backend& ops, std::size_t i);
  /// Behind the step's last pass: updates what is not updated yet; `norm_squared` is then complete.
  void finish_step(Backend& ops);

  AdapterSpec spec;
  std::uint64_t seed;
  AdapterLayout layout;
  Router router;
  std::int64_t experts = 1, slots = 1, rank = 0;
  float attention_scale = 1, ffn_scale = 1, attention_p = 0, expert_p = 0;
  Tensor values, compute, moment1, moment2;  // flat
  Tensor grads;                              // flat; of one layer when updated by layer
  Tensor norm_squared;                       // (1) f32
  std::vector<DoraScales> scales;            // one a layer; empty without DoRA
  DoraScales d_scales;  // gradients of one layer's scales; 0 between layers (where a magnitude is)
  Tensor stats, fraction, aux;  // (L, 2E+2), (L, E), (2): router statistics of a step
  bool per_slot = false;        // DoRA on down_proj: the experts' outputs stay apart
  std::size_t bytes() const { return arena_.bytes(); }

 private:
  /// Updates `count` numbers from `begin` with the gradients from `grad_begin`.
  void update(Backend& ops, std::int64_t begin, std::int64_t count, std::int64_t grad_begin,
              StepNumbers numbers);

  /// d_scales, of layer i, to its magnitudes' gradients.
  void finish_magnitudes(Backend& ops, std::size_t i);

  std::array<Span, 3> qkv_spans_;
  Arena arena_;
  Update update_;
  Optim optim_ = Optim::adamw;
  StepNumbers slow_, fast_;
  bool stale_ = true;
};

}  // namespace mixlora
