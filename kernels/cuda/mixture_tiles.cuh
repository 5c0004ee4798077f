// What the tensor-core kernels of the mixture share: a tile's rows and experts, DoRA's scales,
// the activation, and which variant a call takes.
#pragma once
#include "kernels/cuda/mixture.cuh"
#include "kernels/cuda/rank_tiles.cuh"
#include "kernels/cuda/tiles.cuh"

namespace mixlora::cuda {

constexpr int kScaleBytes = 256;  // 32 columns of two scales, f32

/// A call's working memory and grid, besides TileCall: A2 by columns (E, F, R), and where blocks
/// leave the sums of their columns: (tile, split, fragment, lane, 4); teams as SumParts says.
struct TileRoom {
  const Number* down_t;
  float* sums;
  int splits;
  bool apart;                // each warp has a tile of its own
  bool team;                 // and all of a block's have the same experts
  const std::int32_t* work;  // of teams: units before each one, and of all (TeamWork)
  int blocks;                // of teams

  /// The tile of one of a block's warps.
  __device__ int own_tile(int warp, int warps) const {
    return static_cast<int>(blockIdx.x) * (apart ? warps : 1) + (apart ? warp : 0);
  }
  /// From a warp's columns to its next.
  __device__ int step(int warps) const { return (apart ? 1 : warps) * kColumns; }
};
/// Launches of one pass with `slots` slots on at most `tiles` tiles; they set `room.splits`.
void mixture_forward_tiles(const TileCall& c, TileRoom& room, unsigned tiles, int slots,
                           cudaStream_t stream);
void mixture_backward_rows(const TileCall& c, TileRoom& room, unsigned tiles, int slots,
                           cudaStream_t stream);
void mixture_backward_columns(const TileCall& c, const TileRoom& room, cudaStream_t stream);
/// All of backward in one pass, without teams, of what pairs_take: two slots. `memory` has
/// pairs_bytes(), TileRoom::sums pairs_sums() numbers.
bool pairs_take(const TileCall& c);
Index pairs_sums(const TileCall& c, int tiles);
std::size_t pairs_bytes(const TileCall& c);
void mixture_backward_pairs(const TileCall& c, TileRoom& room, unsigned tiles, void* memory,
                            cudaStream_t stream);

__host__ __device__ inline bool has_factors(const TileCall& c) {
  return c.gate_b != nullptr || c.up_b != nullptr || c.down_a != nullptr;
}
__host__ __device__ inline bool has_scales(const TileCall& c) {
  return c.gate_scale != nullptr || c.up_scale != nullptr;
}
/// The usual call: all three factors (and all that goes with them), with dropout or without, one
/// pass of one or two slots, added up unless there are scales. Kernels compiled for it have no
/// branches in their loops.
inline bool is_whole(const TileCall& c) {
  const bool there = c.gate_b != nullptr && c.up_b != nullptr && c.down_a != nullptr;
  const bool scales = c.gate_scale != nullptr && c.up_scale != nullptr;
  const bool backward = c.q != nullptr && c.p != nullptr && c.d_gate_b != nullptr &&
                        c.d_up_b != nullptr && c.d_down_a != nullptr;
  return there && (has_scales(c) ? scales : !c.per_slot) && c.ids != nullptr && !c.adds &&
         c.slots <= 2 && (c.d_out == nullptr || backward);
}
constexpr int kTogether = 2;  // two slots go together up to so many sixteens of ranks
/// Sixteens of ranks as compiled: 1, 2, 4 or 5.
inline int chunks_of(const TileCall& c) {
  const int n = ceil_div(c.rank > 0 ? c.rank : 1, 16);
  return n == 3 ? 4 : n;
}

/// Rows g and g + 8 of a tile, as a lane sees them. With two slots the lower expert comes first.
template <int K> struct Tile {
  int row[2];
  bool live[2];  // a row that is not there reads the tile's first one; nothing is written for it
  int slot[2][K];
  float weight[2][K];
  int expert[K];  // of the whole tile; -1: none
};

/// Whether a tile has any row; a team's last ones may have none.
__device__ inline bool has_rows(const TileCall& m, int tile) {
  if (m.order == nullptr) return tile * kRows < m.rows;
  return tile < *m.tiles && m.order[tile * kRows] >= 0;
}

template <int K> __device__ Tile<K> tile_of(const TileCall& m, int index, int g) {
  Tile<K> t;
  const int first = index * kRows;
  int own[2][K];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int at = first + g + 8 * h;
    int n = at < m.rows ? at : -1;
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

/// Whether the warps of a block work as a team: on four tiles of the same experts, 64 columns at a
/// time, whose factors they fetch once. The order leaves tiles empty for it, half a team's for each
/// pair of experts, so the pairs must have rows.
constexpr int kTeam = 4, kTeamColumns = 2 * kColumns, kTeamRows = kTeam * kRows;
inline int likely_pairs(const TileCall& c) {
  return c.expert == nullptr ? 1 : c.slots == 2 ? c.experts * (c.experts - 1) / 2 : c.experts;
}
/// What the order sorts by: the experts of a pass's slots, none among them.
inline int keys_of(int slots, int experts) {
  return slots == 2 ? (experts + 1) * (experts + 1) : experts + 1;
}
/// Tiles that a pass of a call with a choice has at most, in teams of `team` of one key.
inline int most_tiles(const TileCall& c, int slots, int team) {
  const auto keys = std::min<Index>(c.rows, keys_of(slots, c.experts));
  return static_cast<int>((c.rows / (team * kRows) + keys + 1) * team);
}
/// Whether rows fill the tiles of most pairs of experts.
inline bool fills_tiles(const TileCall& c) {
  constexpr Index kLeast = 1024, kLeastOfPair = 48;
  return c.rows >= kLeast && c.rows >= kLeastOfPair * likely_pairs(c);
}
inline bool in_teams(const TileCall& c) {
  return is_whole(c) && chunks_of(c) == 1 && c.width % kTeamColumns == 0 && fills_tiles(c);
}

/// How the blocks of a team's kernel, as many as run together, share its work: each takes an equal
/// run of all teams' columns, one team's behind another's. Of a team with one or two tiles two
/// warps work on a tile, each on 32 of 64 columns, so such a team counts one unit for 64 columns
/// and others two.
struct TeamWork {
  const std::int32_t* work;
  Index units;
  int teams, whole, blocks;  // whole: units of a team of three or four tiles

  __device__ TeamWork(const TileCall& m, const TileRoom& room)
      : work(m.order != nullptr ? room.work : nullptr),
        whole(2 * (static_cast<int>(m.width) / kTeamColumns)) {
    teams = work != nullptr ? *m.tiles / kTeam : ceil_div(static_cast<int>(m.rows), kTeamRows);
    units = begin(teams);
    blocks = static_cast<int>(min(units, static_cast<Index>(room.blocks)));
  }
  /// The units before a team; of all of them.
  __device__ int begin(int team) const { return work != nullptr ? work[team] : team * whole; }
  /// The units before a block's.
  __device__ int block_begin(int block) const { return static_cast<int>(units * block / blocks); }
  /// The block that has a unit.
  __device__ int block_of(int unit) const {
    return static_cast<int>((static_cast<Index>(unit + 1) * blocks - 1) / units);
  }
  /// The team that has a unit; asked by all threads of a block.
  __device__ int team_of(int unit) const {
    if (work == nullptr) return unit / whole;
    int before = 0;
    for (int first = 0; first < teams; first += static_cast<int>(blockDim.x)) {
      const int team = first + static_cast<int>(threadIdx.x);
      before += __syncthreads_count(team < teams && work[team + 1] <= unit ? 1 : 0);
    }
    return before;
  }
};
/// A block's part in one team: its columns, and whether two warps share a tile.
struct TeamPart {
  int begin, end;
  bool halves;
  TeamPart() = default;
  __device__ TeamPart(const TeamWork& all, int team, int from, int to) {
    const int first = all.begin(team), units = all.begin(team + 1) - first;
    const int each = 2 * units / all.whole;
    halves = each == 1;
    begin = ceil_div(from - first, each) * kTeamColumns;
    end = ceil_div(min(first + units, to) - first, each) * kTeamColumns;
  }
};
/// A warp's tile and columns, and where its sums go. Of a team: the warp whose pieces it works on,
/// and whether it has no rows and only fetches factors.
struct Share {
  int tile, place;
  TeamPart part;
  int owner;
  bool idle;
};
/// f(share) for each team that the block has columns of.
template <class F>
__device__ void each_part(const TileCall& m, const TileRoom& room, int warp, const F& f) {
  const TeamWork all(m, room);
  const int block = static_cast<int>(blockIdx.x), end = all.block_begin(block + 1);
  if (block >= all.blocks) return;
  int unit = all.block_begin(block);
  for (int team = all.team_of(unit); unit < end; ++team) {
    const TeamPart part(all, team, unit, end);
    const int owner = part.halves ? warp % (kTeam / 2) : warp, tile = team * kTeam + owner;
    f(Share{tile, (block + team) * kTeam + warp, part, owner, !has_rows(m, tile)});
    unit = all.begin(team + 1);
  }
}
/// Where the sums of a tile's columns lie: `count` places from `first` on, `step` apart; with
/// `halves` two of each, the second kTeam / 2 on. Part `block + team` is one block's of a team, a
/// warp's place in it its own.
struct SumParts {
  int first, count, step;
  bool halves;
  __device__ SumParts(const TileCall& m, const TileRoom& room, int tile)
      : first(tile * room.splits), count(room.splits), step(1), halves(false) {
    if (!room.team) return;
    const TeamWork all(m, room);
    const int team = tile / kTeam, begin = all.begin(team), end = all.begin(team + 1);
    const int block = all.block_of(begin);
    first = (block + team) * kTeam + tile % kTeam;
    count = all.block_of(end - 1) - block + 1;
    step = kTeam;
    halves = end - begin < all.whole;
  }
};

/// A team's stage: `Pieces` of every warp for each half of its columns, apart by a few banks, then
/// the factors and scales of each half.
template <int Pieces, int K, bool Scaled> struct TeamStage {
  static constexpr int kHalf = Pieces * kPiece + 64, kOwn = 2 * kHalf;
  static constexpr int kTile = kFactorBytes, kScales = 3 * K * kTile;
  static constexpr int kHalfFactors = kScales + (Scaled ? K * kScaleBytes : 0);
  static constexpr int kFactors = kTeam * kOwn, kBytes = kFactors + 2 * kHalfFactors;
};
/// Of lane l: 16 bytes of rows l / 8 + 4 j of a tile, j = 0 .. 3, from column 8 (l % 8) on; where
/// they go in the first of a stage's pieces (the other rows, 4 j, are team_row(j) on).
template <class Stage> __device__ std::uint32_t team_place(int lane) {
  return static_cast<std::uint32_t>(lane % 8 / 4 * Stage::kHalf + 64 * (lane / 8) +
                                    16 * (lane % 4));
}
__device__ constexpr std::uint32_t team_row(int j) {
  return static_cast<std::uint32_t>(j / 2 * kPiece + j % 2 * 256);
}
/// One of a lane's values of rows g and g + 8 for row l / 8 + 4 j.
__device__ inline int of_team_row(const int (&value)[2], int lane, int j) {
  return __shfl_sync(kAll, value[j / 2], 4 * (lane / 8 + 4 * (j % 2)));
}
/// The factors and scales of each slot's expert, columns f0 .. f0 + 63, into a team's stage; a warp
/// fetches its part.
template <class Stage, int K, bool Scaled>
__device__ void fetch_team(std::uint32_t at, const TileCall& m, const TileRoom& room,
                           const int (&expert)[K], int f0, int warp, int lane) {
  const int rank = m.rank, b = lane / 8, a = lane / 2 % 4, half = lane % 2, i = warp % 2;
  const std::uint64_t policy = kept_longest();
  const bool there = 8 * half < rank;
  const int mine = (kColumns * (warp / 2) + 8 * a + b + 4 * i) * rank + (there ? 8 * half : 0);
  const std::uint32_t to =
      at + static_cast<std::uint32_t>(Stage::kFactors + warp / 2 * Stage::kHalfFactors + 512 * i +
                                      (4 * b + a) * 32 + 16 * (half ^ (b & 1)));
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int from = (expert[k] * static_cast<int>(m.width) + f0) * rank + mine;
    const auto place = to + static_cast<std::uint32_t>(3 * k * Stage::kTile);
    fetch16(place, m.gate_b + from, there, policy);
    fetch16(place + Stage::kTile, m.up_b + from, there, policy);
    fetch16(place + 2 * Stage::kTile, room.down_t + from, there, policy);
  }
  if constexpr (Scaled)
    if (warp < 2 * K && lane < 16) {
      const int k = warp / 2;
      const float* from = (warp % 2 == 0 ? m.gate_scale : m.up_scale) +
                          (k == 0 ? expert[0] : expert[K - 1]) * static_cast<int>(m.width) + f0;
      fetch16(at + static_cast<std::uint32_t>(Stage::kFactors + lane / 8 * Stage::kHalfFactors +
                                              Stage::kScales + k * kScaleBytes +
                                              warp % 2 * (kScaleBytes / 2) + 16 * (lane % 8)),
              from + 4 * lane);
    }
}

/// 32 columns of both scales, the first of which is `at`; ones where a scale is absent.
__device__ inline void fetch_scales(std::uint32_t to, const TileCall& m, Index at, int lane) {
  const float* from = lane < 8 ? m.gate_scale : m.up_scale;
  if (lane < 16 && from != nullptr)
    fetch16(to + static_cast<std::uint32_t>(16 * lane), from + at + 4 * (lane % 8));
}
/// The factors and scales of each slot's expert, columns f0 .. f0 + 31, into the stage at `at`.
template <class Stage, int C, int K, bool Scaled, bool Factors, bool Whole>
__device__ void fetch_slots(std::uint32_t at, const TileCall& m, const TileRoom& room,
                            const int (&expert)[K], int f0, bool down, int lane) {
  const int rank = m.rank;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int column = expert[k] * static_cast<int>(m.width) + f0;
    if constexpr (Factors) {
      const std::uint32_t to =
          at + static_cast<std::uint32_t>(Stage::kFactors + 3 * k * Stage::kTile);
      if (Whole || m.gate_b != nullptr) fetch_factor<C>(to, m.gate_b + column * rank, rank, lane);
      if (Whole || m.up_b != nullptr)
        fetch_factor<C>(to + Stage::kTile, m.up_b + column * rank, rank, lane);
      if (Whole || down)
        fetch_factor<C>(to + 2 * Stage::kTile, room.down_t + column * rank, rank, lane);
    }
    if constexpr (Scaled)
      fetch_scales(at + static_cast<std::uint32_t>(Stage::kScales + k * kScaleBytes), m, column,
                   lane);
  }
}
__device__ inline void read_scales(float (&s1)[4], float (&s3)[4], const std::byte* from,
                                   const TileCall& m, bool there, int column) {
  const auto* gate = reinterpret_cast<const float*>(from);
  const float4 one = make_float4(1, 1, 1, 1);
  const float4 x = there && m.gate_scale != nullptr
                       ? *reinterpret_cast<const float4*>(gate + column)
                       : one,
               y = there && m.up_scale != nullptr
                       ? *reinterpret_cast<const float4*>(gate + kColumns + column)
                       : one;
  s1[0] = x.x, s1[1] = x.y, s1[2] = x.z, s1[3] = x.w;
  s3[0] = y.x, s3[1] = y.y, s3[2] = y.z, s3[3] = y.w;
}

/// f(column, rank, pair of tiles, half of the ranks, two columns of the pair) of all that
/// collect_columns leaves a lane of 32 columns from f0 on.
template <class F> __device__ void each_of_columns(int f0, int lane, int ranks, F&& f) {
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (const int r = 8 * half + 2 * q; r < ranks)
          f(f0 + g / 2 * 8 + 2 * (2 * pair + k) + g % 2, r, pair, half, k);
}
/// A lane's c1 and c3 of a pair of row g + 8 h are read: their place takes d_gate and d_up, packed.
__device__ inline void keep_gradients(std::byte* pieces, int h, int pair, int lane, uint2 gate,
                                      uint2 up) {
  auto* to = reinterpret_cast<uint2*>(pieces + h * kPiece + 16 * lane + 8 * pair);
  to[0] = gate;
  to[2 * kPiece / 8] = up;
}
/// What keep_gradients has of both pairs, to the lane's columns of d_gate_up's row.
__device__ inline void write_gradients(Number* row, const std::byte* pieces, int h, int lane,
                                       int width) {
  const auto* from = reinterpret_cast<const uint4*>(pieces + h * kPiece + 16 * lane);
  auto* to = reinterpret_cast<uint4*>(row);
  to[0] = from[0];
  to[width / 8] = from[2 * kPiece / 16];
}

struct Silu {
  float value, slope;
};
__device__ inline Silu silu(float x) {
  constexpr float kLog2e = 1.44269504F;
  float s;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0F + power_of_two(-kLog2e * x)));
  const float value = x * s;
  return {value, s + value - value * s};  // s (1 + x (1 - s))
}

constexpr int kMostSplits = 16, kMostBlocks = 4096;  // of a tile's columns; of tiles and splits
/// How a kernel's blocks share tiles and columns: each warp has a tile of its own and the columns
/// of its block, so that neighbouring tiles read the factors of one expert from L1; or, where that
/// leaves too few blocks, the warps of a block share the columns of one tile. Either way into so
/// many blocks of columns that the device's last round of blocks is not a short one: rounds times
/// what a warp takes, in columns and their beginning.
inline unsigned share(const TileCall& c, TileRoom& room, unsigned tiles, const Fit& fit) {
  const int chunks = static_cast<int>(c.width / kColumns);
  // Tiles that are not full: about half of one for each pair of experts.
  const int likely = c.expert == nullptr
                         ? static_cast<int>(tiles)
                         : static_cast<int>(ceil_div<Index>(c.rows, kRows)) + c.experts * 2;
  const int most = std::min(kMostBlocks / likely, 2 * kMostBlocks / static_cast<int>(tiles));
  const int most_splits = std::min({kMostSplits, chunks, std::max(1, most)});
  room.apart = ceil_div(likely, fit.warps) * most_splits >= fit.together;
  const int blocks = room.apart ? ceil_div(likely, fit.warps) : likely;
  const int warps = room.apart ? 1 : fit.warps;
  constexpr int kBeginning = 2;
  int least = 0;
  for (int s = 1; s <= most_splits; ++s) {
    const int time =
        ceil_div(blocks * s, fit.together) * (ceil_div(chunks, s * warps) + kBeginning);
    if (s == 1 || time < least) room.splits = s, least = time;
  }
  return room.apart ? ceil_div(tiles, static_cast<unsigned>(fit.warps)) : tiles;
}

/// A team's kernel: `bytes` of shared memory are the block's.
inline Fit team_fit(const void* kernel, int bytes) {
  Fit fit = fit_of(kernel, 0, ceil_div(bytes, kTeam));
  if (fit.warps != kTeam) throw std::logic_error("mixture: a team's stages do not fit a block");
  return fit;
}
/// A warp's way through its columns, 32 at a time: `work(pieces, scales, factors, f0)` takes the
/// pieces of the columns from f0 on. This one goes through its block's share of a tile's columns:
/// `fetch(stage, f0)` sends them.
template <class S, class Fetch, class Work>
__device__ void walk_columns(int width, const TileRoom& room, std::byte* ring, int warp, int lane,
                             const Fetch& fetch, const Work& work) {
  const std::uint32_t ring_address = shared_address(ring), own_row = factor_row(lane);
  const int chunks = width / kColumns, split = static_cast<int>(blockIdx.y),
            splits = static_cast<int>(gridDim.y);
  const int end = chunks * (split + 1) / splits * kColumns;
  const int step = room.step(static_cast<int>(blockDim.x) / kWarp);
  const int begin = chunks * split / splits * kColumns + (room.apart ? 0 : warp * kColumns);
  int stage = 0;
  if (begin < end) fetch(0, begin);
  fetch_commit();
  for (int f0 = begin; f0 < end; f0 += step) {
    if (f0 + step < end) fetch(stage ^ 1, f0 + step);
    fetch_commit();
    const int at = stage * S::kBytes;
    work(ring + at, ring + at + S::kScales,
         ring_address + static_cast<std::uint32_t>(at + S::kFactors) + own_row, f0);
    __syncwarp();
    stage ^= 1;
  }
}
/// The same of a team's warp: they go together, 64 columns at a time, which `fetch` sends; `stage`
/// is the one to begin with, and then the next to.
template <class T, class Fetch, class Work>
__device__ void walk_team(const Share& own, int& stage, std::byte* ring, int warp, int lane,
                          const Fetch& fetch, const Work& work) {
  const TeamPart& part = own.part;
  const std::uint32_t ring_address = shared_address(ring), own_row = factor_row(lane);
  const int first = part.halves ? warp / (kTeam / 2) : 0, last = part.halves ? first + 1 : 2;
  if (part.begin < part.end) fetch(stage, part.begin);
  for (int f0 = part.begin; f0 < part.end; f0 += kTeamColumns) {
    fetch_wait<0>();
    __syncthreads();  // all of this stage is there, and nobody reads the other one any more
    if (f0 + kTeamColumns < part.end) fetch(stage ^ 1, f0 + kTeamColumns);
    if (!own.idle)
#pragma unroll 1
      for (int half = first; half < last; ++half) {
        const int at = stage * T::kBytes, factors = at + T::kFactors + half * T::kHalfFactors;
        work(ring + at + own.owner * T::kOwn + half * T::kHalf, ring + factors + T::kScales,
             ring_address + static_cast<std::uint32_t>(factors) + own_row, f0 + half * kColumns);
      }
    stage ^= 1;
  }
}
/// Leaves a warp's sums where its tile's are, or the block's together where its warps share a tile.
template <int Count>
__device__ void leave_sums(const TileRoom& room, float* to, std::byte* shared,
                           const float (&mine)[Count][4], int lane) {
  if (room.apart) {
#pragma unroll
    for (int i = 0; i < Count; ++i)
      reinterpret_cast<float4*>(to)[i * kWarp + lane] =
          make_float4(mine[i][0], mine[i][1], mine[i][2], mine[i][3]);
  } else {
    leave_sums<Count>(to, reinterpret_cast<float*>(shared), mine);
  }
}

/// Calls f(C, K, Scaled, Factors, Whole) with the compiled variant for a call of `slots` slots.
template <class F> void with_variant(const TileCall& c, int slots, F&& f) {
  using std::false_type;
  using std::integral_constant;
  using std::true_type;
  const auto by_slots = [&](auto chunks, auto scaled, auto factors, auto whole) {
    if constexpr (chunks() <= kTogether)
      if (slots == 2) return f(chunks, integral_constant<int, 2>{}, scaled, factors, whole);
    f(chunks, integral_constant<int, 1>{}, scaled, factors, whole);
  };
  const auto by_whole = [&](auto chunks, auto scaled) {
    if constexpr (chunks() <= kTogether)
      if (is_whole(c)) return by_slots(chunks, scaled, true_type{}, true_type{});
    by_slots(chunks, scaled, true_type{}, false_type{});
  };
  const auto by_scale = [&](auto chunks) {
    if (has_scales(c))
      by_whole(chunks, true_type{});
    else
      by_whole(chunks, false_type{});
  };
  if (!has_factors(c))
    return by_slots(integral_constant<int, 1>{}, false_type{}, false_type{}, false_type{});
  switch (chunks_of(c)) {
    case 1:
      return by_scale(integral_constant<int, 1>{});
    case 2:
      return by_scale(integral_constant<int, 2>{});
    case 4:
      return by_scale(integral_constant<int, 4>{});
    default:
      return by_scale(integral_constant<int, 5>{});
  }
}

}  // namespace mixlora::cuda
