// DoRA: the norm of the adapted rows, and magnitudes as a scale of columns.
#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::kChunk;
using cuda::kTogether;
using cuda::Rows;

/// dora_scale's calls of one launch, as kernels see them; their gram matrices lie end to end.
constexpr int kCalls = 24;
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
  const float squared = call.w_squared[o] + 2 * call.s * cross + call.s * call.s * square;
  const float inverse = squared > 0 ? 1 / sqrtf(squared) : 0;
  call.inverse_norm[o] = inverse;
  call.scale[o] = call.m[o] * inverse;
}

/// d_m += d_scale / n: 12 bytes read, 4 written a number.
struct MagnitudeBackward {
  float* d_m;
  const float *d_scale, *inverse_norm;
  template <bool Aligned> __device__ void at(Index /*row*/, Index at, int count) const {
    Eight sum = cuda::take<Aligned>(d_m + at, count);
    const Eight d = cuda::take<Aligned>(d_scale + at, count),
                inverse = cuda::take<Aligned>(inverse_norm + at, count);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum.v[i] += d.v[i] * inverse.v[i];
    cuda::put<Aligned>(d_m + at, sum, count);
  }
};

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
    bool rows_whole = true, factors_whole = true;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const DoraScale& x = all[i];
      const Index rank = x.a.rows(), out = x.scale.numel();
      cuda::expect(x.wa.rows() == rank && x.wa.cols() == out && x.b.rows() == out &&
                       x.b.cols() == rank && x.inverse_norm.numel() == out && x.m.numel() == out &&
                       x.w_squared.numel() == out && x.scale.contiguous() &&
                       x.inverse_norm.contiguous() && x.m.contiguous() && x.w_squared.contiguous(),
                   op);
      calls.one[i] = {cuda::data<float>(x.scale),     cuda::data<float>(x.inverse_norm),
                      r.take<float>(rank * rank),     cuda::data<float>(x.m),
                      cuda::data<float>(x.w_squared), cuda::rows_of<T>(x.a),
                      cuda::rows_of<T>(x.wa),         cuda::rows_of<T>(x.b),
                      static_cast<int>(out),          static_cast<int>(x.a.cols()),
                      static_cast<int>(rank),         x.s};
      most_out = std::max(most_out, out);
      most_rank = std::max(most_rank, rank);
      rows_whole = rows_whole && cuda::aligned(x.a);
      factors_whole = factors_whole && rank % kChunk == 0 && cuda::aligned(x.b);
    }
    if (most_out == 0 || most_rank == 0) return;
    const auto count = static_cast<unsigned>(all.size()), rank = static_cast<unsigned>(most_rank);
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

void CudaBackend::dora_magnitude_backward(Tensor d_m, ConstTensor d_scale,
                                          ConstTensor inverse_norm) {
  const Index count = d_m.numel();
  cuda::expect(d_scale.numel() == count && inverse_norm.numel() == count && d_m.contiguous() &&
                   d_scale.contiguous() && inverse_norm.contiguous(),
               "dora_magnitude_backward");
  const bool whole = cuda::aligned(d_m.reshaped({count}), d_scale.reshaped({count}),
                                   inverse_norm.reshaped({count}));
  cuda::each_chunk(stream_, "dora_magnitude_backward", 1, count, whole,
                   MagnitudeBackward{cuda::data<float>(d_m), cuda::data<float>(d_scale),
                                     cuda::data<float>(inverse_norm)});
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

}  // namespace mixlora
