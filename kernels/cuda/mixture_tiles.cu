// The gated feed-forward mixture on tensor cores: 16 rows by 32 columns a warp, no staging.
//
// Lane l = 4g + q owns the eight neighbouring columns 8q .. 8q+7 of rows g and g+8: tile j of the
// four 16x8 tiles holds column 8q + 2j + i as its column 2q + i. So a lane reads and writes 16
// bytes of a row at a time, one Philox call covers its columns, and what one product leaves in C
// is what the next one wants as A. Rows are ordered by their experts, so that a tile rarely meets
// more than one expert a slot; where it does, the rows of the others enter as zeros.
//
// Traffic of a row: forward 6 F bytes; backward by rows 10 F, by columns 6 F K; the factors of an
// expert, 6 F R bytes, come from L2 once a tile.
#include <algorithm>

#include "kernels/cuda/mixture.cuh"
#include "kernels/cuda/tensor_core.cuh"

namespace mixlora::cuda {
namespace {

using Number = __nv_bfloat16;
constexpr int kRows = 16, kColumns = 32;
constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kSortThreads = 1024, kSortWarps = kSortThreads / kWarp;
constexpr int kPairKeys = 16;  // experts up to which rows are ordered by pairs

// ---- order ---------------------------------------------------------------------------------

/// order: items by key, equal keys in the order of items; begin[key] where each key's items start
/// (may be null). One block; `counts` has kSortWarps * keys numbers. The result is the same however
/// the warps run.
template <class Key>
__device__ void counting_sort(std::int32_t* order, std::int32_t* begin, std::int32_t* counts,
                              int items, int keys, Key key_of) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int chunk = ceil_div(ceil_div(items, kSortWarps), kWarp) * kWarp;
  const int from = warp * chunk, to = min(items, from + chunk);
  std::int32_t* own = counts + warp * keys;
  for (int i = static_cast<int>(threadIdx.x); i < kSortWarps * keys; i += kSortThreads)
    counts[i] = 0;
  __syncthreads();
  for (int i = from + lane; i - lane < to; i += kWarp) {
    const int key = i < to ? key_of(i) : -1;
    const unsigned same = __match_any_sync(kAll, key);
    if (key >= 0 && lane == __ffs(static_cast<int>(same)) - 1) own[key] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  if (warp == 0) {
    int base = 0;
    for (int k0 = 0; k0 < keys; k0 += kWarp) {
      const int key = k0 + lane;
      int total = 0;
      for (int w = 0; w < kSortWarps && key < keys; ++w) {
        const int count = counts[w * keys + key];
        counts[w * keys + key] = total;
        total += count;
      }
      int before = total;
      for (int step = 1; step < kWarp; step *= 2) {
        const int x = __shfl_up_sync(kAll, before, step);
        if (lane >= step) before += x;
      }
      const int sum = __shfl_sync(kAll, before, kWarp - 1);
      before += base - total;
      if (key < keys) {
        for (int w = 0; w < kSortWarps; ++w) counts[w * keys + key] += before;
        if (begin != nullptr) begin[key] = before;
      }
      base += sum;
    }
  }
  __syncthreads();
  for (int i = from + lane; i - lane < to; i += kWarp) {
    const int key = i < to ? key_of(i) : -1;
    const unsigned same = __match_any_sync(kAll, key);
    if (key >= 0) order[own[key] + __popc(same & ((1U << lane) - 1))] = i;
    __syncwarp();
    if (key >= 0 && lane == __ffs(static_cast<int>(same)) - 1) own[key] += __popc(same);
    __syncwarp();
  }
}

int row_keys(int slots, int experts) {
  return slots == 2 && experts <= kPairKeys ? (experts + 1) * (experts + 1) : experts + 1;
}

/// Block 0: rows by their experts. Block 1: (row, slot) pairs by expert; those without come last.
__global__ void __launch_bounds__(kSortThreads)
    order_kernel(std::int32_t* order, std::int32_t* pairs, std::int32_t* pair_begin,
                 const std::int32_t* expert, int rows, int slots, int experts, int keys) {
  extern __shared__ std::int32_t counts[];
  if (blockIdx.x == 0) {
    const bool by_pairs = slots == 2 && experts <= kPairKeys;
    counting_sort(order, nullptr, counts, rows, keys, [=](int n) {
      const int e0 = expert[n * slots] + 1;
      if (!by_pairs) return e0;
      const int e1 = expert[n * slots + 1] + 1;
      return min(e0, e1) * (experts + 1) + max(e0, e1);
    });
  } else {
    counting_sort(pairs, pair_begin, counts, rows * slots, experts + 1, [=](int i) {
      const int e = expert[i];
      return e < 0 ? experts : e;
    });
  }
}

// ---- rows of a tile ------------------------------------------------------------------------

/// Rows g and g + 8 of a tile, as a lane sees them. With two slots the lower expert comes first.
template <int K> struct TileRows {
  Index row[2];
  bool live[2];
  int slot[2][K], expert[2][K];  // expert -1: none, or the row is not there
  float weight[2][K];
  unsigned long long present[K];  // experts of the tile's rows in this slot
  bool busy[K];                   // some row of the tile uses this slot
};

__device__ inline unsigned long long any_of(unsigned long long bits) {
  const unsigned lower = __reduce_or_sync(kAll, static_cast<unsigned>(bits)),
                 upper = __reduce_or_sync(kAll, static_cast<unsigned>(bits >> 32));
  return (static_cast<unsigned long long>(upper) << 32) | lower;
}

template <int K> __device__ TileRows<K> tile_rows(const TileCall& m, Index first, int g) {
  TileRows<K> t;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Index at = first + g + 8 * h;
    t.live[h] = at < m.rows;
    const Index safe = t.live[h] ? at : m.rows - 1;
    t.row[h] = m.order != nullptr ? m.order[safe] : safe;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      t.slot[h][k] = k;
      t.expert[h][k] = t.live[h] ? m.expert_of(t.row[h], k) : -1;
      t.weight[h][k] = t.live[h] ? m.weight_of(t.row[h], k) : 0.0F;
    }
    if constexpr (K == 2) {
      if (t.expert[h][0] > t.expert[h][1]) {
        const int e = t.expert[h][0];
        const float w = t.weight[h][0];
        t.expert[h][0] = t.expert[h][1], t.expert[h][1] = e;
        t.weight[h][0] = t.weight[h][1], t.weight[h][1] = w;
        t.slot[h][0] = 1, t.slot[h][1] = 0;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    unsigned long long bits = 0;
    bool used = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (t.expert[h][k] >= 0) bits |= 1ULL << t.expert[h][k];
      used = used || t.expert[h][k] >= 0 || t.weight[h][k] != 0;
    }
    t.present[k] = any_of(bits);
    t.busy[k] = __any_sync(kAll, used) != 0;
  }
  return t;
}

/// Sixteen numbers of each row from `row0` and `row1` (null: zeros) as an A operand whose columns
/// 2q+i are the numbers 4q+i and whose columns 2q+8+i are 4q+2+i; `count` of them exist.
__device__ inline void load_a(unsigned (&a)[4], const Number* row0, const Number* row1, int q,
                              int count) {
  const bool there = 4 * q < count;
  const uint2 zero = make_uint2(0, 0);
  const uint2 x = there && row0 != nullptr ? load_pairs2(row0 + 4 * q) : zero;
  const uint2 y = there && row1 != nullptr ? load_pairs2(row1 + 4 * q) : zero;
  a[0] = x.x, a[1] = y.x, a[2] = x.y, a[3] = y.y;
}
/// The same with column 2q+i the number 2q+i and column 2q+8+i the number 2q+8+i.
__device__ inline void load_q(unsigned (&a)[4], const Number* row0, const Number* row1, int q,
                              int count) {
  const bool upper = count > 8;
  a[0] = row0 != nullptr ? load_pair(row0 + 2 * q) : 0;
  a[1] = row1 != nullptr ? load_pair(row1 + 2 * q) : 0;
  a[2] = upper && row0 != nullptr ? load_pair(row0 + 2 * q + 8) : 0;
  a[3] = upper && row1 != nullptr ? load_pair(row1 + 2 * q + 8) : 0;
}

/// Bit i: column 8 * block + i is kept.
__device__ inline unsigned kept_bits(const TileCall& m, Index row, int expert, int block) {
  const Philox4 bits = m.bits(row, expert, block);
  unsigned kept = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    kept |= (((bits.v[i / 2] >> (16 * (i % 2))) & 0xffffU) >= m.threshold ? 1U : 0U) << i;
  return kept;
}

struct Silu {
  float value, slope;
};
__device__ inline Silu silu(float x) {
  const float s = __fdividef(1.0F, 1.0F + __expf(-x));
  return {x * s, s * (1.0F + x * (1.0F - s))};
}

/// u (or v) of two tiles: the frozen projection's numbers plus B_e a_e of each row's own expert.
/// `pair` 0: tiles 0 and 1, 1: tiles 2 and 3.
template <int C>
__device__ void adapted(float (&u)[2][4], const unsigned (&c)[2][4], const Number* b,
                        const unsigned (&a)[C][4], int expert0, int expert1,
                        unsigned long long present, const TileCall& m, int f0, int pair, int g,
                        int q) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      u[t][2 * h] = low(c[h][2 * pair + t]);
      u[t][2 * h + 1] = high(c[h][2 * pair + t]);
    }
  if (b == nullptr) return;
  for (auto left = present; left != 0; left &= left - 1) {
    const int e = __ffsll(static_cast<long long>(left)) - 1;
    const unsigned own0 = expert0 == e ? ~0U : 0, own1 = expert1 == e ? ~0U : 0;
#pragma unroll
    for (int c16 = 0; c16 < C; ++c16)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int f = f0 + (g / 2) * 8 + 2 * (2 * pair + t) + g % 2, r = 16 * c16 + 4 * q;
        const uint2 w =
            r < m.rank ? load_pairs2(b + (e * m.width + f) * m.rank + r) : make_uint2(0, 0);
        mma(u[t], a[c16][0] & own0, a[c16][1] & own1, a[c16][2] & own0, a[c16][3] & own1, w.x, w.y);
      }
  }
}

/// Four numbers a lane from every warp, summed in the order of the warps; warp 0 has the result.
__device__ inline float4 across_warps(const float (&mine)[4], float4 (*shared)[kWarp]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncthreads();
  shared[warp][lane] = make_float4(mine[0], mine[1], mine[2], mine[3]);
  __syncthreads();
  float4 sum = make_float4(0, 0, 0, 0);
  if (warp == 0)
    for (int w = 0; w < kWarps; ++w) {
      const float4 x = shared[w][lane];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
  return sum;
}

__device__ inline const Number* a_row(const TileCall& m, Index row, int e, bool up) {
  if (m.a == nullptr || e < 0) return nullptr;
  return m.a + row * 2 * m.experts * m.rank + ((up ? m.experts : 0) + e) * m.rank;
}

// ---- forward -------------------------------------------------------------------------------

template <int C, int K>
__global__ void __launch_bounds__(kThreads, C* K <= 2 ? 2 : 1) forward_kernel(const TileCall m) {
  __shared__ float4 shared[kWarps][kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q = lane % 4, width = static_cast<int>(m.width);
  const auto rows = tile_rows<K>(m, static_cast<Index>(blockIdx.x) * kRows, g);
  unsigned a1[K][C][4], a3[K][C][4];
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const auto at = [&](int h, bool up) -> const Number* {
        const Number* p = a_row(m, rows.row[h], rows.expert[h][k], up);
        return p == nullptr ? nullptr : p + 16 * c;
      };
      load_a(a1[k][c], at(0, false), at(1, false), q, m.rank - 16 * c);
      load_a(a3[k][c], at(0, true), at(1, true), q, m.rank - 16 * c);
    }
  float z[K][2 * C][4] = {};

  for (int group = warp; group < width / kColumns; group += kWarps) {
    const int f0 = group * kColumns, col = f0 + 8 * q;
    unsigned c1[2][4], c3[2][4], sum[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Number* row = m.gate_up + rows.row[h] * 2 * width + col;
      load_pairs4(c1[h], row);
      load_pairs4(c3[h], row + width);
    }
    unsigned kept[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      kept[k] = 0xffffU;
      if (m.threshold == 0 || m.down_a == nullptr) continue;
      kept[k] = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (rows.expert[h][k] >= 0)
          kept[k] |= kept_bits(m, rows.row[h], rows.expert[h][k], col / 8) << (8 * h);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float total[2][4] = {};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int e0 = rows.expert[0][k], e1 = rows.expert[1][k];
        if (!rows.busy[k]) {
          if (m.per_slot)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              if (rows.live[h])
                *reinterpret_cast<uint2*>(m.out + (rows.slot[h][k] * m.rows + rows.row[h]) * width +
                                          col + 4 * pair) = make_uint2(0, 0);
          continue;
        }
        float u[2][4], v[2][4];
        adapted<C>(u, c1, m.gate_b, a1[k], e0, e1, rows.present[k], m, f0, pair, g, q);
        adapted<C>(v, c3, m.up_b, a3[k], e0, e1, rows.present[k], m, f0, pair, g, q);
        unsigned dropped[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float4 s1 = make_float4(1, 1, 1, 1), s3 = s1;
          const int e = h == 0 ? e0 : e1;
          if (e >= 0 && m.gate_scale != nullptr)
            s1 = *reinterpret_cast<const float4*>(m.gate_scale + e * width + col + 4 * pair);
          if (e >= 0 && m.up_scale != nullptr)
            s3 = *reinterpret_cast<const float4*>(m.up_scale + e * width + col + 4 * pair);
          const float gate_scale[4] = {s1.x, s1.y, s1.z, s1.w},
                      up_scale[4] = {s3.x, s3.y, s3.z, s3.w};
          const bool empty = e < 0 && rows.weight[h][k] == 0;
          float x[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int t = i / 2, at = 2 * h + i % 2;
            x[i] = empty ? 0.0F : silu(u[t][at] * gate_scale[i]).value * v[t][at] * up_scale[i];
            total[t][at] += rows.weight[h][k] * x[i];
          }
          if (m.per_slot && rows.live[h])
            *reinterpret_cast<uint2*>(m.out + (rows.slot[h][k] * m.rows + rows.row[h]) * width +
                                      col + 4 * pair) =
                make_uint2(pack2(x[0], x[1]), pack2(x[2], x[3]));
          const unsigned keep = kept[k] >> (8 * h + 4 * pair);
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = (keep >> i & 1U) != 0 ? x[i] : 0.0F;
          dropped[0][h] = pack2(x[0], x[1]);
          dropped[1][h] = pack2(x[2], x[3]);
        }
        if (m.down_a == nullptr) continue;
        for (auto left = rows.present[k]; left != 0; left &= left - 1) {
          const int e = __ffsll(static_cast<long long>(left)) - 1;
          const unsigned own0 = e0 == e ? ~0U : 0, own1 = e1 == e ? ~0U : 0;
#pragma unroll
          for (int r8 = 0; r8 < 2 * C; ++r8) {
            if (8 * r8 >= m.rank) continue;
            const uint2 w =
                load_pairs2(m.down_a + (e * m.rank + 8 * r8 + g) * width + col + 4 * pair);
            mma(z[k][r8], dropped[0][0] & own0, dropped[0][1] & own1, dropped[1][0] & own0,
                dropped[1][1] & own1, w.x, w.y);
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int t = 0; t < 2; ++t)
          sum[h][2 * pair + t] = pack2(total[t][2 * h], total[t][2 * h + 1]);
    }
    if (!m.per_slot)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (rows.live[h])
          *reinterpret_cast<uint4*>(m.out + rows.row[h] * width + col) =
              make_uint4(sum[h][0], sum[h][1], sum[h][2], sum[h][3]);
  }

  if (m.down_a == nullptr) return;
  const float s = m.scale * m.keep;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int r8 = 0; r8 < 2 * C; ++r8) {
      if (8 * r8 >= m.rank) continue;
      const float4 sum = across_warps(z[k][r8], shared);
      if (warp != 0) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (rows.live[h])
          *reinterpret_cast<unsigned*>(m.z + (rows.row[h] * m.slots + rows.slot[h][k]) * m.rank +
                                       8 * r8 + 2 * q) =
              h == 0 ? pack2(s * sum.x, s * sum.y) : pack2(s * sum.z, s * sum.w);
    }
}

// ---- backward ------------------------------------------------------------------------------

/// A2_e^T q_e of two tiles for the rows' own experts; undropped, without s.
template <int C>
__device__ void back_through_down(float (&d)[2][4], const unsigned (&q_frag)[C][4], int expert0,
                                  int expert1, unsigned long long present, const TileCall& m,
                                  int col, int pair, int g) {
  for (auto left = present; left != 0; left &= left - 1) {
    const int e = __ffsll(static_cast<long long>(left)) - 1;
    const unsigned own0 = expert0 == e ? ~0U : 0, own1 = expert1 == e ? ~0U : 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      uint2 w[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = 16 * c + 8 * i;
        w[i] = r < m.rank ? load_pairs2(m.down_a + (e * m.rank + r + g) * m.width + col + 4 * pair)
                          : make_uint2(0, 0);
      }
      const unsigned a0 = q_frag[c][0] & own0, a1 = q_frag[c][1] & own1, a2 = q_frag[c][2] & own0,
                     a3 = q_frag[c][3] & own1;
      mma(d[0], a0, a1, a2, a3, transposed(w[0].x), transposed(w[1].x));
      mma(d[1], a0, a1, a2, a3, transposed(w[0].y), transposed(w[1].y));
    }
  }
}

/// Backward by rows: d_gate_up, d_weight, p. A block has one tile, its warps share the columns.
template <int C, int K>
__global__ void __launch_bounds__(kThreads, 1) rows_kernel(const TileCall m) {
  __shared__ float4 shared[kWarps][kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q = lane % 4, width = static_cast<int>(m.width);
  const auto rows = tile_rows<K>(m, static_cast<Index>(blockIdx.x) * kRows, g);
  const bool down = m.down_a != nullptr && m.q != nullptr;
  const auto slot_row = [&](int h, int k) {
    return (m.per_slot ? rows.slot[h][k] * m.rows : 0) + rows.row[h];
  };
  unsigned a1[K][C][4], a3[K][C][4], q_frag[K][C][4];
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const auto at = [&](int h, bool up) -> const Number* {
        const Number* p = a_row(m, rows.row[h], rows.expert[h][k], up);
        return p == nullptr ? nullptr : p + 16 * c;
      };
      const auto q_at = [&](int h) -> const Number* {
        const int e = rows.expert[h][k];
        if (!down || e < 0 || 16 * c >= m.rank) return nullptr;
        return m.q + (slot_row(h, k) * m.experts + e) * m.rank + 16 * c;
      };
      load_a(a1[k][c], at(0, false), at(1, false), q, m.rank - 16 * c);
      load_a(a3[k][c], at(0, true), at(1, true), q, m.rank - 16 * c);
      load_q(q_frag[k][c], q_at(0), q_at(1), q, m.rank - 16 * c);
    }
  float p1[K][2 * C][4] = {}, p3[K][2 * C][4] = {}, d_weight[K][2] = {};
  const float keep_scale = m.scale * m.keep;

  for (int group = warp; group < width / kColumns; group += kWarps) {
    const int f0 = group * kColumns, col = f0 + 8 * q;
    unsigned c1[2][4], c3[2][4], d_out[2][4], d_gate[2][4], d_up[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Number* row = m.gate_up + rows.row[h] * 2 * width + col;
      load_pairs4(c1[h], row);
      load_pairs4(c3[h], row + width);
      if (!m.per_slot) load_pairs4(d_out[h], m.d_out + rows.row[h] * width + col);
    }
    unsigned kept[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      kept[k] = 0xffffU;
      if (m.threshold == 0 || !down) continue;
      kept[k] = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (rows.expert[h][k] >= 0)
          kept[k] |= kept_bits(m, rows.row[h], rows.expert[h][k], col / 8) << (8 * h);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float gate_sum[2][4] = {}, up_sum[2][4] = {};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (!rows.busy[k]) continue;
        const int e0 = rows.expert[0][k], e1 = rows.expert[1][k];
        float u[2][4], v[2][4], d[2][4] = {};
        adapted<C>(u, c1, m.gate_b, a1[k], e0, e1, rows.present[k], m, f0, pair, g, q);
        adapted<C>(v, c3, m.up_b, a3[k], e0, e1, rows.present[k], m, f0, pair, g, q);
        if (down) back_through_down<C>(d, q_frag[k], e0, e1, rows.present[k], m, col, pair, g);
        unsigned gate[2][2], up[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float4 s1 = make_float4(1, 1, 1, 1), s3 = s1;
          const int e = h == 0 ? e0 : e1;
          if (e >= 0 && m.gate_scale != nullptr)
            s1 = *reinterpret_cast<const float4*>(m.gate_scale + e * width + col + 4 * pair);
          if (e >= 0 && m.up_scale != nullptr)
            s3 = *reinterpret_cast<const float4*>(m.up_scale + e * width + col + 4 * pair);
          const float gate_scale[4] = {s1.x, s1.y, s1.z, s1.w},
                      up_scale[4] = {s3.x, s3.y, s3.z, s3.w};
          if (m.per_slot)
            *reinterpret_cast<uint2*>(&d_out[h][2 * pair]) =
                load_pairs2(m.d_out + slot_row(h, k) * width + col + 4 * pair);
          const float w = m.per_slot ? 1.0F : rows.weight[h][k];
          const bool empty = e < 0 && rows.weight[h][k] == 0;
          const unsigned keep = kept[k] >> (8 * h + 4 * pair);
          float x[4], y[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int t = i / 2, at = 2 * h + i % 2;
            const unsigned word = d_out[h][2 * pair + t];
            const float from_out = i % 2 == 0 ? low(word) : high(word);
            const Silu act = silu(u[t][at] * gate_scale[i]);
            const float value = v[t][at] * up_scale[i];
            d_weight[k][h] += empty ? 0.0F : act.value * value * from_out;
            float d_h = from_out + ((keep >> i & 1U) != 0 ? keep_scale * d[t][at] : 0.0F);
            d_h = empty ? 0.0F : w * d_h;
            x[i] = d_h * value * act.slope * gate_scale[i];
            y[i] = d_h * act.value * up_scale[i];
            gate_sum[t][at] += x[i];
            up_sum[t][at] += y[i];
          }
          gate[0][h] = pack2(x[0], x[1]), gate[1][h] = pack2(x[2], x[3]);
          up[0][h] = pack2(y[0], y[1]), up[1][h] = pack2(y[2], y[3]);
        }
        if (m.p == nullptr) continue;
        for (auto left = rows.present[k]; left != 0; left &= left - 1) {
          const int e = __ffsll(static_cast<long long>(left)) - 1;
          const unsigned own0 = e0 == e ? ~0U : 0, own1 = e1 == e ? ~0U : 0;
#pragma unroll
          for (int c = 0; c < C; ++c) {
            const int r = 16 * c + 4 * q;
            if (16 * c >= m.rank) continue;
            const auto b = [&](const Number* weights, int t) {
              const int f = f0 + (g / 2) * 8 + 2 * (2 * pair + t) + g % 2;
              return r < m.rank ? load_pairs2(weights + (e * width + f) * m.rank + r)
                                : make_uint2(0, 0);
            };
            if (m.gate_b != nullptr) {
              const uint2 w0 = b(m.gate_b, 0), w1 = b(m.gate_b, 1);
              mma(p1[k][2 * c], gate[0][0] & own0, gate[0][1] & own1, gate[1][0] & own0,
                  gate[1][1] & own1, transposed(w0.x), transposed(w1.x));
              mma(p1[k][2 * c + 1], gate[0][0] & own0, gate[0][1] & own1, gate[1][0] & own0,
                  gate[1][1] & own1, transposed(w0.y), transposed(w1.y));
            }
            if (m.up_b != nullptr) {
              const uint2 w0 = b(m.up_b, 0), w1 = b(m.up_b, 1);
              mma(p3[k][2 * c], up[0][0] & own0, up[0][1] & own1, up[1][0] & own0, up[1][1] & own1,
                  transposed(w0.x), transposed(w1.x));
              mma(p3[k][2 * c + 1], up[0][0] & own0, up[0][1] & own1, up[1][0] & own0,
                  up[1][1] & own1, transposed(w0.y), transposed(w1.y));
            }
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          d_gate[h][2 * pair + t] = pack2(gate_sum[t][2 * h], gate_sum[t][2 * h + 1]);
          d_up[h][2 * pair + t] = pack2(up_sum[t][2 * h], up_sum[t][2 * h + 1]);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!rows.live[h]) continue;
      Number* row = m.d_gate_up + rows.row[h] * 2 * width + col;
      *reinterpret_cast<uint4*>(row) =
          make_uint4(d_gate[h][0], d_gate[h][1], d_gate[h][2], d_gate[h][3]);
      *reinterpret_cast<uint4*>(row + width) =
          make_uint4(d_up[h][0], d_up[h][1], d_up[h][2], d_up[h][3]);
    }
  }

#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (m.p != nullptr)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (16 * c >= m.rank) continue;
#pragma unroll
        for (int up = 0; up < 2; ++up) {
          const float4 x = across_warps(up != 0 ? p3[k][2 * c] : p1[k][2 * c], shared),
                       y = across_warps(up != 0 ? p3[k][2 * c + 1] : p1[k][2 * c + 1], shared);
          if (warp != 0 || 16 * c + 4 * q >= m.rank) continue;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (rows.expert[h][k] < 0) continue;
            Number* row = m.p + rows.row[h] * 2 * m.experts * m.rank +
                          (up * m.experts + rows.expert[h][k]) * m.rank + 16 * c + 4 * q;
            const float s = m.scale;
            *reinterpret_cast<uint2*>(row) =
                h == 0 ? make_uint2(pack2(s * x.x, s * x.y), pack2(s * y.x, s * y.y))
                       : make_uint2(pack2(s * x.z, s * x.w), pack2(s * y.z, s * y.w));
          }
        }
      }
    if (m.d_weight == nullptr) continue;
    float mine[4] = {d_weight[k][0], d_weight[k][1], 0, 0};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      mine[h] += __shfl_xor_sync(kAll, mine[h], 1);
      mine[h] += __shfl_xor_sync(kAll, mine[h], 2);
    }
    const float4 sum = across_warps(mine, shared);
    if (warp != 0 || q != 0) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!rows.live[h]) continue;
      const int e = rows.expert[h][k];
      float total = h == 0 ? sum.x : sum.y;
      if (down && e >= 0)
        for (int r = 0; r < m.rank; ++r)
          total +=
              __bfloat162float(m.z_in[(rows.row[h] * m.slots + rows.slot[h][k]) * m.rank + r]) *
              __bfloat162float(m.q[(rows.row[h] * m.experts + e) * m.rank + r]);
      m.d_weight[rows.row[h] * m.slots + rows.slot[h][k]] = total;
    }
  }
}

/// Backward by columns: a block has 32 columns of one expert and 16 of its ranks (blockIdx.z), its
/// warps share the expert's rows. Adds to the gradients of B1, B3, A2 and of DoRA's scales.
template <int C> __global__ void __launch_bounds__(kThreads, 1) columns_kernel(const TileCall m) {
  __shared__ float shared[kWarps][16][kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q = lane % 4, width = static_cast<int>(m.width);
  const int e = static_cast<int>(blockIdx.y), mine = static_cast<int>(blockIdx.z);
  const int f0 = static_cast<int>(blockIdx.x) * kColumns, col = f0 + 8 * q;
  const bool down = m.down_a != nullptr && m.q != nullptr;
  const int begin = m.pairs != nullptr ? m.pair_begin[e] : 0;
  const int end = m.pairs != nullptr ? m.pair_begin[e + 1] : static_cast<int>(m.rows);
  const unsigned long long own = 1ULL << e;
  const float keep_scale = m.scale * m.keep;
  float gate_b[2][2][4] = {}, up_b[2][2][4] = {}, down_a[4][4] = {};
  float gate_scale_sum[8] = {}, up_scale_sum[8] = {};

  for (int first = begin + warp * kRows; first < end; first += kWarps * kRows) {
    Index row[2], slot_row[2];
    float weight[2];
    int expert[2];
    unsigned c1[2][4], c3[2][4], d_out[2][4], kept = 0xffffU;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = first + g + 8 * h;
      const bool live = at < end;
      const int pair = m.pairs != nullptr ? m.pairs[live ? at : end - 1] : (live ? at : end - 1);
      const int k = m.pairs != nullptr ? pair % m.slots : 0;
      row[h] = m.pairs != nullptr ? pair / m.slots : pair;
      slot_row[h] = (m.per_slot ? k * m.rows : 0) + row[h];
      weight[h] = !live ? 0.0F : m.per_slot ? 1.0F : m.weight_of(row[h], k);
      expert[h] = live ? e : -1;
      const Number* from = m.gate_up + row[h] * 2 * width + col;
      load_pairs4(c1[h], from);
      load_pairs4(c3[h], from + width);
      load_pairs4(d_out[h], m.d_out + slot_row[h] * width + col);
    }
    unsigned a1[C][4], a3[C][4], q_frag[C][4];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const auto at = [&](int h, bool up) -> const Number* {
        const Number* p = a_row(m, row[h], expert[h], up);
        return p == nullptr ? nullptr : p + 16 * c;
      };
      const auto q_at = [&](int h) -> const Number* {
        if (!down || expert[h] < 0 || 16 * c >= m.rank) return nullptr;
        return m.q + (slot_row[h] * m.experts + e) * m.rank + 16 * c;
      };
      load_a(a1[c], at(0, false), at(1, false), q, m.rank - 16 * c);
      load_a(a3[c], at(0, true), at(1, true), q, m.rank - 16 * c);
      load_q(q_frag[c], q_at(0), q_at(1), q, m.rank - 16 * c);
    }
    if (m.threshold != 0 && down)
      kept = kept_bits(m, row[0], e, col / 8) | kept_bits(m, row[1], e, col / 8) << 8;
    // The operands of this block's sixteen ranks, rows as the inner dimension.
    unsigned a1_t[4], a3_t[4], q_t[4];
#pragma unroll
    for (int c = 0; c < C; ++c)
      if (c == mine)
#pragma unroll
        for (int i = 0; i < 4; ++i) a1_t[i] = a1[c][i], a3_t[i] = a3[c][i], q_t[i] = q_frag[c][i];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a1_t[i] = transposed(a1_t[i]), a3_t[i] = transposed(a3_t[i]), q_t[i] = transposed(q_t[i]);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float u[2][4], v[2][4], d[2][4] = {};
      adapted<C>(u, c1, m.gate_b, a1, expert[0], expert[1], own, m, f0, pair, g, q);
      adapted<C>(v, c3, m.up_b, a3, expert[0], expert[1], own, m, f0, pair, g, q);
      if (down) back_through_down<C>(d, q_frag, expert[0], expert[1], own, m, col, pair, g);
      unsigned gate[2][2], up[2][2], dropped[2][2];
      float4 s1 = make_float4(1, 1, 1, 1), s3 = s1;
      if (m.gate_scale != nullptr)
        s1 = *reinterpret_cast<const float4*>(m.gate_scale + e * width + col + 4 * pair);
      if (m.up_scale != nullptr)
        s3 = *reinterpret_cast<const float4*>(m.up_scale + e * width + col + 4 * pair);
      const float gate_scale[4] = {s1.x, s1.y, s1.z, s1.w}, up_scale[4] = {s3.x, s3.y, s3.z, s3.w};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const unsigned keep = kept >> (8 * h + 4 * pair);
        float x[4], y[4], z[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = i / 2, at = 2 * h + i % 2;
          const unsigned word = d_out[h][2 * pair + t];
          const float from_out = i % 2 == 0 ? low(word) : high(word);
          const Silu act = silu(u[t][at] * gate_scale[i]);
          const float value = v[t][at] * up_scale[i];
          const float kept_scale = (keep >> i & 1U) != 0 ? keep_scale : 0.0F;
          const float d_h = weight[h] * (from_out + kept_scale * d[t][at]);
          const float d_u = d_h * value * act.slope, d_v = d_h * act.value;
          x[i] = d_u * gate_scale[i];
          y[i] = d_v * up_scale[i];
          z[i] = weight[h] * kept_scale * act.value * value;
          gate_scale_sum[4 * pair + i] += d_u * u[t][at];
          up_scale_sum[4 * pair + i] += d_v * v[t][at];
        }
        gate[0][h] = pack2(x[0], x[1]), gate[1][h] = pack2(x[2], x[3]);
        up[0][h] = pack2(y[0], y[1]), up[1][h] = pack2(y[2], y[3]);
        dropped[0][h] = pack2(z[0], z[1]), dropped[1][h] = pack2(z[2], z[3]);
      }
      if (m.d_gate_b != nullptr) {
        const unsigned x0 = transposed(gate[0][0]), x1 = transposed(gate[1][0]),
                       x2 = transposed(gate[0][1]), x3 = transposed(gate[1][1]);
        mma(gate_b[pair][0], x0, x1, x2, x3, a1_t[0], a1_t[1]);
        mma(gate_b[pair][1], x0, x1, x2, x3, a1_t[2], a1_t[3]);
      }
      if (m.d_up_b != nullptr) {
        const unsigned x0 = transposed(up[0][0]), x1 = transposed(up[1][0]),
                       x2 = transposed(up[0][1]), x3 = transposed(up[1][1]);
        mma(up_b[pair][0], x0, x1, x2, x3, a3_t[0], a3_t[1]);
        mma(up_b[pair][1], x0, x1, x2, x3, a3_t[2], a3_t[3]);
      }
      if (m.d_down_a != nullptr && down)
#pragma unroll
        for (int t = 0; t < 2; ++t)
          mma(down_a[2 * pair + t], q_t[0], q_t[2], q_t[1], q_t[3], transposed(dropped[t][0]),
              transposed(dropped[t][1]));
    }
  }

  // Sixteen numbers a lane from every warp, summed in the order of the warps, two a thread.
  const auto reduce = [&](const float* numbers, auto&& add) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; ++i) shared[warp][i][lane] = numbers[i];
    __syncthreads();
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int i = warp + kWarps * part;
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared[w][i][lane];
      add(i, sum);
    }
  };
  const int rank = m.rank;
  const auto add_b = [&](float* grads) {
    return [=](int i, float sum) {
      const int pair = i / 8, half = i / 4 % 2, c = i % 4;
      const int f = f0 + (g / 2) * 8 + 2 * (2 * pair + c / 2) + g % 2;
      const int r = 16 * mine + 4 * q + 2 * half + c % 2;
      if (r < rank) grads[(static_cast<Index>(e) * width + f) * rank + r] += sum;
    };
  };
  if (m.d_gate_b != nullptr) reduce(&gate_b[0][0][0], add_b(m.d_gate_b));
  if (m.d_up_b != nullptr) reduce(&up_b[0][0][0], add_b(m.d_up_b));
  if (m.d_down_a != nullptr && down)
    reduce(&down_a[0][0], [&](int i, float sum) {
      const int f = col + 2 * (i / 4) + i % 2, r = 16 * mine + g + 8 * (i % 4 / 2);
      if (r < rank) m.d_down_a[(static_cast<Index>(e) * rank + r) * width + f] += sum;
    });
  if (mine != 0 || (m.d_gate_scale == nullptr && m.d_up_scale == nullptr)) return;
  float sums[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float x = i < 8 ? gate_scale_sum[i % 8] : up_scale_sum[i % 8];
    x += __shfl_xor_sync(kAll, x, 4);
    x += __shfl_xor_sync(kAll, x, 8);
    sums[i] = x + __shfl_xor_sync(kAll, x, 16);
  }
  reduce(sums, [&](int i, float sum) {
    float* grads = i < 8 ? m.d_gate_scale : m.d_up_scale;
    if (g == 0 && grads != nullptr) grads[static_cast<Index>(e) * width + col + i % 8] += sum;
  });
}

// ---- launches ------------------------------------------------------------------------------

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

/// Calls f with the compiled (C, K) of this shape.
template <class F> void with_shape(int rank, int slots, F&& f) {
  const int c = ceil_div(std::max(rank, 1), 16);
  const auto by_slots = [&](auto chunks) {
    if (slots == 1)
      f(chunks, std::integral_constant<int, 1>{});
    else if (slots == 2)
      f(chunks, std::integral_constant<int, 2>{});
    else
      f(chunks, std::integral_constant<int, 4>{});
  };
  if (c == 1)
    by_slots(std::integral_constant<int, 1>{});
  else if (c == 2)
    by_slots(std::integral_constant<int, 2>{});
  else if (c <= 4)
    by_slots(std::integral_constant<int, 4>{});
  else
    f(std::integral_constant<int, 5>{}, std::integral_constant<int, 1>{});
}

/// Enqueues the order of rows, and of pairs when `pairs`; fills the call's pointers.
void put_in_order(TileCall& c, void* room, bool pairs, cudaStream_t stream) {
  if (c.expert == nullptr) return;
  auto* at = static_cast<std::int32_t*>(room);
  auto *order = at, *list = order + c.rows, *begin = list + c.rows * c.slots;
  const int keys = row_keys(c.slots, c.experts);
  const std::size_t shared =
      sizeof(std::int32_t) * kSortWarps * static_cast<std::size_t>(std::max(keys, c.experts + 1));
  order_kernel<<<pairs ? 2 : 1, kSortThreads, shared, stream>>>(
      order, list, begin, c.expert, static_cast<int>(c.rows), c.slots, c.experts, keys);
  launched("mixture order");
  c.order = order;
  if (pairs) c.pairs = list, c.pair_begin = begin;
}

unsigned tiles_of(const TileCall& c) {
  return static_cast<unsigned>(ceil_div<Index>(c.rows, kRows));
}

}  // namespace

bool tiles_take(const TileCall& c) {
  const bool slots = c.slots == 1 || ((c.slots == 2 || c.slots == 4) && c.rank <= 64);
  const bool rank = c.a == nullptr && c.down_a == nullptr ? true : c.rank % 8 == 0 && c.rank <= 80;
  return slots && rank && c.activation == Activation::silu && c.width % kColumns == 0 &&
         c.experts <= 64 && c.rows * c.slots < (1 << 30) && aligned(c.gate_up) && aligned(c.a) &&
         aligned(c.gate_b) && aligned(c.up_b) && aligned(c.down_a) && aligned(c.out) &&
         aligned(c.d_out) && aligned(c.q) && aligned(c.d_gate_up) && aligned(c.p) && aligned(c.z) &&
         aligned(c.gate_scale) && aligned(c.up_scale);
}

std::size_t order_bytes(Index rows, int slots, int experts) {
  return sizeof(std::int32_t) * static_cast<std::size_t>(rows * (1 + slots) + experts + 2);
}

void tiles_forward(TileCall c, void* room, cudaStream_t stream) {
  put_in_order(c, room, false, stream);
  with_shape(c.rank, c.slots, [&](auto chunks, auto slots) {
    forward_kernel<chunks(), slots()><<<tiles_of(c), kThreads, 0, stream>>>(c);
  });
  launched("mixture");
}

void tiles_backward(TileCall c, void* room, cudaStream_t stream) {
  put_in_order(c, room, true, stream);
  with_shape(c.rank, c.slots, [&](auto chunks, auto slots) {
    rows_kernel<chunks(), slots()><<<tiles_of(c), kThreads, 0, stream>>>(c);
  });
  launched("mixture_backward by rows");
  if (c.d_gate_b == nullptr && c.d_up_b == nullptr && c.d_down_a == nullptr &&
      c.d_gate_scale == nullptr && c.d_up_scale == nullptr)
    return;
  with_shape(c.rank, 1, [&](auto chunks, auto) {
    columns_kernel<chunks()>
        <<<dim3(static_cast<unsigned>(c.width / kColumns), static_cast<unsigned>(c.experts),
                static_cast<unsigned>(chunks())),
           kThreads, 0, stream>>>(c);
  });
  launched("mixture_backward by columns");
}

}  // namespace mixlora::cuda
