// DoRA: the norm of the adapted rows, and magnitudes as a scale of columns.
#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/tensor_core.cuh"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::kChunk;
using cuda::kTogether;
using cuda::Rows;

/// dora_scale's calls of one launch, as kernels see them; their gram matrices lie end to end.
constexpr int kCalls = 32;
template <class T> struct Calls {
  struct One {
    float *scale, *inverse_norm, *gram;
    const float *m, *w_squared;
    Rows<const T> a, wa, b;
    int out, in, rank;
    float s;
  };
  One one[kCalls];
};

/// n and m / n of output o from (W A^T)_o . B_o and B_o (A A^T) B_o^T.
template <class Call>
__device__ void leave_scale(const Call& call, Index o, float cross, float square) {
  const float squared = call.w_squared[o] + 2 * call.s * cross + call.s * call.s * square;
  const float inverse = squared > 0 ? 1 / sqrtf(squared) : 0;
  const float exact = call.m[o] * inverse;
  call.inverse_norm[o] = inverse;
  call.scale[o] = fabsf(exact) < kLeastScale ? copysignf(kLeastScale, exact) : exact;
}

/// gram = A A^T, one block a pair of rows and call: R (R + 1) rows of A read, from L2 but for the
/// first time.
template <bool Aligned, class T>
__global__ void gram_kernel(const __grid_constant__ Calls<T> calls) {
  __shared__ float shared[cuda::kWarp];
  const auto& call = calls.one[blockIdx.z];
  const auto i = static_cast<int>(blockIdx.x), j = static_cast<int>(blockIdx.y);
  if (j > i || i >= call.rank) return;
  float sum = 0;
  for (Index col = static_cast<Index>(threadIdx.x) * kChunk; col < call.in;
       col += static_cast<Index>(blockDim.x) * kChunk) {
    const int count = cuda::chunk_at(col, call.in);
    const Eight x = cuda::take<Aligned>(call.a.at(i, col), count),
                y = cuda::take<Aligned>(call.a.at(j, col), count);
#pragma unroll
    for (int n = 0; n < kChunk; ++n) sum += x.v[n] * y.v[n];
  }
  sum = cuda::block_sum(sum, shared);
  if (threadIdx.x == 0) call.gram[i * call.rank + j] = call.gram[j * call.rank + i] = sum;
}

/// One thread an output: 2 R numbers read, W A^T's side by side over a warp, the gram matrix from
/// L1, where a warp reads one address.
template <bool Aligned, class T>
__global__ void dora_scale_kernel(const __grid_constant__ Calls<T> calls) {
  const auto& call = calls.one[blockIdx.y];
  const Index o = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (o >= call.out) return;
  float cross = 0, square = 0;
  for (int j = 0; j < call.rank; j += kChunk) {
    const int count = cuda::chunk_at(j, call.rank);
    const Eight b_j = cuda::take<Aligned>(call.b.at(o, j), count);
#pragma unroll
    for (int n = 0; n < kChunk; ++n)
      if (n < count) cross += b_j.v[n] * cuda::to_float(*call.wa.at(j + n, o));
    for (int i = 0; i < call.rank; ++i) {
      const Eight gram = cuda::take<Aligned>(call.gram + i * call.rank + j, count);
      float part = 0;
#pragma unroll
      for (int n = 0; n < kChunk; ++n) part += gram.v[n] * b_j.v[n];
      square += cuda::to_float(*call.b.at(o, i)) * part;
    }
  }
  leave_scale(call, o, cross, square);
}

/// The same in bf16 for at most kMostRanks ranks by eights: a gram matrix is of tiles of 16 x 16,
/// zero behind its ranks, and comes in kSplits parts, each of a range of A's columns.
constexpr int kTile = 16, kMostRanks = 128, kSplits = 4, kGramWarps = 8;
using Bf16Calls = Calls<__nv_bfloat16>;
__host__ __device__ constexpr int whole_tiles(int rank) {
  return cuda::ceil_div(rank, kTile) * kTile;
}

/// grid (kSplits, calls, pairs of tiles of ranks): a lane's 16 bytes of rows g and g + 8 of each
/// tile are factors of two steps (which of 32 columns is which does not matter to their sum).
__global__ void __launch_bounds__(kGramWarps* cuda::kWarp)
    gram_tile_kernel(const __grid_constant__ Bf16Calls calls) {
  __shared__ float4 sums[kGramWarps][2][cuda::kWarp];
  const auto& call = calls.one[blockIdx.y];
  int first = 0, second = static_cast<int>(blockIdx.z);  // tiles, second <= first
  while (second > first) second -= ++first;
  first *= kTile, second *= kTile;
  const int size = whole_tiles(call.rank);
  if (first >= size) return;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp,
            lane = static_cast<int>(threadIdx.x) % cuda::kWarp, g = lane / 4, q = lane % 4;
  constexpr int kColumns = 4 * kChunk, kStep = kSplits * kGramWarps * kColumns;
  float sum[2][4] = {};
#pragma unroll 4
  for (int col = (static_cast<int>(blockIdx.x) * kGramWarps + warp) * kColumns + kChunk * q;
       col - kChunk * q < call.in; col += kStep) {
    const auto ranks = [&](int row) {
      return col < call.in && row < call.rank ? *reinterpret_cast<const uint4*>(call.a.at(row, col))
                                              : uint4{};
    };
    const uint4 x = ranks(first + g), y = ranks(first + g + 8);
    const uint4 u = second == first ? x : ranks(second + g),
                v = second == first ? y : ranks(second + g + 8);
    cuda::mma(sum[0], x.x, y.x, x.y, y.y, u.x, u.y);
    cuda::mma(sum[1], x.x, y.x, x.y, y.y, v.x, v.y);
    cuda::mma(sum[0], x.z, y.z, x.w, y.w, u.z, u.w);
    cuda::mma(sum[1], x.z, y.z, x.w, y.w, v.z, v.w);
  }
#pragma unroll
  for (int t = 0; t < 2; ++t)
    sums[warp][t][lane] = make_float4(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
  __syncthreads();
  static_assert(kGramWarps * cuda::kWarp == kTile * kTile);
  const int i = static_cast<int>(threadIdx.x) / kTile, j = static_cast<int>(threadIdx.x) % kTile;
  float total = 0;
  for (int w = 0; w < kGramWarps; ++w)
    total += reinterpret_cast<const float*>(
        &sums[w][j / 8][4 * (i % 8) + j % 8 / 2])[2 * (i / 8) + j % 2];
  float* gram = call.gram + static_cast<int>(blockIdx.x) * size * size;
  gram[(first + i) * size + second + j] = total;
  if (second != first) gram[(second + j) * size + first + i] = total;
}

/// grid (outputs / 256, calls): two neighbouring outputs a thread, B's ranks in registers, the gram
/// matrix's lower half in shared memory, what is beside its diagonal doubled.
constexpr int kScaleThreads = 128;
__global__ void __launch_bounds__(kScaleThreads)
    scale_tile_kernel(const __grid_constant__ Bf16Calls calls) {
  __shared__ __align__(16) float gram[kTile][kTile];
  const auto& call = calls.one[blockIdx.y];
  for (int at = static_cast<int>(threadIdx.x); at < kTile * kTile; at += kScaleThreads) {
    float sum = 0;
#pragma unroll
    for (int s = 0; s < kSplits; ++s) sum += call.gram[s * kTile * kTile + at];
    const int i = at / kTile, j = at % kTile;
    gram[i][j] = j < i ? 2 * sum : j == i ? sum : 0;
  }
  __syncthreads();
  const int o = 2 * static_cast<int>(blockIdx.x * kScaleThreads + threadIdx.x);
  if (o >= call.out) return;
  float b[2][kTile] = {}, cross[2] = {}, square[2] = {};
#pragma unroll
  for (int j = 0; j < kTile; j += kChunk)
    if (j < call.rank)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const Eight ranks = cuda::load8(call.b.at(o + t, j));
#pragma unroll
        for (int n = 0; n < kChunk; ++n) b[t][j + n] = ranks.v[n];
      }
#pragma unroll
  for (int j = 0; j < kTile; ++j)
    if (j < call.rank) {
      const unsigned pair = *reinterpret_cast<const unsigned*>(call.wa.at(j, o));
      cross[0] += b[0][j] * cuda::low(pair);
      cross[1] += b[1][j] * cuda::high(pair);
    }
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    float part[2] = {};
#pragma unroll
    for (int j = 0; j <= i; j += 4) {
      const float4 row = *reinterpret_cast<const float4*>(&gram[i][j]);
      const float four[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (j + n <= i)
#pragma unroll
          for (int t = 0; t < 2; ++t) part[t] += four[n] * b[t][j + n];
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) square[t] += part[t] * b[t][i];
  }
#pragma unroll
  for (int t = 0; t < 2; ++t) leave_scale(call, o + t, cross[t], square[t]);
}

/// grid (outputs / 128, calls): of more than a tile of ranks; a warp 16 outputs. B's ranks stay in
/// registers as the products' first factor; the gram matrix, in shared memory as two bf16 a number,
/// is its own transpose.
constexpr int kRanksWarps = 8;
int ranks_bytes(int rank) { return 2 * whole_tiles(rank) * (whole_tiles(rank) + 8) * 2; }
__global__ void __launch_bounds__(kRanksWarps* cuda::kWarp)
    scale_ranks_kernel(const __grid_constant__ Bf16Calls calls) {
  extern __shared__ unsigned planes[];  // the nearest bf16 of pairs of numbers, then what is left
  const auto& call = calls.one[blockIdx.y];
  const int size = whole_tiles(call.rank), words = (size + 8) / 2, left = size * words;
  for (int at = static_cast<int>(threadIdx.x); at < size * size / 2;
       at += kRanksWarps * cuda::kWarp) {
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int s = 0; s < kSplits; ++s) {
      const float2 part = reinterpret_cast<const float2*>(call.gram + s * size * size)[at];
      sum.x += part.x, sum.y += part.y;
    }
    const int to = at / (size / 2) * words + at % (size / 2);
    const uint2 two = cuda::in_two(sum.x, sum.y);
    planes[to] = two.x, planes[left + to] = two.y;
  }
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp,
            lane = static_cast<int>(threadIdx.x) % cuda::kWarp, g = lane / 4, q = lane % 4,
            first = (static_cast<int>(blockIdx.x) * kRanksWarps + warp) * 16;
  if (first >= call.out) return;
  Index o[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) o[h] = min(first + g + 8 * h, call.out - 1);
  unsigned b[kMostRanks / kTile][4];
  float cross[2] = {}, square[2] = {};
#pragma unroll
  for (int k = 0; k < kMostRanks / kTile; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 16 * k + i / 2 * 8 + 2 * q, h = i % 2;
      b[k][i] = 0;
      if (r >= call.rank) continue;
      b[k][i] = *reinterpret_cast<const unsigned*>(call.b.at(o[h], r));
      cross[h] += cuda::low(b[k][i]) * cuda::to_float(*call.wa.at(r, o[h])) +
                  cuda::high(b[k][i]) * cuda::to_float(*call.wa.at(r + 1, o[h]));
    }
#pragma unroll
  for (int n = 0; n < kMostRanks / 8; ++n) {
    if (8 * n >= call.rank) break;
    float part[4] = {};
    const unsigned* row = planes + (8 * n + g) * words + q;
#pragma unroll
    for (int k = 0; k < kMostRanks / kTile; ++k) {
      if (16 * k >= size) break;
      const unsigned* at = row + 8 * k;
      cuda::mma(part, b[k][0], b[k][1], b[k][2], b[k][3], at[0], at[4]);
      cuda::mma(part, b[k][0], b[k][1], b[k][2], b[k][3], at[left], at[left + 4]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const unsigned own = b[n / 2][h + n % 2 * 2];
      square[h] += part[2 * h] * cuda::low(own) + part[2 * h + 1] * cuda::high(own);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      cross[h] += __shfl_xor_sync(cuda::kAll, cross[h], step);
      square[h] += __shfl_xor_sync(cuda::kAll, square[h], step);
    }
    if (q == 0 && first + g + 8 * h < call.out) leave_scale(call, o[h], cross[h], square[h]);
  }
}

/// dora_magnitudes_backward's calls of one launch.
constexpr int kMagnitudes = 8;
struct Magnitudes {
  struct One {
    float *d_m, *d_scale;
    const float* inverse_norm;
    int count;
  };
  One one[kMagnitudes];
};

/// d_m += d_scale / n, d_scale = 0: 12 bytes read, 8 written a number.
__global__ void magnitudes_kernel(const __grid_constant__ Magnitudes all) {
  const auto& m = all.one[blockIdx.y];
  const auto step = static_cast<int>(gridDim.x * blockDim.x);
  for (auto i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < m.count; i += step) {
    m.d_m[i] += m.d_scale[i] * m.inverse_norm[i];
    m.d_scale[i] = 0;
  }
}

/// y = scale core: a row read, a row written.
template <class T> struct ScaleColumns {
  Rows<T> y;
  Rows<const T> core;
  const float* scale;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    Eight e = cuda::take<Aligned>(core.at(row, col), count);
    const Eight by = cuda::take<Aligned>(scale + col, count);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) e.v[i] *= by.v[i];
    cuda::put<Aligned>(y.at(row, col), e, count);
  }
};

/// d_core = scale d_y, and d_y core summed over a range of rows: two rows read, one written.
template <bool Aligned, class T>
__global__ void scale_backward_kernel(Rows<T> d_core, float* parts, Rows<const T> d_y,
                                      Rows<const T> core, const float* scale, Index rows,
                                      Index cols, Index length) {
  const Index col = (static_cast<Index>(blockIdx.y) * blockDim.x + threadIdx.x) * kChunk;
  if (col >= cols) return;
  const int count = cuda::chunk_at(col, cols);
  const Index begin = static_cast<Index>(blockIdx.x) * length, end = min(rows, begin + length);
  const Eight by = cuda::take<Aligned>(scale + col, count);
  Eight sum = {};
  cuda::Packed<T> next_g[kTogether], next_c[kTogether];
  const auto fetch = [&](Index row) {
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      next_g[t] = cuda::take_packed<Aligned>(d_y.at(min(row + t, end - 1), col), count);
      next_c[t] = cuda::take_packed<Aligned>(core.at(min(row + t, end - 1), col), count);
    }
  };
  fetch(begin);
  for (Index row = begin; row < end; row += kTogether) {
    cuda::Packed<T> now_g[kTogether], now_c[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) now_g[t] = next_g[t], now_c[t] = next_c[t];
    fetch(row + kTogether);
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
      if (row + t < end) {
        Eight g = cuda::unpacked(now_g[t]);
        const Eight c = cuda::unpacked(now_c[t]);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          sum.v[i] += g.v[i] * c.v[i];
          g.v[i] *= by.v[i];
        }
        cuda::put<Aligned>(d_core.at(row + t, col), g, count);
      }
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i < count) parts[blockIdx.x * cols + col + i] = sum.v[i];
}

/// The same behind rope, core being y turned back and over the scale: three rows read but for the
/// angles, one written. A thread has a chunk of each half of a head (Aligned; else one column of
/// each), so that a pair of rope's is in one thread.
constexpr int kTurnedTogether = 2;  // rows that a thread loads before it uses the first
template <bool Aligned, class T>
__global__ void __launch_bounds__(128, sizeof(T) == 2 ? 3 : 1)
    scale_rope_backward_kernel(Rows<T> d_core, float* parts, Rows<const T> d_y, Rows<const T> y,
                               const float* scale, Rows<const float> table, const std::int32_t* ids,
                               int half, int turned, Index rows, Index cols, Index length) {
  constexpr int kStep = Aligned ? kChunk : 1;
  const int pair = (static_cast<int>(blockIdx.y) * static_cast<int>(blockDim.x) +
                    static_cast<int>(threadIdx.x)) *
                   kStep;
  if (2 * pair >= cols) return;
  const int j = pair % half, col[2] = {2 * (pair - j) + j, 2 * (pair - j) + j + half};
  const bool turns = pair < turned;
  const Index begin = static_cast<Index>(blockIdx.x) * length, end = min(rows, begin + length);
  Eight by[2], sum[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) by[h] = cuda::take<Aligned>(scale + col[h], kStep);
  cuda::Packed<T> next_g[kTurnedTogether][2], next_y[kTurnedTogether][2];
  Index position[kTurnedTogether];
  const auto fetch = [&](Index row) {
#pragma unroll
    for (int t = 0; t < kTurnedTogether; ++t) {
      const Index at = min(row + t, end - 1);
      position[t] = ids[4 * at + 1];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        next_g[t][h] = cuda::take_packed<Aligned>(d_y.at(at, col[h]), kStep);
        next_y[t][h] = cuda::take_packed<Aligned>(y.at(at, col[h]), kStep);
      }
    }
  };
  fetch(begin);
  for (Index row = begin; row < end; row += kTurnedTogether) {
    cuda::Packed<T> now_g[kTurnedTogether][2], now_y[kTurnedTogether][2];
    const float* angles[kTurnedTogether];
#pragma unroll
    for (int t = 0; t < kTurnedTogether; ++t) {
      angles[t] = table.at(position[t], j);
#pragma unroll
      for (int h = 0; h < 2; ++h) now_g[t][h] = next_g[t][h], now_y[t][h] = next_y[t][h];
    }
    fetch(row + kTurnedTogether);
#pragma unroll
    for (int t = 0; t < kTurnedTogether; ++t) {
      if (row + t >= end) break;
      Eight g[2] = {cuda::unpacked(now_g[t][0]), cuda::unpacked(now_g[t][1])},
            core[2] = {cuda::unpacked(now_y[t][0]), cuda::unpacked(now_y[t][1])};
      if (turns) {
        const Eight c = cuda::take<Aligned>(angles[t], kStep),
                    s = cuda::take<Aligned>(angles[t] + half, kStep);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const float left = core[0].v[i], right = core[1].v[i];
          core[0].v[i] = left * c.v[i] + right * s.v[i];
          core[1].v[i] = right * c.v[i] - left * s.v[i];
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          sum[h].v[i] += g[h].v[i] * core[h].v[i];
          g[h].v[i] *= by[h].v[i];
        }
        cuda::put<Aligned>(d_core.at(row + t, col[h]), g[h], kStep);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < kStep; ++i)
      parts[blockIdx.x * cols + col[h] + i] = sum[h].v[i] / by[h].v[i];
}

}  // namespace

void CudaBackend::dora_scale(Tensor scale, Tensor inverse_norm, ConstTensor m,
                             ConstTensor w_squared, ConstTensor a, ConstTensor wa, ConstTensor b,
                             float s) {
  const DoraScale one{scale, inverse_norm, m, w_squared, a, wa, b, s};
  dora_scales({&one, 1});
}

void CudaBackend::dora_scales(std::span<const DoraScale> all) {
  const char* op = "dora_scales";
  for (; all.size() > kCalls; all = all.subspan(kCalls)) dora_scales(all.first(kCalls));
  if (all.empty()) return;
  Room r = room();
  cuda::with_type(all.front().a.dtype, [&](auto number) {
    using T = decltype(number);
    Calls<T> calls{};
    Index most_out = 0, most_rank = 0;
    bool rows_whole = true, factors_whole = true, tiles = std::is_same_v<T, __nv_bfloat16>;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const DoraScale& x = all[i];
      const Index rank = x.a.rows(), out = x.scale.numel(),
                  size = whole_tiles(static_cast<int>(rank));
      cuda::expect(x.wa.rows() == rank && x.wa.cols() == out && x.b.rows() == out &&
                       x.b.cols() == rank && x.inverse_norm.numel() == out && x.m.numel() == out &&
                       x.w_squared.numel() == out && x.scale.contiguous() &&
                       x.inverse_norm.contiguous() && x.m.contiguous() && x.w_squared.contiguous(),
                   op);
      calls.one[i] = {cuda::data<float>(x.scale),
                      cuda::data<float>(x.inverse_norm),
                      r.take<float>(kSplits * size * size),
                      cuda::data<float>(x.m),
                      cuda::data<float>(x.w_squared),
                      cuda::rows_of<T>(x.a),
                      cuda::rows_of<T>(x.wa),
                      cuda::rows_of<T>(x.b),
                      static_cast<int>(out),
                      static_cast<int>(x.a.cols()),
                      static_cast<int>(rank),
                      x.s};
      most_out = std::max(most_out, out);
      most_rank = std::max(most_rank, rank);
      rows_whole = rows_whole && cuda::aligned(x.a);
      factors_whole = factors_whole && rank % kChunk == 0 && cuda::aligned(x.b);
      tiles = tiles && rank <= kMostRanks && cuda::aligned(x.wa);
    }
    if (most_out == 0 || most_rank == 0) return;
    const auto count = static_cast<unsigned>(all.size()), rank = static_cast<unsigned>(most_rank);
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      if (tiles && rows_whole && factors_whole) {
        const unsigned across = cuda::ceil_div(rank, unsigned{kTile});
        gram_tile_kernel<<<dim3(kSplits, count, across * (across + 1) / 2),
                           kGramWarps * cuda::kWarp, 0, stream_>>>(calls);
        cuda::launched(op);
        const auto blocks_of = [&](Index outputs) {
          return dim3(static_cast<unsigned>(cuda::ceil_div(most_out, outputs)), count);
        };
        if (most_rank <= kTile) {
          scale_tile_kernel<<<blocks_of(2 * kScaleThreads), kScaleThreads, 0, stream_>>>(calls);
        } else {
          cuda::admit_shared(reinterpret_cast<const void*>(scale_ranks_kernel),
                             ranks_bytes(kMostRanks));
          scale_ranks_kernel<<<blocks_of(kRanksWarps * 16), kRanksWarps * cuda::kWarp,
                               static_cast<std::size_t>(ranks_bytes(static_cast<int>(rank))),
                               stream_>>>(calls);
        }
        cuda::launched(op);
        return;
      }
    const auto gram = rows_whole ? gram_kernel<true, T> : gram_kernel<false, T>;
    gram<<<dim3(rank, rank, count), 256, 0, stream_>>>(calls);
    cuda::launched(op);
    constexpr Index kThreads = 128;
    const auto scale = factors_whole ? dora_scale_kernel<true, T> : dora_scale_kernel<false, T>;
    scale<<<dim3(static_cast<unsigned>(cuda::ceil_div(most_out, kThreads)), count), kThreads, 0,
            stream_>>>(calls);
    cuda::launched(op);
  });
}

void CudaBackend::dora_magnitudes_backward(std::span<const DoraMagnitude> all) {
  const char* op = "dora_magnitudes_backward";
  for (; all.size() > kMagnitudes; all = all.subspan(kMagnitudes))
    dora_magnitudes_backward(all.first(kMagnitudes));
  Magnitudes m{};
  Index most = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const DoraMagnitude& x = all[i];
    const Index count = x.d_m.numel();
    cuda::expect(x.d_scale.numel() == count && x.inverse_norm.numel() == count &&
                     count < (Index{1} << 30) && x.d_m.contiguous() && x.d_scale.contiguous() &&
                     x.inverse_norm.contiguous(),
                 op);
    m.one[i] = {cuda::data<float>(x.d_m), cuda::data<float>(x.d_scale),
                cuda::data<float>(x.inverse_norm), static_cast<int>(count)};
    most = std::max(most, count);
  }
  if (most == 0) return;
  constexpr Index kThreads = 256, kMostBlocks = 1024;
  const dim3 blocks(static_cast<unsigned>(std::min(kMostBlocks, cuda::ceil_div(most, kThreads))),
                    static_cast<unsigned>(all.size()));
  magnitudes_kernel<<<blocks, kThreads, 0, stream_>>>(m);
  cuda::launched(op);
}

void CudaBackend::scale_columns(Tensor y, ConstTensor core, ConstTensor scale) {
  cuda::expect_same(y, core, "scale_columns");
  cuda::expect(scale.numel() == y.cols() && scale.contiguous(), "scale_columns");
  cuda::with_type(y.dtype, [&](auto number) {
    using T = decltype(number);
    cuda::each_chunk(
        stream_, "scale_columns", y.rows(), y.cols(), cuda::aligned(y, core, scale),
        ScaleColumns<T>{cuda::rows_of<T>(y), cuda::rows_of<T>(core), cuda::data<float>(scale)});
  });
}

void CudaBackend::scale_columns_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y,
                                         ConstTensor core, ConstTensor scale) {
  const char* op = "scale_columns_backward";
  const Index rows = core.rows(), cols = core.cols();
  cuda::expect_same(d_core, core, op);
  cuda::expect_same(d_y, core, op);
  cuda::expect(scale.numel() == cols && scale.contiguous() && d_scale.numel() == cols &&
                   d_scale.contiguous(),
               op);
  if (rows == 0) return;
  const cuda::Parts parts = cuda::parts_of(rows, cols);
  const unsigned threads = cuda::column_threads(cols);
  const dim3 blocks(static_cast<unsigned>(parts.count),
                    static_cast<unsigned>(cuda::ceil_div<Index>(cols, threads * kChunk)));
  auto* sums = room().take<float>(parts.count * cols);
  cuda::with_type(core.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      kernel<<<blocks, threads, 0, stream_>>>(cuda::rows_of<T>(d_core), sums, cuda::rows_of<T>(d_y),
                                              cuda::rows_of<T>(core), cuda::data<float>(scale),
                                              rows, cols, parts.length);
    };
    if (cuda::aligned(d_core, d_y, core, scale))
      run(scale_backward_kernel<true, T>);
    else
      run(scale_backward_kernel<false, T>);
  });
  cuda::launched(op);
  cuda::add_partials(stream_, op, cuda::data<float>(d_scale), sums, parts.count, cols);
}

void CudaBackend::scale_rope_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y, ConstTensor y,
                                      ConstTensor scale, ConstTensor table, RowIds ids, Heads h) {
  const char* op = "scale_rope_backward";
  const Index rows = y.rows(), cols = y.cols(), half = h.head_dim / 2;
  cuda::expect_same(d_core, y, op);
  cuda::expect_same(d_y, y, op);
  cuda::expect(cols == (h.heads + 2 * h.kv_heads) * h.head_dim && h.head_dim % 2 == 0 &&
                   table.cols() == h.head_dim && ids.rows() == rows && ids.cols() == 4 &&
                   ids.contiguous() && scale.numel() == cols && scale.contiguous() &&
                   d_scale.numel() == cols && d_scale.contiguous(),
               op);
  if (rows == 0) return;
  const bool whole = half % kChunk == 0 && cuda::aligned(d_core, d_y, y, scale, table);
  // Ranges of rows that make one round of blocks at the widths of large models, for their sums'
  // sake.
  constexpr Index kMostRanges = 64;
  const Index length = std::max<Index>(16, cuda::ceil_div(rows, kMostRanges)),
              ranges = cuda::ceil_div(rows, length);
  const Index units = cols / 2 / (whole ? kChunk : 1);
  constexpr Index kThreads = 128;
  const dim3 blocks(static_cast<unsigned>(ranges),
                    static_cast<unsigned>(cuda::ceil_div(units, kThreads)));
  auto* sums = room().take<float>(ranges * cols);
  cuda::with_type(y.dtype, [&](auto number) {
    using T = decltype(number);
    const auto kernel =
        whole ? scale_rope_backward_kernel<true, T> : scale_rope_backward_kernel<false, T>;
    kernel<<<blocks, kThreads, 0, stream_>>>(
        cuda::rows_of<T>(d_core), sums, cuda::rows_of<T>(d_y), cuda::rows_of<T>(y),
        cuda::data<float>(scale), cuda::rows_of<float>(table), ids.ptr<std::int32_t>(),
        static_cast<int>(half), static_cast<int>((h.heads + h.kv_heads) * half), rows, cols,
        length);
  });
  cuda::launched(op);
  cuda::add_partials(stream_, op, cuda::data<float>(d_scale), sums, ranges, cols);
}

}  // namespace mixlora
