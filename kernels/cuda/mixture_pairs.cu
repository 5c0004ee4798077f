// Backward of the mixture where every row has two slots (top-2), in one pass: d_gate_up, the sums
// over columns that become p and d_weight, and all gradients.
//
// A block has 256 columns and goes down a share of the tiles, which lie in the order of their pairs
// of experts. What a pair's rows add to the gradients of its two experts stays in registers until
// the next tile has another expert; then it is added to the block's own sums in memory, without
// waiting. Traffic of a row: 10 F bytes, and 32 R + 32 for every 256 columns.
#include <algorithm>

#include "kernels/cuda/mixture_pairs.cuh"

namespace mixlora::cuda {
namespace pairs {
namespace {

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
              m.d_out + (lists.slot_row(tile, 2 * warp + h, k, rows) * width + block + 8 * lane),
              lists.there(tile, 2 * warp + h, k));  // else it has no gradient
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
      add_to(sum, parts[w * kFragments * kWarp]);
    }
    reinterpret_cast<uint2*>(to)[warp * kWarp + lane] =
        make_uint2(pack2(sum.x, sum.y), pack2(sum.z, sum.w));
    if (thread >= S::kByRow * kRows) return;
    const float* by_row = reinterpret_cast<const float*>(met + S::kRowSums) + thread;
    float row_sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) row_sum += by_row[w * S::kByRow * kRows];
    to[S::kRowPlace + thread] = row_sum;
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
    each_of_columns(f0, lane, rank, [&](int f, int r, int pair, int half, int k) {
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
    });
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
        weight[h] = Scaled ? 1.0F : lists.weight(tile, g + 8 * h, k);
      }
      float p[2][2][4] = {};  // of gate, of up: eight ranks, eight more
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
        add_factor(u, a_of, b);
        add_factor(v, a_of + kPiece, b + kFactorBytes);
        add_factor(d, a_of + 2 * kPiece, b + 2 * kFactorBytes);
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
            if constexpr (Scaled) {
              // The scales' gradients times the scales: finish_kernel divides.
              from_x[i] = gate_u * x[i], from_y[i] = value * y[i];
              dot[h] += from_x[i] + from_y[i];
              x[i] *= s1[i], y[i] *= s3[i];
            } else {
              dot[h] += gate_u * x[i];
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
        collect_ranks<1>(p[0], gate, b);
        collect_ranks<1>(p[1], up, b + kFactorBytes);
        unsigned a[4];
        read_matrices_trans(a, a_of);
        collect_columns(b1[k][pair], gate, a);
        read_matrices_trans(a, a_of + kPiece);
        collect_columns(b3[k][pair], up, a);
        read_matrices_trans(a, a_of + 2 * kPiece);
        collect_turned(a2[k] + 2 * pair, dropped, a);
        if constexpr (Scaled)
#pragma unroll
          for (int which = 0; which < 2; ++which) {
            const auto& x = by_scale[which];
            const unsigned ones = g == 2 * k + which ? 0x3f803f80U : 0U;  // of one column
            mma(scales[pair], transposed(x[0][0]), transposed(x[1][0]), transposed(x[0][1]),
                transposed(x[1][1]), ones, ones);
          }
        if (k + 1 < kSlots) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h)
          keep_gradients(own, h, pair, lane, packed_row(gate_sum[pair], h),
                         packed_row(up_sum[pair], h));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        reinterpret_cast<float4*>(meeting)[(warp * kFragments + 4 * k + i) * kWarp + lane] =
            make_float4(p[i / 2][i % 2][0], p[i / 2][i % 2][1], p[i / 2][i % 2][2],
                        p[i / 2][i % 2][3]);
      if constexpr (!Scaled) leave_row_sums(k, d_weight);
    }
    leave_row_sums(S::kByRow - 1, dot);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = lists.own(tile, g + 8 * h);
      if (n >= 0) write_gradients(m.d_gate_up + (n * 2 * width + col), own, h, lane, width);
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

Index row_sums(const TileCall& c, int tiles) {
  return tiles * (c.width / kBlockColumns) *
         (has_scales(c) ? Room<true>::kPlace : Room<false>::kPlace);
}
/// Numbers that `splits` runs of tiles leave of the gradients, and a word each.
Index gradient_sums(const TileCall& c, int splits) {
  return splits * (c.experts * c.width * (3 * c.rank + (has_scales(c) ? 2 : 0)) + 1);
}
/// Into how many runs of tiles a block's way is cut, so that the device's last round of blocks is
/// not a short one: rounds times what a block takes, in tiles and its beginning and end; 0 where
/// the sums of not even one run fit.
int splits_of(const TileCall& c, int together) {
  constexpr int kAround = 8, kMost = 8;
  const int tiles = static_cast<int>(c.rows / kRows) + likely_pairs(c) / 2,
            blocks = static_cast<int>(c.width) / kBlockColumns;
  const Index rows = row_sums(c, most_tiles(c, kSlots, 1));
  int best = 0, least = 0;
  for (int s = 1; s <= std::min(tiles, kMost); ++s) {
    if ((rows + gradient_sums(c, s)) * Index{sizeof(float)} > kMostSumBytes) break;
    const int time = ceil_div(blocks * s, together) * (ceil_div(tiles, s) + kAround);
    if (s == 1 || time < least) best = s, least = time;
  }
  return best;
}

/// How the kernel for a call runs: no blocks together where their shared memory is not there.
Fit fit_for(const TileCall& c) {
  const int bytes = has_scales(c) ? Room<true>::kBytes : Room<false>::kBytes;
  if (bytes > most_shared()) return {kWarps, bytes, 0};
  return fit_of(has_scales(c) ? reinterpret_cast<const void*>(pairs_kernel<true>)
                              : reinterpret_cast<const void*>(pairs_kernel<false>),
                bytes, 0, kWarps);
}
Sums sums_of(const TileCall& c, void* memory) {
  Sums s{};
  s.splits = splits_of(c, fit_for(c).together);
  const Index count = s.splits * c.experts * c.width * c.rank;
  auto* at = static_cast<float*>(memory);
  for (float** part : {&s.b1, &s.b3, &s.a2}) *part = at, at += count;
  if (has_scales(c))
    for (float** part : {&s.scale1, &s.scale3}) *part = at, at += count / c.rank;
  s.seen = reinterpret_cast<std::uint32_t*>(at);
  return s;
}

}  // namespace
}  // namespace pairs

bool pairs_take(const TileCall& c) {
  if (c.slots != pairs::kSlots || c.expert == nullptr || !is_whole(c) || c.d_out == nullptr ||
      has_scales(c) != c.per_slot || !(c.per_slot || c.z_in != nullptr) || chunks_of(c) != 1 ||
      c.width % pairs::kBlockColumns != 0 || !fills_tiles(c))
    return false;
  const int together = pairs::fit_for(c).together;
  return together > 0 && pairs::splits_of(c, together) > 0;
}
Index pairs_sums(const TileCall& c, int tiles) { return pairs::row_sums(c, tiles); }
std::size_t pairs_bytes(const TileCall& c) {
  return sizeof(float) * static_cast<std::size_t>(pairs::gradient_sums(
                             c, pairs::splits_of(c, pairs::fit_for(c).together)));
}
void mixture_backward_pairs(const TileCall& c, TileRoom& room, unsigned tiles, void* memory,
                            cudaStream_t stream) {
  const pairs::Sums s = pairs::sums_of(c, memory);
  room.splits = static_cast<int>(c.width) / pairs::kBlockColumns;
  const Fit fit = pairs::fit_for(c);
  const dim3 grid(static_cast<unsigned>(room.splits), static_cast<unsigned>(s.splits));
  if (has_scales(c))
    launch_warps(pairs::pairs_kernel<true>, fit, grid, stream, "mixture_backward of pairs", c, room,
                 s);
  else
    launch_warps(pairs::pairs_kernel<false>, fit, grid, stream, "mixture_backward of pairs", c,
                 room, s);
  pairs::finish(c, room, s, tiles, stream);
}

}  // namespace mixlora::cuda
