// What a top-2 mixture's backward adds up behind its blocks (mixture_pairs.cu), in their order.
#include "kernels/cuda/mixture_pairs.cuh"

namespace mixlora::cuda::pairs {
namespace {

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
    const auto* from = reinterpret_cast<const uint2*>(place) + warp * kWarp + lane;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int i = 0; i < room.splits; ++i) {
      const uint2 part = from[i * (Room<Scaled>::kPlace / 2)];
      sum.x += low(part.x), sum.y += high(part.x), sum.z += low(part.y), sum.w += high(part.y);
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
  const float* from = place + Room<Scaled>::kRowPlace + i;
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
__device__ void finish_gradients(const TileCall& m, const Sums& in, int unit) {
  const int one = static_cast<int>(m.width) * m.rank / 4, quads = m.experts * one,
            which = unit / quads;
  const auto add = [&](float* grads, const float* parts, int i, int of_expert, const float* scale) {
    if (grads == nullptr || i >= m.experts * of_expert) return;
    const int e = i / of_expert;
    auto* to = reinterpret_cast<float4*>(grads) + i;
    const auto* from = reinterpret_cast<const float4*>(parts) + i;
    float4 sum = make_float4(0, 0, 0, 0), old = *to;
#pragma unroll 4
    for (int s = 0; s < in.splits; ++s) {
      if ((in.seen[s] >> e & 1) == 0) continue;
      add_to(sum, from[static_cast<Index>(s) * m.experts * of_expert]);
    }
    if constexpr (Scaled)
      if (scale != nullptr) {
        const float4 by = reinterpret_cast<const float4*>(scale)[i];
        sum = make_float4(sum.x / by.x, sum.y / by.y, sum.z / by.z, sum.w / by.w);
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
        unit % quads, one, nullptr);
  } else if constexpr (Scaled) {
    const int i = unit - 3 * quads, of_expert = static_cast<int>(m.width) / 4,
              each = m.experts * of_expert;
    if (i < each)
      add(m.d_gate_scale, in.scale1, i, of_expert, m.gate_scale);
    else
      add(m.d_up_scale, in.scale3, i - each, of_expert, m.up_scale);
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
                             (block - tiles) * kFinishThreads + static_cast<int>(threadIdx.x));
}

}  // namespace

void finish(const TileCall& c, const TileRoom& room, const Sums& sums, unsigned tiles,
            cudaStream_t stream) {
  const auto run = [&](auto scaled) {
    const Index units = c.experts * c.width * (3 * c.rank + (scaled() ? 2 : 0)) / 4;
    const auto blocks = tiles + static_cast<unsigned>(ceil_div<Index>(units, kFinishThreads));
    finish_kernel<scaled()>
        <<<blocks, kFinishThreads, 0, stream>>>(c, room, sums, static_cast<int>(tiles));
  };
  if (has_scales(c))
    run(std::true_type{});
  else
    run(std::false_type{});
  launched("mixture_backward of pairs");
}

}  // namespace mixlora::cuda::pairs
