// One call of attention as its kernels see it, and what they share.
#pragma once
#include "kernels/cuda/launch.cuh"

namespace mixlora::cuda {

using Number = __nv_bfloat16;  // of the tensor-core kernels

template <class T> struct AttentionCall {
  const T *qkv, *o, *d_o;  // (N, (H + 2 Hkv) D), (N, H D)
  T *out, *d_qkv;
  float *lse, *mean;  // (N, H); mean: d_o . o
  const float* rope;  // (positions, D): d_q and d_k are turned back by these angles; or null
  const std::int32_t* ids;
  const std::int32_t* table;
  int sequences, heads, kv_heads, head_dim;
  Index rows;  // N
  bool prefixes;
  float root;          // 1 / sqrt(D)
  const float* scale;  // (width): q, k, v were scaled by it before rope; or null
  float* d_scale;      // (width), added to
  float* row_dots;     // (N): <q, d_q> + <k, d_k> + <v, d_v>; or null
  float* dot_parts;    // (H + Hkv, N): of each query head, of each key head with its values
  float* scale_sums;  // (parts, width): d_scale scale of 64 rows of a sequence each; see scale_part

  __host__ __device__ Index width() const {
    return static_cast<Index>(heads + 2 * kv_heads) * head_dim;
  }
  __device__ float& dot_part(Index n, int part) const { return dot_parts[part * rows + n]; }
  __device__ int kv_of(int head) const { return head / (heads / kv_heads); }
  __device__ const T* query(Index n, int head) const { return qkv + n * width() + head * head_dim; }
  __device__ const T* key(Index n, int kv) const { return query(n, heads + kv); }
  __device__ const T* value(Index n, int kv) const { return query(n, heads + kv_heads + kv); }
};
struct Sequence {
  int begin, length, prefix_begin, prefix_length;
};
__device__ inline Sequence sequence_of(const std::int32_t* table, int s) {
  const int4 x = reinterpret_cast<const int4*>(table)[s];
  return {x.x, x.y, x.z, x.w};
}

constexpr float kLog2E = 1.44269504F;

/// The part of scale_sums that is of a sequence's first 64 rows; the next rows' are behind it.
/// Sequences lie end to end, so that no two meet; not every part is of some rows.
constexpr int kScaleRows = 64;
__host__ __device__ inline Index scale_part(Index sequence, Index begin) {
  return begin / kScaleRows + sequence;
}

/// The kernels for compute capability 9.0: heads of 128, no prefixes; in builds for it alone.
/// `rows` of qkv; the device has so many processors. Backward's c.mean is room for d_o . o, its
/// scale wants rope.
void warpgroup_forward(const AttentionCall<Number>& c, Index rows, Index max_length, int processors,
                       cudaStream_t stream);
void warpgroup_backward(const AttentionCall<Number>& c, Index rows, Index max_length,
                        int processors, cudaStream_t stream);

}  // namespace mixlora::cuda
