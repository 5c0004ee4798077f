// The gated feed-forward mixture on tensor cores: its passes, and what comes before and after its
// kernels (mixture_order.cu; mixture_forward.cu, mixture_rows.cu, mixture_columns.cu; of two slots
// mixture_pairs.cu).
//
// A pass takes two slots (or one). Rows are sorted by the pair of experts they chose, and every
// pair begins a new tile, so that a tile has one expert a slot; more slots take more passes. The
// sums over columns (z, p, d_weight) are left by each block of columns and added here, in order.
//
// Traffic of a row: forward 6 F bytes; backward by rows 10 F, by columns 6 F K; the factors of an
// expert, 6 F R bytes, come from L2 once a tile,
// or once for the four tiles of a team.
#include <algorithm>

#include "kernels/cuda/mixture_order.cuh"
#include "kernels/cuda/mixture_tiles.cuh"

namespace mixlora::cuda {
namespace {

constexpr int kMostExperts = 32;

/// Whether a call goes in teams: not a backward of pairs in one pass.
bool takes_teams(const TileCall& c) { return in_teams(c) && !pairs_take(c); }
int most_tiles(const TileCall& c, int slots = 2) {
  return most_tiles(c, slots, takes_teams(c) ? kTeam : 1);
}

// ---- after the kernels ---------------------------------------------------------------------

/// The sum of fragment i of a tile over the parts of its columns, in their order.
__device__ inline float4 sum_of(const TileRoom& room, const SumParts& parts, int count, int i,
                                int lane) {
  float4 sum = make_float4(0, 0, 0, 0);
  const auto add = [&](int place) {
    const float4 x = reinterpret_cast<const float4*>(
        room.sums)[(static_cast<Index>(place) * count + i) * kWarp + lane];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  };
#pragma unroll 8
  for (int s = 0; s < parts.count; ++s) {
    const int place = parts.first + s * parts.step;
    add(place);
    if (parts.halves) add(place + kTeam / 2);
  }
  return sum;
}

/// grid (tiles), a warp a slot and eight ranks: z = s sum, zero of a slot without an expert.
template <int K> __global__ void z_kernel(const TileCall m, const TileRoom room, int chunks) {
  if (!has_rows(m, static_cast<int>(blockIdx.x))) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const auto tile = tile_of<K>(m, static_cast<int>(blockIdx.x), g);
  const float s = m.scale * m.keep;
  const SumParts parts(m, room, static_cast<int>(blockIdx.x));
#pragma unroll
  for (int k = 0; k < K; ++k)
    for (int i = 0; 8 * i < m.rank; ++i) {
      if ((k * 2 * chunks + i) % (static_cast<int>(blockDim.x) / kWarp) != warp) continue;
      const float4 x = sum_of(room, parts, K * 2 * chunks, k * 2 * chunks + i, lane);
      const bool there = tile.expert[k] >= 0;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (tile.live[h])
          *reinterpret_cast<unsigned*>(m.z + (tile.row[h] * m.slots + tile.slot[h][k]) * m.rank +
                                       8 * i + 2 * q) = !there   ? 0
                                                        : h == 0 ? pack2(s * x.x, s * x.y)
                                                                 : pack2(s * x.z, s * x.w);
    }
}

/// grid (tiles): p, of experts that a row did not choose zero, and d_weight. The first pass clears
/// the rows of p.
template <int K> __global__ void p_kernel(const TileCall m, const TileRoom room, int chunks) {
  if (!has_rows(m, static_cast<int>(blockIdx.x))) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int count = K * (4 * chunks + 1), warps = static_cast<int>(blockDim.x) / kWarp;
  const auto tile = tile_of<K>(m, static_cast<int>(blockIdx.x), g);
  const SumParts parts(m, room, static_cast<int>(blockIdx.x));
  const bool down = m.down_a != nullptr && m.q != nullptr;
  if (m.p != nullptr && !m.adds) {
    const int across = 2 * m.experts * m.rank / 8, first = static_cast<int>(blockIdx.x) * kRows;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * across; i += warps * kWarp) {
      const int at = first + i / across;
      const int row = m.order != nullptr ? m.order[at] : at < m.rows ? at : -1;
      if (row >= 0)
        reinterpret_cast<uint4*>(m.p)[static_cast<Index>(row) * across + i % across] =
            make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int e = tile.expert[k];
    for (int i = 0; m.p != nullptr && e >= 0 && i < 4 * chunks; ++i) {
      if ((k * 4 * chunks + i) % warps != warp) continue;
      const bool up = i >= 2 * chunks;
      const int r = 8 * (up ? i - 2 * chunks : i) + 2 * q;
      if (r >= m.rank || (up ? m.up_b : m.gate_b) == nullptr) continue;
      const float4 x = sum_of(room, parts, count, k * 4 * chunks + i, lane);
      const float s = m.scale;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (tile.live[h])
          *reinterpret_cast<unsigned*>(
              m.p + ((tile.row[h] * 2 + (up ? 1 : 0)) * m.experts + e) * m.rank + r) =
              h == 0 ? pack2(s * x.x, s * x.y) : pack2(s * x.z, s * x.w);
    }
    if (m.d_weight == nullptr || warp != warps - 1 - k) continue;
    const float4 x = sum_of(room, parts, count, K * 4 * chunks + k, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = h == 0 ? x.x : x.y;
      if (down && e >= 0)
        for (int r = q; r < m.rank; r += 4)
          total +=
              __bfloat162float(m.z_in[(tile.row[h] * m.slots + tile.slot[h][k]) * m.rank + r]) *
              __bfloat162float(m.q[(tile.row[h] * m.experts + e) * m.rank + r]);
      total += __shfl_xor_sync(kAll, total, 1);
      total += __shfl_xor_sync(kAll, total, 2);
      if (!tile.live[h] || q != 0) continue;
      m.d_weight[tile.row[h] * m.slots + tile.slot[h][k]] =
          e < 0 && tile.weight[h][k] == 0 ? 0.0F : total;
    }
  }
}

// ---- launches ------------------------------------------------------------------------------

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

OrderRoom order_room(const TileCall& c, void* room) {
  auto* at = static_cast<std::int32_t*>(room);
  OrderRoom r{};
  r.most_tiles = most_tiles(c);
  r.order = at;
  r.tiles = at + static_cast<Index>(r.most_tiles) * kRows;
  r.pairs = r.tiles + 1;
  r.pair_begin = r.pairs + c.rows * c.slots;
  r.work = r.pair_begin + c.experts + 2;
  r.held = reinterpret_cast<std::uint32_t*>(r.work + r.most_tiles / kTeam + 1);
  return r;
}

/// Working memory as it is cut from the call's block.
struct Cut {
  OrderRoom order;
  Number* down_t;
  void* pairs;
  float* sums;
  std::size_t bytes;
};
std::size_t whole(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
int sums_of(const TileCall& c, int slots) {
  return slots * (4 * chunks_of(c) + 1);  // backward's; forward leaves fewer
}
unsigned most_blocks(const TileCall& c) {
  return c.expert == nullptr ? static_cast<unsigned>(ceil_div<Index>(c.rows, kRows))
                             : static_cast<unsigned>(most_tiles(c));
}
Cut cut(const TileCall& c, void* room) {
  auto* base = static_cast<std::byte*>(room);
  Cut r{};
  r.order = order_room(c, room);
  std::size_t at =
      whole(sizeof(std::int32_t) *
            static_cast<std::size_t>(static_cast<Index>(r.order.most_tiles) * kRows +
                                     c.rows * c.slots + c.experts + 3 + r.order.most_tiles / kTeam +
                                     1 + c.rows * (c.slots + 1)));
  r.down_t = reinterpret_cast<Number*>(base + at);
  if (c.down_a != nullptr)
    at += whole(sizeof(Number) * static_cast<std::size_t>(c.experts * c.width * c.rank));
  r.pairs = base + at;
  Index sums = sums_of(c, std::min(c.slots, 2)) * kFragment *
               std::max<Index>(kMostBlocks * 2, kMostBlocks + most_blocks(c));
  if (pairs_take(c)) {
    at += whole(pairs_bytes(c));
    sums = pairs_sums(c, r.order.most_tiles);
  }
  r.sums = reinterpret_cast<float*>(base + at);
  at += sizeof(float) * static_cast<std::size_t>(sums);
  r.bytes = at;
  return r;
}

/// Runs f(call, room, tiles, slots) for each pass: the order of its rows first, and with the first
/// one the lists of pairs when `pairs`. The call and the room that come back serve what follows.
template <class F>
TileRoom each_pass(TileCall& c, void* memory, bool pairs, cudaStream_t stream, F&& f) {
  const Cut r = cut(c, memory);
  TileRoom room{r.down_t, r.sums, 1, false, takes_teams(c), r.order.work, 0};
  // Two slots go together where registers admit it and, when they lie apart, where the kernels read
  // each one's d_out.
  const int together =
      (has_factors(c) && chunks_of(c) > kTogether) || (c.per_slot && !has_scales(c)) ? 1 : 2;
  for (int first = 0; first < c.slots; first += together) {
    const int count = std::min(together, c.slots - first);
    c.first_slot = first;
    c.adds = first > 0;
    unsigned tiles = most_blocks(c);
    const OrderCall call{c.expert,
                         static_cast<int>(c.rows),
                         c.slots,
                         c.experts,
                         first,
                         count,
                         room.team ? kTeamRows : kRows,
                         room.team ? static_cast<int>(c.width) / kTeamColumns : 0,
                         pairs && first == 0};
    const Turn down{r.down_t, first == 0 ? c.down_a : nullptr, static_cast<int>(c.width), c.rank,
                    c.experts};
    order_rows(r.order, call, down, stream);
    if (c.expert != nullptr) {
      c.order = r.order.order, c.tiles = r.order.tiles;
      if (pairs) c.pairs = r.order.pairs, c.pair_begin = r.order.pair_begin;
      tiles = static_cast<unsigned>(most_tiles(c, count));
    }
    f(c, room, tiles, count);
  }
  return room;
}

}  // namespace

bool tiles_take(const TileCall& c) {
  constexpr Index limit = Index{1} << 31;  // places are 32-bit numbers
  const bool ranks = has_factors(c) ? c.rank % 8 == 0 && c.rank <= 80 : !has_scales(c);
  return ranks && c.activation == Activation::silu && c.width % kColumns == 0 &&
         c.experts <= kMostExperts &&
         (c.expert == nullptr || order_fits(std::min(c.slots, 2), c.experts)) &&
         c.rows * c.width * std::max(2, c.slots) < limit &&
         c.experts * c.width * std::max(c.rank, 1) < limit &&
         2 * c.rows * c.experts * c.slots * std::max(c.rank, 1) < limit && aligned(c.gate_up) &&
         aligned(c.a) && aligned(c.gate_b) && aligned(c.up_b) && aligned(c.down_a) &&
         aligned(c.out) && aligned(c.d_out) && aligned(c.q) && aligned(c.d_gate_up) &&
         aligned(c.p) && aligned(c.z) && aligned(c.gate_scale) && aligned(c.up_scale) &&
         aligned(c.ids);
}

std::size_t tiles_bytes(const TileCall& c) { return cut(c, nullptr).bytes; }

void tiles_forward(TileCall c, void* memory, cudaStream_t stream) {
  each_pass(c, memory, false, stream,
            [&](TileCall pass, TileRoom& room, unsigned tiles, int slots) {
              pass.adds = pass.adds && !pass.per_slot;
              mixture_forward_tiles(pass, room, tiles, slots, stream);
              if (pass.down_a == nullptr) return;
              (slots == 1 ? z_kernel<1> : z_kernel<2>)<<<tiles, 4 * kWarp, 0, stream>>>(
                  pass, room, chunks_of(pass));
              launched("mixture z");
            });
}

bool tiles_backward(TileCall c, void* memory, cudaStream_t stream) {
  const bool pairs = pairs_take(c);
  void* pairs_room = cut(c, memory).pairs;
  const TileRoom room =
      each_pass(c, memory, !pairs, stream,
                [&](const TileCall& pass, TileRoom& room, unsigned tiles, int slots) {
                  if (pairs) return mixture_backward_pairs(pass, room, tiles, pairs_room, stream);
                  mixture_backward_rows(pass, room, tiles, slots, stream);
                  if (pass.p == nullptr && pass.d_weight == nullptr) return;
                  const int chunks = has_factors(pass) ? chunks_of(pass) : 1;
                  (slots == 1 ? p_kernel<1> : p_kernel<2>)<<<tiles, 10 * kWarp, 0, stream>>>(
                      pass, room, chunks);
                  launched("mixture_backward p");
                });
  if (pairs) return c.row_dots != nullptr;
  if (c.d_gate_b != nullptr || c.d_up_b != nullptr || c.d_down_a != nullptr ||
      c.d_gate_scale != nullptr || c.d_up_scale != nullptr)
    mixture_backward_columns(c, room, stream);
  return false;
}

}  // namespace mixlora::cuda
