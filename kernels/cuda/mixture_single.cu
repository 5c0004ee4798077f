// Backward of the mixture where there is one expert and no choice (LoRA, DoRA): d_gate_up, p and
// all gradients in one pass. Traffic of a row: 10 F bytes, and 16 R for every 128 columns.
#include <algorithm>

#include "kernels/cuda/mixture_tiles.cuh"

namespace mixlora::cuda {
namespace {

constexpr int kWarps = 4, kBlockColumns = kWarps * kColumns;

/// A stage: of every warp's columns c1, c3 and d_out of rows g and g + 8, the warps' apart by a few
/// banks; the 16 rows' a of gate and up, q, ids.
constexpr int kSide = 6 * kPiece + 64, kRanks = kWarps * kSide, kIds = kRanks + 3 * kPiece,
              kStage = kIds + kPiece / 2;
/// B1, B3 and A2 of each warp's columns, two stages, and where the warps' p and the rows' dots
/// meet, twice.
constexpr int kRing = kWarps * 3 * kFactorBytes, kMeeting = kRing + 2 * kStage,
              kDots = kMeeting + 2 * kWarps * 4 * kPiece, kBytes = kDots + 2 * kWarps * kPiece;

/// What blocks leave: (block of columns, row, 2 R); (split, F R) of B1, of B3, of A2; (split, F) of
/// either scale; (block of columns, row) of the rows' dots, or null.
struct Sums {
  float *p, *b1, *b3, *a2, *scale1, *scale3, *dots;
  int blocks, splits;
};

/// grid (F / 128, splits of the rows). Factors as fetch_factor lays them, fetched once. Scaled: no
/// dots, for which there are not registers.
template <bool Scaled>
__global__ void __launch_bounds__(kWarps* kWarp, 3)
    single_kernel(const __grid_constant__ TileCall m, const Sums out) {
  extern __shared__ __align__(16) std::byte shared[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int width = static_cast<int>(m.width), rows = static_cast<int>(m.rows), rank = m.rank;
  const int block = static_cast<int>(blockIdx.x) * kBlockColumns, f0 = block + warp * kColumns,
            col = f0 + 8 * q;
  const int tiles = ceil_div(rows, kRows), splits = static_cast<int>(gridDim.y),
            split = static_cast<int>(blockIdx.y);
  const int begin = tiles * split / splits * kRows,
            end = min(rows, tiles * (split + 1) / splits * kRows);
  const bool there = f0 < width;  // the last block's warps may have no columns, but meet the others
  const bool drops = m.threshold != 0;
  const std::uint32_t threshold = m.threshold << 16;
  const float keep_scale = m.scale * m.keep;

  std::byte* own = shared + warp * 3 * kFactorBytes;
  std::byte* ring = shared + kRing;
  auto* meeting = reinterpret_cast<float4*>(shared + kMeeting);
  auto* meeting_dots = reinterpret_cast<float*>(shared + kDots);
  const std::uint32_t factors = shared_address(own), ring_address = shared_address(ring),
                      own_row = factor_row(lane), own_ranks = rank_row(lane);
  if (there) {
    fetch_factor<1>(factors, m.gate_b + static_cast<Index>(f0) * rank, rank, lane);
    fetch_factor<1>(factors + kFactorBytes, m.up_b + static_cast<Index>(f0) * rank, rank, lane);
    auto* turned = reinterpret_cast<Number*>(own + 2 * kFactorBytes);
    for (int i = lane; i < 16 * kColumns; i += kWarp) {
      const int c = i % kColumns, r = i / kColumns, a = c / 8, b = c % 8;
      turned[(4 * b + a) * 16 + 8 * (r / 8 ^ (b & 1)) + r % 8] =
          r < rank ? m.down_a[static_cast<Index>(r) * width + f0 + c] : Number(0.0F);
    }
  }
  float s1[Scaled ? 8 : 1], s3[Scaled ? 8 : 1];
  if constexpr (Scaled)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      s1[i] = there && m.gate_scale != nullptr ? m.gate_scale[col + i] : 1.0F;
      s3[i] = there && m.up_scale != nullptr ? m.up_scale[col + i] : 1.0F;
    }

  // Where a lane leaves its part of a row's dot, of a stage, a pair of tiles and a half of the
  // rows.
  const auto dot_place = [&](int stage, int pair, int h) -> float& {
    return meeting_dots[(((stage * kWarps + warp) * 2 + pair) * 2 + h) * kWarp + lane];
  };
  if (!Scaled && !there)
#pragma unroll
    for (int i = 0; i < 8; ++i) dot_place(i / 4, i / 2 % 2, i % 2) = 0;

  // Four rows a warp, 256 bytes of each together, and an array of all rows' ranks.
  const int across = 8 * (lane % 16);
  const std::uint32_t piece =
      ring_address + static_cast<std::uint32_t>(lane % 16 / 4 * kSide + warp / 2 * kPiece +
                                                (warp % 2 * 4 + lane / 16) * 64 + 16 * (lane % 4));
  const auto fetch = [&](int stage, int first) {
    const auto at = static_cast<std::uint32_t>(stage * kStage);
    if (block + across < width)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Index row = min(first + 4 * warp + 2 * h + lane / 16, end - 1);
        const Number* from = m.gate_up + row * 2 * width + block + across;
        const std::uint32_t to = piece + at + static_cast<std::uint32_t>(128 * h);
        fetch16_wide(to, from);
        fetch16_wide(to + 2 * kPiece, from + width);
        fetch16_wide(to + 4 * kPiece, m.d_out + row * width + block + across);
      }
    if (warp < 3) {
      // Rows that are not there have no ranks, and so no part in the sums over rows.
      const int row = first + lane / 2, ranks = row < end ? rank : 0;
      const Index safe = min(row, end - 1);
      fetch_ranks<1>(ring_address + at + static_cast<std::uint32_t>(kRanks + warp * kPiece),
                     warp < 2 ? m.a + (safe * 2 + warp) * rank : m.q + safe * rank, ranks, lane);
    } else if (drops && lane < kRows) {
      fetch16(ring_address + at + static_cast<std::uint32_t>(kIds + 16 * lane),
              m.ids + 4 * static_cast<Index>(min(first + lane, end - 1)));
    }
    fetch_commit();
  };
  // The warps' columns of the p and the dots of a tile, in the order of the warps.
  const auto leave_p = [&](int stage, int first) {
    const auto* parts = reinterpret_cast<const float2*>(meeting + stage * kWarps * 4 * kWarp);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int at = static_cast<int>(threadIdx.x) + k * kWarps * kWarp, i = at / (2 * kWarp),
                from = at % (2 * kWarp) / 2;
      float2 sum = make_float2(0, 0);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 part = parts[w * 4 * 2 * kWarp + at];
        sum.x += part.x, sum.y += part.y;
      }
      const int row = first + from / 4 + 8 * (at % 2), r = 8 * (i % 2) + 2 * (from % 4);
      if (row < end && r < rank)
        *reinterpret_cast<float2*>(
            out.p + (static_cast<Index>(blockIdx.x) * rows + row) * 2 * rank + i / 2 * rank + r) =
            sum;
    }
    if constexpr (!Scaled) {
      // Eight threads a row: a quarter of the lanes' of a pair each.
      const int r = static_cast<int>(threadIdx.x) / 8, part = static_cast<int>(threadIdx.x) % 8;
      const float* own = meeting_dots + ((stage * kWarps * 2 + part / 4) * 2 + r / 8) * kWarp +
                         r % 8 * 4 + part % 4;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += own[w * 4 * kWarp];
#pragma unroll
      for (int apart = 1; apart < 8; apart *= 2) sum += __shfl_xor_sync(kAll, sum, apart);
      if (part == 0 && first + r < end && out.dots != nullptr)
        out.dots[static_cast<Index>(blockIdx.x) * rows + first + r] = sum;
    }
  };

  float b1[2][2][4] = {}, b3[2][2][4] = {}, a2[4][4] = {};
  float scale1[Scaled ? 8 : 1] = {}, scale3[Scaled ? 8 : 1] = {};
  int stage = 0;
  fetch(0, begin);
  for (int first = begin; first < end; first += kRows) {
    fetch_wait<0>();
    __syncthreads();  // this stage and the last tile's p are there, the other stage is read
    if (first + kRows < end) fetch(stage ^ 1, first + kRows);
    if (first > begin) leave_p(stage ^ 1, first - kRows);
    float p[2][2][4] = {};  // of gate, of up: eight ranks, eight more
    if (there) {
      const std::byte* whole = ring + stage * kStage;
      std::byte* here = ring + stage * kStage + warp * kSide;
      const std::uint32_t ranks =
          ring_address + static_cast<std::uint32_t>(stage * kStage + kRanks) + own_ranks;
      Philox4 bits[2] = {};
      if (drops)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          bits[h] =
              m.bits(*reinterpret_cast<const int4*>(whole + kIds + 16 * (g + 8 * h)), 0, col / 8);
      const bool live[2] = {first + g < end, first + g + 8 < end};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        float u[2][4], v[2][4], d[2][4] = {}, from_out[2][4];
        start(u, read_piece(here, 0, pair, lane), read_piece(here, 1, pair, lane));
        start(v, read_piece(here, 2, pair, lane), read_piece(here, 3, pair, lane));
        start(from_out, read_piece(here, 4, pair, lane), read_piece(here, 5, pair, lane));
        const std::uint32_t b = factors + own_row + static_cast<std::uint32_t>(512 * pair);
        add_factor(u, ranks, b);
        add_factor(v, ranks + kPiece, b + kFactorBytes);
        add_factor(d, ranks + 2 * kPiece, b + 2 * kFactorBytes);
        unsigned gate[2][2], up[2][2], dropped[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x[4], y[4], z[4], dot = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int t = i / 2, at = 2 * h + i % 2;
            const float kept_scale =
                !drops || kept(bits[h], 4 * pair + i, threshold) ? keep_scale : 0.0F;
            float gate_u = u[t][at], value = v[t][at];
            if constexpr (Scaled) gate_u *= s1[4 * pair + i], value *= s3[4 * pair + i];
            const Silu act = silu(gate_u);
            const float d_h = from_out[t][at] + kept_scale * d[t][at];
            x[i] = d_h * value * act.slope;
            y[i] = d_h * act.value;
            z[i] = kept_scale * act.value * value;
            if constexpr (!Scaled) dot += x[i] * gate_u + y[i] * value;
            if constexpr (Scaled) {
              if (live[h]) {
                scale1[4 * pair + i] += x[i] * u[t][at];
                scale3[4 * pair + i] += y[i] * v[t][at];
              }
              x[i] *= s1[4 * pair + i], y[i] *= s3[4 * pair + i];
            }
          }
          if constexpr (!Scaled) dot_place(stage, pair, h) = dot;
          gate[0][h] = pack2(x[0], x[1]), gate[1][h] = pack2(x[2], x[3]);
          up[0][h] = pack2(y[0], y[1]), up[1][h] = pack2(y[2], y[3]);
          dropped[0][h] = pack2(z[0], z[1]), dropped[1][h] = pack2(z[2], z[3]);
          keep_gradients(here, h, pair, lane, make_uint2(gate[0][h], gate[1][h]),
                         make_uint2(up[0][h], up[1][h]));
        }
        collect_ranks<1>(p[0], gate, b);
        collect_ranks<1>(p[1], up, b + kFactorBytes);
        unsigned a[4];
        read_matrices_trans(a, ranks);
        collect_columns(b1[pair], gate, a);
        read_matrices_trans(a, ranks + kPiece);
        collect_columns(b3[pair], up, a);
        read_matrices_trans(a, ranks + 2 * kPiece);
        collect_turned(a2 + 2 * pair, dropped, a);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (live[h])
          write_gradients(m.d_gate_up + static_cast<Index>(first + g + 8 * h) * 2 * width + col,
                          here, h, lane, width);
      }
    }
    float4* turn = meeting + stage * kWarps * 4 * kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      turn[(warp * 4 + i) * kWarp + lane] = make_float4(p[i / 2][i % 2][0], p[i / 2][i % 2][1],
                                                        p[i / 2][i % 2][2], p[i / 2][i % 2][3]);
    stage ^= 1;
  }
  __syncthreads();
  if (begin < end) leave_p(stage ^ 1, begin + (end - begin - 1) / kRows * kRows);
  if (!there) return;

  const Index place = static_cast<Index>(split) * width;
  each_of_columns(f0, lane, rank, [&](int f, int r, int pair, int half, int k) {
    const Index at = (place + f) * rank + r;
    const float *x = b1[pair][half], *y = b3[pair][half];
    *reinterpret_cast<float2*>(out.b1 + at) = make_float2(x[2 * k], x[2 * k + 1]);
    *reinterpret_cast<float2*>(out.b3 + at) = make_float2(y[2 * k], y[2 * k + 1]);
  });
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (const int r = g + 8 * half; r < rank)
        *reinterpret_cast<float2*>(out.a2 + place * rank + static_cast<Index>(r) * width + col +
                                   2 * j) = make_float2(a2[j][2 * half], a2[j][2 * half + 1]);
  if constexpr (Scaled)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int apart = 4; apart < kWarp; apart *= 2) {
        scale1[i] += __shfl_xor_sync(kAll, scale1[i], apart);
        scale3[i] += __shfl_xor_sync(kAll, scale3[i], apart);
      }
      if (g == 0) out.scale1[place + col + i] = scale1[i], out.scale3[place + col + i] = scale3[i];
    }
}

/// grid (parts, 7): p = s times its sums; B1, B3, A2 and both scales += theirs; the dots, their
/// sums, one a thread; four numbers a thread of the others.
__global__ void finish_kernel(const __grid_constant__ TileCall m, const Sums in) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int which = static_cast<int>(blockIdx.y);
  const auto sum_of = [i](const float* from, int parts, Index quads) {
    return sum_of_parts(from, i, quads, parts);
  };
  if (which == 0) {
    const Index quads = m.rows * 2 * m.rank / 4;
    if (i >= quads) return;
    const float4 sum = sum_of(in.p, in.blocks, quads);
    reinterpret_cast<uint2*>(m.p)[i] = make_uint2(pack2(m.scale * sum.x, m.scale * sum.y),
                                                  pack2(m.scale * sum.z, m.scale * sum.w));
    return;
  }
  if (which == 1) {
    if (i >= m.rows || in.dots == nullptr) return;
    float sum = 0;
#pragma unroll 8
    for (int k = 0; k < in.blocks; ++k) sum += in.dots[k * m.rows + i];
    m.row_dots[i] = sum;
    return;
  }
  float* const to[] = {m.d_gate_b, m.d_up_b, m.d_down_a, m.d_gate_scale, m.d_up_scale};
  const float* const from[] = {in.b1, in.b3, in.a2, in.scale1, in.scale3};
  float* grads = nullptr;
  const float* sums = nullptr;
#pragma unroll
  for (int k = 0; k < 5; ++k)
    if (which == k + 2) grads = to[k], sums = from[k];
  const Index quads = m.width * (which > 4 ? 1 : m.rank) / 4;
  if (grads == nullptr || i >= quads) return;
  const float4 sum = sum_of(sums, in.splits, quads);
  float4 old = reinterpret_cast<float4*>(grads)[i];
  old.x += sum.x, old.y += sum.y, old.z += sum.z, old.w += sum.w;
  reinterpret_cast<float4*>(grads)[i] = old;
}

/// Rounds of blocks times what one takes, in tiles of rows and its beginning and end.
int splits_of(int tiles, int blocks, int together) {
  constexpr int kAround = 4, kMost = 16;
  int best = 1, least = 0;
  for (int s = 1; s <= std::min(tiles, kMost); ++s) {
    const int time = ceil_div(blocks * s, together) * (ceil_div(tiles, s) + kAround);
    if (s == 1 || time < least) best = s, least = time;
  }
  return best;
}

template <bool Scaled> Fit fit() {
  return fit_of(reinterpret_cast<const void*>(single_kernel<Scaled>), 0, kBytes / kWarps);
}
Sums sums_of(const TileCall& c, void* room, std::size_t& bytes) {
  const Fit own = has_scales(c) ? fit<true>() : fit<false>();
  Sums s{};
  s.blocks = static_cast<int>(ceil_div<Index>(c.width, kBlockColumns));
  s.splits = splits_of(static_cast<int>(ceil_div<Index>(c.rows, kRows)), s.blocks, own.together);
  auto* at = static_cast<float*>(room);
  const auto take = [&at](Index count) {
    float* own_at = at;
    at += ceil_div<Index>(count, 64) * 64;
    return own_at;
  };
  s.p = take(s.blocks * c.rows * 2 * c.rank);
  for (float** part : {&s.b1, &s.b3, &s.a2}) *part = take(s.splits * c.width * c.rank);
  for (float** part : {&s.scale1, &s.scale3}) *part = take(s.splits * c.width);
  if (c.row_dots != nullptr && !has_scales(c)) s.dots = take(s.blocks * c.rows);
  bytes = static_cast<std::size_t>(at - static_cast<float*>(room)) * sizeof(float);
  return s;
}

}  // namespace

bool single_takes(const TileCall& c) {
  if (c.experts != 1 || c.slots != 1 || c.expert != nullptr || c.weight != nullptr ||
      c.d_weight != nullptr || c.rank > 16 || c.gate_b == nullptr || c.up_b == nullptr ||
      c.down_a == nullptr || c.q == nullptr || c.p == nullptr || c.d_gate_b == nullptr ||
      c.d_up_b == nullptr || c.d_down_a == nullptr)
    return false;
  const Fit own = has_scales(c) ? fit<true>() : fit<false>();
  std::size_t bytes = 0;
  sums_of(c, nullptr, bytes);
  return own.warps == kWarps && static_cast<Index>(bytes) <= kMostSumBytes;
}
std::size_t single_bytes(const TileCall& c) {
  std::size_t bytes = 0;
  sums_of(c, nullptr, bytes);
  return bytes;
}
bool single_backward(const TileCall& c, void* memory, cudaStream_t stream) {
  std::size_t bytes = 0;
  const Sums s = sums_of(c, memory, bytes);
  const dim3 grid(static_cast<unsigned>(s.blocks), static_cast<unsigned>(s.splits));
  if (has_scales(c))
    launch_warps(single_kernel<true>, fit<true>(), grid, stream, "mixture_backward", c, s);
  else
    launch_warps(single_kernel<false>, fit<false>(), grid, stream, "mixture_backward", c, s);
  constexpr int kThreads = 128;
  const Index most = std::max(c.rows * 2, c.width) * c.rank / 4;
  finish_kernel<<<dim3(static_cast<unsigned>(ceil_div<Index>(most, kThreads)),
                       has_scales(c) ? 7 : 5),
                  kThreads, 0, stream>>>(c, s);
  launched("mixture_backward");
  return s.dots != nullptr;
}

}  // namespace mixlora::cuda
