// RMSNorm with a low-rank update of its input added before it.
#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/low_rank.cuh"

namespace mixlora {
namespace {

using cuda::Index;
using cuda::kWarp;
using cuda::Update;
using Number = __nv_bfloat16;

constexpr int kRows = cuda::kUpdateRows, kWarps = cuda::kUpdateWarps;
constexpr int kOwn = 8, kTile = 8 * kOwn;  // columns of a lane; that a warp takes at a time

/// Eight rows that wait in shared memory, and behind them a tile of B for each warp.
__host__ __device__ constexpr int waiting_bytes(int cols) {
  return cuda::ceil_div(cols, kWarps * kTile) * kWarps * kTile * kRows * 2;
}
template <int C> constexpr int kTileBytes = C* cuda::kUpdateTile<kOwn>;

struct NormCall {
  Number *sum, *y;
  const Number* x;
  Number* delta;
  Index stride_sum, stride_y, stride_x, stride_delta;
  const float* w;
  float* r;
  int rows, cols;
  float eps;
  Update update;
};

/// grid (rows / 8): sum = x + delta + a B^T, y = sum r w. Two rows read, two written; the sums wait
/// in shared memory, each lane's own. Scaled: delta += a B^T is written too, and sum = x + scale
/// delta.
template <int C, bool Scaled>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    norm_kernel(const __grid_constant__ NormCall m) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ float squares[kWarps][kRows];
  auto* kept = reinterpret_cast<uint4*>(memory);
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int row0 = static_cast<int>(blockIdx.x) * kRows;
  const auto row_of = [&](int i) { return static_cast<Index>(min(row0 + i, m.rows - 1)); };
  const Index rows[2] = {row_of(2 * q), row_of(2 * q + 1)};
  const bool live[2] = {row0 + 2 * q < m.rows, row0 + 2 * q + 1 < m.rows};
  const std::uint32_t tile =
      cuda::shared_address(memory) +
      static_cast<std::uint32_t>(waiting_bytes(m.cols) + warp * kTileBytes<C>);
  const auto fetch = [&](int from) {  // from: a tile's first column
    if (from < m.cols)
      cuda::fetch_update<kOwn, C>(tile, m.update.b + static_cast<Index>(from) * m.update.rank,
                                  m.update.rank, lane, kWarp);
    cuda::fetch_commit();
  };
  fetch(warp * kTile);
  uint2 a[C];
#pragma unroll
  for (int c = 0; c < C; ++c) a[c] = m.update.ranks(row_of(g), c, q);

  unsigned x[2][4], delta[2][4];
  const auto load = [&](int col) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      cuda::load_words<8>(x[i], m.x + rows[i] * m.stride_x + col);
      cuda::load_words<8>(delta[i], m.delta + rows[i] * m.stride_delta + col);
    }
  };
  const int first = warp * kTile + 8 * g, step = kWarps * kTile;
  if (first < m.cols) load(first);
  float own[2] = {};
  for (int col = first, at = threadIdx.x; col < m.cols; col += step, at += 2 * kWarps * kWarp) {
    float sums[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[j][i] = Scaled ? cuda::low(delta[i][j]) : cuda::low(x[i][j]) + cuda::low(delta[i][j]);
        sums[j][2 + i] =
            Scaled ? cuda::high(delta[i][j]) : cuda::high(x[i][j]) + cuda::high(delta[i][j]);
      }
    unsigned own_x[2][4];
    if (Scaled)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) own_x[i][j] = x[i][j];
    if (col + step < m.cols) load(col + step);
    cuda::fetch_wait<0>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) cuda::add_update<kOwn, C>(sums[j], tile, a, j, lane);
    __syncwarp();
    fetch(col - 8 * g + step);
    if (Scaled) {
      const cuda::Eight by = cuda::load8(m.update.scale + col);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unsigned words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          words[j] = cuda::pack2(sums[j][i], sums[j][2 + i]);
          sums[j][i] = cuda::low(own_x[i][j]) + by.v[2 * j] * sums[j][i];
          sums[j][2 + i] = cuda::high(own_x[i][j]) + by.v[2 * j + 1] * sums[j][2 + i];
        }
        if (live[i]) cuda::store_words<8>(m.delta + rows[i] * m.stride_delta + col, words);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = cuda::pack2(sums[j][i], sums[j][2 + i]);
        const float low = cuda::low(words[j]), high = cuda::high(words[j]);
        own[i] += low * low + high * high;  // as it is stored, so that rmsnorm(sum) gives the same
      }
      kept[at + i * kWarps * kWarp] = make_uint4(words[0], words[1], words[2], words[3]);
      if (live[i]) cuda::store_words<8>(m.sum + rows[i] * m.stride_sum + col, words);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int apart = 4; apart < kWarp; apart *= 2)
      own[i] += __shfl_xor_sync(cuda::kAll, own[i], apart);
    if (g == 0) squares[warp][2 * q + i] = own[i];
  }
  __syncthreads();
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += squares[w][2 * q + i];
    inverse[i] = 1.0F / sqrtf(sum / static_cast<float>(m.cols) + m.eps);
    if (warp == 0 && g == 0 && live[i]) m.r[rows[i]] = inverse[i];
  }
  for (int col = first, at = threadIdx.x; col < m.cols; col += step, at += 2 * kWarps * kWarp) {
    const cuda::Eight w = cuda::load8(m.w + col);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 raw = kept[at + i * kWarps * kWarp];
      const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
      unsigned out[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        out[j] = cuda::pack2(cuda::low(words[j]) * (inverse[i] * w.v[2 * j]),
                             cuda::high(words[j]) * (inverse[i] * w.v[2 * j + 1]));
      if (live[i]) cuda::store_words<8>(m.y + rows[i] * m.stride_y + col, out);
    }
  }
}

int shared_bytes(Index cols, int chunks) {
  return waiting_bytes(static_cast<int>(cols)) +
         kWarps * chunks * static_cast<int>(cuda::kUpdateTile<kOwn>);
}
/// What a block may ask for beside its kernel's own sums of a row.
int most_dynamic() { return cuda::most_shared() - 1024; }
/// Whether rows of `cols` numbers fit beside B of `rank` ranks.
bool fits(Index cols, Index rank) {
  return cols % kTile == 0 && cols < (1 << 16) &&
         shared_bytes(cols, static_cast<int>(cuda::ceil_div<Index>(rank, 16))) <= most_dynamic();
}
template <class Call>
void launch(void (*kernel)(Call), int chunks, const char* name, const Call& m,
            cudaStream_t stream) {
  cuda::admit_shared(reinterpret_cast<const void*>(kernel), most_dynamic());
  kernel<<<static_cast<unsigned>(cuda::ceil_div(m.rows, kRows)), kWarps * kWarp,
           static_cast<std::size_t>(shared_bytes(m.cols, chunks)), stream>>>(m);
  cuda::launched(name);
}

}  // namespace

void CudaBackend::add_lora_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                   const LowRank& update, ConstTensor w, float eps) {
  const auto even = [&x](const auto& t) {
    return t.dtype == DType::bf16 && cuda::by_eights(t) && t.rows() == x.rows() &&
           t.cols() == x.cols();
  };
  if (!update.a || !cuda::takes_update(update, x.rows(), x.cols()) ||
      !fits(x.cols(), update.a.cols()) || !even(x) || !even(delta) || !even(sum) || !even(y) ||
      !cuda::by_eights(w) || w.numel() != x.cols() || r.numel() != x.rows() || !r.contiguous() ||
      x.rows() >= (Index{1} << 24))
    return Backend::add_lora_rmsnorm(sum, y, r, x, delta, update, w, eps);
  if (x.rows() == 0) return;
  const NormCall m{cuda::data<Number>(sum),
                   cuda::data<Number>(y),
                   cuda::data<Number>(x),
                   cuda::data<Number>(delta),
                   sum.stride,
                   y.stride,
                   x.stride,
                   delta.stride,
                   cuda::data<float>(w),
                   cuda::data<float>(r),
                   static_cast<int>(x.rows()),
                   static_cast<int>(x.cols()),
                   eps,
                   cuda::update_of(update)};
  cuda::with_rank_chunks(update.a.cols(), [&](auto chunks) {
    launch(update.scale ? norm_kernel<chunks(), true> : norm_kernel<chunks(), false>, chunks(),
           "add_lora_rmsnorm", m, stream_);
  });
}

}  // namespace mixlora
