// The gated feed-forward mixture on tensor cores: 16 rows by 32 columns a warp, no staging.
//
// Lane l = 4g + q owns the eight neighbouring columns 8q .. 8q+7 of rows g and g+8: tile j of the
// four 16x8 tiles holds column 8q + 2j + i as its column 2q + i. So a lane reads and writes 16
// bytes of a row at a time, one Philox call covers its columns, and what one product leaves in C
// is what the next one wants as A.
//
// A pass takes two slots (or one). Rows are sorted by the pair of experts they chose, and every
// pair begins a new tile, so that a tile has one expert a slot; more slots take more passes.
//
// Traffic of a row: forward 6 F bytes; backward by rows 10 F, by columns 6 F K; the factors of an
// expert, 6 F R bytes, come from L2 once a tile. The kernels are bound by their instructions, half
// of them Philox and SiLU.
#include <algorithm>

#include "kernels/cuda/mixture.cuh"
#include "kernels/cuda/tensor_core.cuh"

namespace mixlora::cuda {
namespace {

using Number = __nv_bfloat16;
constexpr int kRows = 16, kColumns = 32;
constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kSortThreads = 1024, kSortWarps = kSortThreads / kWarp;
constexpr int kMostExperts = 32;  // the sort's counters of all pairs fit in shared memory

// ---- order ---------------------------------------------------------------------------------

/// order: items by key, equal keys in the order of items, every key beginning at a multiple of
/// `align`; begin[key] where each key's items start (may be null). Returns the end. One block;
/// `counts` has kSortWarps * keys numbers. The result is the same however the warps run.
template <class Key>
__device__ int counting_sort(std::int32_t* order, std::int32_t* begin, std::int32_t* counts,
                             int items, int keys, int align, Key key_of) {
  __shared__ int end;
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
      total = ceil_div(total, align) * align;
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
    if (lane == 0) end = base;
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
  return end;
}

/// Where one pass's order and the lists of pairs lie in the call's working memory.
struct OrderRoom {
  std::int32_t *order, *tiles, *pairs, *pair_begin;
  int most_tiles;
};
int keys_of(int slots, int experts) {
  return slots == 2 ? (experts + 1) * (experts + 1) : experts + 1;
}
int most_tiles(Index rows, int experts) {
  const auto keys = std::min<Index>(rows, keys_of(2, experts));
  return static_cast<int>(rows / kRows + keys + 1);
}

/// Block 0: rows by the experts of slots [first, first + count), tiles apart, -1 where a tile is
/// not full. Block 1: all (row, slot) pairs by expert; those without come last.
__global__ void __launch_bounds__(kSortThreads)
    order_kernel(OrderRoom room, const std::int32_t* expert, int rows, int slots, int experts,
                 int first, int count, int keys) {
  extern __shared__ std::int32_t counts[];
  if (blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < room.most_tiles * kRows; i += kSortThreads)
      room.order[i] = -1;
    const int end = counting_sort(room.order, nullptr, counts, rows, keys, kRows, [=](int n) {
      const int e0 = expert[n * slots + first] + 1;
      if (count == 1) return e0;
      const int e1 = expert[n * slots + first + 1] + 1;
      return min(e0, e1) * (experts + 1) + max(e0, e1);
    });
    if (threadIdx.x == 0) *room.tiles = end / kRows;
  } else {
    counting_sort(room.pairs, room.pair_begin, counts, rows * slots, experts + 1, 1, [=](int i) {
      const int e = expert[i];
      return e < 0 ? experts : e;
    });
  }
}

// ---- what a lane reads ---------------------------------------------------------------------

__device__ inline uint2 read2(const Number* p) { return __ldg(reinterpret_cast<const uint2*>(p)); }
__device__ inline void read4(unsigned (&to)[4], const Number* p) {
  const uint4 x = __ldg(reinterpret_cast<const uint4*>(p));
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ inline void read4(float (&to)[4], const float* p) {
  const float4 x = __ldg(reinterpret_cast<const float4*>(p));
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ inline void write4(Number* p, const unsigned (&x)[4]) {
  *reinterpret_cast<uint4*>(p) = make_uint4(x[0], x[1], x[2], x[3]);
}

/// Rows g and g + 8 of a tile, as a lane sees them. With two slots the lower expert comes first.
template <int K> struct Tile {
  Index row[2];
  bool live[2];  // a row that is not there reads the tile's first one; nothing is written for it
  int slot[2][K];
  float weight[2][K];
  int expert[K];  // of the whole tile; -1: none
};

template <int K> __device__ Tile<K> tile_of(const TileCall& m, int index, int g) {
  Tile<K> t;
  const Index first = static_cast<Index>(index) * kRows;
  int own[2][K];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Index at = first + g + 8 * h;
    Index n = at < m.rows ? at : -1;
    if (m.order != nullptr) n = m.order[at];
    t.live[h] = n >= 0;
    t.row[h] = t.live[h] ? n : (m.order != nullptr ? m.order[first] : first);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      t.slot[h][k] = m.first_slot + k;
      own[h][k] = m.expert_of(t.row[h], m.first_slot + k);
      t.weight[h][k] = m.weight_of(t.row[h], m.first_slot + k);
    }
    if constexpr (K == 2) {
      if (own[h][0] > own[h][1]) {
        const int e = own[h][0];
        const float w = t.weight[h][0];
        own[h][0] = own[h][1], own[h][1] = e;
        t.weight[h][0] = t.weight[h][1], t.weight[h][1] = w;
        t.slot[h][0] = m.first_slot + 1, t.slot[h][1] = m.first_slot;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) t.expert[k] = __shfl_sync(kAll, own[0][k], 0);
  return t;
}

/// Sixteen numbers of each row as an A operand whose columns 2q+i are the numbers 4q+i and whose
/// columns 2q+8+i are 4q+2+i; `count` of them exist.
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
  const bool lower = count > 0, upper = count > 8;
  a[0] = lower && row0 != nullptr ? load_pair(row0 + 2 * q) : 0;
  a[1] = lower && row1 != nullptr ? load_pair(row1 + 2 * q) : 0;
  a[2] = upper && row0 != nullptr ? load_pair(row0 + 2 * q + 8) : 0;
  a[3] = upper && row1 != nullptr ? load_pair(row1 + 2 * q + 8) : 0;
}
/// The rows' a of expert e for B1 (or B3), all its sixteens; zeros for a row that is null.
template <int C>
__device__ void load_ranks(unsigned (&a)[C][4], const TileCall& m, const Index (&row)[2],
                           const bool (&there)[2], int e, bool up, int q) {
  const Index width = 2 * m.experts * m.rank, at = ((up ? m.experts : 0) + e) * m.rank;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const Number* rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      rows[h] = m.a == nullptr || e < 0 || !there[h] ? nullptr : m.a + row[h] * width + at + 16 * c;
    load_a(a[c], rows[0], rows[1], q, m.rank - 16 * c);
  }
}
/// The rows' q of expert e; `slot_row` counts slots apart when per_slot.
template <int C>
__device__ void load_gradients(unsigned (&a)[C][4], const TileCall& m, const Index (&slot_row)[2],
                               const bool (&there)[2], int e, int q) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const Number* rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      rows[h] = m.q == nullptr || m.down_a == nullptr || e < 0 || !there[h]
                    ? nullptr
                    : m.q + (slot_row[h] * m.experts + e) * m.rank + 16 * c;
    load_q(a[c], rows[0], rows[1], q, m.rank - 16 * c);
  }
}

constexpr __device__ bool kBoth[2] = {true, true};

/// One expert's factors where a lane reads them, for the columns from 0.
struct Factors {
  const Number *gate_b, *up_b, *down_a;
  const float *gate_scale, *up_scale;
};
__device__ inline Factors factors_of(const TileCall& m, int e, int g, int q) {
  Factors f{};
  if (e < 0) return f;
  const Index b = (e * m.width + (g / 2) * 8 + g % 2) * m.rank + 4 * q;
  if (m.gate_b != nullptr && m.a != nullptr) f.gate_b = m.gate_b + b;
  if (m.up_b != nullptr && m.a != nullptr) f.up_b = m.up_b + b;
  if (m.down_a != nullptr)
    f.down_a = m.down_a + (static_cast<Index>(e) * m.rank + g) * m.width + 8 * q;
  if (m.gate_scale != nullptr) f.gate_scale = m.gate_scale + e * m.width + 8 * q;
  if (m.up_scale != nullptr) f.up_scale = m.up_scale + e * m.width + 8 * q;
  return f;
}
/// B1 (or B3) of two tiles as B operands: inner dimension the rank, outer the columns.
template <int C>
__device__ void load_b(uint2 (&w)[C][2], const Number* b, int f0, int pair, int rank, int q) {
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int t = 0; t < 2; ++t)
      w[c][t] = 16 * c + 4 * q < rank ? read2(b + (f0 + 2 * (2 * pair + t)) * rank + 16 * c)
                                      : make_uint2(0, 0);
}
/// A2 of two tiles as B operands: inner dimension the columns, outer eight ranks each.
template <int C>
__device__ void load_down(uint2 (&w)[2 * C], const Number* down_a, int f0, int pair, int rank,
                          int width) {
#pragma unroll
  for (int i = 0; i < 2 * C; ++i)
    w[i] = 8 * i < rank ? read2(down_a + static_cast<Index>(8 * i) * width + f0 + 4 * pair)
                        : make_uint2(0, 0);
}

/// Eight stored numbers of rows g and g + 8 into the four tiles.
__device__ inline void widen(float (&to)[4][4], int h, const Number* from) {
  unsigned x[4];
  load_pairs4(x, from);
#pragma unroll
  for (int j = 0; j < 4; ++j) to[j][2 * h] = low(x[j]), to[j][2 * h + 1] = high(x[j]);
}
__device__ inline void narrow(Number* to, const float (&from)[4][4], int h) {
  unsigned x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = pack2(from[j][2 * h], from[j][2 * h + 1]);
  write4(to, x);
}

/// u (or v) of two tiles: the frozen projection's numbers, then plus B a.
__device__ inline void start(float (&u)[2][4], const unsigned (&c)[2][4], int pair) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      u[t][2 * h] = low(c[h][2 * pair + t]);
      u[t][2 * h + 1] = high(c[h][2 * pair + t]);
    }
}
template <int C>
__device__ void add_b(float (&u)[2][4], const unsigned (&a)[C][4], const uint2 (&w)[C][2]) {
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int t = 0; t < 2; ++t) mma(u[t], a[c][0], a[c][1], a[c][2], a[c][3], w[c][t].x, w[c][t].y);
}
/// d += A2^T q of two tiles; undropped, without s.
template <int C>
__device__ void add_down(float (&d)[2][4], const unsigned (&q)[C][4], const uint2 (&w)[2 * C]) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    mma(d[0], q[c][0], q[c][1], q[c][2], q[c][3], transposed(w[2 * c].x),
        transposed(w[2 * c + 1].x));
    mma(d[1], q[c][0], q[c][1], q[c][2], q[c][3], transposed(w[2 * c].y),
        transposed(w[2 * c + 1].y));
  }
}

/// Whether column i of the eight is kept; `threshold` in the upper half of its word.
__device__ inline bool kept(const Philox4& bits, int i, std::uint32_t threshold) {
  const std::uint32_t word = bits.v[i / 2];
  return (i % 2 == 0 ? word << 16 : word) >= threshold;
}

struct Silu {
  float value, slope;
};
__device__ inline Silu silu(float x) {
  float s;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0F + __expf(-x)));
  const float value = x * s;
  return {value, s + value - value * s};  // s (1 + x (1 - s))
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

// ---- forward -------------------------------------------------------------------------------

template <int C, int K, bool Scaled>
__global__ void __launch_bounds__(kThreads, C == 1 ? 2 : 1) forward_kernel(const TileCall m) {
  __shared__ float4 shared[kWarps][kWarp];
  if (m.tiles != nullptr && static_cast<int>(blockIdx.x) >= *m.tiles) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q = lane % 4, width = static_cast<int>(m.width), rank = m.rank;
  const auto tile = tile_of<K>(m, static_cast<int>(blockIdx.x), g);
  const bool drops = m.threshold != 0 && m.down_a != nullptr;
  const std::uint32_t threshold = m.threshold << 16;
  Factors factors[K];
  unsigned a1[K][C][4], a3[K][C][4];
  float z[K][2 * C][4] = {};
  int4 ids[2];
  const Number* gate_up[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    ids[h] = drops ? m.id_of(tile.row[h]) : int4{};
    gate_up[h] = m.gate_up + tile.row[h] * 2 * width + 8 * q;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int e = tile.expert[k];
    factors[k] = factors_of(m, e, g, q);
    load_ranks<C>(a1[k], m, tile.row, kBoth, e, false, q);
    load_ranks<C>(a3[k], m, tile.row, kBoth, e, true, q);
  }

  for (int f0 = warp * kColumns; f0 < width; f0 += kWarps * kColumns) {
    unsigned c1[2][4], c3[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      read4(c1[h], gate_up[h] + f0);
      read4(c3[h], gate_up[h] + width + f0);
    }
    float total[4][4] = {};
    if (m.adds)
#pragma unroll
      for (int h = 0; h < 2; ++h) widen(total, h, m.out + tile.row[h] * width + f0 + 8 * q);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Factors& f = factors[k];
      Philox4 bits[2] = {};
      const bool drop = drops && tile.expert[k] >= 0;
      if (drop)
#pragma unroll
        for (int h = 0; h < 2; ++h) bits[h] = m.bits(ids[h], tile.expert[k], (f0 + 8 * q) / 8);
      unsigned own[2][4];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        float u[2][4], v[2][4];
        start(u, c1, pair);
        start(v, c3, pair);
        if (f.gate_b != nullptr) {
          uint2 w[C][2];
          load_b<C>(w, f.gate_b, f0, pair, rank, q);
          add_b<C>(u, a1[k], w);
        }
        if (f.up_b != nullptr) {
          uint2 w[C][2];
          load_b<C>(w, f.up_b, f0, pair, rank, q);
          add_b<C>(v, a3[k], w);
        }
        float s1[4], s3[4];
        if (Scaled && f.gate_scale != nullptr) read4(s1, f.gate_scale + f0 + 4 * pair);
        if (Scaled && f.up_scale != nullptr) read4(s3, f.up_scale + f0 + 4 * pair);
        unsigned dropped[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float &gate = u[i / 2][2 * h + i % 2], &up = v[i / 2][2 * h + i % 2];
            if (Scaled && f.gate_scale != nullptr) gate *= s1[i];
            if (Scaled && f.up_scale != nullptr) up *= s3[i];
            x[i] = silu(gate).value * up;
            total[2 * pair + i / 2][2 * h + i % 2] += tile.weight[h][k] * x[i];
          }
          own[h][2 * pair] = pack2(x[0], x[1]), own[h][2 * pair + 1] = pack2(x[2], x[3]);
          if (drop)
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] = kept(bits[h], 4 * pair + i, threshold) ? x[i] : 0.0F;
          dropped[0][h] = pack2(x[0], x[1]), dropped[1][h] = pack2(x[2], x[3]);
        }
        if (f.down_a == nullptr) continue;
        uint2 w[2 * C];
        load_down<C>(w, f.down_a, f0, pair, rank, width);
#pragma unroll
        for (int i = 0; i < 2 * C; ++i)
          mma(z[k][i], dropped[0][0], dropped[0][1], dropped[1][0], dropped[1][1], w[i].x, w[i].y);
      }
      if (m.per_slot)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (!tile.live[h]) continue;
          if (tile.expert[k] < 0 && tile.weight[h][k] == 0)
            own[h][0] = own[h][1] = own[h][2] = own[h][3] = 0;
          write4(m.out + (tile.slot[h][k] * m.rows + tile.row[h]) * width + f0 + 8 * q, own[h]);
        }
    }
    if (!m.per_slot)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (tile.live[h]) narrow(m.out + tile.row[h] * width + f0 + 8 * q, total, h);
  }

  if (m.down_a == nullptr) return;
  const float s = m.scale * m.keep;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int i = 0; i < 2 * C; ++i) {
      if (8 * i >= rank) continue;
      const float4 sum = across_warps(z[k][i], shared);
      if (warp != 0) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (tile.live[h])
          *reinterpret_cast<unsigned*>(m.z + (tile.row[h] * m.slots + tile.slot[h][k]) * rank +
                                       8 * i + 2 * q) =
              h == 0 ? pack2(s * sum.x, s * sum.y) : pack2(s * sum.z, s * sum.w);
    }
}

// ---- backward ------------------------------------------------------------------------------

/// Backward by rows: d_gate_up, d_weight, p. A block has one tile, its warps share the columns.
template <int C, int K, bool Scaled>
__global__ void __launch_bounds__(kThreads, C == 1 && K == 1 ? 2 : 1)
    rows_kernel(const TileCall m) {
  __shared__ float4 shared[kWarps][kWarp];
  if (m.tiles != nullptr && static_cast<int>(blockIdx.x) >= *m.tiles) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q = lane % 4, width = static_cast<int>(m.width), rank = m.rank;
  const auto tile = tile_of<K>(m, static_cast<int>(blockIdx.x), g);
  const bool down = m.down_a != nullptr && m.q != nullptr;
  const bool drops = m.threshold != 0 && down;
  const std::uint32_t threshold = m.threshold << 16;
  const float keep_scale = m.scale * m.keep;
  const auto slot_row = [&](int h, int k) {
    return (m.per_slot ? tile.slot[h][k] * m.rows : 0) + tile.row[h];
  };
  Factors factors[K];
  unsigned a1[K][C][4], a3[K][C][4], q_frag[K][C][4];
  float p1[K][2 * C][4] = {}, p3[K][2 * C][4] = {}, d_weight[K][2] = {};
  int4 ids[2];
  const Number* gate_up[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    ids[h] = drops ? m.id_of(tile.row[h]) : int4{};
    gate_up[h] = m.gate_up + tile.row[h] * 2 * width + 8 * q;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int e = tile.expert[k];
    factors[k] = factors_of(m, e, g, q);
    load_ranks<C>(a1[k], m, tile.row, kBoth, e, false, q);
    load_ranks<C>(a3[k], m, tile.row, kBoth, e, true, q);
    const Index slot_rows[2] = {slot_row(0, k), slot_row(1, k)};
    load_gradients<C>(q_frag[k], m, slot_rows, kBoth, e, q);
  }

  for (int f0 = warp * kColumns; f0 < width; f0 += kWarps * kColumns) {
    unsigned c1[2][4], c3[2][4], d_out[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      read4(c1[h], gate_up[h] + f0);
      read4(c3[h], gate_up[h] + width + f0);
      if (!m.per_slot) read4(d_out[h], m.d_out + tile.row[h] * width + f0 + 8 * q);
    }
    float gate_sum[4][4] = {}, up_sum[4][4] = {};
    if (m.adds)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Number* row = m.d_gate_up + tile.row[h] * 2 * width + f0 + 8 * q;
        widen(gate_sum, h, row);
        widen(up_sum, h, row + width);
      }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Factors& f = factors[k];
      Philox4 bits[2] = {};
      const bool drop = drops && tile.expert[k] >= 0;
      float w_h[2];
      if (drop)
#pragma unroll
        for (int h = 0; h < 2; ++h) bits[h] = m.bits(ids[h], tile.expert[k], (f0 + 8 * q) / 8);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool empty = tile.expert[k] < 0 && tile.weight[h][k] == 0;
        w_h[h] = m.per_slot ? (empty ? 0.0F : 1.0F) : tile.weight[h][k];
        if (m.per_slot) read4(d_out[h], m.d_out + slot_row(h, k) * width + f0 + 8 * q);
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        float u[2][4], v[2][4], d[2][4] = {};
        uint2 w1[C][2], w3[C][2];
        start(u, c1, pair);
        start(v, c3, pair);
        if (f.gate_b != nullptr) {
          load_b<C>(w1, f.gate_b, f0, pair, rank, q);
          add_b<C>(u, a1[k], w1);
        }
        if (f.up_b != nullptr) {
          load_b<C>(w3, f.up_b, f0, pair, rank, q);
          add_b<C>(v, a3[k], w3);
        }
        if (down && f.down_a != nullptr) {
          uint2 w[2 * C];
          load_down<C>(w, f.down_a, f0, pair, rank, width);
          add_down<C>(d, q_frag[k], w);
        }
        float s1[4], s3[4];
        if (Scaled && f.gate_scale != nullptr) read4(s1, f.gate_scale + f0 + 4 * pair);
        if (Scaled && f.up_scale != nullptr) read4(s3, f.up_scale + f0 + 4 * pair);
        unsigned gate[2][2], up[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x[4], y[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int t = i / 2, at = 2 * h + i % 2;
            const unsigned word = d_out[h][2 * pair + t];
            const float from_out = i % 2 == 0 ? low(word) : high(word);
            float through = keep_scale * d[t][at];
            if (drop) through = kept(bits[h], 4 * pair + i, threshold) ? through : 0.0F;
            float gate_u = u[t][at], value = v[t][at];
            if (Scaled && f.gate_scale != nullptr) gate_u *= s1[i];
            if (Scaled && f.up_scale != nullptr) value *= s3[i];
            const Silu act = silu(gate_u);
            d_weight[k][h] += act.value * value * from_out;
            const float d_h = w_h[h] * (from_out + through);
            x[i] = d_h * value * act.slope;
            y[i] = d_h * act.value;
            if (Scaled && f.gate_scale != nullptr) x[i] *= s1[i];
            if (Scaled && f.up_scale != nullptr) y[i] *= s3[i];
            gate_sum[2 * pair + t][at] += x[i];
            up_sum[2 * pair + t][at] += y[i];
          }
          gate[0][h] = pack2(x[0], x[1]), gate[1][h] = pack2(x[2], x[3]);
          up[0][h] = pack2(y[0], y[1]), up[1][h] = pack2(y[2], y[3]);
        }
        const auto collect = [&](float(&p)[2 * C][4], const unsigned(&x)[2][2],
                                 const uint2(&w)[C][2]) {
#pragma unroll
          for (int c = 0; c < C; ++c) {
            mma(p[2 * c], x[0][0], x[0][1], x[1][0], x[1][1], transposed(w[c][0].x),
                transposed(w[c][1].x));
            mma(p[2 * c + 1], x[0][0], x[0][1], x[1][0], x[1][1], transposed(w[c][0].y),
                transposed(w[c][1].y));
          }
        };
        if (m.p != nullptr && f.gate_b != nullptr) collect(p1[k], gate, w1);
        if (m.p != nullptr && f.up_b != nullptr) collect(p3[k], up, w3);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!tile.live[h]) continue;
      Number* row = m.d_gate_up + tile.row[h] * 2 * width + f0 + 8 * q;
      narrow(row, gate_sum, h);
      narrow(row + width, up_sum, h);
    }
  }

#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int e = tile.expert[k];
    if (m.p != nullptr && e >= 0)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (16 * c >= rank) continue;
#pragma unroll
        for (int up = 0; up < 2; ++up) {
          const float4 x = across_warps(up != 0 ? p3[k][2 * c] : p1[k][2 * c], shared),
                       y = across_warps(up != 0 ? p3[k][2 * c + 1] : p1[k][2 * c + 1], shared);
          if (warp != 0 || 16 * c + 4 * q >= rank) continue;
          const float s = m.scale;
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (tile.live[h])
              *reinterpret_cast<uint2*>(m.p + tile.row[h] * 2 * m.experts * rank +
                                        (up * m.experts + e) * rank + 16 * c + 4 * q) =
                  h == 0 ? make_uint2(pack2(s * x.x, s * x.y), pack2(s * y.x, s * y.y))
                         : make_uint2(pack2(s * x.z, s * x.w), pack2(s * y.z, s * y.w));
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
      if (!tile.live[h]) continue;
      const bool empty = e < 0 && tile.weight[h][k] == 0;
      float total = empty ? 0.0F : h == 0 ? sum.x : sum.y;
      if (down && e >= 0)
        for (int r = 0; r < rank; ++r)
          total += __bfloat162float(m.z_in[(tile.row[h] * m.slots + tile.slot[h][k]) * rank + r]) *
                   __bfloat162float(m.q[(tile.row[h] * m.experts + e) * rank + r]);
      m.d_weight[tile.row[h] * m.slots + tile.slot[h][k]] = total;
    }
  }
}

/// Backward by columns: a block has 32 columns of one expert and 16 of its ranks (blockIdx.z), its
/// warps share the expert's rows. Adds to the gradients of B1, B3, A2 and of DoRA's scales.
template <int C, bool Scaled>
__global__ void __launch_bounds__(kThreads, 1) columns_kernel(const TileCall m) {
  __shared__ float shared[kWarps][16][kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q = lane % 4, width = static_cast<int>(m.width), rank = m.rank;
  const int e = static_cast<int>(blockIdx.y), mine = static_cast<int>(blockIdx.z);
  const int f0 = static_cast<int>(blockIdx.x) * kColumns, col = f0 + 8 * q;
  const bool down = m.down_a != nullptr && m.q != nullptr;
  const bool drops = m.threshold != 0 && down;
  const std::uint32_t threshold = m.threshold << 16;
  const int begin = m.pairs != nullptr ? m.pair_begin[e] : 0;
  const int end = m.pairs != nullptr ? m.pair_begin[e + 1] : static_cast<int>(m.rows);
  const float keep_scale = m.scale * m.keep;
  const Factors factors = factors_of(m, e, g, q);
  float gate_b[2][2][4] = {}, up_b[2][2][4] = {}, down_a[4][4] = {};
  float gate_scale_sum[8] = {}, up_scale_sum[8] = {};
  // The block's columns do not change, so neither do the factors' operands.
  uint2 w1[2][C][2] = {}, w3[2][C][2] = {}, w2[2][2 * C] = {};
  if constexpr (C == 1)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      if (factors.gate_b != nullptr) load_b<C>(w1[pair], factors.gate_b, f0, pair, rank, q);
      if (factors.up_b != nullptr) load_b<C>(w3[pair], factors.up_b, f0, pair, rank, q);
      if (down) load_down<C>(w2[pair], factors.down_a, f0, pair, rank, width);
    }

  for (int first = begin + warp * kRows; first < end; first += kWarps * kRows) {
    Index row[2], slot_row[2];
    float weight[2];
    bool live[2];
    unsigned c1[2][4], c3[2][4], d_out[2][4];
    Philox4 bits[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = first + g + 8 * h;
      live[h] = at < end;
      const int safe = live[h] ? at : end - 1;
      const int pair = m.pairs != nullptr ? m.pairs[safe] : safe;
      const int k = m.pairs != nullptr ? pair % m.slots : 0;
      row[h] = m.pairs != nullptr ? pair / m.slots : pair;
      slot_row[h] = (m.per_slot ? k * m.rows : 0) + row[h];
      weight[h] = !live[h] ? 0.0F : m.per_slot ? 1.0F : m.weight_of(row[h], k);
      const Number* from = m.gate_up + row[h] * 2 * width + col;
      read4(c1[h], from);
      read4(c3[h], from + width);
      read4(d_out[h], m.d_out + slot_row[h] * width + col);
      if (drops) bits[h] = m.bits(m.id_of(row[h]), e, col / 8);
    }
    unsigned a1[C][4], a3[C][4], q_frag[C][4];
    load_ranks<C>(a1, m, row, live, e, false, q);
    load_ranks<C>(a3, m, row, live, e, true, q);
    load_gradients<C>(q_frag, m, slot_row, live, e, q);
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
      if constexpr (C > 1) {
        if (factors.gate_b != nullptr) load_b<C>(w1[pair], factors.gate_b, f0, pair, rank, q);
        if (factors.up_b != nullptr) load_b<C>(w3[pair], factors.up_b, f0, pair, rank, q);
        if (down) load_down<C>(w2[pair], factors.down_a, f0, pair, rank, width);
      }
      float u[2][4], v[2][4], d[2][4] = {};
      start(u, c1, pair);
      start(v, c3, pair);
      if (factors.gate_b != nullptr) add_b<C>(u, a1, w1[pair]);
      if (factors.up_b != nullptr) add_b<C>(v, a3, w3[pair]);
      if (down) add_down<C>(d, q_frag, w2[pair]);
      float s1[4], s3[4];
      if (Scaled && m.gate_scale != nullptr) read4(s1, factors.gate_scale + f0 + 4 * pair);
      if (Scaled && m.up_scale != nullptr) read4(s3, factors.up_scale + f0 + 4 * pair);
      unsigned gate[2][2], up[2][2], dropped[2][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x[4], y[4], z[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = i / 2, at = 2 * h + i % 2;
          const unsigned word = d_out[h][2 * pair + t];
          const float from_out = i % 2 == 0 ? low(word) : high(word);
          float kept_scale = weight[h] * keep_scale;
          if (drops) kept_scale = kept(bits[h], 4 * pair + i, threshold) ? kept_scale : 0.0F;
          float gate_u = u[t][at], value = v[t][at];
          if (Scaled && m.gate_scale != nullptr) gate_u *= s1[i];
          if (Scaled && m.up_scale != nullptr) value *= s3[i];
          const Silu act = silu(gate_u);
          const float d_h = weight[h] * from_out + kept_scale * d[t][at];
          x[i] = d_h * value * act.slope;
          y[i] = d_h * act.value;
          z[i] = kept_scale * act.value * value;
          if (Scaled) {
            gate_scale_sum[4 * pair + i] += x[i] * u[t][at];
            up_scale_sum[4 * pair + i] += y[i] * v[t][at];
          }
          if (Scaled && m.gate_scale != nullptr) x[i] *= s1[i];
          if (Scaled && m.up_scale != nullptr) y[i] *= s3[i];
        }
        gate[0][h] = pack2(x[0], x[1]), gate[1][h] = pack2(x[2], x[3]);
        up[0][h] = pack2(y[0], y[1]), up[1][h] = pack2(y[2], y[3]);
        dropped[0][h] = pack2(z[0], z[1]), dropped[1][h] = pack2(z[2], z[3]);
      }
      const auto collect = [&](float(&sums)[2][4], const unsigned(&x)[2][2],
                               const unsigned(&a)[4]) {
        const unsigned x0 = transposed(x[0][0]), x1 = transposed(x[1][0]), x2 = transposed(x[0][1]),
                       x3 = transposed(x[1][1]);
        mma(sums[0], x0, x1, x2, x3, a[0], a[1]);
        mma(sums[1], x0, x1, x2, x3, a[2], a[3]);
      };
      if (m.d_gate_b != nullptr) collect(gate_b[pair], gate, a1_t);
      if (m.d_up_b != nullptr) collect(up_b[pair], up, a3_t);
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
  if constexpr (Scaled) {
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
}

// ---- launches ------------------------------------------------------------------------------

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }
bool scaled(const TileCall& c) { return c.gate_scale != nullptr || c.up_scale != nullptr; }

/// Calls f with the compiled C, sixteens of ranks, and whether DoRA's scales are there.
template <class F> void with_rank(const TileCall& c, F&& f) {
  const int chunks = ceil_div(std::max(c.rank, 1), 16);
  const auto by_scale = [&](auto n) {
    if (scaled(c))
      f(n, std::true_type{});
    else
      f(n, std::false_type{});
  };
  if (chunks == 1)
    by_scale(std::integral_constant<int, 1>{});
  else if (chunks == 2)
    by_scale(std::integral_constant<int, 2>{});
  else if (chunks <= 4)
    by_scale(std::integral_constant<int, 4>{});
  else
    by_scale(std::integral_constant<int, 5>{});
}

OrderRoom order_room(const TileCall& c, void* room) {
  auto* at = static_cast<std::int32_t*>(room);
  OrderRoom r{};
  r.most_tiles = most_tiles(c.rows, c.experts);
  r.order = at;
  r.tiles = at + static_cast<Index>(r.most_tiles) * kRows;
  r.pairs = r.tiles + 1;
  r.pair_begin = r.pairs + c.rows * c.slots;
  return r;
}

/// Runs f(call, grid, slots) for each pass: the order of its rows first, and with the first one the
/// lists of pairs when `pairs`. The call that comes back has those.
template <class F> void each_pass(TileCall& c, void* room, bool pairs, cudaStream_t stream, F&& f) {
  for (int first = 0; first < c.slots; first += 2) {
    const int count = std::min(2, c.slots - first);
    c.first_slot = first;
    c.adds = first > 0 && !c.per_slot;
    auto grid = static_cast<unsigned>(ceil_div<Index>(c.rows, kRows));
    if (c.expert != nullptr) {
      const OrderRoom r = order_room(c, room);
      const int keys = keys_of(count, c.experts);
      const std::size_t shared = sizeof(std::int32_t) * kSortWarps *
                                 static_cast<std::size_t>(std::max(keys, c.experts + 1));
      check(cudaFuncSetAttribute(order_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared)),
            "shared memory");
      order_kernel<<<pairs && first == 0 ? 2 : 1, kSortThreads, shared, stream>>>(
          r, c.expert, static_cast<int>(c.rows), c.slots, c.experts, first, count, keys);
      launched("mixture order");
      c.order = r.order, c.tiles = r.tiles;
      if (pairs) c.pairs = r.pairs, c.pair_begin = r.pair_begin;
      grid = static_cast<unsigned>(
          std::min<Index>(r.most_tiles, c.rows / kRows + std::min<Index>(c.rows, keys) + 1));
    }
    f(grid, count);
  }
}

}  // namespace

bool tiles_take(const TileCall& c) {
  const bool rank = (c.a == nullptr && c.down_a == nullptr) || (c.rank % 8 == 0 && c.rank <= 80);
  return rank && c.activation == Activation::silu && c.width % kColumns == 0 &&
         c.experts <= kMostExperts && c.rows * c.slots < (1 << 30) &&
         c.width * std::max(c.rank, 1) < (1 << 30) && aligned(c.gate_up) && aligned(c.a) &&
         aligned(c.gate_b) && aligned(c.up_b) && aligned(c.down_a) && aligned(c.out) &&
         aligned(c.d_out) && aligned(c.q) && aligned(c.d_gate_up) && aligned(c.p) && aligned(c.z) &&
         aligned(c.gate_scale) && aligned(c.up_scale) && aligned(c.ids);
}

std::size_t order_bytes(Index rows, int slots, int experts) {
  return sizeof(std::int32_t) *
         static_cast<std::size_t>(static_cast<Index>(most_tiles(rows, experts)) * kRows +
                                  rows * slots + experts + 3);
}

void tiles_forward(TileCall c, void* room, cudaStream_t stream) {
  each_pass(c, room, false, stream, [&](unsigned grid, int slots) {
    with_rank(c, [&](auto chunks, auto scales) {
      if (slots == 1)
        forward_kernel<chunks(), 1, scales()><<<grid, kThreads, 0, stream>>>(c);
      else
        forward_kernel<chunks(), 2, scales()><<<grid, kThreads, 0, stream>>>(c);
    });
    launched("mixture");
  });
}

void tiles_backward(TileCall c, void* room, cudaStream_t stream) {
  each_pass(c, room, true, stream, [&](unsigned grid, int slots) {
    with_rank(c, [&](auto chunks, auto scales) {
      if (slots == 1)
        rows_kernel<chunks(), 1, scales()><<<grid, kThreads, 0, stream>>>(c);
      else
        rows_kernel<chunks(), 2, scales()><<<grid, kThreads, 0, stream>>>(c);
    });
    launched("mixture_backward by rows");
  });
  if (c.d_gate_b == nullptr && c.d_up_b == nullptr && c.d_down_a == nullptr &&
      c.d_gate_scale == nullptr && c.d_up_scale == nullptr)
    return;
  with_rank(c, [&](auto chunks, auto scales) {
    columns_kernel<chunks(), scales()>
        <<<dim3(static_cast<unsigned>(c.width / kColumns), static_cast<unsigned>(c.experts),
                static_cast<unsigned>(chunks())),
           kThreads, 0, stream>>>(c);
  });
  launched("mixture_backward by columns");
}

}  // namespace mixlora::cuda
