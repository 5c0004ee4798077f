// d_y B and d_y^T a in one pass over d_y, several matrices at once (q, k, v).
#include <algorithm>

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
constexpr int kBlocksTogether = 2;                          // of one processor
constexpr std::size_t kMostBytes = std::size_t{128} << 20;  // of sums

/// One matrix of the launch.
struct One {
  const Number *d_y, *a, *b;
  Index stride_d_y, stride_a, stride_d_a;
  Number* d_a;
  float* d_b;
  float* d_a_sums;  // (blocks of columns, row, rank)
  float* d_b_sums;  // (split, column, rank)
  int cols, blocks, first_block;
};
struct Call {
  One all[kMostCalls];
  int count, rows, rank, splits;
  float s;
};

/// A warp has so many tiles of 32 columns, a stage 16 rows of them and of a.
template <int C> constexpr int kTiles = 4 / C;
template <int C> constexpr int kBlockColumns = kWarps* kTiles<C>* kColumns;
template <int C> struct Stage {
  static constexpr int kRanks = 2 * kTiles<C> * kPiece, kBytes = kRanks + C * kPiece;
};
template <int C>
constexpr int kShared = kWarps* kStages* Stage<C>::kBytes + 2 * kWarps * 2 * C* kWarp * 16;

/// grid (blocks of columns of all matrices, splits of the rows).
template <int C>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocksTogether)
    backward_kernel(const __grid_constant__ Call m) {
  extern __shared__ __align__(16) std::byte memory[];
  using S = Stage<C>;
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
          const Index column = f0 + t * kColumns + g / 2 * 8 + 4 * j + 2 * k + g % 2;
          const unsigned pair =
              there(t) && 8 * i < rank ? cuda::load_pair(one.b + column * rank + 8 * i + 2 * q) : 0;
          b[t][j][i][k] = cuda::transposed(pair);
        }

  std::byte* ring = memory + warp * kStages * S::kBytes;
  const std::uint32_t ring_address = cuda::shared_address(ring), own_ranks = cuda::rank_row(lane);
  constexpr int kRowBytes = kOwn * kColumns * 2;
  /// Columns 4 j .. 4 j + 3 of this lane's eight of tile t, row g + 8 h.
  const auto own_piece = [&](const std::byte* stage, int t, int h, int j) {
    return *reinterpret_cast<const uint2*>(stage + (g + 8 * h) * kRowBytes +
                                           16 * ((4 * t + q) ^ 4 * (g & 1)) + 8 * j);
  };
  const auto fetch = [&](int stage, int first) {
    if (first < end) {
      const std::uint32_t at = ring_address + static_cast<std::uint32_t>(stage * S::kBytes);
      // Eight lanes a row of 128 bytes; a row's sixteens change places by the row (see
      // `own_piece`).
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = lane / 8 + 4 * i;
        const Number* row = one.d_y + static_cast<Index>(min(first + r, end - 1)) * one.stride_d_y;
#pragma unroll
        for (int k = 0; k < kOwn / 2; ++k) {
          const int unit = lane % 8 + 8 * k;
          const bool live = f0 + 8 * unit < one.cols;
          cuda::fetch16(at + static_cast<std::uint32_t>(r * kRowBytes + 16 * (unit ^ 4 * (r & 1))),
                        row + (live ? f0 + 8 * unit : 0), live);
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

  float d_b[kOwn][2][2 * C][4] = {};
  auto* meeting = reinterpret_cast<float4*>(memory + kWarps * kStages * S::kBytes);
  int stage = 0, turn = 0;
#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) fetch(i, begin + i * kRows);
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
    for (int t = 0; t < kOwn; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint2 x = own_piece(here, t, 0, j), y = own_piece(here, t, 1, j);
        const unsigned x0 = cuda::transposed(x.x), x1 = cuda::transposed(x.y),
                       y0 = cuda::transposed(y.x), y1 = cuda::transposed(y.y);
#pragma unroll
        for (int i = 0; i < 2 * C; ++i) {
          cuda::mma(d_a[i], x.x, y.x, x.y, y.y, b[t][j][i][0], b[t][j][i][1]);
          cuda::mma(d_b[t][j][i], x0, x1, y0, y1, a[i / 2][2 * (i % 2)], a[i / 2][2 * (i % 2) + 1]);
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
          const int column = f0 + t * kColumns + g / 2 * 8 + 4 * j + 2 * k + g % 2,
                    r = 8 * i + 2 * q;
          if (there(t) && r < rank)
            *reinterpret_cast<float2*>(one.d_b_sums +
                                       (static_cast<Index>(split) * one.cols + column) * rank + r) =
                make_float2(d_b[t][j][i][2 * k], d_b[t][j][i][2 * k + 1]);
        }
}

/// grid (parts, matrices): d_a = s times its sums, two numbers a thread, then d_b += its sums,
/// four.
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
  const int i = (static_cast<int>(blockIdx.x) - blocks) * static_cast<int>(blockDim.x) +
                static_cast<int>(threadIdx.x);
  if (i >= quads) return;
  const auto* sums = reinterpret_cast<const float4*>(one.d_b_sums);
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int k = 0; k < m.splits; ++k) {
    const float4 part = sums[static_cast<Index>(k) * quads + i];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  auto* to = reinterpret_cast<float4*>(one.d_b) + i;
  float4 old = *to;
  old.x += sum.x, old.y += sum.y, old.z += sum.z, old.w += sum.w;
  *to = old;
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

}  // namespace

void CudaBackend::lora_b_backward(std::span<const LowRankBackward> all, float s) {
  if (all.empty() || all[0].d_y.rows() == 0) return;
  const Index rows = all[0].d_y.rows(), rank = all[0].a.cols();
  bool fits = all.size() <= kMostCalls;
  for (const LowRankBackward& x : all) fits = fits && takes(x, rows, rank);
  if (!fits) return Backend::lora_b_backward(all, s);

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
  if (static_cast<std::size_t>(sums) * sizeof(float) > kMostBytes)
    return Backend::lora_b_backward(all, s);
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
    parts = std::max(
        parts, ceil_div(m.rows * m.rank / 2, kThreads) + ceil_div(one.cols * m.rank / 4, kThreads));
  }
  const auto launch = [&](auto chunks) {
    auto* kernel = backward_kernel<chunks()>;
    cuda::admit_shared(reinterpret_cast<const void*>(kernel), kShared<chunks()>);
    kernel<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(m.splits)), kWarps * kWarp,
             kShared<chunks()>, stream_>>>(m);
  };
  if (rank > 16)
    launch(std::integral_constant<int, 2>{});
  else
    launch(std::integral_constant<int, 1>{});
  cuda::launched("lora_b_backward");
  finish_kernel<<<dim3(static_cast<unsigned>(parts), static_cast<unsigned>(m.count)), kThreads, 0,
                  stream_>>>(m);
  cuda::launched("lora_b_backward");
}

}  // namespace mixlora
