// What the two kernels of a top-2 mixture's backward in one pass share: a block's lists of rows and
// shared memory, and what blocks leave (mixture_pairs.cu, mixture_pairs_finish.cu).
#pragma once
#include "kernels/cuda/mixture_tiles.cuh"

namespace mixlora::cuda::pairs {

constexpr int kWarps = 8, kThreads = kWarps * kWarp, kBlockColumns = kWarps * kColumns, kSlots = 2;

struct Place {
  int warp, lane;
  __device__ Place() {
    const int thread = thread_anew();
    warp = thread / kWarp, lane = thread % kWarp;
  }
};

/// A number that all lanes have, in one register of the warp.
__device__ inline int uniform(int x) { return __reduce_max_sync(kAll, x); }

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
  /// Whether a row has the slot k: an expert, or a weight for none.
  __device__ bool there(int tile, int i, int k) const {
    const int2 chosen = experts(tile, i);
    const int e = k == 0 ? min(chosen.x, chosen.y) : max(chosen.x, chosen.y);
    return own(tile, i) >= 0 && (e >= 0 || weight(tile, i, k) != 0);
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
  /// What a block leaves of a tile at TileRoom::sums, in floats: the fragments, which are bf16 (p
  /// is rounded so anyhow; they are half the traffic), and from kRowPlace on the sums by row.
  static constexpr int kRowPlace = kFragments * kFragment / 2, kPlace = kRowPlace + kByRow * kRows;
};

/// What blocks leave of the gradients: (split, E F R) of B1, of B3, of A2, (split, E F) of either
/// scale, and for each split the experts that have any.
struct Sums {
  float *b1, *b3, *a2, *scale1, *scale3;
  std::uint32_t* seen;
  int splits;
};

/// Adds what the blocks left: p, d_weight and row_dots of at most `tiles` tiles, all gradients.
void finish(const TileCall& c, const TileRoom& room, const Sums& sums, unsigned tiles,
            cudaStream_t stream);

}  // namespace mixlora::cuda::pairs
