// Backward of the mixture by rows on tensor cores: d_gate_up, and the sums over columns that become
// p and d_weight.
#include <algorithm>

#include "kernels/cuda/mixture_tiles.cuh"

namespace mixlora::cuda {
namespace {

/// A warp's stage: c1, c3 and d_out of rows g and g + 8 (d_out of each slot when they may lie
/// apart), then each slot's B1, B3, A2 and scales.
template <int C, int K, bool Scaled, bool Factors> struct Stage {
  static constexpr int kApart = Scaled ? K : 1;
  static constexpr int kFactors = (4 + 2 * kApart) * kPiece, kTile = C * kFactorBytes;
  static constexpr int kScales = kFactors + (Factors ? 3 * K * kTile : 0);
  static constexpr int kBytes = kScales + (Scaled ? K * kScaleBytes : 0);
  static constexpr int kIds = kRows * 16;  // the tile's ids, beside a warp's two stages
  static constexpr int kWarpBytes = 2 * kBytes + kIds;
  // Accumulator tiles left behind: p of gate and up, and d_weight.
  static constexpr int kSums = K * (4 * C + 1);
};

/// The columns of a warp's tile that are the block's; `stage` is a team's.
template <int C, int K, bool Scaled, bool Factors, bool Whole, bool Team>
__device__ __forceinline__ void rows_of(const TileCall& m, const TileRoom& room, std::byte* shared,
                                        const Share& own, int& stage) {
  using S = Stage<C, K, Scaled, Factors>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q = lane % 4, width = static_cast<int>(m.width), rank = m.rank,
            rows = static_cast<int>(m.rows);
  const auto tile = tile_of<K>(m, Team && own.idle ? own.tile - own.owner : own.tile, g);
  const bool gate_too = Whole || m.gate_b != nullptr, up_too = Whole || m.up_b != nullptr,
             down = Whole || (m.down_a != nullptr && m.q != nullptr);
  const bool drops = Whole || (m.threshold != 0 && down);
  const bool per_slot = !(Whole && !Scaled) && m.per_slot;
  const std::uint32_t threshold = m.threshold << 16;
  const float keep_scale = m.scale * m.keep;
  using T = TeamStage<S::kFactors / kPiece, K, Scaled>;
  std::byte* ring = shared + (Team ? 0 : warp * S::kWarpBytes);
  const std::uint32_t ring_address = shared_address(ring);
  unsigned a1[K][C][4], a3[K][C][4], q_ranks[K][C][4];
  float sums[S::kSums][4] = {};  // slot by slot: p of gate, p of up; then d_weight
  auto* ids =
      reinterpret_cast<int4*>(ring + (Team ? 2 * T::kBytes + warp * S::kIds : 2 * S::kBytes));
  int gate_up[2], d_out[S::kApart][2];  // where the lane's numbers begin
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (drops && q == 0) ids[g + 8 * h] = m.id_of(tile.row[h]);
    gate_up[h] = tile.row[h] * 2 * width + 8 * q;
#pragma unroll
    for (int k = 0; k < S::kApart; ++k)
      d_out[k][h] = ((per_slot ? tile.slot[h][k] * rows : 0) + tile.row[h]) * width + 8 * q;
  }
  int expert[K];  // whose factors are read; of a slot without one they meet zeros
  float weight[K][2];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const bool there = tile.expert[k] >= 0;
    expert[k] = there ? tile.expert[k] : 0;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      weight[k][h] = !per_slot ? tile.weight[h][k] : !there && tile.weight[h][k] == 0 ? 0.0F : 1.0F;
    if constexpr (Factors) {
      const int across = 2 * m.experts * rank, at = expert[k] * rank;
      const Number* gate = there && gate_too ? m.a : nullptr;
      const Number* up = there && up_too ? m.a : nullptr;
      load_ranks<C>(a1[k], gate, tile.row[0] * across + at, tile.row[1] * across + at, rank, q);
      load_ranks<C>(a3[k], up, tile.row[0] * across + m.experts * rank + at,
                    tile.row[1] * across + m.experts * rank + at, rank, q);
      const auto q_of = [&](int h) {
        const int row = (per_slot ? tile.slot[h][k] * rows : 0) + tile.row[h];
        return row * m.experts * rank + at;
      };
      load_ranks<C>(q_ranks[k], there && down ? m.q : nullptr, q_of(0), q_of(1), rank, q);
    }
  }

  // Where the lane's numbers of c1 and of each slot's d_out begin as a team fetches them.
  int team_rows[1 + S::kApart][4];
  if constexpr (Team)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      team_rows[0][j] = of_team_row(tile.row, lane, j) * 2 * width + 8 * (lane % 8);
#pragma unroll
      for (int k = 0; k < S::kApart; ++k) {
        const int slot[2] = {tile.slot[0][k], tile.slot[1][k]};
        team_rows[1 + k][j] =
            ((per_slot ? of_team_row(slot, lane, j) * rows : 0) + of_team_row(tile.row, lane, j)) *
                width +
            8 * (lane % 8);
      }
    }
  __syncwarp();
  const auto fetch = [&](int stage, int f0) {
    const std::uint32_t at = ring_address + static_cast<std::uint32_t>(stage * S::kBytes);
    const std::uint32_t mine = at + static_cast<std::uint32_t>(16 * lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      fetch16_wide(mine + static_cast<std::uint32_t>(h * kPiece), m.gate_up + (gate_up[h] + f0));
      fetch16_wide(mine + static_cast<std::uint32_t>((2 + h) * kPiece),
                   m.gate_up + (gate_up[h] + width + f0));
#pragma unroll
      for (int k = 0; k < S::kApart; ++k)
        fetch16_wide(mine + static_cast<std::uint32_t>((4 + 2 * k + h) * kPiece),
                     m.d_out + (d_out[k][h] + f0));
    }
    fetch_slots<S, C, K, Scaled, Factors, Whole>(at, m, room, expert, f0, down, lane);
  };

  const auto fetch_team_rows = [&](int stage, int f0) {
    const std::uint32_t at = ring_address + static_cast<std::uint32_t>(stage * T::kBytes);
    const std::uint32_t mine =
        at + static_cast<std::uint32_t>(own.owner * T::kOwn) + team_place<T>(lane);
    if (!own.idle)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // Of a tile of two warps each fetches half the rows.
        if (own.part.halves && j / 2 != warp / (kTeam / 2)) continue;
        fetch16_wide(mine + team_row(j), m.gate_up + (team_rows[0][j] + f0));
        fetch16_wide(mine + team_row(j) + 2 * kPiece, m.gate_up + (team_rows[0][j] + width + f0));
#pragma unroll
        for (int k = 0; k < S::kApart; ++k)
          fetch16_wide(mine + team_row(j) + static_cast<std::uint32_t>((4 + 2 * k) * kPiece),
                       m.d_out + (team_rows[1 + k][j] + f0));
      }
    fetch_team<T, K, Scaled>(at, m, room, expert, f0, warp, lane);
    fetch_commit();
  };

  // 32 columns from f0 on; `here` has the warp's pieces.
  const auto work = [&](std::byte* here, const std::byte* scales, std::uint32_t factors, int f0) {
    Philox4 bits[K][2] = {};
    if (drops)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int4 id = ids[g + 8 * h];
#pragma unroll
        for (int k = 0; k < K; ++k) bits[k][h] = m.bits(id, expert[k], (f0 + 8 * q) / 8);
      }
    if constexpr (!Team) {
      fetch_wait<1>();
      __syncwarp();
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float gate_sum[2][4] = {}, up_sum[2][4] = {};
      if (!Whole && m.adds) {
        const auto old = [&](int h, int up) {
          return load_pairs2(m.d_gate_up + (gate_up[h] + up * width + f0 + 4 * pair));
        };
        start(gate_sum, old(0, 0), old(1, 0));
        start(up_sum, old(0, 1), old(1, 1));
      }
      const uint2 c1[2] = {read_piece(here, 0, pair, lane), read_piece(here, 1, pair, lane)};
      const uint2 c3[2] = {read_piece(here, 2, pair, lane), read_piece(here, 3, pair, lane)};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int of = 4 + 2 * (k < S::kApart ? k : 0);
        float(*p1)[4] = sums + k * 4 * C, (*p3)[4] = p1 + 2 * C;
        float(&d_weight)[4] = sums[K * 4 * C + k];
        const std::uint32_t b = factors + static_cast<std::uint32_t>(3 * k * S::kTile + 512 * pair);
        float u[2][4], v[2][4], d[2][4] = {}, from_out[2][4];
        start(u, c1[0], c1[1]);
        start(v, c3[0], c3[1]);
        start(from_out, read_piece(here, of, pair, lane), read_piece(here, of + 1, pair, lane));
        if constexpr (Factors) {
          if (gate_too) add_factor<C>(u, a1[k], b);
          if (up_too) add_factor<C>(v, a3[k], b + S::kTile);
          if (down) add_factor<C>(d, q_ranks[k], b + 2 * S::kTile);
        }
        float s1[4], s3[4];
        if constexpr (Scaled)
          read_scales(s1, s3, scales + k * kScaleBytes, m, tile.expert[k] >= 0, 8 * q + 4 * pair);
        unsigned gate[2][2], up[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x[4], y[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int t = i / 2, at = 2 * h + i % 2;
            float through = keep_scale;
            if (drops) through = kept(bits[k][h], 4 * pair + i, threshold) ? through : 0.0F;
            float gate_u = u[t][at], value = v[t][at];
            if constexpr (Scaled) gate_u *= s1[i], value *= s3[i];
            const Silu act = silu(gate_u);
            d_weight[h] += act.value * value * from_out[t][at];
            const float d_h = weight[k][h] * (from_out[t][at] + through * d[t][at]);
            x[i] = d_h * value * act.slope;
            y[i] = d_h * act.value;
            if constexpr (Scaled) x[i] *= s1[i], y[i] *= s3[i];
            gate_sum[t][at] = Whole && k == 0 ? x[i] : gate_sum[t][at] + x[i];
            up_sum[t][at] = Whole && k == 0 ? y[i] : up_sum[t][at] + y[i];
          }
          gate[0][h] = pack2(x[0], x[1]), gate[1][h] = pack2(x[2], x[3]);
          up[0][h] = pack2(y[0], y[1]), up[1][h] = pack2(y[2], y[3]);
        }
        if constexpr (Factors) {
          if (gate_too) collect_ranks<C>(*reinterpret_cast<float(*)[2 * C][4]>(p1), gate, b);
          if (up_too) collect_ranks<C>(*reinterpret_cast<float(*)[2 * C][4]>(p3), up, b + S::kTile);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
        keep_gradients(here, h, pair, lane, packed_row(gate_sum, h), packed_row(up_sum, h));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (tile.live[h]) write_gradients(m.d_gate_up + (gate_up[h] + f0), here, h, lane, width);
  };

  if constexpr (Team)
    walk_team<T>(own, stage, ring, warp, lane, fetch_team_rows, work);
  else
    walk_columns<S>(width, room, ring, warp, lane, fetch, work);
  if (Team && own.idle) return;
  if (!Whole && m.p == nullptr && m.d_weight == nullptr) return;
  fetch_wait<0>();
  float* to = room.sums + static_cast<Index>(own.place) * S::kSums * kFragment;
  leave_sums(room, to, shared, sums, lane);
}

/// grid (tiles, splits): a block has one tile of rows, or one a warp, and its share of the columns.
/// Teams: grid (TileRoom::blocks).
template <int C, int K, bool Scaled, bool Factors, bool Whole, bool Team>
__global__ void __launch_bounds__(kMostWarps* kWarp, C > 1              ? 1
                                                     : Scaled && K == 2 ? 2
                                                                        : 3)
    rows_kernel(const TileCall m, const TileRoom room) {
  extern __shared__ __align__(16) std::byte shared[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int stage = 0;
  const auto work = [&](const Share& own) {
    rows_of<C, K, Scaled, Factors, Whole, Team>(m, room, shared, own, stage);
  };
  if constexpr (Team) {
    each_part(m, room, warp, work);
  } else {
    const int tile = room.own_tile(warp, static_cast<int>(blockDim.x) / kWarp);
    const auto part = static_cast<int>(blockIdx.y), parts = static_cast<int>(gridDim.y);
    if (has_rows(m, tile)) work(Share{tile, tile * parts + part, {}, warp, false});
  }
}

}  // namespace

void mixture_backward_rows(const TileCall& c, TileRoom& room, unsigned tiles, int slots,
                           cudaStream_t stream) {
  with_variant(c, slots, [&](auto chunks, auto k, auto scaled, auto factors, auto whole) {
    using S = Stage<chunks(), k(), scaled(), factors()>;
    if constexpr (chunks() == 1 && whole())
      if (room.team) {
        using T = TeamStage<S::kFactors / kPiece, k(), scaled()>;
        auto* kernel = rows_kernel<1, k(), scaled(), true, true, true>;
        const Fit fit =
            team_fit(reinterpret_cast<const void*>(kernel), 2 * T::kBytes + kTeam * S::kIds);
        room.apart = true;
        room.blocks = std::min(fit.together, kMostBlocks / kTeam - 1);
        return launch_warps(kernel, fit, dim3(static_cast<unsigned>(room.blocks)), stream,
                            "mixture_backward by rows", c, room);
      }
    auto* kernel = rows_kernel<chunks(), k(), scaled(), factors(), whole(), false>;
    const Fit fit = fit_of(reinterpret_cast<const void*>(kernel), 0,
                           std::max(S::kWarpBytes, S::kSums * kFragment * 4));
    const unsigned blocks = share(c, room, tiles, fit);
    launch_warps(kernel, fit, dim3(blocks, static_cast<unsigned>(room.splits)), stream,
                 "mixture_backward by rows", c, room);
  });
}

}  // namespace mixlora::cuda
