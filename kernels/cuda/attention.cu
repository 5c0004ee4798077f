// Causal grouped-query attention over packed sequences with shared prefixes.
//
// Tensor-core kernels for heads of 64 and 128 in bf16, in the manner of FlashAttention-2 [Dao
// 2023]: a block has 128 queries of one head, keys and values pass through shared memory, nothing
// of size rows x keys is kept. Backward is two kernels, by queries and by 64 keys, so that no two
// blocks add to one number. Plain kernels, one warp a row and head, serve f32 and other head sizes.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/tiles.cuh"

namespace mixlora {
namespace {

using namespace cuda;  // NOLINT: this file is the CUDA backend's

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

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kWarpQueries = 32, kQueries = kWarps * kWarpQueries;  // of a block by queries
/// Keys of a tile, in forward and for d_q. Few where the sequences have no more, or where a block
/// gets too little shared memory for many (it does below 102 KB: compute
/// capability 8.6, 8.9, 12.0).
constexpr int kSeenKeys = 64, kMetKeys = 32, kFewSeenKeys = 32, kFewMetKeys = 16;
constexpr int kWarpKeys = 16, kKeys = kWarps * kWarpKeys;  // of a block by keys
constexpr int kMetQueries = 32;                            // of a tile, for d_k and d_v

/// The key tiles that a block's queries, `last` the end of them, meet: the prefix, then their own.
template <int Size> struct KeyTiles {
  Sequence s;
  int prefix_tiles, count;
  __device__ KeyTiles(const Sequence& of, int last)
      : s(of),
        prefix_tiles(ceil_div(of.prefix_length, Size)),
        count(prefix_tiles + ceil_div(min(of.length, last), Size)) {}
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

/// Starts copying keys and values of tile t into their half of the room for two tiles.
template <int D, int Size>
__device__ void copy_tile(Number* room, const AttentionCall<Number>& m, const KeyTiles<Size>& tiles,
                          int t, int kv) {
  Number* at = room + t % 2 * 2 * Size * TileRows<D>::kStride;
  const Number* keys = m.key(tiles.row(t), kv);
  const int rows = tiles.rows(t);
  copy_rows<Size, kThreads>(TileRows<D>(at), keys, m.width(), rows);
  copy_rows<Size, kThreads>(TileRows<D>(at + Size * TileRows<D>::kStride), keys + m.kv_heads * D,
                            m.width(), rows);
}

/// Packs 16 rows of C tiles into a warp's own rows of shared memory, from where copy_out takes them
/// in whole chunks; row h of a lane times by[h].
template <int D>
__device__ void stage(TileRows<D> to, int r, const float (&x)[D / 8][4], float by0, float by1,
                      int lane) {
  const float by[2] = {by0, by1};
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<unsigned*>(to.at + (r + lane / 4 + 8 * h) * TileRows<D>::kStride + 8 * n +
                                   lane % 4 * 2) =
          pack2(x[n][2 * h] * by[h], x[n][2 * h + 1] * by[h]);
}
/// A warp copies its rows [r, r + Count) of shared memory, as far as below `rows`, to rows
/// `stride` numbers apart; `first` is where row 0 goes.
template <int Count, int D>
__device__ void copy_out(Number* first, Index stride, TileRows<D> from, int r, int rows, int lane) {
  constexpr int kChunks = D / 8, kStep = kWarp / kChunks;
#pragma unroll 4
  for (int i = r + lane / kChunks; i < r + Count; i += kStep)
    if (i < rows)
      *reinterpret_cast<uint4*>(first + i * stride + lane % kChunks * 8) =
          *reinterpret_cast<const uint4*>(from.at + i * TileRows<D>::kStride + lane % kChunks * 8);
}

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

/// 128 queries of one head, 32 a warp; keys and values pass in tiles of Size, the next on its way
/// while one is used.
template <int D, int Size>
__global__ void __launch_bounds__(kThreads, 2) tile_forward(const AttentionCall<Number> m) {
  extern __shared__ __align__(16) Number shared[];
  constexpr int kStride = TileRows<D>::kStride;
  const Sequence s = sequence_of(m.table, static_cast<int>(blockIdx.z));
  // Long rows first: they take longest.
  const int first = (static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)) * kQueries;
  if (first >= s.length) return;
  const int head = static_cast<int>(blockIdx.y), kv = m.kv_of(head);
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            row0 = static_cast<int>(threadIdx.x) / kWarp * kWarpQueries;
  const KeyTiles<Size> tiles(s, first + kQueries);
  const TileRows<D> queries(shared);
  Number* room = shared + kQueries * kStride;
  copy_rows<kQueries, kThreads>(queries, m.query(s.begin + first, head), m.width(),
                                s.length - first);
  copy_tile<D>(room, m, tiles, 0, kv);
  fetch_commit();
  float o[2][D / 8][4] = {}, top[2][2], total[2][2] = {};
  for (auto& half : top) half[0] = half[1] = -INFINITY;
  const float to_log2 = m.root * kLog2E;

  for (int t = 0; t < tiles.count; ++t) {
    fetch_wait<0>();
    __syncthreads();  // tile t is here, and the other half of the room is free
    if (t + 1 < tiles.count) {
      copy_tile<D>(room, m, tiles, t + 1, kv);
      fetch_commit();
    }
    if (first + row0 >= s.length || tiles.visible(t, first + row0 + kWarpQueries - 1) <= 0)
      continue;
    const TileRows<D> keys(room + t % 2 * 2 * Size * kStride), values(keys.at + Size * kStride);
    float score[2][Size / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      unsigned q[2][4];
      load_as_a(q[0], queries, row0, 16 * c, lane);
      load_as_a(q[1], queries, row0 + 16, 16 * c, lane);
#pragma unroll
      for (int n = 0; n < Size / 16; ++n) {
        unsigned b[4];
        load_as_bt(b, keys, 16 * n, 16 * c, lane);
        mma2(score[0][2 * n], score[0][2 * n + 1], q[0], b);
        mma2(score[1][2 * n], score[1][2 * n + 1], q[1], b);
      }
    }
    if (tiles.visible(t, first + row0) < Size) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int visible = tiles.visible(t, first + row0 + 8 * r + lane / 4);
#pragma unroll
        for (int n = 0; n < Size / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (8 * n + lane % 4 * 2 + i >= visible) score[r / 2][n][r % 2 * 2 + i] = -INFINITY;
      }
    }
    unsigned p[2][Size / 8][2];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      auto& x = score[r / 2];
      const int h = r % 2;
      float &most = top[r / 2][h], next = most;
#pragma unroll
      for (int n = 0; n < Size / 8; ++n) next = fmaxf(next, fmaxf(x[n][2 * h], x[n][2 * h + 1]));
      next = quad_max(next);
      const float base = next == -INFINITY ? 0.0F : next * to_log2;  // a row that sees nothing yet
      const float shrink = power_of_two(most * to_log2 - base);
      const bool grew = next > most;
      most = next;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < Size / 8; ++n) {
        const float x0 = power_of_two(x[n][2 * h] * to_log2 - base),
                    x1 = power_of_two(x[n][2 * h + 1] * to_log2 - base);
        sum += x0 + x1;
        p[r / 2][n][h] = pack2(x0, x1);
      }
      total[r / 2][h] = total[r / 2][h] * shrink + sum;  // this lane's keys alone
      if (__any_sync(kAll, grew)) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          o[r / 2][n][2 * h] *= shrink;
          o[r / 2][n][2 * h + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < Size / 16; ++k)
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        unsigned b[4];
        load_as_b(b, values, 16 * k, 16 * n, lane);
        mma2(o[0][2 * n], o[0][2 * n + 1], p[0], k, b);
        mma2(o[1][2 * n], o[1][2 * n + 1], p[1], k, b);
      }
  }
  __syncwarp();  // these rows of the queries are this warp's alone
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(total[half][h]);
      inverse[h] = 1.0F / sum;
      const int i = first + row0 + 16 * half + 8 * h + lane / 4;
      if (lane % 4 == 0 && i < s.length)
        m.lse[(s.begin + i) * m.heads + head] = top[half][h] * m.root + logf(sum);
    }
    stage(queries, row0 + 16 * half, o[half], inverse[0], inverse[1], lane);
  }
  __syncwarp();
  copy_out<kWarpQueries>(m.out + ((s.begin + first) * m.heads + head) * D,
                         static_cast<Index>(m.heads) * D, queries, row0, s.length - first, lane);
}

/// d_q of 128 queries of one head, 32 a warp; also their d_o . o, which tile_d_key_value reads.
template <int D, int Size>
__global__ void __launch_bounds__(kThreads, 2) tile_d_query(const AttentionCall<Number> m) {
  extern __shared__ __align__(16) Number shared[];
  constexpr int kStride = TileRows<D>::kStride;
  const Sequence s = sequence_of(m.table, static_cast<int>(blockIdx.z));
  const int first = (static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)) * kQueries;
  if (first >= s.length) return;
  const int head = static_cast<int>(blockIdx.y), kv = m.kv_of(head);
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            row0 = static_cast<int>(threadIdx.x) / kWarp * kWarpQueries;
  const KeyTiles<Size> tiles(s, first + kQueries);
  const TileRows<D> queries(shared), d_out(shared + kQueries * kStride);
  Number* room = shared + 2 * kQueries * kStride;
  const Index at = (s.begin + first) * m.heads + head;  // of row 0, among rows and heads
  copy_rows<kQueries, kThreads>(queries, m.query(s.begin + first, head), m.width(),
                                s.length - first);
  copy_rows<kQueries, kThreads>(d_out, m.d_o + at * D, static_cast<Index>(m.heads) * D,
                                s.length - first);
  copy_tile<D>(room, m, tiles, 0, kv);
  fetch_commit();
  fetch_wait<0>();
  __syncthreads();

  float lse[4] = {}, mean[4] = {};  // rows 8 r + lane / 4
  {
    constexpr int kChunks = D / 8, kStep = kWarp / kChunks;
    const int col = lane % kChunks * 8;
#pragma unroll 4
    for (int r = 0; r < kWarpQueries; r += kStep) {
      const int row = row0 + r + lane / kChunks;
      float sum = 0;
      if (first + row < s.length) {
        const Eight x = load8(m.o + (at + static_cast<Index>(row) * m.heads) * D + col),
                    y = load8(d_out.at + row * kStride + col);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += x.v[i] * y.v[i];
      }
#pragma unroll
      for (int step = kChunks / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
      if (lane % kChunks == 0 && first + row < s.length)
        m.mean[at + static_cast<Index>(row) * m.heads] = sum;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = row0 + 8 * r + lane / 4;
      if (first + row >= s.length) continue;
      lse[r] = m.lse[at + static_cast<Index>(row) * m.heads] * kLog2E;
      mean[r] = m.mean[at + static_cast<Index>(row) * m.heads];
    }
  }
  float d_q[2][D / 8][4] = {};
  const float to_log2 = m.root * kLog2E;
  for (int t = 0; t < tiles.count; ++t) {
    if (t > 0) {
      fetch_wait<0>();
      __syncthreads();
    }
    if (t + 1 < tiles.count) {
      copy_tile<D>(room, m, tiles, t + 1, kv);
      fetch_commit();
    }
    if (first + row0 >= s.length || tiles.visible(t, first + row0 + kWarpQueries - 1) <= 0)
      continue;
    const TileRows<D> keys(room + t % 2 * 2 * Size * kStride), values(keys.at + Size * kStride);
    float score[2][Size / 8][4] = {}, d_p[2][Size / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      unsigned a[2][4], b[Size / 16][4];
      const auto multiply = [&](TileRows<D> left, TileRows<D> right, float(&to)[2][Size / 8][4]) {
        load_as_a(a[0], left, row0, 16 * c, lane);
        load_as_a(a[1], left, row0 + 16, 16 * c, lane);
#pragma unroll
        for (int n = 0; n < Size / 16; ++n) {
          load_as_bt(b[n], right, 16 * n, 16 * c, lane);
          mma2(to[0][2 * n], to[0][2 * n + 1], a[0], b[n]);
          mma2(to[1][2 * n], to[1][2 * n + 1], a[1], b[n]);
        }
      };
      multiply(queries, keys, score);
      multiply(d_out, values, d_p);
    }
    const bool whole = tiles.visible(t, first + row0) == Size;
    unsigned d_s[2][Size / 8][2];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int h = r % 2;
      const int visible = whole ? Size : tiles.visible(t, first + row0 + 8 * r + lane / 4);
#pragma unroll
      for (int n = 0; n < Size / 8; ++n) {
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float p = power_of_two(score[r / 2][n][2 * h + i] * to_log2 - lse[r]);
          x[i] =
              8 * n + lane % 4 * 2 + i < visible ? p * (d_p[r / 2][n][2 * h + i] - mean[r]) : 0.0F;
        }
        d_s[r / 2][n][h] = pack2(x[0], x[1]);
      }
    }
#pragma unroll
    for (int k = 0; k < Size / 16; ++k)
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        unsigned b[4];
        load_as_b(b, keys, 16 * k, 16 * n, lane);
        mma2(d_q[0][2 * n], d_q[0][2 * n + 1], d_s[0], k, b);
        mma2(d_q[1][2 * n], d_q[1][2 * n + 1], d_s[1], k, b);
      }
  }
  __syncwarp();  // these rows of the queries are this warp's alone
  if (first + row0 >= s.length) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (m.rope != nullptr) {
      const int i = first + row0 + 16 * half + lane / 4;
      turn_back<D>(d_q[half], m, s.begin + min(i, s.length - 1), s.begin + min(i + 8, s.length - 1),
                   lane);
    }
    stage(queries, row0 + 16 * half, d_q[half], m.root, m.root, lane);
  }
  __syncwarp();
  copy_out<kWarpQueries>(m.d_qkv + (s.begin + first) * m.width() + head * D, m.width(), queries,
                         row0, s.length - first, lane);
}

/// Walks the tiles of queries that see a tile of keys: the sequences, their rows, a key head's
/// query heads. `find` makes it stand on the first sequence from t on that sees them.
struct QueryTiles {
  int own, first, end;     // the keys' sequence and first position; where sequences end
  int key_row, key_count;  // of the tile
  int first_head, head_end;
  int t, head = 0, i = 0;  // now: sequence, head, first position
  Sequence s{};
  int from = 0, to = 0;  // keys of the tile that s sees as its prefix
  __device__ void find(const std::int32_t* table) {
    for (; t < end; ++t) {
      s = sequence_of(table, t);
      from = s.prefix_begin - key_row;
      to = from + s.prefix_length;
      head = first_head;
      i = t == own ? first : 0;
      if (t == own || (s.prefix_length > 0 && s.length > 0 && from < key_count && to > 0)) return;
    }
  }
  __device__ bool valid() const { return t < end; }
  __device__ void advance(const std::int32_t* table) {
    if (++head < head_end) return;
    head = first_head;
    i += kMetQueries;
    if (i < s.length) return;
    ++t;
    find(table);
  }
  __device__ int count() const { return min(kMetQueries, s.length - i); }
};

/// d_k and d_v of 64 rows of one key head, 16 a warp, from every query that saw them; queries and
/// their gradients pass in tiles of 32.
template <int D>
__global__ void __launch_bounds__(kThreads, 2) tile_d_key_value(const AttentionCall<Number> m) {
  extern __shared__ __align__(16) Number shared[];
  constexpr int kStride = TileRows<D>::kStride, kTile = kMetQueries * kStride;
  const int own = static_cast<int>(blockIdx.z), first = static_cast<int>(blockIdx.x) * kKeys;
  const Sequence s = sequence_of(m.table, own);
  if (first >= s.length) return;
  const int kv = static_cast<int>(blockIdx.y), group = m.heads / m.kv_heads;
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            row0 = static_cast<int>(threadIdx.x) / kWarp * kWarpKeys;
  const int rows = min(kKeys, s.length - first);
  const TileRows<D> keys(shared), values(shared + kKeys * kStride);
  Number* room = shared + 2 * kKeys * kStride;
  auto* row_room = reinterpret_cast<float*>(room + 4 * kTile);  // lse and mean of a tile, twice
  const auto fetch = [&](const QueryTiles& q, int turn) {
    Number* at = room + turn * 2 * kTile;
    const Index row = q.s.begin + q.i, pair = row * m.heads + q.head;
    copy_rows<kMetQueries, kThreads>(TileRows<D>(at), m.query(row, q.head), m.width(), q.count());
    copy_rows<kMetQueries, kThreads>(TileRows<D>(at + kTile), m.d_o + pair * D,
                                     static_cast<Index>(m.heads) * D, q.count());
    const int r = static_cast<int>(threadIdx.x) % kMetQueries;
    if (static_cast<int>(threadIdx.x) < 2 * kMetQueries) {
      const float* from = static_cast<int>(threadIdx.x) < kMetQueries ? m.lse : m.mean;
      const bool there = r < q.count();
      fetch4(shared_address(row_room + turn * 2 * kMetQueries + threadIdx.x),
             from + pair + static_cast<Index>(there ? r : 0) * m.heads, there);
    }
    fetch_commit();
  };
  QueryTiles now{own,
                 first,
                 m.prefixes ? m.sequences : own + 1,
                 s.begin + first,
                 rows,
                 kv * group,
                 kv * group + group,
                 m.prefixes ? 0 : own};
  now.find(m.table);
  copy_rows<kKeys, kThreads>(keys, m.key(s.begin + first, kv), m.width(), rows);
  copy_rows<kKeys, kThreads>(values, m.value(s.begin + first, kv), m.width(), rows);
  fetch(now, 0);
  float d_k[D / 8][4] = {}, d_v[D / 8][4] = {};
  const float to_log2 = m.root * kLog2E;

  for (int turn = 0; now.valid(); turn ^= 1) {
    const bool causal = now.t == own;
    const int i = now.i, from = now.from, to = now.to;
    now.advance(m.table);
    fetch_wait<0>();
    __syncthreads();  // this tile is here, and the other half of the room is free
    if (now.valid()) fetch(now, turn ^ 1);
    // Nothing here sees the warp's keys.
    if (row0 >= rows ||
        (causal ? first + row0 > i + kMetQueries - 1 : from >= row0 + kWarpKeys || to <= row0))
      continue;
    const TileRows<D> queries(room + turn * 2 * kTile), d_out(queries.at + kTile);
    const float* lse = row_room + turn * 2 * kMetQueries;
    const float* mean = lse + kMetQueries;
    // Rows are keys, columns queries. Absent queries are zeros with zero gradients: they add none.
    float score[kMetQueries / 8][4] = {}, d_p[kMetQueries / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      unsigned a[4], b[4];
      load_as_a(a, keys, row0, 16 * c, lane);
#pragma unroll
      for (int n = 0; n < kMetQueries / 16; ++n) {
        load_as_bt(b, queries, 16 * n, 16 * c, lane);
        mma2(score[2 * n], score[2 * n + 1], a, b);
      }
      load_as_a(a, values, row0, 16 * c, lane);
#pragma unroll
      for (int n = 0; n < kMetQueries / 16; ++n) {
        load_as_bt(b, d_out, 16 * n, 16 * c, lane);
        mma2(d_p[2 * n], d_p[2 * n + 1], a, b);
      }
    }
    const bool whole =
        causal ? first + row0 + kWarpKeys - 1 <= i : from <= row0 && to >= row0 + kWarpKeys;
    unsigned p[kMetQueries / 8][2], d_s[kMetQueries / 8][2];
#pragma unroll
    for (int n = 0; n < kMetQueries / 8; ++n) {
      const int column = 8 * n + lane % 4 * 2;
      const float2 lse2 = *reinterpret_cast<const float2*>(lse + column),
                   mean2 = *reinterpret_cast<const float2*>(mean + column);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = row0 + lane / 4 + 8 * h;
        float x[2], y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool sees =
              whole || (causal ? first + key <= i + column + e : key >= from && key < to);
          const float l = (e == 0 ? lse2.x : lse2.y) * kLog2E;
          x[e] = sees ? power_of_two(score[n][2 * h + e] * to_log2 - l) : 0.0F;
          y[e] = x[e] * (d_p[n][2 * h + e] - (e == 0 ? mean2.x : mean2.y));
        }
        p[n][h] = pack2(x[0], x[1]);
        d_s[n][h] = pack2(y[0], y[1]);
      }
    }
#pragma unroll
    for (int k = 0; k < kMetQueries / 16; ++k)
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        unsigned b[4];
        load_as_b(b, d_out, 16 * k, 16 * n, lane);
        mma2(d_v[2 * n], d_v[2 * n + 1], p, k, b);
        load_as_b(b, queries, 16 * k, 16 * n, lane);
        mma2(d_k[2 * n], d_k[2 * n + 1], d_s, k, b);
      }
  }
  __syncwarp();  // these rows of keys and values are this warp's alone
  if (row0 >= rows) return;
  if (m.rope != nullptr) {
    const int r = row0 + lane / 4;
    turn_back<D>(d_k, m, s.begin + first + min(r, rows - 1), s.begin + first + min(r + 8, rows - 1),
                 lane);
  }
  stage(keys, row0, d_k, m.root, m.root, lane);
  stage(values, row0, d_v, 1.0F, 1.0F, lane);
  __syncwarp();
  Number* out = m.d_qkv + (s.begin + first) * m.width() + (m.heads + kv) * D;
  copy_out<kWarpKeys>(out, m.width(), keys, row0, rows, lane);
  copy_out<kWarpKeys>(out + m.kv_heads * D, m.width(), values, row0, rows, lane);
}

template <class T> AttentionCall<T> call_of(ConstTensor qkv, const Sequences& s, const Heads& h) {
  if (!qkv.contiguous() || qkv.cols() != (h.heads + 2 * h.kv_heads) * h.head_dim ||
      h.head_dim > kLaneDims * kWarp)
    throw std::logic_error("attention: the rows are not (H + 2 Hkv) D wide, or D is over 256");
  AttentionCall<T> c{};
  c.qkv = data<T>(qkv);
  c.rows = qkv.rows();
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
  admit_shared(reinterpret_cast<const void*>(kernel), bytes);
  kernel<<<grid, kThreads, static_cast<std::size_t>(bytes), stream>>>(call);
}

bool few_keys(const Sequences& s, int size) { return s.max_length + s.max_prefix <= size; }
unsigned blocks_of(std::int64_t rows, int size) {
  return static_cast<unsigned>(ceil_div<Index>(rows, size));
}

/// True when attention_forward_90a.cu and attention_backward_90a.cu serve the call.
bool by_warpgroups([[maybe_unused]] int device, [[maybe_unused]] ConstTensor qkv,
                   [[maybe_unused]] const Sequences& s, [[maybe_unused]] Heads heads) {
#ifdef MIXLORA_WARPGROUPS
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "attributes");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "attributes");
  return major == 9 && minor == 0 && qkv.dtype == DType::bf16 && heads.head_dim == 128 &&
         s.max_prefix == 0;
#else
  return false;
#endif
}

constexpr Index kMostSums = Index{16} << 20;  // numbers: many short sequences leave more

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
  const auto sequences = static_cast<unsigned>(s.count),
             all_heads = static_cast<unsigned>(heads.heads);
  const bool fast = with_head(qkv.dtype, heads.head_dim, [&](auto d) {
    auto c = call_of<Number>(qkv, s, heads);
    c.out = data<Number>(o);
    c.lse = data<float>(lse);
#ifdef MIXLORA_WARPGROUPS
    if (by_warpgroups(device_, qkv, s, heads))
      return warpgroup_forward(c, qkv.rows(), s.max_length, processors_, stream_);
#endif
    const dim3 blocks(blocks_of(s.max_length, kQueries), all_heads, sequences);
    constexpr int kBytes = TileRows<d()>::bytes(kQueries + 4 * kSeenKeys);
    if (few_keys(s, kFewSeenKeys) || kBytes > most_shared())
      launch(tile_forward<d(), kFewSeenKeys>, blocks,
             TileRows<d()>::bytes(kQueries + 4 * kFewSeenKeys), stream_, c);
    else
      launch(tile_forward<d(), kSeenKeys>, blocks, kBytes, stream_, c);
  });
  if (!fast)
    with_type(qkv.dtype, [&](auto number) {
      using T = decltype(number);
      auto c = call_of<T>(qkv, s, heads);
      c.out = data<T>(o);
      c.lse = data<float>(lse);
      plain_forward<<<dim3(static_cast<unsigned>(s.max_length), all_heads, sequences), kWarp, 0,
                      stream_>>>(c);
    });
  launched("attention");
}

void CudaBackend::attention_backward(Tensor d_qkv, ConstTensor d_o, ConstTensor qkv, ConstTensor o,
                                     ConstTensor lse, const Sequences& s, Heads heads) {
  attention_rope_backward(d_qkv, {}, d_o, qkv, o, lse, s, {}, {}, heads, {});
}

bool CudaBackend::attention_rope_backward(Tensor d_qkv, [[maybe_unused]] Tensor row_dots,
                                          ConstTensor d_o, ConstTensor qkv, ConstTensor o,
                                          ConstTensor lse, const Sequences& s, ConstTensor table,
                                          RowIds ids, Heads heads, const QkvScale& scale) {
  if (s.count == 0 || s.max_length == 0) return false;
  if (!d_qkv.contiguous() || !d_o.contiguous() || !o.contiguous())
    throw std::logic_error("attention_backward: a strided view");
  const Index count = qkv.rows() * heads.heads;
  const auto sequences = static_cast<unsigned>(s.count),
             all_heads = static_cast<unsigned>(heads.heads),
             kv_heads = static_cast<unsigned>(heads.kv_heads);
  if (scale.scale && (!table || scale.scale.numel() != qkv.cols() || !scale.scale.contiguous() ||
                      scale.d_scale.numel() != qkv.cols() || !scale.d_scale.contiguous()))
    throw std::logic_error("attention_rope_backward: a scale not of qkv's columns, or no angles");
  Room r = room();
  const auto fill = [&](auto& c) {
    using T = std::remove_cvref_t<decltype(*c.d_qkv)>;
    c.d_qkv = data<T>(d_qkv);
    c.d_o = data<T>(d_o);
    c.o = data<T>(o);
    c.lse = const_cast<float*>(data<float>(lse));  // NOLINT: read only in backward
    c.mean = r.take<float>(count);
  };
  bool scaled = false, left = false;  // by the kernels of attention; row_dots
  const bool fast = with_head(qkv.dtype, heads.head_dim, [&](auto d) {
    auto c = call_of<Number>(qkv, s, heads);
    fill(c);
    if (table) {
      if (!table.contiguous() || table.cols() != heads.head_dim || !ids.contiguous() ||
          ids.cols() != 4 || ids.rows() != qkv.rows())
        throw std::logic_error("attention_rope_backward: angles not (positions, D), or ids");
      c.rope = data<float>(table);
      c.ids = data<std::int32_t>(ids);
    }
#ifdef MIXLORA_WARPGROUPS
    if (by_warpgroups(device_, qkv, s, heads)) {
      const Index sums = scale_part(s.count, qkv.rows()) * qkv.cols();
      scaled = scale.scale && sums <= kMostSums;
      if (scaled) {
        c.scale = data<float>(scale.scale);
        c.d_scale = data<float>(scale.d_scale);
        c.scale_sums = r.take<float>(sums);
      }
      const Index dots = c.rows * (heads.heads + heads.kv_heads);
      left = row_dots && row_dots.contiguous() && dots <= kMostSums / 4;
      if (left) {
        c.row_dots = data<float>(row_dots);
        c.dot_parts = r.take<float>(dots);
      }
      return warpgroup_backward(c, qkv.rows(), s.max_length, processors_, stream_);
    }
#endif
    const dim3 blocks(blocks_of(s.max_length, kQueries), all_heads, sequences);
    constexpr int kBytes = TileRows<d()>::bytes(2 * kQueries + 4 * kMetKeys);
    if (few_keys(s, kFewMetKeys) || kBytes > most_shared())
      launch(tile_d_query<d(), kFewMetKeys>, blocks,
             TileRows<d()>::bytes(2 * kQueries + 4 * kFewMetKeys), stream_, c);
    else
      launch(tile_d_query<d(), kMetKeys>, blocks, kBytes, stream_, c);
    launch(tile_d_key_value<d()>, dim3(blocks_of(s.max_length, kKeys), kv_heads, sequences),
           TileRows<d()>::bytes(2 * kKeys + 4 * kMetQueries) +
               4 * kMetQueries * static_cast<int>(sizeof(float)),
           stream_, c);
  });
  if (!fast)
    with_type(qkv.dtype, [&](auto number) {
      using T = decltype(number);
      auto c = call_of<T>(qkv, s, heads);
      fill(c);
      constexpr int kMeanThreads = 256;
      mean_kernel<<<static_cast<unsigned>(ceil_div<Index>(count, kMeanThreads / kWarp)),
                    kMeanThreads, 0, stream_>>>(c.mean, c.d_o, c.o, c.head_dim, count);
      launched("attention_backward");
      const auto length = static_cast<unsigned>(s.max_length);
      plain_d_key_value<<<dim3(length, kv_heads, sequences), kWarp, 0, stream_>>>(c);
      plain_d_query<<<dim3(length, all_heads, sequences), kWarp, 0, stream_>>>(c);
    });
  launched("attention_backward");
  if (!fast && table) rope(d_qkv, d_qkv, table, ids, heads, true);
  if (scale.scale && !scaled)
    scale_rope_backward(d_qkv, scale.d_scale, d_qkv, qkv, scale.scale, table, ids, heads);
  return left;
}

}  // namespace mixlora
