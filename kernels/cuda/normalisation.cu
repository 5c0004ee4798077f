// RMSNorm: one block a row, the row in registers between its sum and its use.
#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::kChunk;
using cuda::Rows;

constexpr int kKept = 2;    // chunks of a row that a thread keeps; wider rows are read twice
constexpr int kMost = 512;  // threads of a block: 128 registers each

/// [sum = x + delta,] y = sum r w: a row read (two with delta), one written (two). Each block walks
/// rows and holds its columns of w.
template <bool Aligned, bool Add, class T>
__global__ void __launch_bounds__(kMost)
    rmsnorm_kernel(Rows<T> y, float* r, Rows<const T> x, Rows<const T> delta, Rows<T> sum,
                   const float* w, Index rows, Index cols, float eps) {
  __shared__ float shared[2][cuda::kWarp];
  const Index first = static_cast<Index>(threadIdx.x) * kChunk,
              step = static_cast<Index>(blockDim.x) * kChunk;
  const auto count = [&](Index col) { return cuda::chunk_at(col, cols); };
  Eight weight[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    if (const Index col = first + i * step; col < cols)
      weight[i] = cuda::take<Aligned>(w + col, count(col));
  int turn = 0;
  for (Index row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    float squares = 0;
    const auto read = [&](Index col) {
      Eight e = cuda::take<Aligned>(x.at(row, col), count(col));
      if (Add) {
        const Eight d = cuda::take<Aligned>(delta.at(row, col), count(col));
#pragma unroll
        for (int j = 0; j < kChunk; ++j)  // as it is stored, so that rmsnorm(sum) gives the same y
          e.v[j] = cuda::to_float(cuda::from_float<T>(e.v[j] + d.v[j]));
        cuda::put<Aligned>(sum.at(row, col), e, count(col));
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) squares += e.v[j] * e.v[j];
      return e;
    };
    Eight own[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (const Index col = first + i * step; col < cols) own[i] = read(col);
    for (Index col = first + kKept * step; col < cols; col += step) read(col);

    const float mean = cuda::block_sum(squares, shared[turn]) / static_cast<float>(cols);
    const float inverse = 1.0F / sqrtf(mean + eps);
    if (threadIdx.x == 0) r[row] = inverse;
    const auto write = [&](Index col, Eight e, const Eight& scale) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) e.v[j] *= inverse * scale.v[j];
      cuda::put<Aligned>(y.at(row, col), e, count(col));
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (const Index col = first + i * step; col < cols) write(col, own[i], weight[i]);
    for (Index col = first + kKept * step; col < cols; col += step)
      write(col, cuda::take<Aligned>(Add ? sum.at(row, col) : x.at(row, col), count(col)),
            cuda::take<Aligned>(w + col, count(col)));
  }
}

constexpr int kResident = 1024;  // threads a processor that the backward kernel's registers admit

/// d_x += r w d_y - x r^3 mean(x w d_y): three rows read, one written. What a row's sum needs again
/// stays packed and w stays in L1, so that twice as many rows are on their way.
template <bool Aligned, class T>
__global__ void __launch_bounds__(kMost, sizeof(T) == 2 ? kResident / kMost : 1)
    rmsnorm_backward_kernel(Rows<T> d_x, Rows<const T> d_y, Rows<const T> x, const float* w,
                            const float* r, int rows, int cols) {
  __shared__ float shared[2][cuda::kWarp];
  const int first = static_cast<int>(threadIdx.x) * kChunk,
            step = static_cast<int>(blockDim.x) * kChunk;
  const auto count = [&](int col) { return cuda::chunk_at(col, cols); };
  const auto weight = [&](int col) { return cuda::take<Aligned>(w + col, count(col)); };
  int turn = 0;
  for (int row = static_cast<int>(blockIdx.x); row < rows;
       row += static_cast<int>(gridDim.x), turn ^= 1) {
    const auto dot = [](const Eight& a, const Eight& b, const Eight& scale) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sum += a.v[j] * (b.v[j] * scale.v[j]);
      return sum;
    };
    cuda::Packed<T> own[kKept], g[kKept], old[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (const int col = first + i * step; col < cols) {
        own[i] = cuda::take_packed<Aligned>(x.at(row, col), count(col));
        g[i] = cuda::take_packed<Aligned>(d_y.at(row, col), count(col));
        old[i] = cuda::take_packed<Aligned>(d_x.at(row, col), count(col));
      }
    const float inverse = r[row];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (const int col = first + i * step; col < cols)
        sum += dot(cuda::unpacked(own[i]), cuda::unpacked(g[i]), weight(col));
    for (int col = first + kKept * step; col < cols; col += step)
      sum += dot(cuda::take<Aligned>(x.at(row, col), count(col)),
                 cuda::take<Aligned>(d_y.at(row, col), count(col)), weight(col));

    const float k =
        inverse * inverse * inverse * cuda::block_sum(sum, shared[turn]) / static_cast<float>(cols);
    const auto write = [&](int col, Eight to, const Eight& from, const Eight& slope,
                           const Eight& scale) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        to.v[j] += inverse * (slope.v[j] * scale.v[j]) - from.v[j] * k;
      cuda::put<Aligned>(d_x.at(row, col), to, count(col));
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (const int col = first + i * step; col < cols)
        write(col, cuda::unpacked(old[i]), cuda::unpacked(own[i]), cuda::unpacked(g[i]),
              weight(col));
    for (int col = first + kKept * step; col < cols; col += step)
      write(col, cuda::take<Aligned>(d_x.at(row, col), count(col)),
            cuda::take<Aligned>(x.at(row, col), count(col)),
            cuda::take<Aligned>(d_y.at(row, col), count(col)), weight(col));
  }
}

/// y = x r w, in rmsnorm's order.
template <class T> struct Again {
  Rows<T> y;
  Rows<const T> x;
  const float *w, *r;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    Eight e = cuda::take<Aligned>(x.at(row, col), count);
    const Eight scale = cuda::take<Aligned>(w + col, count);
    const float inverse = r[row];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) e.v[i] *= inverse * scale.v[i];
    cuda::put<Aligned>(y.at(row, col), e, count);
  }
};

/// Threads for rows of `cols` numbers, and as many blocks as the device runs at once.
struct Grid {
  unsigned blocks, threads;
};
Grid grid_of(Index rows, Index cols, int processors, int resident = 2048) {
  const Index threads = std::clamp<Index>(
      cuda::ceil_div<Index>(cols, kKept * kChunk * cuda::kWarp) * cuda::kWarp, cuda::kWarp, kMost);
  return {static_cast<unsigned>(std::min<Index>(rows, processors * (resident / threads))),
          static_cast<unsigned>(threads)};
}

template <bool Add>
void norm(cudaStream_t stream, int processors, const char* op, Tensor sum, Tensor y, Tensor r,
          ConstTensor x, ConstTensor delta, ConstTensor w, float eps) {
  cuda::expect_same(y, x, op);
  if (Add) {
    cuda::expect_same(sum, x, op);
    cuda::expect_same(delta, x, op);
  }
  cuda::expect(w.numel() == x.cols() && r.numel() == x.rows() && r.contiguous(), op);
  if (x.numel() == 0) return;
  const Grid g = grid_of(x.rows(), x.cols(), processors);
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      kernel<<<g.blocks, g.threads, 0, stream>>>(
          cuda::rows_of<T>(y), cuda::data<float>(r), cuda::rows_of<T>(x), cuda::rows_of<T>(delta),
          cuda::rows_of<T>(sum), cuda::data<float>(w), x.rows(), x.cols(), eps);
    };
    if (cuda::aligned(y, x, delta, sum, w))
      run(rmsnorm_kernel<true, Add, T>);
    else
      run(rmsnorm_kernel<false, Add, T>);
  });
  cuda::launched(op);
}

}  // namespace

void CudaBackend::rmsnorm(Tensor y, Tensor r, ConstTensor x, ConstTensor w, float eps) {
  norm<false>(stream_, processors_, "rmsnorm", {}, y, r, x, {}, w, eps);
}
void CudaBackend::rmsnorm_again(Tensor y, ConstTensor x, ConstTensor w, ConstTensor r) {
  cuda::expect_same(y, x, "rmsnorm_again");
  cuda::expect(w.numel() == x.cols() && r.numel() == x.rows() && r.contiguous(), "rmsnorm_again");
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    cuda::each_chunk(stream_, "rmsnorm_again", x.rows(), x.cols(), cuda::aligned(y, x, w),
                     Again<T>{cuda::rows_of<T>(y), cuda::rows_of<T>(x), cuda::data<float>(w),
                              cuda::data<float>(r)});
  });
}
void CudaBackend::add_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, ConstTensor delta,
                              ConstTensor w, float eps) {
  norm<true>(stream_, processors_, "add_rmsnorm", sum, y, r, x, delta, w, eps);
}
void CudaBackend::rmsnorm_backward(Tensor d_x, ConstTensor d_y, ConstTensor x, ConstTensor w,
                                   ConstTensor r) {
  cuda::expect_same(d_x, x, "rmsnorm_backward");
  cuda::expect_same(d_y, x, "rmsnorm_backward");
  cuda::expect(w.numel() == x.cols() && r.numel() == x.rows() && r.contiguous(),
               "rmsnorm_backward");
  if (x.numel() == 0) return;
  const Grid g = grid_of(x.rows(), x.cols(), processors_, kResident);
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      kernel<<<g.blocks, g.threads, 0, stream_>>>(
          cuda::rows_of<T>(d_x), cuda::rows_of<T>(d_y), cuda::rows_of<T>(x), cuda::data<float>(w),
          cuda::data<float>(r), static_cast<int>(x.rows()), static_cast<int>(x.cols()));
    };
    if (cuda::aligned(d_x, d_y, x, w))
      run(rmsnorm_backward_kernel<true, T>);
    else
      run(rmsnorm_backward_kernel<false, T>);
  });
  cuda::launched("rmsnorm_backward");
}

}  // namespace mixlora
