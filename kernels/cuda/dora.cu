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

/// gram = A A^T, one block a pair of rows: R (R + 1) rows of A read, from L2 but for the first
/// time.
template <bool Aligned, class T>
__global__ void gram_kernel(float* gram, Rows<const T> a, Index cols) {
  __shared__ float shared[cuda::kWarp];
  const unsigned i = blockIdx.x, j = blockIdx.y, rank = gridDim.x;
  if (j > i) return;
  float sum = 0;
  for (Index col = static_cast<Index>(threadIdx.x) * kChunk; col < cols;
       col += static_cast<Index>(blockDim.x) * kChunk) {
    const int count = cuda::chunk_at(col, cols);
    const Eight x = cuda::take<Aligned>(a.at(i, col), count),
                y = cuda::take<Aligned>(a.at(j, col), count);
#pragma unroll
    for (int n = 0; n < kChunk; ++n) sum += x.v[n] * y.v[n];
  }
  sum = cuda::block_sum(sum, shared);
  if (threadIdx.x == 0) gram[i * rank + j] = gram[j * rank + i] = sum;
}

/// One warp an output: 2 R numbers read, the gram matrix from L1.
template <class T>
__global__ void dora_scale_kernel(float* scale, float* inverse_norm, const float* m,
                                  const float* w_squared, Rows<const T> wa, Rows<const T> b,
                                  const float* gram, float s, Index out, int rank) {
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const Index o = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) / cuda::kWarp;
  if (o >= out) return;
  float sum = 0;
  for (int i = lane; i < rank; i += cuda::kWarp) {
    float part = 0;
    for (int j = 0; j < rank; ++j) part += gram[j * rank + i] * cuda::to_float(*b.at(o, j));
    sum += cuda::to_float(*b.at(o, i)) * (2 * s * cuda::to_float(*wa.at(i, o)) + s * s * part);
  }
  const float squared = w_squared[o] + cuda::warp_sum(sum);
  if (lane != 0) return;
  const float inverse = squared > 0 ? 1 / sqrtf(squared) : 0;
  inverse_norm[o] = inverse;
  scale[o] = m[o] * inverse;
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
  for (Index row = begin; row < end; row += kTogether) {
    Eight g[kTogether], c[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
      if (row + t < end) {
        g[t] = cuda::take<Aligned>(d_y.at(row + t, col), count);
        c[t] = cuda::take<Aligned>(core.at(row + t, col), count);
      }
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
      if (row + t < end) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          sum.v[i] += g[t].v[i] * c[t].v[i];
          g[t].v[i] *= by.v[i];
        }
        cuda::put<Aligned>(d_core.at(row + t, col), g[t], count);
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
  const char* op = "dora_scale";
  const Index rank = a.rows(), out = scale.numel();
  cuda::expect(wa.rows() == rank && wa.cols() == out && b.rows() == out && b.cols() == rank &&
                   inverse_norm.numel() == out && m.numel() == out && w_squared.numel() == out &&
                   scale.contiguous() && inverse_norm.contiguous() && m.contiguous() &&
                   w_squared.contiguous() && wa.dtype == b.dtype,
               op);
  if (out == 0 || rank == 0) return;
  auto* gram = room().take<float>(rank * rank);
  cuda::with_type(a.dtype, [&](auto number) {
    using T = decltype(number);
    const dim3 pairs(static_cast<unsigned>(rank), static_cast<unsigned>(rank));
    if (cuda::aligned(a))
      gram_kernel<true, T><<<pairs, 256, 0, stream_>>>(gram, cuda::rows_of<T>(a), a.cols());
    else
      gram_kernel<false, T><<<pairs, 256, 0, stream_>>>(gram, cuda::rows_of<T>(a), a.cols());
  });
  cuda::launched(op);
  cuda::with_type(b.dtype, [&](auto number) {
    using T = decltype(number);
    dora_scale_kernel<<<static_cast<unsigned>(cuda::ceil_div<Index>(out, 8)), 8 * cuda::kWarp, 0,
                        stream_>>>(cuda::data<float>(scale), cuda::data<float>(inverse_norm),
                                   cuda::data<float>(m), cuda::data<float>(w_squared),
                                   cuda::rows_of<T>(wa), cuda::rows_of<T>(b), gram, s, out,
                                   static_cast<int>(rank));
  });
  cuda::launched(op);
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
