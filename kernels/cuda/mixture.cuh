// What the kernels of the gated feed-forward mixture share: the call, its rows, its activation.
#pragma once
#include "kernels/backend.h"
#include "kernels/cuda/launch.cuh"

namespace mixlora::cuda {

/// A call of Backend::mixture or mixture_backward as a kernel's argument. T is the activations'
/// type; null pointers are absent parts. Letters as in backend.h.
template <class T> struct MixtureCall {
  const T *gate_up, *a;             // (N, 2F), (N, 2 E R)
  const T *gate_b, *up_b, *down_a;  // (E, F, R), (E, F, R), (E, R, F)
  const float *gate_scale, *up_scale;
  const std::int32_t* expert;  // (N, K), null: expert 0 of 1
  const float* weight;         // (N, K), null: 1
  const std::int32_t* ids;     // (N, 4)
  Index rows, width;           // N, F
  int experts, slots, rank;    // E, K, R
  Activation activation;
  float scale;  // s
  bool per_slot;
  // Dropout: an element is kept when its 16 bits are not below `threshold`, and then times `keep`.
  RandomKey key;
  std::uint32_t threshold, layer, site;
  float keep;
  // forward
  T *out, *z;  // (N, F) or (K, N, F); (N, K R)
  // backward
  const T *d_out, *q, *z_in;  // (N, F) or (K, N, F); (N, E R) or (K N, E R); (N, K R)
  T *d_gate_up, *p;           // (N, 2F), (N, 2 E R)
  float* d_weight;            // (N, K)
  float* row_dots;            // (N), of passes that leave it
  float *d_gate_b, *d_up_b, *d_down_a, *d_gate_scale, *d_up_scale;
  // Of the tile kernels: the slots of this pass, whether it adds to an earlier one's output, the
  // order of its rows in tiles, and all (row, slot) pairs by expert; null: as they come.
  int first_slot;
  bool adds;
  const std::int32_t *order, *tiles, *pairs, *pair_begin;

  __device__ int expert_of(Index n, int k) const { return expert ? expert[n * slots + k] : 0; }
  __device__ float weight_of(Index n, int k) const { return weight ? weight[n * slots + k] : 1.0F; }
  /// The 128 bits of eight neighbouring columns of a row (sample, position, step) for expert e;
  /// column = 8 * block + i.
  __device__ Philox4 bits(int4 id, int e, Index block) const {
    return row_bits(key, layer, site + static_cast<std::uint32_t>(e),
                    static_cast<std::uint32_t>(id.z), static_cast<std::uint32_t>(id.x),
                    static_cast<std::uint32_t>(id.y), static_cast<std::uint32_t>(block));
  }
  /// A row's {sample, position, step, adapter}.
  __device__ int4 id_of(Index n) const { return __ldg(reinterpret_cast<const int4*>(ids) + n); }
};

/// What both directions read of a call. Throws std::logic_error when a view is strided.
template <class T> MixtureCall<T> call_of(const Mixture& m);

struct Activated {
  float value, slope;
};
/// act(x) and act'(x): reference/mixture.h's `activate`.
__device__ inline Activated activate(Activation kind, float x) {
  switch (kind) {
    case Activation::silu: {
      const float s = 1.0F / (1.0F + expf(-x));
      return {x * s, s * (1.0F + x * (1.0F - s))};
    }
    case Activation::gelu: {
      const float half = 0.5F * (1.0F + erff(x * 0.70710678F));
      return {x * half, half + x * 0.39894228F * expf(-0.5F * x * x)};
    }
    case Activation::gelu_new: {
      constexpr float c = 0.79788456F, cubic = 0.044715F;
      const float t = tanhf(c * (x + cubic * x * x * x));
      return {0.5F * x * (1.0F + t),
              0.5F * (1.0F + t) + 0.5F * x * (1.0F - t * t) * c * (1.0F + 3.0F * cubic * x * x)};
    }
    case Activation::relu:
      break;
  }
  return x > 0 ? Activated{x, 1.0F} : Activated{0.0F, 0.0F};
}

using TileCall = MixtureCall<__nv_bfloat16>;
/// Whether the tensor-core kernels take this shape: SiLU, widths by 32, ranks by 8 up to 80 (scales
/// only with factors), at most 32 experts.
bool tiles_take(const TileCall& c);
/// Bytes of working memory of a call, forward or backward.
std::size_t tiles_bytes(const TileCall& c);
/// `memory` has tiles_bytes(); both enqueue on `stream`. Backward returns whether row_dots are
/// left.
void tiles_forward(TileCall c, void* memory, cudaStream_t stream);
bool tiles_backward(TileCall c, void* memory, cudaStream_t stream);
/// The same of backward in one pass, for one expert without a choice, of what tiles_take: all three
/// factors of at most 16 ranks with their gradients, and p. Returns whether row_dots are left.
bool single_takes(const TileCall& c);
std::size_t single_bytes(const TileCall& c);
bool single_backward(const TileCall& c, void* memory, cudaStream_t stream);

}  // namespace mixlora::cuda
