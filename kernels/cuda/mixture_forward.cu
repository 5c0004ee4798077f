// Forward of the mixture on tensor cores: out, and the sums over columns that become z.
#include <algorithm>

#include "kernels/cuda/mixture_tiles.cuh"

namespace mixlora::cuda {
namespace {

/// A warp's stage: c1 and c3 of rows g and g + 8, then each slot's B1, B3, A2 and scales.
template <int C, int K, bool Scaled, bool Factors> struct Stage {
  static constexpr int kFactors = 4 * kPiece, kTile = C * kFactorBytes;
  static constexpr int kScales = kFactors + (Factors ? 3 * K * kTile : 0);
  static constexpr int kBytes = kScales + (Scaled ? K * kScaleBytes : 0);
};

/// The columns of a warp's tile that are the block's; `stage` is a team's.
template <int C, int K, bool Scaled, bool Factors, bool Whole, bool Team, bool Drops>
__device__ __forceinline__ void forward_of(const TileCall& m, const TileRoom& room,
                                           std::byte* shared, const Share& own, int& stage) {
  using S = Stage<C, K, Scaled, Factors>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, q = lane % 4, width = static_cast<int>(m.width), rank = m.rank,
            rows = static_cast<int>(m.rows);
  const auto tile = tile_of<K>(m, Team && own.idle ? own.tile - own.owner : own.tile, g);
  const bool gate_too = Whole || m.gate_b != nullptr, up_too = Whole || m.up_b != nullptr,
             down = Whole || m.down_a != nullptr;
  const bool drops = Whole ? Drops : m.threshold != 0 && down;
  const bool per_slot = !(Whole && !Scaled) && m.per_slot;
  const std::uint32_t threshold = m.threshold << 16;
  using T = TeamStage<4, K, Scaled>;
  std::byte* ring = shared + (Team ? 0 : warp * 2 * S::kBytes);
  const std::uint32_t ring_address = shared_address(ring);
  unsigned a1[K][C][4], a3[K][C][4];
  float z[K][2 * C][4] = {};
  int4 ids[2];
  int gate_up[2];  // where the lane's numbers of c1 and c3 begin
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    ids[h] = drops ? m.id_of(tile.row[h]) : int4{};
    gate_up[h] = tile.row[h] * 2 * width + 8 * q;
  }
  int expert[K];  // whose factors are read; of a slot without one they meet zeros
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const bool there = tile.expert[k] >= 0;
    expert[k] = there ? tile.expert[k] : 0;
    if constexpr (Factors) {
      const int across = 2 * m.experts * rank, at = expert[k] * rank;
      const Number* gate = there && gate_too ? m.a : nullptr;
      const Number* up = there && up_too ? m.a : nullptr;
      load_ranks<C>(a1[k], gate, tile.row[0] * across + at, tile.row[1] * across + at, rank, q);
      load_ranks<C>(a3[k], up, tile.row[0] * across + m.experts * rank + at,
                    tile.row[1] * across + m.experts * rank + at, rank, q);
    }
  }

  int team_rows[4];  // where the lane's numbers of c1 begin as a team fetches them
  if constexpr (Team)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      team_rows[j] = of_team_row(tile.row, lane, j) * 2 * width + 8 * (lane % 8);

  const auto fetch = [&](int stage, int f0) {
    const std::uint32_t at = ring_address + static_cast<std::uint32_t>(stage * S::kBytes);
    const std::uint32_t mine = at + static_cast<std::uint32_t>(16 * lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      fetch16_wide(mine + static_cast<std::uint32_t>(h * kPiece), m.gate_up + (gate_up[h] + f0));
      fetch16_wide(mine + static_cast<std::uint32_t>((2 + h) * kPiece),
                   m.gate_up + (gate_up[h] + width + f0));
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
        fetch16_wide(mine + team_row(j), m.gate_up + (team_rows[j] + f0));
        fetch16_wide(mine + team_row(j) + 2 * kPiece, m.gate_up + (team_rows[j] + width + f0));
      }
    fetch_team<T, K, Scaled>(at, m, room, expert, f0, warp, lane);
    fetch_commit();
  };

  // 32 columns from f0 on; `here` has the warp's pieces.
  const auto work = [&](const std::byte* here, const std::byte* scales, std::uint32_t factors,
                        int f0) {
    Philox4 bits[K][2] = {};
    if (drops)
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h) bits[k][h] = m.bits(ids[h], expert[k], (f0 + 8 * q) / 8);
    if constexpr (!Team) {
      fetch_wait<1>();
      __syncwarp();
    }
    unsigned out[2][4], own[K][2][4] = {};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float total[2][4] = {};
      if (!Whole && m.adds) {
        const auto old = [&](int h) {
          return load_pairs2(m.out + (tile.row[h] * width + f0 + 8 * q + 4 * pair));
        };
        start(total, old(0), old(1));
      }
      const uint2 c1[2] = {read_piece(here, 0, pair, lane), read_piece(here, 1, pair, lane)};
      const uint2 c3[2] = {read_piece(here, 2, pair, lane), read_piece(here, 3, pair, lane)};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const std::uint32_t b = factors + static_cast<std::uint32_t>(3 * k * S::kTile + 512 * pair);
        float u[2][4], v[2][4];
        start(u, c1[0], c1[1]);
        start(v, c3[0], c3[1]);
        if constexpr (Factors) {
          if (gate_too) add_factor<C>(u, a1[k], b);
          if (up_too) add_factor<C>(v, a3[k], b + S::kTile);
        }
        float s1[4], s3[4];
        if constexpr (Scaled)
          read_scales(s1, s3, scales + k * kScaleBytes, m, tile.expert[k] >= 0, 8 * q + 4 * pair);
        unsigned dropped[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float gate = u[i / 2][2 * h + i % 2], up = v[i / 2][2 * h + i % 2];
            if constexpr (Scaled) gate *= s1[i], up *= s3[i];
            x[i] = silu(gate).value * up;
            total[i / 2][2 * h + i % 2] += tile.weight[h][k] * x[i];
          }
          if (per_slot)
            own[k][h][2 * pair] = pack2(x[0], x[1]), own[k][h][2 * pair + 1] = pack2(x[2], x[3]);
          if (drops)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              x[i] = kept(bits[k][h], 4 * pair + i, threshold) ? x[i] : 0.0F;
          dropped[0][h] = pack2(x[0], x[1]), dropped[1][h] = pack2(x[2], x[3]);
        }
        if constexpr (Factors) {
          if (!down) continue;
          collect_ranks<C>(z[k], dropped, b + 2 * S::kTile);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        out[h][2 * pair] = pack2(total[0][2 * h], total[0][2 * h + 1]);
        out[h][2 * pair + 1] = pack2(total[1][2 * h], total[1][2 * h + 1]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!tile.live[h]) continue;
      if (!per_slot)
        write4(m.out + (tile.row[h] * width + f0 + 8 * q), out[h]);
      else
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (tile.expert[k] < 0 && tile.weight[h][k] == 0)
            own[k][h][0] = own[k][h][1] = own[k][h][2] = own[k][h][3] = 0;
          write4(m.out + ((tile.slot[h][k] * rows + tile.row[h]) * width + f0 + 8 * q), own[k][h]);
        }
    }
  };

  if constexpr (Team)
    walk_team<T>(own, stage, ring, warp, lane, fetch_team_rows, work);
  else
    walk_columns<S>(width, room, ring, warp, lane, fetch, work);
  if (Team && own.idle) return;
  if (!down) return;
  fetch_wait<0>();
  constexpr int kSums = K * 2 * C;
  float* to = room.sums + static_cast<Index>(own.place) * kSums * kFragment;
  const auto& mine = reinterpret_cast<const float(&)[kSums][4]>(z);
  leave_sums(room, to, shared, mine, lane);
}

/// grid (tiles, splits): a block has one tile of rows, or one a warp, and its share of the columns.
/// Teams: grid (TileRoom::blocks). Drops: of a whole call, whether it has dropout; others ask.
template <int C, int K, bool Scaled, bool Factors, bool Whole, bool Team, bool Drops>
__global__ void __launch_bounds__(kMostWarps* kWarp, C > 1    ? 1
                                                     : K == 1 ? 4
                                                              : 3)
    forward_kernel(const TileCall m, const TileRoom room) {
  extern __shared__ __align__(16) std::byte shared[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int stage = 0;
  const auto work = [&](const Share& own) {
    forward_of<C, K, Scaled, Factors, Whole, Team, Drops>(m, room, shared, own, stage);
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

void mixture_forward_tiles(const TileCall& c, TileRoom& room, unsigned tiles, int slots,
                           cudaStream_t stream) {
  const auto launch = [&](auto chunks, auto k, auto scaled, auto factors, auto whole, auto drops) {
    using S = Stage<chunks(), k(), scaled(), factors()>;
    if constexpr (chunks() == 1 && whole())
      if (room.team) {
        using T = TeamStage<4, k(), scaled()>;
        auto* kernel = forward_kernel<1, k(), scaled(), true, true, true, drops()>;
        const Fit fit = team_fit(reinterpret_cast<const void*>(kernel), 2 * T::kBytes);
        room.apart = true;
        room.blocks = std::min(fit.together, kMostBlocks / kTeam - 1);
        return launch_warps(kernel, fit, dim3(static_cast<unsigned>(room.blocks)), stream,
                            "mixture", c, room);
      }
    auto* kernel = forward_kernel<chunks(), k(), scaled(), factors(), whole(), false, drops()>;
    const Fit fit = fit_of(reinterpret_cast<const void*>(kernel), 0,
                           std::max(2 * S::kBytes, 2 * k() * chunks() * kFragment * 4));
    const unsigned blocks = share(c, room, tiles, fit);
    launch_warps(kernel, fit, dim3(blocks, static_cast<unsigned>(room.splits)), stream, "mixture",
                 c, room);
  };
  with_variant(c, slots, [&](auto chunks, auto k, auto scaled, auto factors, auto whole) {
    if constexpr (whole())
      if (c.threshold == 0) return launch(chunks, k, scaled, factors, whole, std::false_type{});
    launch(chunks, k, scaled, factors, whole, std::true_type{});
  });
}

}  // namespace mixlora::cuda
