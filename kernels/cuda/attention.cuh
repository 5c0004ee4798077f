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
  bool prefixes;
  float root;  // 1 / sqrt(D)

  __host__ __device__ Index width() const {
    return static_cast<Index>(heads + 2 * kv_heads) * head_dim;
  }
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

/// Turns row h of a lane's C tiles back by the rotary angles of row n[h].
template <int D>
__device__ void turn_back(float (&x)[D / 8][4], const AttentionCall<Number>& m, Index n0, Index n1,
                          int lane) {
  const Index n[2] = {n0, n1};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float* angles = m.rope + static_cast<Index>(m.ids[4 * n[h] + 1]) * D + lane % 4 * 2;
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      const float2 cosine = *reinterpret_cast<const float2*>(angles + 8 * c),
                   sine = *reinterpret_cast<const float2*>(angles + D / 2 + 8 * c);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float &left = x[c][2 * h + i], &right = x[c + D / 16][2 * h + i];
        const float a = left, b = right, cos = i == 0 ? cosine.x : cosine.y,
                    sin = i == 0 ? sine.x : sine.y;
        left = a * cos + b * sin;
        right = b * cos - a * sin;
      }
    }
  }
}

/// The kernels for compute capability 9.0: heads of 128, no prefixes; in builds for it alone.
/// `rows` of qkv; the device has so many processors. Backward's c.mean is room for d_o . o.
void warpgroup_forward(const AttentionCall<Number>& c, Index rows, Index max_length, int processors,
                       cudaStream_t stream);
void warpgroup_backward(const AttentionCall<Number>& c, Index rows, Index max_length,
                        int processors, cudaStream_t stream);

}  // namespace mixlora::cuda
