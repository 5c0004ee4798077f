// Causal grouped-query attention over packed sequences with shared prefixes.
//
// Tensor-core kernels for heads of 64 and 128 in bf16, in the manner of FlashAttention-2 [Dao
// 2023]: a block has 64 rows of one head, keys and values pass through shared memory, nothing of
// size rows x keys is kept. Backward is two kernels, by keys and by queries, so that no two blocks
// add to one number. Plain kernels, one warp a row and head, serve f32 and other head sizes.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/tensor_core.cuh"

namespace mixlora {
namespace {

using namespace cuda;  // NOLINT: this file is the CUDA backend's

template <class T> struct AttentionCall {
  const T *qkv, *o, *d_o;  // (N, (H + 2 Hkv) D), (N, H D)
  T *out, *d_qkv;
  float* lse;         // (N, H)
  const float* mean;  // (N, H): d_o . o
  const std::int32_t* table;
  int sequences, heads, kv_heads, head_dim;
  bool prefixes;
  float root;  // 1 / sqrt(D)

  __device__ Index width() const { return static_cast<Index>(heads + 2 * kv_heads) * head_dim; }
  __device__ int kv_of(int head) const { return head / (heads / kv_heads); }
  __device__ const T* query(Index n, int head) const { return qkv + n * width() + head * head_dim; }
  __device__ const T* key(Index n, int kv) const { return query(n, heads + kv); }
  __device__ const T* value(Index n, int kv) const { return query(n, heads + kv_heads + kv); }
};
struct Sequence {
  int begin, length, prefix_begin, prefix_length;
};
__device__ Sequence sequence_of(const std::int32_t* table, int s) {
  const int4 x = reinterpret_cast<const int4*>(table)[s];
  return {x.x, x.y, x.z, x.w};
}

// ---- plain ---------------------------------------------------------------------------------

constexpr int kLaneDims = 8;  // head sizes up to 256

template <class T> __device__ void load_lane(float (&x)[kLaneDims], const T* p, int d) {
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    const int c = static_cast<int>(threadIdx.x) + kWarp * i;
    x[i] = c < d ? to_float(p[c]) : 0.0F;
  }
}
template <class T> __device__ void store_lane(T* p, const float (&x)[kLaneDims], int d) {
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    const int c = static_cast<int>(threadIdx.x) + kWarp * i;
    if (c < d) p[c] = from_float<T>(x[i]);
  }
}
__device__ float lane_dot(const float (&x)[kLaneDims], const float (&y)[kLaneDims]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) sum += x[i] * y[i];
  return warp_sum(sum);
}
/// The j-th of the rows that a query of a sequence sees.
__device__ Index seen(const Sequence& s, int j) {
  return j < s.prefix_length ? s.prefix_begin + j : s.begin + j - s.prefix_length;
}

/// Blocks (row of its sequence, head, sequence) of one warp.
template <class T> __global__ void plain_forward(const AttentionCall<T> m) {
  const Sequence s = sequence_of(m.table, static_cast<int>(blockIdx.z));
  const int i = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), d = m.head_dim;
  if (i >= s.length) return;
  const Index n = s.begin + i;
  float q[kLaneDims], o[kLaneDims] = {}, x[kLaneDims], top = -INFINITY, total = 0;
  load_lane(q, m.query(n, head), d);
  for (int j = 0; j <= s.prefix_length + i; ++j) {
    load_lane(x, m.key(seen(s, j), m.kv_of(head)), d);
    const float score = m.root * lane_dot(q, x), next = fmaxf(top, score);
    const float shrink = expf(top - next), p = expf(score - next);
    load_lane(x, m.value(seen(s, j), m.kv_of(head)), d);
    total = total * shrink + p;
#pragma unroll
    for (int c = 0; c < kLaneDims; ++c) o[c] = o[c] * shrink + p * x[c];
    top = next;
  }
#pragma unroll
  for (float& x_c : o) x_c /= total;
  store_lane(m.out + (n * m.heads + head) * d, o, d);
  if (threadIdx.x == 0) m.lse[n * m.heads + head] = top + logf(total);
}

template <class T> __global__ void plain_d_query(const AttentionCall<T> m) {
  const Sequence s = sequence_of(m.table, static_cast<int>(blockIdx.z));
  const int i = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), d = m.head_dim;
  if (i >= s.length) return;
  const Index n = s.begin + i, at = n * m.heads + head;
  float q[kLaneDims], g[kLaneDims], d_q[kLaneDims] = {}, k[kLaneDims], v[kLaneDims];
  load_lane(q, m.query(n, head), d);
  load_lane(g, m.d_o + at * d, d);
  for (int j = 0; j <= s.prefix_length + i; ++j) {
    load_lane(k, m.key(seen(s, j), m.kv_of(head)), d);
    load_lane(v, m.value(seen(s, j), m.kv_of(head)), d);
    const float p = expf(m.root * lane_dot(q, k) - m.lse[at]);
    const float d_score = m.root * p * (lane_dot(g, v) - m.mean[at]);
#pragma unroll
    for (int c = 0; c < kLaneDims; ++c) d_q[c] += d_score * k[c];
  }
  store_lane(m.d_qkv + n * m.width() + head * d, d_q, d);
}

/// Blocks (row of its sequence, key head, sequence): collects from all queries that saw the row.
template <class T> __global__ void plain_d_key_value(const AttentionCall<T> m) {
  const int own = static_cast<int>(blockIdx.z), i = static_cast<int>(blockIdx.x);
  const int kv = static_cast<int>(blockIdx.y), d = m.head_dim, group = m.heads / m.kv_heads;
  const Sequence s = sequence_of(m.table, own);
  if (i >= s.length) return;
  const Index row = s.begin + i;
  float k[kLaneDims], v[kLaneDims], d_k[kLaneDims] = {}, d_v[kLaneDims] = {}, q[kLaneDims],
                                    g[kLaneDims];
  load_lane(k, m.key(row, kv), d);
  load_lane(v, m.value(row, kv), d);
  for (int t = m.prefixes ? 0 : own; t < (m.prefixes ? m.sequences : own + 1); ++t) {
    const Sequence other = sequence_of(m.table, t);
    const bool as_prefix =
        row >= other.prefix_begin && row < other.prefix_begin + other.prefix_length;
    if (t != own && !as_prefix) continue;
    for (int j = as_prefix ? 0 : i; j < other.length; ++j)
      for (int head = kv * group; head < kv * group + group; ++head) {
        const Index n = other.begin + j, at = n * m.heads + head;
        load_lane(q, m.query(n, head), d);
        load_lane(g, m.d_o + at * d, d);
        const float p = expf(m.root * lane_dot(q, k) - m.lse[at]);
        const float d_score = m.root * p * (lane_dot(g, v) - m.mean[at]);
#pragma unroll
        for (int c = 0; c < kLaneDims; ++c) {
          d_k[c] += d_score * q[c];
          d_v[c] += p * g[c];
        }
      }
  }
  T* out = m.d_qkv + row * m.width();
  store_lane(out + (m.heads + kv) * d, d_k, d);
  store_lane(out + (m.heads + m.kv_heads + kv) * d, d_v, d);
}

/// mean (N, H) = d_o . o of each row and head; one warp each.
template <class T>
__global__ void mean_kernel(float* mean, const T* d_o, const T* o, int d, Index count) {
  const Index at = static_cast<Index>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (at >= count) return;
  float sum = 0;
  for (int c = static_cast<int>(threadIdx.x) % kWarp; c < d; c += kWarp)
    sum += to_float(d_o[at * d + c]) * to_float(o[at * d + c]);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) mean[at] = sum;
}

// ---- tensor cores --------------------------------------------------------------------------

using Number = __nv_bfloat16;
constexpr int kTile = 64;  // rows of a block: 16 a warp
constexpr int kWarps = kTile / 16, kThreads = kWarps * kWarp;
constexpr int kInner = 32;  // rows of the other side at a time, in backward
constexpr float kLog2E = 1.44269504F;

/// Rows in shared memory, 16 bytes apart from a multiple of 128, so that eight rows' chunks lie in
/// different banks.
template <int D> struct Rows {
  static constexpr int kStride = D + 8;
  Number* at;
  __device__ explicit Rows(Number* p) : at(p) {}
  static constexpr int bytes(int rows) { return rows * kStride * static_cast<int>(sizeof(Number)); }
};

/// Copies `count` rows of `total` (the rest zeros) of D numbers to shared memory, asynchronously.
template <int D, class RowOf>
__device__ void copy_rows(Rows<D> to, int total, int count, RowOf row_of) {
  constexpr int kChunks = D / 8;
  for (int i = static_cast<int>(threadIdx.x); i < total * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks * 8;
    Number* dst = to.at + r * Rows<D>::kStride + c;
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(dst));
    const bool there = r < count;
    const Number* src = there ? row_of(r) + c : row_of(0);
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(src),
                 "r"(bytes));
  }
  asm volatile("cp.async.commit_group;");
}
template <int N> __device__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

/// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ void load_matrices(unsigned (&x)[4], const Number* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}
__device__ void load_matrices_transposed(unsigned (&x)[4], const Number* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}
/// A operand: rows [r, r+16) and columns [c, c+16).
template <int D> __device__ void load_as_a(unsigned (&x)[4], Rows<D> rows, int r, int c, int lane) {
  load_matrices(x, rows.at + (r + lane % 16) * Rows<D>::kStride + c + lane / 16 * 8);
}
/// Two B operands of x = rows^T: inner dimension the columns [c, c+16), outer the rows [r, r+8) in
/// x[0], x[1] and [r+8, r+16) in x[2], x[3].
template <int D>
__device__ void load_as_bt(unsigned (&x)[4], Rows<D> rows, int r, int c, int lane) {
  load_matrices(x,
                rows.at + (r + lane % 8 + lane / 16 * 8) * Rows<D>::kStride + c + lane / 8 % 2 * 8);
}
/// Two B operands of x = rows: inner dimension the rows [r, r+16), outer the columns [c, c+8) and
/// [c+8, c+16).
template <int D> __device__ void load_as_b(unsigned (&x)[4], Rows<D> rows, int r, int c, int lane) {
  load_matrices_transposed(x, rows.at + (r + lane % 16) * Rows<D>::kStride + c + lane / 16 * 8);
}

__device__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}
__device__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}

/// The key tiles that 64 queries from `first` of a sequence meet: its prefix, then itself.
template <int Size> struct KeyTiles {
  Sequence s;
  int prefix_tiles, count;
  __device__ KeyTiles(const Sequence& of, int first)
      : s(of),
        prefix_tiles(ceil_div(of.prefix_length, Size)),
        count(prefix_tiles + ceil_div(min(of.length, first + kTile), Size)) {}
  __device__ bool is_prefix(int t) const { return t < prefix_tiles; }
  __device__ int first(int t) const { return (is_prefix(t) ? t : t - prefix_tiles) * Size; }
  __device__ int rows(int t) const {
    return min(Size, (is_prefix(t) ? s.prefix_length : s.length) - first(t));
  }
  __device__ Index row(int t) const { return (is_prefix(t) ? s.prefix_begin : s.begin) + first(t); }
  /// Keys of tile t that the query at position i of its sequence sees: the first so many.
  __device__ int visible(int t, int i) const {
    return is_prefix(t) ? rows(t) : min(rows(t), i + 1 - first(t));
  }
};

/// Keys and values of tile t into their half of the room for two tiles.
template <int D, int Size>
__device__ void copy_tile(Number* room, const AttentionCall<Number>& m, const KeyTiles<Size>& tiles,
                          int t, int kv) {
  Number* at = room + t % 2 * 2 * Size * Rows<D>::kStride;
  const int rows = tiles.rows(t);
  const Index first = tiles.row(t);
  copy_rows<D>(Rows<D>(at), Size, rows, [&](int r) { return m.key(first + r, kv); });
  copy_rows<D>(Rows<D>(at + Size * Rows<D>::kStride), Size, rows,
               [&](int r) { return m.value(first + r, kv); });
}
/// Two neighbouring 16x8 tiles c += a b, b as load_as_bt and load_as_b give it.
__device__ void mma2(float (&left)[4], float (&right)[4], const unsigned (&a)[4],
                     const unsigned (&b)[4]) {
  mma(left, a[0], a[1], a[2], a[3], b[0], b[1]);
  mma(right, a[0], a[1], a[2], a[3], b[2], b[3]);
}
/// The same with a of the packed C tiles 2k and 2k + 1.
template <int N>
__device__ void mma2(float (&left)[4], float (&right)[4], const unsigned (&p)[N][2], int k,
                     const unsigned (&b)[4]) {
  mma(left, p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1], b[0], b[1]);
  mma(right, p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1], b[2], b[3]);
}

template <int D>
__global__ void __launch_bounds__(kThreads) tile_forward(const AttentionCall<Number> m) {
  extern __shared__ __align__(16) Number shared[];
  constexpr int kSize = kTile * Rows<D>::kStride;
  const Sequence s = sequence_of(m.table, static_cast<int>(blockIdx.z));
  // Long rows first: they take longest.
  const int first = (static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)) * kTile;
  if (first >= s.length) return;
  const int head = static_cast<int>(blockIdx.y), kv = m.kv_of(head);
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q4 = lane % 4;
  const KeyTiles<kTile> tiles(s, first);
  const auto fetch = [&](int t) { copy_tile<D>(shared, m, tiles, t, kv); };
  fetch(0);
  const int position[2] = {first + warp * 16 + g, first + warp * 16 + g + 8};
  unsigned q[D / 16][4];
#pragma unroll
  for (int c = 0; c < D / 16; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int p = min(position[i % 2], s.length - 1);
      q[c][i] = load_pair(m.query(s.begin + p, head) + 16 * c + 2 * q4 + i / 2 * 8);
    }
  float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const float to_log2 = m.root * kLog2E;

  for (int t = 0; t < tiles.count; ++t) {
    if (t + 1 < tiles.count) {
      fetch(t + 1);
      wait_copies<2>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const Rows<D> keys(shared + t % 2 * 2 * kSize), values(shared + t % 2 * 2 * kSize + kSize);
    float score[kTile / 8][4] = {};
#pragma unroll
    for (int n = 0; n < kTile / 16; ++n)
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        unsigned b[4];
        load_as_bt<D>(b, keys, 16 * n, 16 * c, lane);
        mma2(score[2 * n], score[2 * n + 1], q[c], b);
      }
    unsigned p[kTile / 8][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int visible = tiles.visible(t, position[h]);
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = score[n][2 * h + i];
          x = 8 * n + 2 * q4 + i < visible ? x * to_log2 : -INFINITY;
          most = fmaxf(most, x);
        }
      const float next = fmaxf(top[h], quad_max(most));
      const float base = next == -INFINITY ? 0.0F : next;  // a row that has seen nothing yet
      const float shrink = exp2f(top[h] - base);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        const float x0 = exp2f(score[n][2 * h] - base), x1 = exp2f(score[n][2 * h + 1] - base);
        sum += x0 + x1;
        p[n][h] = pack2(x0, x1);
      }
      total[h] = total[h] * shrink + quad_sum(sum);
      top[h] = next;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        o[n][2 * h] *= shrink;
        o[n][2 * h + 1] *= shrink;
      }
    }
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k)
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        unsigned b[4];
        load_as_b<D>(b, values, 16 * k, 16 * n, lane);
        mma2(o[2 * n], o[2 * n + 1], p, k, b);
      }
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (position[h] >= s.length) continue;
    const Index at = (s.begin + position[h]) * m.heads + head;
    const float inverse = 1.0F / total[h];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<unsigned*>(m.out + at * D + 8 * n + 2 * q4) =
          pack2(o[n][2 * h] * inverse, o[n][2 * h + 1] * inverse);
    if (q4 == 0) m.lse[at] = (top[h] + log2f(total[h])) / kLog2E;
  }
}

/// d_q of 64 queries of one head.
template <int D>
__global__ void __launch_bounds__(kThreads) tile_d_query(const AttentionCall<Number> m) {
  extern __shared__ __align__(16) Number shared[];
  constexpr int kSize = kInner * Rows<D>::kStride;
  const Sequence s = sequence_of(m.table, static_cast<int>(blockIdx.z));
  const int first = (static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)) * kTile;
  if (first >= s.length) return;
  const int head = static_cast<int>(blockIdx.y), kv = m.kv_of(head);
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q4 = lane % 4;
  const KeyTiles<kInner> tiles(s, first);
  const auto fetch = [&](int t) { copy_tile<D>(shared, m, tiles, t, kv); };
  fetch(0);
  const int position[2] = {first + warp * 16 + g, first + warp * 16 + g + 8};
  unsigned q[D / 16][4], d_o[D / 16][4];
  float lse[2], mean[2];
#pragma unroll
  for (int c = 0; c < D / 16; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Index n = s.begin + min(position[i % 2], s.length - 1);
      const int at = 16 * c + 2 * q4 + i / 2 * 8;
      q[c][i] = load_pair(m.query(n, head) + at);
      d_o[c][i] = load_pair(m.d_o + (n * m.heads + head) * D + at);
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Index at = (s.begin + min(position[h], s.length - 1)) * m.heads + head;
    lse[h] = m.lse[at] * kLog2E;
    mean[h] = m.mean[at];
  }
  float d_q[D / 8][4] = {};
  const float to_log2 = m.root * kLog2E;
  for (int t = 0; t < tiles.count; ++t) {
    if (t + 1 < tiles.count) {
      fetch(t + 1);
      wait_copies<2>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const Rows<D> keys(shared + t % 2 * 2 * kSize), values(shared + t % 2 * 2 * kSize + kSize);
    float score[kInner / 8][4] = {}, d_p[kInner / 8][4] = {};
#pragma unroll
    for (int n = 0; n < kInner / 16; ++n)
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        unsigned b[4];
        load_as_bt<D>(b, keys, 16 * n, 16 * c, lane);
        mma2(score[2 * n], score[2 * n + 1], q[c], b);
        load_as_bt<D>(b, values, 16 * n, 16 * c, lane);
        mma2(d_p[2 * n], d_p[2 * n + 1], d_o[c], b);
      }
    unsigned d_s[kInner / 8][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int visible = tiles.visible(t, position[h]);
#pragma unroll
      for (int n = 0; n < kInner / 8; ++n) {
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float p =
              8 * n + 2 * q4 + i < visible ? exp2f(score[n][2 * h + i] * to_log2 - lse[h]) : 0.0F;
          x[i] = p * (d_p[n][2 * h + i] - mean[h]);
        }
        d_s[n][h] = pack2(x[0], x[1]);
      }
    }
#pragma unroll
    for (int k = 0; k < kInner / 16; ++k)
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        unsigned b[4];
        load_as_b<D>(b, keys, 16 * k, 16 * n, lane);
        mma2(d_q[2 * n], d_q[2 * n + 1], d_s, k, b);
      }
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (position[h] >= s.length) continue;
    Number* row = m.d_qkv + (s.begin + position[h]) * m.width() + head * D;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<unsigned*>(row + 8 * n + 2 * q4) =
          pack2(m.root * d_q[n][2 * h], m.root * d_q[n][2 * h + 1]);
  }
}

/// d_k and d_v of 64 rows of one key head, from every query that saw them.
template <int D>
__global__ void __launch_bounds__(kThreads) tile_d_key_value(const AttentionCall<Number> m) {
  extern __shared__ __align__(16) Number shared[];
  constexpr int kOwn = kTile * Rows<D>::kStride, kOther = kInner * Rows<D>::kStride;
  const int own = static_cast<int>(blockIdx.z), first = static_cast<int>(blockIdx.x) * kTile;
  const Sequence s = sequence_of(m.table, own);
  if (first >= s.length) return;
  const int kv = static_cast<int>(blockIdx.y), group = m.heads / m.kv_heads;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q4 = lane % 4, rows = min(kTile, s.length - first);
  const Rows<D> keys(shared), values(shared + kOwn), queries(shared + 2 * kOwn),
      d_out(shared + 2 * kOwn + kOther);
  float* lse = reinterpret_cast<float*>(shared + 2 * kOwn + 2 * kOther);
  float* mean = lse + kInner;
  copy_rows<D>(keys, kTile, rows, [&](int r) { return m.key(s.begin + first + r, kv); });
  copy_rows<D>(values, kTile, rows, [&](int r) { return m.value(s.begin + first + r, kv); });
  float d_k[D / 8][4] = {}, d_v[D / 8][4] = {};
  const float to_log2 = m.root * kLog2E;

  for (int t = m.prefixes ? 0 : own; t < (m.prefixes ? m.sequences : own + 1); ++t) {
    const Sequence other = sequence_of(m.table, t);
    // Rows of this tile that the other's queries see as their prefix.
    const int from = other.prefix_begin - s.begin - first, to = from + other.prefix_length;
    const bool as_prefix = other.prefix_length > 0 && from < rows && to > 0;
    if (t != own && !as_prefix) continue;
    for (int i0 = as_prefix ? 0 : first / kInner * kInner; i0 < other.length; i0 += kInner)
      for (int head = kv * group; head < kv * group + group; ++head) {
        const int count = min(kInner, other.length - i0);
        const Index n0 = other.begin + i0;
        __syncthreads();
        copy_rows<D>(queries, kInner, count, [&](int r) { return m.query(n0 + r, head); });
        copy_rows<D>(d_out, kInner, count,
                     [&](int r) { return m.d_o + ((n0 + r) * m.heads + head) * D; });
        if (static_cast<int>(threadIdx.x) < kInner) {
          const int r = static_cast<int>(threadIdx.x);
          const Index at = (n0 + min(r, count - 1)) * m.heads + head;
          lse[r] = m.lse[at] * kLog2E;
          mean[r] = m.mean[at];
        }
        wait_copies<0>();
        __syncthreads();
        // Rows are keys, columns queries.
        float score[kInner / 8][4] = {}, d_p[kInner / 8][4] = {};
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
          unsigned k[4], v[4];
          load_as_a<D>(k, keys, 16 * warp, 16 * c, lane);
          load_as_a<D>(v, values, 16 * warp, 16 * c, lane);
#pragma unroll
          for (int n = 0; n < kInner / 16; ++n) {
            unsigned b[4];
            load_as_bt<D>(b, queries, 16 * n, 16 * c, lane);
            mma2(score[2 * n], score[2 * n + 1], k, b);
            load_as_bt<D>(b, d_out, 16 * n, 16 * c, lane);
            mma2(d_p[2 * n], d_p[2 * n + 1], v, b);
          }
        }
        unsigned p[kInner / 8][2], d_s[kInner / 8][2];
#pragma unroll
        for (int n = 0; n < kInner / 8; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int key = 16 * warp + g + 8 * h;
            float x[2], y[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int column = 8 * n + 2 * q4 + i;
              const bool sees = column < count && key < rows &&
                                ((as_prefix && key >= from && key < to) ||
                                 (t == own && first + key <= i0 + column));
              x[i] = sees ? exp2f(score[n][2 * h + i] * to_log2 - lse[column]) : 0.0F;
              y[i] = x[i] * (d_p[n][2 * h + i] - mean[column]);
            }
            p[n][h] = pack2(x[0], x[1]);
            d_s[n][h] = pack2(y[0], y[1]);
          }
#pragma unroll
        for (int k = 0; k < kInner / 16; ++k)
#pragma unroll
          for (int n = 0; n < D / 16; ++n) {
            unsigned b[4];
            load_as_b<D>(b, d_out, 16 * k, 16 * n, lane);
            mma2(d_v[2 * n], d_v[2 * n + 1], p, k, b);
            load_as_b<D>(b, queries, 16 * k, 16 * n, lane);
            mma2(d_k[2 * n], d_k[2 * n + 1], d_s, k, b);
          }
      }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = 16 * warp + g + 8 * h;
    if (key >= rows) continue;
    Number* row = m.d_qkv + (s.begin + first + key) * m.width();
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int c = 8 * n + 2 * q4;
      *reinterpret_cast<unsigned*>(row + (m.heads + kv) * D + c) =
          pack2(m.root * d_k[n][2 * h], m.root * d_k[n][2 * h + 1]);
      *reinterpret_cast<unsigned*>(row + (m.heads + m.kv_heads + kv) * D + c) =
          pack2(d_v[n][2 * h], d_v[n][2 * h + 1]);
    }
  }
}

template <class T> AttentionCall<T> call_of(ConstTensor qkv, const Sequences& s, const Heads& h) {
  if (!qkv.contiguous() || qkv.cols() != (h.heads + 2 * h.kv_heads) * h.head_dim ||
      h.head_dim > kLaneDims * kWarp)
    throw std::logic_error("attention: the rows are not (H + 2 Hkv) D wide, or D is over 256");
  AttentionCall<T> c{};
  c.qkv = data<T>(qkv);
  c.table = data<std::int32_t>(s.table);
  c.sequences = static_cast<int>(s.count);
  c.heads = static_cast<int>(h.heads);
  c.kv_heads = static_cast<int>(h.kv_heads);
  c.head_dim = static_cast<int>(h.head_dim);
  c.prefixes = s.max_prefix > 0;
  c.root = static_cast<float>(1 / std::sqrt(static_cast<double>(h.head_dim)));
  return c;
}

/// Launches a kernel with more shared memory than is given by default.
template <class Kernel, class Call>
void launch(Kernel kernel, dim3 grid, int bytes, cudaStream_t stream, const Call& call) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "shared memory");
  kernel<<<grid, kThreads, static_cast<std::size_t>(bytes), stream>>>(call);
}

template <class F> bool with_head(DType type, std::int64_t head_dim, F&& f) {
  if (type != DType::bf16) return false;
  if (head_dim == 64)
    f(std::integral_constant<int, 64>{});
  else if (head_dim == 128)
    f(std::integral_constant<int, 128>{});
  else
    return false;
  return true;
}

}  // namespace

void CudaBackend::attention(Tensor o, Tensor lse, ConstTensor qkv, const Sequences& s,
                            Heads heads) {
  if (s.count == 0 || s.max_length == 0) return;
  if (!o.contiguous()) throw std::logic_error("attention: a strided view");
  const auto sequences = static_cast<unsigned>(s.count);
  const bool fast = with_head(qkv.dtype, heads.head_dim, [&](auto d) {
    auto c = call_of<Number>(qkv, s, heads);
    c.out = data<Number>(o);
    c.lse = data<float>(lse);
    launch(tile_forward<d()>,
           dim3(static_cast<unsigned>(ceil_div<Index>(s.max_length, kTile)),
                static_cast<unsigned>(heads.heads), sequences),
           4 * Rows<d()>::bytes(kTile), stream_, c);
  });
  if (!fast)
    with_type(qkv.dtype, [&](auto number) {
      using T = decltype(number);
      auto c = call_of<T>(qkv, s, heads);
      c.out = data<T>(o);
      c.lse = data<float>(lse);
      plain_forward<<<dim3(static_cast<unsigned>(s.max_length), static_cast<unsigned>(heads.heads),
                           sequences),
                      kWarp, 0, stream_>>>(c);
    });
  launched("attention");
}

void CudaBackend::attention_backward(Tensor d_qkv, ConstTensor d_o, ConstTensor qkv, ConstTensor o,
                                     ConstTensor lse, const Sequences& s, Heads heads) {
  if (s.count == 0 || s.max_length == 0) return;
  if (!d_qkv.contiguous() || !d_o.contiguous() || !o.contiguous())
    throw std::logic_error("attention_backward: a strided view");
  const Index count = qkv.rows() * heads.heads;
  auto* mean = room().take<float>(count);
  const auto sequences = static_cast<unsigned>(s.count),
             tiles = static_cast<unsigned>(ceil_div<Index>(s.max_length, kTile)),
             all_heads = static_cast<unsigned>(heads.heads),
             kv_heads = static_cast<unsigned>(heads.kv_heads);
  const auto fill = [&](auto& c) {
    using T = std::remove_cvref_t<decltype(*c.d_qkv)>;
    c.d_qkv = data<T>(d_qkv);
    c.d_o = data<T>(d_o);
    c.o = data<T>(o);
    c.lse = const_cast<float*>(data<float>(lse));  // NOLINT: read only in backward
    c.mean = mean;
    constexpr int kMeanThreads = 256;
    mean_kernel<<<static_cast<unsigned>(ceil_div<Index>(count, kMeanThreads / kWarp)), kMeanThreads,
                  0, stream_>>>(mean, c.d_o, c.o, c.head_dim, count);
    launched("attention_backward");
  };
  const bool fast = with_head(qkv.dtype, heads.head_dim, [&](auto d) {
    auto c = call_of<Number>(qkv, s, heads);
    fill(c);
    launch(tile_d_key_value<d()>, dim3(tiles, kv_heads, sequences),
           2 * Rows<d()>::bytes(kTile) + 2 * Rows<d()>::bytes(kInner) +
               2 * kInner * static_cast<int>(sizeof(float)),
           stream_, c);
    launch(tile_d_query<d()>, dim3(tiles, all_heads, sequences), 4 * Rows<d()>::bytes(kInner),
           stream_, c);
  });
  if (!fast)
    with_type(qkv.dtype, [&](auto number) {
      using T = decltype(number);
      auto c = call_of<T>(qkv, s, heads);
      fill(c);
      const auto length = static_cast<unsigned>(s.max_length);
      plain_d_key_value<<<dim3(length, kv_heads, sequences), kWarp, 0, stream_>>>(c);
      plain_d_query<<<dim3(length, all_heads, sequences), kWarp, 0, stream_>>>(c);
    });
  launched("attention_backward");
}

}  // namespace mixlora
