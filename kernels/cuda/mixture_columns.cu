// Backward of the mixture by columns on tensor cores: the gradients of B1, B3, A2 and of DoRA's
// scales.
#include <algorithm>

#include "kernels/cuda/mixture_tiles.cuh"

namespace mixlora::cuda {
namespace {

/// A warp's stage: c1, c3 and d_out of rows g and g + 8; the 16 rows' a of gate and up, and q; the
/// rows' ids.
template <int C, bool Factors> struct Stage {
  static constexpr int kRanks = 6 * kPiece, kTile = C * kPiece;
  static constexpr int kIds = kRanks + (Factors ? 3 * kTile : 0);
  static constexpr int kBytes = kIds + kPiece / 2;
};

/// grid (experts, columns / 32, C): a block has 32 columns of one expert and 16 of its ranks, its
/// warps share the expert's rows. Adds to the gradients.
template <int C, bool Scaled, bool Factors, bool Whole>
__global__ void __launch_bounds__(kMostWarps* kWarp, C > 2 || Scaled ? 2 : 3)
    columns_kernel(const TileCall m, const TileRoom room) {
  extern __shared__ __align__(16) std::byte shared[];
  using S = Stage<C, Factors>;
  constexpr int kFactor = C * kFactorBytes;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp,
            warps = static_cast<int>(blockDim.x) / kWarp;
  const int g = lane / 4, q = lane % 4, width = static_cast<int>(m.width), rank = m.rank;
  const int e = static_cast<int>(blockIdx.x), mine = static_cast<int>(blockIdx.z);
  const int f0 = static_cast<int>(blockIdx.y) * kColumns, col = f0 + 8 * q;
  const bool gate_too = Whole || m.gate_b != nullptr, up_too = Whole || m.up_b != nullptr,
             down = Whole || (m.down_a != nullptr && m.q != nullptr);
  const bool drops = Whole || (m.threshold != 0 && down);
  const bool per_slot = !(Whole && !Scaled) && m.per_slot;
  const std::uint32_t threshold = m.threshold << 16;
  const int begin = m.pairs != nullptr ? m.pair_begin[e] : 0;
  const int end = m.pairs != nullptr ? m.pair_begin[e + 1] : static_cast<int>(m.rows);
  if (begin == end) return;
  const float keep_scale = m.scale * m.keep;
  float gate_b[2][2][4] = {}, up_b[2][2][4] = {}, down_a[4][4] = {};
  float gate_scale_sum[8] = {}, up_scale_sum[8] = {};

  const Index column = static_cast<Index>(e) * width + f0;
  const std::uint32_t factors = shared_address(shared), own_row = factor_row(lane);
  // The factors are on their way while the first rows are looked up; the loop's barrier is behind.
  if constexpr (Factors)
    for (int which = warp; which < 3; which += warps) {
      const Number* from = which == 0   ? m.gate_b
                           : which == 1 ? m.up_b
                           : down       ? room.down_t
                                        : nullptr;
      if (from != nullptr)
        fetch_factor<C>(factors + static_cast<std::uint32_t>(which * kFactor), from + column * rank,
                        rank, lane);
    }
  fetch_commit();
  float s1[2][4], s3[2][4];
  if constexpr (Scaled)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Index at = column + 8 * q + 4 * pair + i;
        s1[pair][i] = m.gate_scale != nullptr ? m.gate_scale[at] : 1.0F;
        s3[pair][i] = m.up_scale != nullptr ? m.up_scale[at] : 1.0F;
      }

  std::byte* ring = shared + (Factors ? 3 * kFactor : 0) + warp * 2 * S::kBytes;
  const std::uint32_t ring_address = shared_address(ring);
  const std::uint32_t own_rank_row = rank_row(lane);

  // Of row lane % 16 of a tile: its place, its slot's place in d_out and q, and its weight. Its
  // pair is read one tile earlier, so that nothing waits for one load to send the next.
  struct Row {
    int row, slot_row;
    float weight;
  };
  const auto pair_at = [&](int first) {
    const int safe = min(first + lane % kRows, end - 1);
    return m.pairs != nullptr ? m.pairs[safe] : safe;
  };
  const auto row_at = [&](int first, int pair) {
    Row r{pair, pair, 0};
    int k = 0;
    if (m.pairs != nullptr) {
      r.row = Whole ? pair >> (m.slots - 1) : pair / m.slots;
      k = pair - r.row * m.slots;
      r.slot_row = r.row;
    }
    if (per_slot) r.slot_row += k * static_cast<int>(m.rows);
    if (first + lane % kRows < end) r.weight = per_slot ? 1.0F : m.weight_of(r.row, k);
    return r;
  };
  const auto fetch = [&](int stage, const Row& own) {
    const std::uint32_t at = ring_address + static_cast<std::uint32_t>(stage * S::kBytes);
    const std::uint32_t piece = at + static_cast<std::uint32_t>(16 * lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = __shfl_sync(kAll, own.row, g + 8 * h),
                slot_row = __shfl_sync(kAll, own.slot_row, g + 8 * h);
      const Number* from = m.gate_up + (row * 2 * width + col);
      fetch16_wide(piece + static_cast<std::uint32_t>(h * kPiece), from);
      fetch16_wide(piece + static_cast<std::uint32_t>((2 + h) * kPiece), from + width);
      fetch16_wide(piece + static_cast<std::uint32_t>((4 + h) * kPiece),
                   m.d_out + (slot_row * width + col));
    }
    if constexpr (Factors) {
      const int row = __shfl_sync(kAll, own.row, lane / 2),
                slot_row = __shfl_sync(kAll, own.slot_row, lane / 2);
      const Number* a = m.a + ((row * 2 * m.experts + e) * rank);
      const std::uint32_t ranks = at + static_cast<std::uint32_t>(S::kRanks);
      if (gate_too) fetch_ranks<C>(ranks, a, rank, lane);
      if (up_too) fetch_ranks<C>(ranks + S::kTile, a + m.experts * rank, rank, lane);
      if (down)
        fetch_ranks<C>(ranks + 2 * S::kTile, m.q + ((slot_row * m.experts + e) * rank), rank, lane);
    }
    if (drops && lane < kRows)
      fetch16(at + static_cast<std::uint32_t>(S::kIds + 16 * lane), m.ids + 4 * own.row);
  };

  const int step = warps * kRows;
  int stage = 0;
  float weight_here = 0, weight_next = 0;
  const int mine_from = begin + warp * kRows;
  if (mine_from < end) {
    const Row own = row_at(mine_from, pair_at(mine_from));
    weight_next = own.weight;
    fetch(0, own);
  }
  fetch_commit();
  Row ahead = row_at(mine_from + step, pair_at(mine_from + step));
  int pair_ahead = pair_at(mine_from + 2 * step);
  fetch_wait<1>();
  __syncthreads();  // the factors are there
  for (int first = mine_from; first < end; first += step) {
    weight_here = weight_next;
    if (first + step < end) {
      weight_next = ahead.weight;
      fetch(stage ^ 1, ahead);
      ahead = row_at(first + 2 * step, pair_ahead);
      pair_ahead = pair_at(first + 3 * step);
    }
    fetch_commit();
    fetch_wait<1>();
    __syncwarp();
    const std::byte* here = ring + stage * S::kBytes;
    const std::uint32_t ranks =
        ring_address + static_cast<std::uint32_t>(stage * S::kBytes + S::kRanks) + own_rank_row;
    const float weight[2] = {__shfl_sync(kAll, weight_here, g),
                             __shfl_sync(kAll, weight_here, g + 8)};
    const float whole_scale[2] = {weight[0] * keep_scale, weight[1] * keep_scale};
    Philox4 bits[2] = {};
    if (drops)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int4 id = *reinterpret_cast<const int4*>(here + S::kIds + 16 * (g + 8 * h));
        bits[h] = m.bits(id, e, col / 8);
      }
    // The operands of this block's sixteen ranks, rows as the inner dimension.
    unsigned a1_t[4], a3_t[4], q_t[4];
    if constexpr (Factors) {
      const std::uint32_t own = ranks + static_cast<std::uint32_t>(mine * kPiece);
      if (gate_too) read_matrices_trans(a1_t, own);
      if (up_too) read_matrices_trans(a3_t, own + S::kTile);
      if (down) read_matrices_trans(q_t, own + 2 * S::kTile);
    }
    const auto add = [&](float(&to)[2][4], int which, int pair) {
      const std::uint32_t b =
          factors + own_row + static_cast<std::uint32_t>(which * kFactor + 512 * pair);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        unsigned a[4], w[4];
        read_matrices(a, ranks + static_cast<std::uint32_t>(which * S::kTile + c * kPiece));
        read_matrices(w, b + static_cast<std::uint32_t>(c * kFactorBytes));
        mma(to[0], a[0], a[1], a[2], a[3], w[0], w[1]);
        mma(to[1], a[0], a[1], a[2], a[3], w[2], w[3]);
      }
    };
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float u[2][4], v[2][4], d[2][4] = {}, from_out[2][4];
      start(u, read_piece(here, 0, pair, lane), read_piece(here, 1, pair, lane));
      start(v, read_piece(here, 2, pair, lane), read_piece(here, 3, pair, lane));
      start(from_out, read_piece(here, 4, pair, lane), read_piece(here, 5, pair, lane));
      if constexpr (Factors) {
        if (gate_too) add(u, 0, pair);
        if (up_too) add(v, 1, pair);
        if (down) add(d, 2, pair);
      }
      unsigned gate[2][2], up[2][2], dropped[2][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x[4], y[4], z[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = i / 2, at = 2 * h + i % 2;
          float kept_scale = whole_scale[h];
          if (drops) kept_scale = kept(bits[h], 4 * pair + i, threshold) ? kept_scale : 0.0F;
          float gate_u = u[t][at], value = v[t][at];
          if constexpr (Scaled) gate_u *= s1[pair][i], value *= s3[pair][i];
          const Silu act = silu(gate_u);
          const float d_h = weight[h] * from_out[t][at] + kept_scale * d[t][at];
          x[i] = d_h * value * act.slope;
          y[i] = d_h * act.value;
          z[i] = kept_scale * act.value * value;
          if constexpr (Scaled) {
            gate_scale_sum[4 * pair + i] += x[i] * u[t][at];
            up_scale_sum[4 * pair + i] += y[i] * v[t][at];
            x[i] *= s1[pair][i], y[i] *= s3[pair][i];
          }
        }
        gate[0][h] = pack2(x[0], x[1]), gate[1][h] = pack2(x[2], x[3]);
        up[0][h] = pack2(y[0], y[1]), up[1][h] = pack2(y[2], y[3]);
        dropped[0][h] = pack2(z[0], z[1]), dropped[1][h] = pack2(z[2], z[3]);
      }
      if constexpr (Factors) {
        if (Whole || m.d_gate_b != nullptr) collect_columns(gate_b[pair], gate, a1_t);
        if (Whole || m.d_up_b != nullptr) collect_columns(up_b[pair], up, a3_t);
        if (Whole || (m.d_down_a != nullptr && down))
          collect_turned(down_a + 2 * pair, dropped, q_t);
      }
    }
    __syncwarp();
    stage ^= 1;
  }
  fetch_wait<0>();

  // What every warp has, summed in the order of the warps and added to the gradients, which are
  // read before the warps meet.
  constexpr int kParts = Factors ? 12 : 0, kAtOnce = 3;
  constexpr int kScales = kParts * kFragment;  // where a warp's sums for the scales lie
  constexpr int kNumbers = kScales + (Scaled ? 64 : 0);
  __syncthreads();
  auto* numbers = reinterpret_cast<float*>(shared) + warp * kNumbers;
  const auto leave = [&](int part, const float(&x)[4]) {
    reinterpret_cast<float4*>(numbers)[part * kWarp + lane] = make_float4(x[0], x[1], x[2], x[3]);
  };
  if constexpr (Factors)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      leave(i, gate_b[i / 2][i % 2]);
      leave(4 + i, up_b[i / 2][i % 2]);
      leave(8 + i, down_a[i]);
    }
  float* scale_grad = nullptr;
  float old_scale = 0;
  if constexpr (Scaled) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float x = i < 8 ? gate_scale_sum[i % 8] : up_scale_sum[i % 8];
#pragma unroll
      for (int apart = 4; apart < kWarp; apart *= 2) x += __shfl_xor_sync(kAll, x, apart);
      if (g == 0) numbers[kScales + i / 8 * kColumns + 8 * q + i % 8] = x;
    }
    if (mine == 0 && threadIdx.x < 2 * kColumns) {
      float* grads = threadIdx.x < kColumns ? m.d_gate_scale : m.d_up_scale;
      if (grads != nullptr) scale_grad = grads + column + threadIdx.x % kColumns;
    }
    if (scale_grad != nullptr) old_scale = *scale_grad;
  }
  // The two pairs of gradients that a part's four numbers of a lane go to; null: none.
  const auto grads_of = [&](int part, int h) -> float2* {
    const int i = part % 4, ranks = 16 * mine + 8 * (part < 8 ? i % 2 : h);
    float* grads = part < 4 ? m.d_gate_b : part < 8 ? m.d_up_b : down ? m.d_down_a : nullptr;
    if (grads == nullptr || ranks >= rank) return nullptr;
    const Index at = part < 8
                         ? (column + g / 2 * 8 + 2 * (i / 2 * 2 + h) + g % 2) * rank + ranks + 2 * q
                         : (static_cast<Index>(e) * rank + ranks + g) * width + col + 2 * i;
    return reinterpret_cast<float2*>(grads + at);
  };
  for (int from = warp; from < kParts; from += kAtOnce * warps) {
    float2* grads[kAtOnce][2];
    float2 old[kAtOnce][2];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int part = from + j * warps;
        grads[j][h] = part < kParts ? grads_of(part, h) : nullptr;
        old[j][h] = grads[j][h] != nullptr ? *grads[j][h] : float2{};
      }
    if (from == warp) __syncthreads();
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int part = from + j * warps;
      if (part >= kParts) break;
      float4 sum = make_float4(0, 0, 0, 0);
      for (int w = 0; w < warps; ++w) {
        add_to(sum, reinterpret_cast<const float4*>(reinterpret_cast<const float*>(shared) +
                                                    w * kNumbers)[part * kWarp + lane]);
      }
      if (grads[j][0] != nullptr)
        *grads[j][0] = make_float2(old[j][0].x + sum.x, old[j][0].y + sum.y);
      if (grads[j][1] != nullptr)
        *grads[j][1] = make_float2(old[j][1].x + sum.z, old[j][1].y + sum.w);
    }
  }
  if (scale_grad != nullptr) {
    float sum = 0;
    for (int w = 0; w < warps; ++w)
      sum += reinterpret_cast<const float*>(
          shared)[w * kNumbers + kScales + static_cast<int>(threadIdx.x)];
    *scale_grad = old_scale + sum;
  }
}

}  // namespace

void mixture_backward_columns(const TileCall& c, const TileRoom& room, cudaStream_t stream) {
  with_variant(c, 1, [&](auto chunks, auto /*slots*/, auto scaled, auto factors, auto whole) {
    using S = Stage<chunks(), factors()>;
    auto* kernel = columns_kernel<chunks(), scaled(), factors(), whole()>;
    const Fit fit =
        fit_of(reinterpret_cast<const void*>(kernel), factors() ? 3 * chunks() * kFactorBytes : 0,
               std::max(2 * S::kBytes, (12 * kFragment + 2 * kColumns) * 4));
    launch_warps(kernel, fit,
                 dim3(static_cast<unsigned>(c.experts), static_cast<unsigned>(c.width / kColumns),
                      static_cast<unsigned>(chunks())),
                 stream, "mixture_backward by columns", c, room);
  });
}

}  // namespace mixlora::cuda
