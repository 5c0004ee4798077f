// d_y B and d_y^T a in one pass over d_y, several matrices at once (q, k, v); DoRA's scale of
// columns on the way.
#include <algorithm>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/rank_tiles.cuh"

namespace mixlora {
namespace {

using cuda::ceil_div;
using cuda::Index;
using cuda::kColumns;
using cuda::kPiece;
using cuda::kRows;
using cuda::kWarp;
using cuda::Number;

constexpr int kWarps = 4, kStages = 3;
constexpr int kMostChunks = 2;  // sixteens of ranks; with more, sums outweigh d_y
constexpr std::size_t kMostCalls = 3;
constexpr int kBlocksTogether = 2;  // of one processor

/// One matrix of the launch.
struct One {
  const Number *d_y, *a, *b;
  Index stride_d_y, stride_a, stride_d_a;
  Number* d_a;
  float* d_b;
  float* d_a_sums;  // (blocks of columns, row, rank)
  float* d_b_sums;  // (split, column, rank)
  // With a scale:
  const Number* core;
  const float* scale;
  Number* d_core;
  float *d_scale, *d_scale_sums;  // (split, column)
  Index stride_core, stride_d_core;
  int cols, blocks, first_block;
};
struct Call {
  One all[kMostCalls];
  int count, rows, rank, splits;
  float s;
};

/// A warp has so many tiles of 32 columns, a stage 16 rows of them, of core's, and of a.
template <int C> constexpr int kTiles = 4 / C;
template <int C> constexpr int kBlockColumns = kWarps* kTiles<C>* kColumns;
template <int C, bool Scaled> struct Stage {
  static constexpr int kCore = 2 * kTiles<C> * kPiece, kRanks = Scaled ? 2 * kCore : kCore,
                       kBytes = kRanks + C * kPiece;
};
/// Where the warps' shares of d_y B meet, and the scales of the block's columns.
template <int C> constexpr int kMeeting = 2 * kWarps * 2 * C* kWarp * 16;
template <int C, bool Scaled>
constexpr int kShared = kWarps* kStages* Stage<C, Scaled>::kBytes + kMeeting<C> +
                        (Scaled ? kBlockColumns<C> * 4 : 0);

/// Eight columns of d_core = scale d_y; d_scale += d_y core.
__device__ uint4 scaled(uint4 d_y, uint4 core, const float* scale, float (&d_scale)[8]) {
  const unsigned g[4] = {d_y.x, d_y.y, d_y.z, d_y.w}, c[4] = {core.x, core.y, core.z, core.w};
  unsigned d[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = cuda::low(g[i]), high = cuda::high(g[i]);
    d_scale[2 * i] += low * cuda::low(c[i]);
    d_scale[2 * i + 1] += high * cuda::high(c[i]);
    const float2 by = *reinterpret_cast<const float2*>(scale + 2 * i);
    d[i] = cuda::pack2(by.x * low, by.y * high);
  }
  return make_uint4(d[0], d[1], d[2], d[3]);
}

/// grid (blocks of columns of all matrices, splits of the rows).
template <int C, bool Scaled>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocksTogether)
    backward_kernel(const __grid_constant__ Call m) {
  extern __shared__ __align__(16) std::byte memory[];
  using S = Stage<C, Scaled>;
  constexpr int kOwn = kTiles<C>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  int which = 0;
  while (which + 1 < m.count && static_cast<int>(blockIdx.x) >= m.all[which + 1].first_block)
    ++which;
  const One& one = m.all[which];
  const int block = static_cast<int>(blockIdx.x) - one.first_block, rank = m.rank;
  const int f0 = (block * kWarps + warp) * kOwn * kColumns;
  const int tiles = ceil_div(m.rows, kRows), splits = static_cast<int>(gridDim.y),
            split = static_cast<int>(blockIdx.y);
  const int begin = tiles * split / splits * kRows,
            end = min(m.rows, tiles * (split + 1) / splits * kRows);
  const auto there = [&](int t) { return f0 + t * kColumns < one.cols; };

  std::byte* ring = memory + warp * kStages * S::kBytes;
  const std::uint32_t ring_address = cuda::shared_address(ring), own_ranks = cuda::rank_row(lane);
  constexpr int kRowBytes = kOwn * kColumns * 2;
  /// This lane's eight columns of tile t, row g + 8 h.
  const auto own_piece = [&](const std::byte* rows, int t, int h) {
    return *reinterpret_cast<const uint4*>(rows + (g + 8 * h) * kRowBytes +
                                           16 * ((4 * t + q) ^ 4 * (g & 1)));
  };
  const auto fetch = [&](int stage, int first) {
    if (first < end) {
      const std::uint32_t at = ring_address + static_cast<std::uint32_t>(stage * S::kBytes);
      // Eight lanes a row of 128 bytes; a row's sixteens change places by the row (see
      // `own_piece`).
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = lane / 8 + 4 * i;
        const Index from = min(first + r, end - 1);
        const Number *row = one.d_y + from * one.stride_d_y,
                     *core = Scaled ? one.core + from * one.stride_core : nullptr;
#pragma unroll
        for (int k = 0; k < kOwn / 2; ++k) {
          const int unit = lane % 8 + 8 * k;
          const bool live = f0 + 8 * unit < one.cols;
          const std::uint32_t to =
              at + static_cast<std::uint32_t>(r * kRowBytes + 16 * (unit ^ 4 * (r & 1)));
          cuda::fetch16(to, row + (live ? f0 + 8 * unit : 0), live);
          if constexpr (Scaled)
            cuda::fetch16(to + S::kCore, core + (live ? f0 + 8 * unit : 0),
                          live && first + r < end);
        }
      }
      // Rows that are not there add nothing.
      const int row = first + lane / 2;
      cuda::fetch_ranks<C>(at + S::kRanks,
                           one.a + static_cast<Index>(min(row, end - 1)) * one.stride_a,
                           row < end ? rank : 0, lane);
    }
    cuda::fetch_commit();
  };

#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) fetch(i, begin + i * kRows);

  // Of a lane as g: the column whose ranks it reads and whose gradients it leaves, of half j of the
  // eight of tile t.
  const auto column_of = [&](int t, int j, int k) {
    return f0 + t * kColumns + g / 2 * 8 + 4 * j + 2 * k + g % 2;
  };
  // B, columns as the inner dimension: tile, half of a lane's eight columns, eight ranks.
  unsigned b[kOwn][2][2 * C][2];
#pragma unroll
  for (int t = 0; t < kOwn; ++t)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 2 * C; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const Index column = column_of(t, j, k);
          const unsigned pair =
              there(t) && 8 * i < rank ? cuda::load_pair(one.b + column * rank + 8 * i + 2 * q) : 0;
          b[t][j][i][k] = cuda::transposed(pair);
        }

  float d_b[kOwn][2][2 * C][4] = {}, d_scale[kOwn][8] = {};
  auto* meeting = reinterpret_cast<float4*>(memory + kWarps * kStages * S::kBytes);
  auto* scale = reinterpret_cast<float*>(memory + kWarps * kStages * S::kBytes + kMeeting<C>) +
                warp * kOwn * kColumns;
  if constexpr (Scaled) {
    for (int i = lane; i < kOwn * kColumns; i += kWarp)
      scale[i] = f0 + i < one.cols ? one.scale[f0 + i] : 0;
    __syncwarp();
  }
  int stage = 0, turn = 0;
  for (int first = begin; first < end; first += kRows) {
    fetch((stage + kStages - 1) % kStages, first + (kStages - 1) * kRows);
    cuda::fetch_wait<kStages - 1>();
    __syncwarp();
    const std::byte* here = ring + stage * S::kBytes;
    const std::uint32_t ranks =
        ring_address + static_cast<std::uint32_t>(stage * S::kBytes + S::kRanks) + own_ranks;
    unsigned a[C][4];
#pragma unroll
    for (int c = 0; c < C; ++c)
      cuda::read_matrices_trans(a[c], ranks + static_cast<std::uint32_t>(c * kPiece));
    float d_a[2 * C][4] = {};
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
      unsigned d[2][4];  // rows g and g + 8
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint4 own = own_piece(here, t, h);
        if constexpr (Scaled) {
          own = scaled(own, own_piece(here + S::kCore, t, h), scale + t * kColumns + 8 * q,
                       d_scale[t]);
          if (there(t) && first + g + 8 * h < end)
            *reinterpret_cast<uint4*>(one.d_core +
                                      static_cast<Index>(first + g + 8 * h) * one.stride_d_core +
                                      f0 + t * kColumns + 8 * q) = own;
        }
        d[h][0] = own.x, d[h][1] = own.y, d[h][2] = own.z, d[h][3] = own.w;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const unsigned x[2] = {d[0][2 * j], d[0][2 * j + 1]}, y[2] = {d[1][2 * j], d[1][2 * j + 1]};
        const unsigned x0 = cuda::transposed(x[0]), x1 = cuda::transposed(x[1]),
                       y0 = cuda::transposed(y[0]), y1 = cuda::transposed(y[1]);
#pragma unroll
        for (int i = 0; i < 2 * C; ++i) {
          cuda::mma(d_a[i], x[0], y[0], x[1], y[1], b[t][j][i][0], b[t][j][i][1]);
          cuda::mma(d_b[t][j][i], x0, x1, y0, y1, a[i / 2][2 * (i % 2)], a[i / 2][2 * (i % 2) + 1]);
        }
      }
    }
    // The warps' columns of d_y B, in the order of the warps.
    float4* mine = meeting + (turn * kWarps + warp) * 2 * C * kWarp;
#pragma unroll
    for (int i = 0; i < 2 * C; ++i)
      mine[i * kWarp + lane] = make_float4(d_a[i][0], d_a[i][1], d_a[i][2], d_a[i][3]);
    __syncthreads();
    const auto* all = reinterpret_cast<const float2*>(meeting + turn * kWarps * 2 * C * kWarp);
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const int at = static_cast<int>(threadIdx.x) + k * kWarps * kWarp,
                fragment = at / (2 * kWarp), from = at % (2 * kWarp) / 2;
      float2 sum = make_float2(0, 0);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 part = all[w * 2 * C * 2 * kWarp + at];
        sum.x += part.x, sum.y += part.y;
      }
      const int row = first + from / 4 + 8 * (at % 2), r = 8 * fragment + 2 * (from % 4);
      if (row < end && r < rank)
        *reinterpret_cast<float2*>(one.d_a_sums +
                                   (static_cast<Index>(block) * m.rows + row) * rank + r) = sum;
    }
    stage = (stage + 1) % kStages;
    turn ^= 1;
  }
  cuda::fetch_wait<0>();

#pragma unroll
  for (int t = 0; t < kOwn; ++t)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 2 * C; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int column = column_of(t, j, k), r = 8 * i + 2 * q;
          if (there(t) && r < rank)
            *reinterpret_cast<float2*>(one.d_b_sums +
                                       (static_cast<Index>(split) * one.cols + column) * rank + r) =
                make_float2(d_b[t][j][i][2 * k], d_b[t][j][i][2 * k + 1]);
        }
  if constexpr (Scaled)
#pragma unroll
    for (int t = 0; t < kOwn; ++t)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float sum = d_scale[t][n];
#pragma unroll
        for (int apart = 4; apart < kWarp; apart *= 2)
          sum += __shfl_xor_sync(cuda::kAll, sum, apart);
        if (g == n && there(t))
          one.d_scale_sums[static_cast<Index>(split) * one.cols + f0 + t * kColumns + 8 * q + n] =
              sum;
      }
}

/// Threads that share a sum over the splits: lanes 8 apart.
constexpr int kTogether = 4;
/// to[i] += part i of every split's sums, `quads` of four numbers each.
__device__ void add_sums(float* to, const float* sums, int i, int quads, int splits) {
  const int part = static_cast<int>(threadIdx.x) / 8 % kTogether;
  float sum[4] = {};
#pragma unroll 8
  for (int k = part; k < splits; k += kTogether) {
    const float4 own = reinterpret_cast<const float4*>(sums)[static_cast<Index>(k) * quads + i];
    sum[0] += own.x, sum[1] += own.y, sum[2] += own.z, sum[3] += own.w;
  }
#pragma unroll
  for (int apart = 8; apart < 8 * kTogether; apart *= 2)
#pragma unroll
    for (float& x : sum) x += __shfl_xor_sync(cuda::kAll, x, apart);
  if (part != 0) return;
  float4& own = reinterpret_cast<float4*>(to)[i];
  const float4 old = own;
  own = make_float4(old.x + sum[0], old.y + sum[1], old.z + sum[2], old.w + sum[3]);
}

/// grid (parts, matrices): d_a = s times its sums, two numbers a thread, then d_b and d_scale +=
/// their sums, four.
__global__ void finish_kernel(const __grid_constant__ Call m) {
  const One& one = m.all[blockIdx.y];
  const int half = m.rank / 2, numbers = m.rows * half, quads = one.cols * m.rank / 4;
  const int blocks = ceil_div(numbers, static_cast<int>(blockDim.x));
  if (static_cast<int>(blockIdx.x) < blocks) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= numbers) return;
    const auto* sums = reinterpret_cast<const float2*>(one.d_a_sums);
    float2 sum = make_float2(0, 0);
#pragma unroll 8
    for (int k = 0; k < one.blocks; ++k) {
      const float2 part = sums[static_cast<Index>(k) * numbers + i];
      sum.x += part.x, sum.y += part.y;
    }
    *reinterpret_cast<unsigned*>(one.d_a + i / half * one.stride_d_a + i % half * 2) =
        cuda::pack2(m.s * sum.x, m.s * sum.y);
    return;
  }
  // Eight sums a warp: all of one matrix, whose columns and ranks come by eights.
  const int thread = (static_cast<int>(blockIdx.x) - blocks) * static_cast<int>(blockDim.x) +
                     static_cast<int>(threadIdx.x),
            i = thread / kWarp * 8 + thread % 8;
  if (i < quads)
    add_sums(one.d_b, one.d_b_sums, i, quads, m.splits);
  else if (one.scale != nullptr && i - quads < one.cols / 4)
    add_sums(one.d_scale, one.d_scale_sums, i - quads, one.cols / 4, m.splits);
}

bool takes(const LowRankBackward& x, Index rows, Index rank) {
  const auto even = [](const auto& t) { return t.dtype == DType::bf16 && cuda::by_eights(t); };
  return even(x.d_y) && even(x.a) && even(x.d_a) && even(x.b) && x.b.contiguous() &&
         x.d_b.contiguous() && x.d_b.dtype == DType::f32 && x.d_y.cols() % kColumns == 0 &&
         x.d_y.rows() == rows && x.a.rows() == rows && x.d_a.rows() == rows && x.a.cols() == rank &&
         x.d_a.cols() == rank && x.b.cols() == rank && x.b.rows() == x.d_y.cols() &&
         x.d_b.numel() == x.b.numel() && rank % 8 == 0 && rank <= 16 * kMostChunks &&
         rows < (Index{1} << 24);
}
/// The same of a scale.
bool takes(const ScaledColumns& x, Index rows, Index cols) {
  const auto whole = [&](const auto& t) {
    return t.dtype == DType::bf16 && cuda::by_eights(t) && t.rows() == rows && t.cols() == cols;
  };
  return whole(x.core) && whole(x.d_core) && x.scale.numel() == cols && x.scale.contiguous() &&
         x.d_scale.numel() == cols && x.d_scale.contiguous() && cuda::by_eights(x.d_scale);
}

}  // namespace

void CudaBackend::lora_b_backward(std::span<const LowRankBackward> all, float s) {
  if (all.empty() || all[0].d_y.rows() == 0) return;
  const Index rows = all[0].d_y.rows(), rank = all[0].a.cols();
  const bool scaled = static_cast<bool>(all[0].scaled.scale);
  bool fits = all.size() <= kMostCalls;
  for (const LowRankBackward& x : all)
    fits = fits && takes(x, rows, rank) && static_cast<bool>(x.scaled.scale) == scaled &&
           (!scaled || takes(x.scaled, rows, x.d_y.cols()));
  if (!fits) return Backend::lora_b_backward(all, s);
  if (scaled && (rank > 16 ? kShared<2, true> : kShared<1, true>) > cuda::most_shared()) {
    std::vector<LowRankBackward> plain;
    for (const LowRankBackward& x : all) {
      const ScaledColumns& c = x.scaled;
      scale_columns_backward(c.d_core, c.d_scale, x.d_y, c.core, c.scale);
      plain.push_back({x.d_b, x.d_a, c.d_core, x.a, x.b});
    }
    return lora_b_backward(plain, s);
  }

  Call m{};
  m.count = static_cast<int>(all.size());
  m.rows = static_cast<int>(rows);
  m.rank = static_cast<int>(rank);
  m.s = s;
  const int across = rank > 16 ? kBlockColumns<2> : kBlockColumns<1>;
  int blocks = 0;
  Index columns = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    One& one = m.all[i];
    one.cols = static_cast<int>(all[i].d_y.cols());
    one.blocks = ceil_div(one.cols, across);
    one.first_block = blocks;
    blocks += one.blocks;
    columns += one.cols;
  }
  m.splits = std::clamp(kBlocksTogether * processors_ / blocks, 1,
                        std::max(1, ceil_div(m.rows, 4 * kRows)));
  const Index sums = (blocks * rows + m.splits * columns) * rank;
  if (sums * Index{sizeof(float)} > cuda::kMostSumBytes) return Backend::lora_b_backward(all, s);
  Room space = room();
  int parts = 0;
  constexpr int kThreads = 256;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const LowRankBackward& x = all[i];
    One& one = m.all[i];
    one.d_y = cuda::data<Number>(x.d_y), one.stride_d_y = x.d_y.stride;
    one.a = cuda::data<Number>(x.a), one.stride_a = x.a.stride;
    one.b = cuda::data<Number>(x.b);
    one.d_a = cuda::data<Number>(x.d_a), one.stride_d_a = x.d_a.stride;
    one.d_b = cuda::data<float>(x.d_b);
    one.d_a_sums = space.take<float>(one.blocks * rows * rank);
    one.d_b_sums = space.take<float>(m.splits * x.b.numel());
    if (scaled) {
      const ScaledColumns& c = x.scaled;
      one.core = cuda::data<Number>(c.core), one.stride_core = c.core.stride;
      one.scale = cuda::data<float>(c.scale);
      one.d_core = cuda::data<Number>(c.d_core), one.stride_d_core = c.d_core.stride;
      one.d_scale = cuda::data<float>(c.d_scale);
      one.d_scale_sums = space.take<float>(m.splits * one.cols);
    }
    const int quads = one.cols * m.rank / 4 + (scaled ? one.cols / 4 : 0);
    parts = std::max(
        parts, ceil_div(m.rows * m.rank / 2, kThreads) + ceil_div(kTogether * quads, kThreads));
  }
  const auto launch = [&](auto* kernel, int bytes) {
    cuda::admit_shared(reinterpret_cast<const void*>(kernel), bytes);
    kernel<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(m.splits)), kWarps * kWarp,
             static_cast<std::size_t>(bytes), stream_>>>(m);
  };
  if (rank > 16)
    scaled ? launch(backward_kernel<2, true>, kShared<2, true>)
           : launch(backward_kernel<2, false>, kShared<2, false>);
  else
    scaled ? launch(backward_kernel<1, true>, kShared<1, true>)
           : launch(backward_kernel<1, false>, kShared<1, false>);
  cuda::launched("lora_b_backward");
  finish_kernel<<<dim3(static_cast<unsigned>(parts), static_cast<unsigned>(m.count)), kThreads, 0,
                  stream_>>>(m);
  cuda::launched("lora_b_backward");
}

}  // namespace mixlora
