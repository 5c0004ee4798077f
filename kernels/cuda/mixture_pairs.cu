// Backward of the mixture where every row has two slots (top-2), in one pass: d_gate_up, the sums
// over columns that become p and d_weight, and all gradients.
//
// A block has 256 columns and goes down a share of the tiles, which lie in the order of their pairs
// of experts. What a pair's rows add to the gradients of its two experts stays in registers until
// the next tile has another expert; then it is added to the block's own sums in memory, without
// waiting. Traffic of a row: 10 F bytes, and 32 R + 32 for every 256 columns.
#include <algorithm>
#include <map>

#include "kernels/cuda/mixture_tiles.cuh"

namespace mixlora::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp, kBlockColumns = kWarps * kColumns, kSlots = 2;

/// A thread's place, asked anew where it is used: what follows from it is not kept in registers
/// from tile to tile.
struct Place {
  int warp, lane;
  __device__ Place() {
    int thread;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(thread));
    warp = thread / kWarp, lane = thread % kWarp;
  }
};

/// A number that all lanes have, in one register of the warp.
__device__ int uniform(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAll, x);
#else
  return x;
#endif
}

/// The rows of four tiles in shared memory (-1: none), which are on their way three tiles before a
/// tile is worked on, and their experts and weights, as they come, two.
struct TileLists {
  static constexpr int kEach = 20 * kRows, kBytes = 4 * kEach;
  std::byte* at;
  int end;  // the block's tiles

  __device__ std::byte* of(int tile) const { return at + tile % 4 * kEach; }
  __device__ int own(int tile, int i) const {
    return reinterpret_cast<const std::int32_t*>(of(tile))[i];
  }
  /// A row that is not there is the tile's first one; nothing is written for it.
  __device__ int row(int tile, int i) const {
    const int n = own(tile, i);
    return n < 0 ? own(tile, 0) : n;
  }
  __device__ int2 experts(int tile, int i) const {
    return reinterpret_cast<const int2*>(of(tile) + 4 * kRows)[i];
  }
  /// The weight of the slot k, the one with the lower expert first.
  __device__ float weight(int tile, int i, int k) const {
    const int2 chosen = experts(tile, i);
    const float2 w = reinterpret_cast<const float2*>(of(tile) + 12 * kRows)[i];
    return (chosen.x > chosen.y) == (k == 0) ? w.y : w.x;
  }
  /// Where what lies apart by slots has a row's slot k.
  __device__ int slot_row(int tile, int i, int k, int rows) const {
    const int2 chosen = experts(tile, i);
    return (chosen.x > chosen.y ? kSlots - 1 - k : k) * rows + row(tile, i);
  }
  /// The experts of a tile, the lower first; -1: none.
  __device__ int2 pair(int tile) const {
    const int2 chosen = experts(tile, 0);
    return make_int2(uniform(min(chosen.x, chosen.y)), uniform(max(chosen.x, chosen.y)));
  }

  __device__ void fetch_rows(const TileCall& m, int tile, Place here) const {
    if (here.warp == kWarps - 1 && here.lane < kRows / 4 && tile < end)
      fetch16(shared_address(of(tile)) + static_cast<std::uint32_t>(16 * here.lane),
              m.order + tile * kRows + 4 * here.lane);
  }
  __device__ void fetch_choice(const TileCall& m, int tile, Place here) const {
    if (here.warp != kWarps - 1 || tile >= end) return;
    const int i = here.lane % kRows, n = row(tile, i);
    const bool weights = here.lane >= kRows;
    std::byte* to = of(tile) + (weights ? 12 : 4) * kRows + 8 * i;
    if (!weights || m.weight != nullptr)
      fetch8(shared_address(to),
             weights ? static_cast<const void*>(m.weight + kSlots * n) : m.expert + kSlots * n);
    else
      *reinterpret_cast<float2*>(to) = make_float2(1, 1);
  }
  /// The lists of the block's first tiles; all threads.
  __device__ void begin(const TileCall& m, int first) const {
    const auto settle = [] {
      fetch_commit();
      fetch_wait<0>();
      __syncthreads();
    };
    for (int i = 0; i < 3; ++i) fetch_rows(m, first + i, Place());
    settle();
    for (int i = 0; i < 2; ++i) fetch_choice(m, first + i, Place());
    settle();
  }
};

/// Where a thread's 16 bytes of a tile's row 2 warp go in a stage whose warps' columns are `Side`
/// bytes apart, 512 bytes of a row together; row 2 warp + 1 is 64 bytes on.
template <int Side> __device__ std::uint32_t piece_of(Place here) {
  return static_cast<std::uint32_t>(here.lane / 4 * Side + here.warp / 4 * kPiece +
                                    here.warp % 4 * 128 + 16 * (here.lane % 4));
}
/// B1, B3 and A2 of 32 columns of an expert, and with scales those of gate and up behind them.
template <bool Scaled>
__device__ void fetch_factors(std::uint32_t to, const TileCall& m, const TileRoom& room, int expert,
                              int column, int lane) {
  const int at = max(expert, 0) * static_cast<int>(m.width) + column;
  fetch_factor<1>(to, m.gate_b + at * m.rank, m.rank, lane);
  fetch_factor<1>(to + kFactorBytes, m.up_b + at * m.rank, m.rank, lane);
  fetch_factor<1>(to + 2 * kFactorBytes, room.down_t + at * m.rank, m.rank, lane);
  if constexpr (Scaled) fetch_scales(to + 3 * kFactorBytes, m, at, lane);
}

constexpr int kFragments = kSlots * 4;  // of p

/// A block's shared memory: B1, B3 and A2 of each warp's columns (and DoRA's scales of gate and
/// up), of each slot twice, for this tile and the next; two stages; where the warps' sums of a
/// tile's rows meet, twice where there is room; lists of four tiles' rows.
///
/// A stage: of every warp's columns c1, c3 and d_out (with scales each slot's) of rows g and g + 8,
/// the warps' apart by a few banks; of each slot the 16 rows' a of gate and up, and q; ids.
/// Sums of rows: eight fragments of p, then by rows d_weight of each slot and <u, d u> of both
/// (with scales <v, d v> too).
template <bool Scaled> struct Room {
  static constexpr int kPieces = Scaled ? 8 : 6, kSide = kPieces * kPiece + 64,
                       kRanks = kWarps * kSide, kIds = kRanks + kSlots * 3 * kPiece,
                       kStage = kIds + kPiece / 2;
  static constexpr int kOwn = 3 * kFactorBytes + (Scaled ? kScaleBytes : 0),
                       kFactors = kWarps * kOwn, kRing = kSlots * 2 * kFactors,
                       kMeeting = kRing + 2 * kStage, kMeetings = Scaled ? 1 : 2,
                       kByRow = Scaled ? 1 : kSlots + 1, kRowSums = kWarps * kFragments * kPiece,
                       kMeetingBytes = kRowSums + kWarps * kByRow * kRows * 4,
                       kLists = kMeeting + kMeetings * kMeetingBytes,
                       kBytes = kLists + TileLists::kBytes;
  /// What a block leaves of a tile at TileRoom::sums: the fragments, the sums by row.
  static constexpr int kPlace = kFragments * kFragment + kByRow * kRows;
};

/// What blocks leave of the gradients: (split, E F R) of B1, of B3, of A2, (split, E F) of either
/// scale, and for each split the experts that have any.
struct Sums {
  float *b1, *b3, *a2, *scale1, *scale3;
  std::uint32_t* seen;
  int splits;
};

/// Adds to what this thread alone wrote, in the order of its calls.
__device__ void add2(float* to, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y)
               : "memory");
#else
  atomicAdd(to, x);
  atomicAdd(to + 1, y);
#endif
}
__device__ void add4(float* to, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x),
               "f"(y), "f"(z), "f"(w)
               : "memory");
#else
  add2(to, x, y);
  add2(to + 2, z, w);
#endif
}

/// grid (F / 256, splits of the tiles). Scaled: the slots' outputs lie apart, gate and up have
/// scales.
template <bool Scaled>
__global__ void __launch_bounds__(kThreads, 1)
    pairs_kernel(const __grid_constant__ TileCall m, const __grid_constant__ TileRoom room,
                 const __grid_constant__ Sums out) {
  extern __shared__ __align__(16) std::byte shared[];
  using S = Room<Scaled>;
  const int width = static_cast<int>(m.width), rank = m.rank, rows = static_cast<int>(m.rows);
  const int block = static_cast<int>(blockIdx.x) * kBlockColumns;
  const int tiles = uniform(*m.tiles), split = static_cast<int>(blockIdx.y);
  const int begin = tiles * split / out.splits, end = tiles * (split + 1) / out.splits;
  const std::uint32_t threshold = m.threshold << 16;
  const float keep_scale = m.scale * m.keep;

  std::byte* ring = shared + S::kRing;
  const std::uint32_t base = shared_address(shared), ring_address = base + S::kRing;

  const TileLists lists{shared + S::kLists, end};
  // Which of a slot's two places the newest factors are in, a bit a slot.
  int turns = 0;
  // Sends a tile's numbers, and the factors of the experts that the tile before (`before`) does not
  // have; says by a bit a slot which these are.
  const auto fetch = [&](int tile, int2 before, Place here) {
    const auto [warp, lane] = here;
    const std::uint32_t at = ring_address + static_cast<std::uint32_t>(tile % 2 * S::kStage);
    const std::uint32_t piece = at + piece_of<S::kSide>(here);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lists.row(tile, 2 * warp + h);
      const Number* from = m.gate_up + (row * 2 * width + block + 8 * lane);
      const std::uint32_t to = piece + static_cast<std::uint32_t>(64 * h);
      fetch16(to, from);
      fetch16(to + 2 * kPiece, from + width);
      if constexpr (Scaled)
#pragma unroll
        for (int k = 0; k < kSlots; ++k)
          fetch16(
              to + static_cast<std::uint32_t>((4 + 2 * k) * kPiece),
              m.d_out + (lists.slot_row(tile, 2 * warp + h, k, rows) * width + block + 8 * lane));
      else
        fetch16(to + 4 * kPiece, m.d_out + (row * width + block + 8 * lane));
    }
    const int2 pair = lists.pair(tile);
    const int expert[kSlots] = {pair.x, pair.y};
    if (warp < 3 * kSlots) {
      // Rows and experts that are not there have no ranks, and so no part in the sums over rows.
      const int row = lists.row(tile, lane / 2), which = warp % 3, e = warp < 3 ? pair.x : pair.y,
                k = max(e, 0);
      const bool live = lists.own(tile, lane / 2) >= 0 && e >= 0;
      const Number* from =
          which < 2
              ? m.a + ((row * 2 + which) * m.experts + k) * rank
              : m.q + ((Scaled ? lists.slot_row(tile, lane / 2, warp / 3, rows) : row) * m.experts +
                       k) *
                          rank;
      fetch_ranks<1>(at + static_cast<std::uint32_t>(S::kRanks + warp * kPiece), from,
                     live ? rank : 0, lane);
    } else if (warp == 3 * kSlots && lane < kRows) {
      fetch16(at + static_cast<std::uint32_t>(S::kIds + 16 * lane),
              m.ids + 4 * lists.row(tile, lane));
    }
    int changed = 0;
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
      if (expert[k] != (k == 0 ? before.x : before.y)) {
        turns ^= 1 << k, changed |= 1 << k;
        const auto to =
            shared_address(shared) +
            static_cast<std::uint32_t>((2 * k + (turns >> k & 1)) * S::kFactors + warp * S::kOwn);
        fetch_factors<Scaled>(to, m, room, expert[k], block + warp * kColumns, lane);
      }
    return changed;
  };
  // The warps' sums of a tile's rows, in the order of the warps.
  const auto leave_rows = [&](int tile, Place here) {
    const auto [warp, lane] = here;
    const int thread = warp * kWarp + lane;
    const std::byte* met = shared + S::kMeeting + tile % S::kMeetings * S::kMeetingBytes;
    float* to = room.sums +
                static_cast<Index>(tile * room.splits + static_cast<int>(blockIdx.x)) * S::kPlace;
    const auto* parts = reinterpret_cast<const float4*>(met) + warp * kWarp + lane;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = parts[w * kFragments * kWarp];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    reinterpret_cast<float4*>(to)[warp * kWarp + lane] = sum;
    if (thread >= S::kByRow * kRows) return;
    const float* by_row = reinterpret_cast<const float*>(met + S::kRowSums) + thread;
    float row_sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) row_sum += by_row[w * S::kByRow * kRows];
    to[kFragments * kFragment + thread] = row_sum;
  };

  float b1[kSlots][2][2][4] = {}, b3[kSlots][2][2][4] = {}, a2[kSlots][4][4] = {};
  // Of 16 columns, rows of the fragment: the sums for a slot's scales of gate and up, columns 2k
  // and 2k + 1.
  float scales[Scaled ? 2 : 1][4] = {};
  std::uint32_t seen = 0;
  // Adds a slot's gradients to the block's sums of expert e.
  const auto flush = [&](int slot, int e, float(&x1)[2][2][4], float(&x3)[2][2][4],
                         float(&x2)[4][4]) {
    const auto [warp, lane] = Place();
    const int f0 = block + warp * kColumns, g = lane / 4, q = lane % 4, col = f0 + 8 * q;
    const bool first = (seen >> e & 1) == 0;
    seen |= 1U << e;
    const Index place = static_cast<Index>(split * m.experts + e) * width;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int f = f0 + g / 2 * 8 + 2 * (2 * pair + k) + g % 2, r = 8 * half + 2 * q;
          if (r >= rank) continue;
          const Index at = (place + f) * rank + r;
          float *x = x1[pair][half] + 2 * k, *y = x3[pair][half] + 2 * k;
          if (first) {
            *reinterpret_cast<float2*>(out.b1 + at) = make_float2(x[0], x[1]);
            *reinterpret_cast<float2*>(out.b3 + at) = make_float2(y[0], y[1]);
          } else {
            add2(out.b1 + at, x[0], x[1]);
            add2(out.b3 + at, y[0], y[1]);
          }
          x[0] = x[1] = y[0] = y[1] = 0;
        }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        float *x = x2[j] + 2 * half, *y = x2[j + 1] + 2 * half;
        if (const int r = g + 8 * half; r < rank) {
          float* to = out.a2 + place * rank + static_cast<Index>(r) * width + col + 2 * j;
          if (first)
            *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], y[0], y[1]);
          else
            add4(to, x[0], x[1], y[0], y[1]);
        }
        x[0] = x[1] = y[0] = y[1] = 0;
      }
    if (Scaled && q == slot) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Index at = place + f0 + g / 2 * 8 + 2 * i + g % 2;
        const float* x = scales[Scaled ? i / 2 : 0] + 2 * (i % 2);
        if (first)
          out.scale1[at] = x[0], out.scale3[at] = x[1];
        else
          atomicAdd(out.scale1 + at, x[0]), atomicAdd(out.scale3 + at, x[1]);
      }
    }
  };

  // finish_kernel writes what a row's experts have of p.
  const int all = static_cast<int>(gridDim.x * gridDim.y) * kThreads;
  for (Index i = (split * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * kThreads +
                 static_cast<int>(threadIdx.x);
       i < m.rows * 2 * m.experts * rank / 8; i += all)
    reinterpret_cast<uint4*>(m.p)[i] = make_uint4(0, 0, 0, 0);
  if (begin < end) {
    lists.begin(m, begin);
    fetch(begin, make_int2(-2, -2), Place());
    fetch_commit();
  }
  for (int tile = begin; tile < end; ++tile) {
    fetch_wait<0>();
    __syncthreads();  // this stage and the last tile's sums are there, the other stage is read
    const Place sender;
    const int2 pair_here = lists.pair(tile);
    const int turned = turns;  // this tile's factors
    int ending = 3;            // slots whose expert the next tile does not have
    if (tile + 1 < end) {
      ending = fetch(tile + 1, pair_here, sender);
      lists.fetch_choice(m, tile + 2, sender);
      lists.fetch_rows(m, tile + 3, sender);
      fetch_commit();
    }
    if (S::kMeetings == 2 && tile > begin) leave_rows(tile - 1, sender);

    const auto [warp, lane] = Place();
    const int g = lane / 4, q = lane % 4, col = block + warp * kColumns + 8 * q;
    std::byte* whole = ring + tile % 2 * S::kStage;
    std::byte* own = whole + warp * S::kSide;
    const std::uint32_t ranks = ring_address +
                                static_cast<std::uint32_t>(tile % 2 * S::kStage + S::kRanks) +
                                rank_row(lane),
                        factors =
                            base + static_cast<std::uint32_t>(warp * S::kOwn) + factor_row(lane);
    std::byte* meeting = shared + S::kMeeting + tile % S::kMeetings * S::kMeetingBytes;
    const auto leave_row_sums = [&](int which, const float(&sums)[2]) {
      auto* to =
          reinterpret_cast<float*>(meeting + S::kRowSums) + (warp * S::kByRow + which) * kRows + g;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (const float sum = quad_sum(sums[h]); q == 0) to[8 * h] = sum;
    };
    float gate_sum[2][2][4], up_sum[2][2][4], dot[2] = {};
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      Philox4 bits[2];
      float weight[2], d_weight[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int4 id = *reinterpret_cast<const int4*>(whole + S::kIds + 16 * (g + 8 * h));
        bits[h] = m.bits(id, max(k == 0 ? pair_here.x : pair_here.y, 0), col / 8);
        weight[h] = lists.weight(tile, g + 8 * h, k);
        if constexpr (Scaled) {
          // A row that is not there has no part in the scales' sums.
          const bool live = lists.own(tile, g + 8 * h) >= 0;
          const bool there = (k == 0 ? pair_here.x : pair_here.y) >= 0;
          weight[h] = live && (there || weight[h] != 0) ? 1.0F : 0.0F;
        }
      }
      float p[4][4] = {};  // eight ranks of gate's, eight more, then up's
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const std::uint32_t b =
            factors +
            static_cast<std::uint32_t>((2 * k + (turned >> k & 1)) * S::kFactors + 512 * pair);
        const std::uint32_t a_of = ranks + static_cast<std::uint32_t>(3 * k * kPiece);
        float u[2][4], v[2][4], d[2][4] = {}, from_out[2][4];
        start(u, read_piece(own, 0, pair, lane), read_piece(own, 1, pair, lane));
        start(v, read_piece(own, 2, pair, lane), read_piece(own, 3, pair, lane));
        constexpr int kApart = Scaled ? 2 : 0;
        start(from_out, read_piece(own, 4 + kApart * k, pair, lane),
              read_piece(own, 5 + kApart * k, pair, lane));
        const auto add = [&](float(&to)[2][4], int which) {
          unsigned a[4], w[4];
          read_matrices(a, a_of + static_cast<std::uint32_t>(which * kPiece));
          read_matrices(w, b + static_cast<std::uint32_t>(which * kFactorBytes));
          mma(to[0], a[0], a[1], a[2], a[3], w[0], w[1]);
          mma(to[1], a[0], a[1], a[2], a[3], w[2], w[3]);
        };
        add(u, 0);
        add(v, 1);
        add(d, 2);
        unsigned gate[2][2], up[2][2], dropped[2][2], by_scale[Scaled ? 2 : 1][2][2];
        float s1[4], s3[4];
        if constexpr (Scaled)
          read_scales(s1, s3,
                      shared + (2 * k + (turned >> k & 1)) * S::kFactors + warp * S::kOwn +
                          3 * kFactorBytes,
                      m, (k == 0 ? pair_here.x : pair_here.y) >= 0, 8 * q + 4 * pair);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float whole_scale = weight[h] * keep_scale;
          float x[4], y[4], z[4], from_x[4], from_y[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int t = i / 2, at = 2 * h + i % 2;
            const float kept_scale = kept(bits[h], 4 * pair + i, threshold) ? whole_scale : 0.0F;
            float gate_u = u[t][at], value = v[t][at];
            if constexpr (Scaled) gate_u *= s1[i], value *= s3[i];
            const Silu act = silu(gate_u);
            const float product = act.value * value;
            const float d_h = weight[h] * from_out[t][at] + kept_scale * d[t][at];
            x[i] = d_h * value * act.slope;
            y[i] = d_h * act.value;
            z[i] = kept_scale * product;
            dot[h] += gate_u * x[i];
            if constexpr (Scaled) {
              dot[h] += value * y[i];
              from_x[i] = x[i] * u[t][at], from_y[i] = y[i] * v[t][at];
              x[i] *= s1[i], y[i] *= s3[i];
            } else {
              d_weight[h] += product * from_out[t][at];
            }
            gate_sum[pair][t][at] = k == 0 ? x[i] : gate_sum[pair][t][at] + x[i];
            up_sum[pair][t][at] = k == 0 ? y[i] : up_sum[pair][t][at] + y[i];
          }
          gate[0][h] = pack2(x[0], x[1]), gate[1][h] = pack2(x[2], x[3]);
          up[0][h] = pack2(y[0], y[1]), up[1][h] = pack2(y[2], y[3]);
          dropped[0][h] = pack2(z[0], z[1]), dropped[1][h] = pack2(z[2], z[3]);
          if constexpr (Scaled)
#pragma unroll
            for (int t = 0; t < 2; ++t) {
              by_scale[0][t][h] = pack2(from_x[2 * t], from_x[2 * t + 1]);
              by_scale[1][t][h] = pack2(from_y[2 * t], from_y[2 * t + 1]);
            }
        }
        const auto rows_of = [&](float* sums, const unsigned(&x)[2][2], int which) {
          collect_ranks<1>(*reinterpret_cast<float(*)[2][4]>(sums), x,
                           b + static_cast<std::uint32_t>(which * kFactorBytes));
        };
        rows_of(p[0], gate, 0);
        rows_of(p[2], up, 1);
        const auto columns_of = [&](float(&sums)[2][4], const unsigned(&x)[2][2], int which) {
          unsigned a[4];
          read_matrices_trans(a, a_of + static_cast<std::uint32_t>(which * kPiece));
          const unsigned x0 = transposed(x[0][0]), x1 = transposed(x[1][0]),
                         x2 = transposed(x[0][1]), x3 = transposed(x[1][1]);
          mma(sums[0], x0, x1, x2, x3, a[0], a[1]);
          mma(sums[1], x0, x1, x2, x3, a[2], a[3]);
        };
        columns_of(b1[k][pair], gate, 0);
        columns_of(b3[k][pair], up, 1);
        unsigned a[4];
        read_matrices_trans(a, a_of + 2 * kPiece);
#pragma unroll
        for (int t = 0; t < 2; ++t)
          mma(a2[k][2 * pair + t], a[0], a[2], a[1], a[3], transposed(dropped[t][0]),
              transposed(dropped[t][1]));
        if constexpr (Scaled)
#pragma unroll
          for (int which = 0; which < 2; ++which) {
            const auto& x = by_scale[which];
            const unsigned ones = g == 2 * k + which ? 0x3f803f80U : 0U;  // of one column
            mma(scales[pair], transposed(x[0][0]), transposed(x[1][0]), transposed(x[0][1]),
                transposed(x[1][1]), ones, ones);
          }
        if (k + 1 < kSlots) continue;
          // The lane's c1 and c3 of this pair are read: their place takes the gradients.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto &x = gate_sum[pair], &y = up_sum[pair];
          auto* to = reinterpret_cast<uint2*>(own + h * kPiece + 16 * lane + 8 * pair);
          to[0] =
              make_uint2(pack2(x[0][2 * h], x[0][2 * h + 1]), pack2(x[1][2 * h], x[1][2 * h + 1]));
          to[2 * kPiece / 8] =
              make_uint2(pack2(y[0][2 * h], y[0][2 * h + 1]), pack2(y[1][2 * h], y[1][2 * h + 1]));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        reinterpret_cast<float4*>(meeting)[(warp * kFragments + 4 * k + i) * kWarp + lane] =
            make_float4(p[i][0], p[i][1], p[i][2], p[i][3]);
      if constexpr (!Scaled) leave_row_sums(k, d_weight);
    }
    leave_row_sums(S::kByRow - 1, dot);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = lists.own(tile, g + 8 * h);
      if (n < 0) continue;
      const auto* from = reinterpret_cast<const uint4*>(own + h * kPiece + 16 * lane);
      auto* row = reinterpret_cast<uint4*>(m.d_gate_up + (n * 2 * width + col));
      row[0] = from[0];
      row[width / 8] = from[2 * kPiece / 16];
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if ((ending >> slot & 1) == 0) continue;
      if (const int e = slot == 0 ? pair_here.x : pair_here.y; e >= 0)
        flush(slot, e, b1[slot], b3[slot], a2[slot]);
      // No expert has no scales, but sums for them.
      if (Scaled && q == slot) {
#pragma unroll
        for (int i = 0; i < 8; ++i) scales[Scaled ? i / 4 : 0][i % 4] = 0;
      }
    }
    if constexpr (S::kMeetings == 1) {
      __syncthreads();
      leave_rows(tile, Place());
    }
  }
  if (S::kMeetings == 2 && begin < end) {
    __syncthreads();
    leave_rows(end - 1, Place());
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) out.seen[split] = seen;
}

/// A tile's p, d_weight and row_dots, of all blocks' columns in their order. A warp a fragment of
/// p; one more the sums by row, a lane a row and slot.
constexpr int kFinishWarps = kFragments + 1, kFinishThreads = kFinishWarps * kWarp;
template <bool Scaled>
__device__ void finish_rows(const TileCall& m, const TileRoom& room, int tile) {
  if (tile >= *m.tiles) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const float* place = room.sums + static_cast<Index>(tile) * room.splits * Room<Scaled>::kPlace;
  if (warp < kFragments) {
    const auto rows = tile_of<kSlots>(m, tile, lane / 4);
    const int e = warp < kFragments / 2 ? rows.expert[0] : rows.expert[1];
    if (e < 0) return;
    const auto* from = reinterpret_cast<const float4*>(place) + warp * kWarp + lane;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int i = 0; i < room.splits; ++i) {
      const float4 part = from[i * (Room<Scaled>::kPlace / 4)];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    const int up = warp / 2 % 2, r = 8 * (warp % 2) + 2 * (lane % 4);
    if (r >= m.rank) return;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (rows.live[h])
        *reinterpret_cast<unsigned*>(m.p + ((rows.row[h] * 2 + up) * m.experts + e) * m.rank + r) =
            h == 0 ? pack2(m.scale * sum.x, m.scale * sum.y)
                   : pack2(m.scale * sum.z, m.scale * sum.w);
    return;
  }
  const int i = lane % kRows, k = lane / kRows;
  const bool live = m.order[tile * kRows + i] >= 0;
  const int row = live ? m.order[tile * kRows + i] : 0;
  const float* from = place + kFragments * kFragment + i;
  float sum = 0, dot = 0;
#pragma unroll 8
  for (int j = 0; j < room.splits; ++j) {
    if constexpr (!Scaled) sum += from[j * Room<Scaled>::kPlace + k * kRows];
    dot += from[j * Room<Scaled>::kPlace + (Room<Scaled>::kByRow - 1) * kRows];
  }
  if constexpr (!Scaled) {
    // Where the slot was before its row's lower expert came first.
    const int at =
        row * kSlots + (m.expert[row * kSlots] > m.expert[row * kSlots + 1] ? kSlots - 1 - k : k);
    const int e = m.expert[at];
    const float weight = m.weight_of(row, at % kSlots);
    if (e >= 0) {
      const auto *z = reinterpret_cast<const uint4*>(m.z_in + at * m.rank),
                 *to = reinterpret_cast<const uint4*>(m.q + (row * m.experts + e) * m.rank);
      for (int r = 0; r < m.rank / 8; ++r) {
        const Eight x = unpacked(Packed<Number>{{z[r]}}), y = unpacked(Packed<Number>{{to[r]}});
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += x.v[j] * y.v[j];
      }
    }
    if (live && m.d_weight != nullptr) m.d_weight[at] = e < 0 && weight == 0 ? 0.0F : sum;
    // <v, d v> of a slot is its weight's gradient times the weight.
    const float first = weight * sum;
    dot += first + __shfl_down_sync(kAll, first, kRows);
  }
  if (live && k == 0 && m.row_dots != nullptr) m.row_dots[row] = dot;
}
/// B1, B3 and A2 += the splits' sums, and the scales; four numbers a thread.
template <bool Scaled>
__device__ void finish_gradients(const TileCall& m, const Sums& in, Index unit) {
  const Index one = m.width * m.rank / 4, quads = m.experts * one;
  const auto which = static_cast<int>(unit / quads);
  const auto add = [&](float* grads, const float* parts, Index i, Index of_expert) {
    if (grads == nullptr || i >= m.experts * of_expert) return;
    const auto e = static_cast<int>(i / of_expert);
    auto* to = reinterpret_cast<float4*>(grads) + i;
    const auto* from = reinterpret_cast<const float4*>(parts) + i;
    float4 sum = make_float4(0, 0, 0, 0), old = *to;
#pragma unroll 4
    for (int s = 0; s < in.splits; ++s) {
      if ((in.seen[s] >> e & 1) == 0) continue;
      const float4 part = from[s * m.experts * of_expert];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    *to = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
  };
  if (which < 3) {
    add(which == 0   ? m.d_gate_b
        : which == 1 ? m.d_up_b
                     : m.d_down_a,
        which == 0   ? in.b1
        : which == 1 ? in.b3
                     : in.a2,
        unit % quads, one);
  } else if constexpr (Scaled) {
    const Index i = unit - 3 * quads, each = m.experts * m.width / 4;
    if (i < each)
      add(m.d_gate_scale, in.scale1, i, m.width / 4);
    else
      add(m.d_up_scale, in.scale3, i - each, m.width / 4);
  }
}
/// grid (tiles, then the gradients' parts)
template <bool Scaled>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ TileCall m, const __grid_constant__ TileRoom room,
                  const __grid_constant__ Sums in, int tiles) {
  const auto block = static_cast<int>(blockIdx.x);
  if (block < tiles)
    finish_rows<Scaled>(m, room, block);
  else
    finish_gradients<Scaled>(m, in,
                             static_cast<Index>(block - tiles) * kFinishThreads + threadIdx.x);
}

/// Into how many runs of tiles a block's way is cut, so that the device's last round of blocks is
/// not a short one: rounds times what a block takes, in tiles and its beginning and end.
int splits_of(const TileCall& c, int together) {
  constexpr int kAround = 8, kMost = 8;
  const int tiles = static_cast<int>(c.rows / kRows) + likely_pairs(c) / 2,
            blocks = static_cast<int>(c.width) / kBlockColumns;
  int best = 1, least = 0;
  for (int s = 1; s <= std::min(tiles, kMost); ++s) {
    const int time = ceil_div(blocks * s, together) * (ceil_div(tiles, s) + kAround);
    if (s == 1 || time < least) best = s, least = time;
  }
  return best;
}
/// A kernel's blocks of kThreads with `bytes` of shared memory: none together where they do not
/// fit; asked of the driver once for each kernel and device.
Fit fit(const void* kernel, int bytes) {
  thread_local std::map<std::pair<const void*, int>, Fit> known;
  int device = 0, processors = 0, blocks = 0;
  check(cudaGetDevice(&device), "the device");
  const auto [found, added] = known.try_emplace({kernel, device}, Fit{kWarps, bytes, 0});
  if (added && bytes <= most_shared()) {
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "processors");
    admit_shared(kernel, bytes);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads,
                                                        static_cast<std::size_t>(bytes)),
          "occupancy");
    found->second.together = blocks * processors;
  }
  return found->second;
}
Fit fit_for(const TileCall& c) {
  return has_scales(c)
             ? fit(reinterpret_cast<const void*>(pairs_kernel<true>), Room<true>::kBytes)
             : fit(reinterpret_cast<const void*>(pairs_kernel<false>), Room<false>::kBytes);
}
Sums sums_of(const TileCall& c, void* memory, std::size_t& bytes) {
  Sums s{};
  s.splits = splits_of(c, fit_for(c).together);
  const Index count = s.splits * c.experts * c.width * c.rank;
  auto* at = static_cast<float*>(memory);
  for (float** part : {&s.b1, &s.b3, &s.a2}) *part = at, at += count;
  if (has_scales(c))
    for (float** part : {&s.scale1, &s.scale3}) *part = at, at += count / c.rank;
  s.seen = reinterpret_cast<std::uint32_t*>(at);
  bytes = static_cast<std::size_t>(at - static_cast<float*>(memory) + s.splits) * sizeof(float);
  return s;
}

}  // namespace

bool pairs_take(const TileCall& c) {
  return c.slots == kSlots && c.expert != nullptr && is_whole(c) && c.d_out != nullptr &&
         has_scales(c) == c.per_slot && (c.per_slot || c.z_in != nullptr) && chunks_of(c) == 1 &&
         c.width % kBlockColumns == 0 && fills_tiles(c) && fit_for(c).together > 0;
}
Index pairs_sums(const TileCall& c, int tiles) {
  return tiles * (c.width / kBlockColumns) *
         (has_scales(c) ? Room<true>::kPlace : Room<false>::kPlace);
}
std::size_t pairs_bytes(const TileCall& c) {
  std::size_t bytes = 0;
  sums_of(c, nullptr, bytes);
  return bytes;
}
void mixture_backward_pairs(const TileCall& c, TileRoom& room, unsigned tiles, void* memory,
                            cudaStream_t stream) {
  std::size_t bytes = 0;
  const Sums s = sums_of(c, memory, bytes);
  room.splits = static_cast<int>(c.width) / kBlockColumns;
  const auto launch = [&](auto scaled) {
    launch_warps(pairs_kernel<scaled()>, fit_for(c),
                 dim3(static_cast<unsigned>(room.splits), static_cast<unsigned>(s.splits)), stream,
                 "mixture_backward of pairs", c, room, s);
    const Index units = c.experts * c.width * (3 * c.rank + (scaled() ? 2 : 0)) / 4;
    finish_kernel<scaled()><<<tiles + static_cast<unsigned>(ceil_div<Index>(units, kFinishThreads)),
                              kFinishThreads, 0, stream>>>(c, room, s, static_cast<int>(tiles));
  };
  if (has_scales(c))
    launch(std::true_type{});
  else
    launch(std::false_type{});
  launched("mixture_backward of pairs");
}

}  // namespace mixlora::cuda
