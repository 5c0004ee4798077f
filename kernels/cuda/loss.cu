// The loss at the vocabulary, log-probabilities, and sums of flat numbers.
#include <cmath>

#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::kChunk;
using cuda::Rows;

constexpr float kLog2E = 1.4426950408889634F;
constexpr int kLossThreads = 1024;

struct Softmax {
  float top, sum;  // the largest; sum of exp(x - top)
};
/// Of one row by one block, the row read once.
template <bool Aligned, class T> __device__ Softmax softmax_of(const T* x, Index cols) {
  __shared__ float shared[2][cuda::kWarp];
  float top = -INFINITY, sum = 0;
  for (Index col = static_cast<Index>(threadIdx.x) * kChunk; col < cols;
       col += static_cast<Index>(blockDim.x) * kChunk) {
    const int count = cuda::chunk_at(col, cols);
    const Eight e = cuda::take<Aligned>(x + col, count);
    float next = top, part = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < count) next = fmaxf(next, e.v[i]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < count) part += exp2f((e.v[i] - next) * kLog2E);
    sum = sum * exp2f((top - next) * kLog2E) + part;
    top = next;
  }
  const float of_all = cuda::block_max(top, shared[0]);
  return {of_all, cuda::block_sum(sum * exp2f((top - of_all) * kLog2E), shared[1])};
}

/// One block a row: the row read twice (the second time mostly from L2) and written once.
template <bool Aligned, class T>
__global__ void __launch_bounds__(kLossThreads, 2)
    cross_entropy_kernel(float* loss, Rows<T> logits, const std::int32_t* target,
                         const float* weight, Index cols) {
  const Index row = blockIdx.x;
  T* x = logits.at(row, 0);
  const Index t = target[row];
  const float own = cuda::to_float(x[t]), w = weight[row];
  const Softmax s = softmax_of<Aligned>(x, cols);
  if (threadIdx.x == 0) loss[row] = w * (logf(s.sum) - (own - s.top));
  const float factor = w / s.sum;
  for (Index col = static_cast<Index>(threadIdx.x) * kChunk; col < cols;
       col += static_cast<Index>(blockDim.x) * kChunk) {
    const int count = cuda::chunk_at(col, cols);
    Eight e = cuda::take<Aligned>(x + col, count);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      e.v[i] = factor * exp2f((e.v[i] - s.top) * kLog2E) - (col + i == t ? w : 0.0F);
    cuda::put<Aligned>(x + col, e, count);
  }
}

/// One block a row: the row read once, and up to the target again where that is the largest.
template <bool Aligned, class T>
__global__ void __launch_bounds__(kLossThreads, 2)
    log_prob_kernel(float* log_prob, float* greedy, Rows<const T> logits,
                    const std::int32_t* target, Index cols) {
  const Index row = blockIdx.x;
  const T* x = logits.at(row, 0);
  const Index t = target[row];
  const float own = cuda::to_float(x[t]);
  const Softmax s = softmax_of<Aligned>(x, cols);
  int earlier = 0;
  if (own == s.top)
    for (Index col = threadIdx.x; col < t; col += blockDim.x)
      earlier |= cuda::to_float(x[col]) == s.top ? 1 : 0;
  earlier = __syncthreads_or(earlier);
  if (threadIdx.x != 0) return;
  log_prob[row] = (own - s.top) - logf(s.sum);
  greedy[row] = own == s.top && earlier == 0 ? 1.0F : 0.0F;
}

constexpr int kSumThreads = 256;
constexpr Index kMostSums = 2048;

/// One partial sum of x or x^2 a block, eight running sums a thread: the numbers read once.
template <bool Aligned, bool Square>
__global__ void flat_sum_kernel(float* partial, const float* x, Index count) {
  __shared__ float shared[cuda::kWarp];
  Eight sum = {};
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x * kChunk;
#pragma unroll 2
  for (Index at = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) * kChunk; at < count;
       at += step) {
    const Eight e = cuda::take<Aligned>(x + at, cuda::chunk_at(at, count));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum.v[i] += Square ? e.v[i] * e.v[i] : e.v[i];
  }
  const float* v = sum.v;
  const float total =
      cuda::block_sum(((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])), shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

/// One warp adds the partial sums in double.
__global__ void total_kernel(float* out, const float* partial, int count, bool accumulate) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += cuda::kWarp)
    sum += static_cast<double>(partial[i]);
#pragma unroll
  for (int step = cuda::kWarp / 2; step > 0; step /= 2)
    sum += __shfl_xor_sync(cuda::kAll, sum, step);
  if (threadIdx.x == 0)
    out[0] = static_cast<float>(sum + (accumulate ? static_cast<double>(out[0]) : 0.0));
}

template <bool Square>
void flat_sum(cudaStream_t stream, const char* op, Tensor out, ConstTensor x, float* partial,
              bool accumulate) {
  cuda::expect(x.contiguous() && out.numel() >= 1, op);
  const Index blocks = std::min(kMostSums, cuda::ceil_div<Index>(x.numel(), kSumThreads * kChunk));
  if (blocks > 0) {
    const auto* p = cuda::data<float>(x);
    const auto b = static_cast<unsigned>(blocks);
    if (cuda::aligned(x.reshaped({x.numel()})))
      flat_sum_kernel<true, Square><<<b, kSumThreads, 0, stream>>>(partial, p, x.numel());
    else
      flat_sum_kernel<false, Square><<<b, kSumThreads, 0, stream>>>(partial, p, x.numel());
    cuda::launched(op);
  }
  total_kernel<<<1, cuda::kWarp, 0, stream>>>(cuda::data<float>(out), partial,
                                              static_cast<int>(blocks), accumulate);
  cuda::launched(op);
}

/// Threads for a row of `cols`: whole warps, each with a chunk at least.
unsigned threads_for(Index cols) {
  const Index warps = cuda::ceil_div<Index>(cols, kChunk * cuda::kWarp);
  return static_cast<unsigned>(std::clamp<Index>(warps * cuda::kWarp, cuda::kWarp, kLossThreads));
}
bool is_list(ConstTensor t, Index count) { return t.numel() == count && t.contiguous(); }

}  // namespace

void CudaBackend::cross_entropy(Tensor loss, Tensor logits, ConstTensor target,
                                ConstTensor weight) {
  const Index rows = logits.rows(), cols = logits.cols();
  cuda::expect(is_list(loss, rows) && is_list(target, rows) && is_list(weight, rows),
               "cross_entropy");
  if (rows == 0) return;
  cuda::with_type(logits.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(rows), threads_for(cols), 0, stream_>>>(
          cuda::data<float>(loss), cuda::rows_of<T>(logits), target.ptr<std::int32_t>(),
          cuda::data<float>(weight), cols);
    };
    if (cuda::aligned(logits))
      run(cross_entropy_kernel<true, T>);
    else
      run(cross_entropy_kernel<false, T>);
  });
  cuda::launched("cross_entropy");
}

void CudaBackend::log_prob(Tensor log_prob, Tensor greedy, ConstTensor logits, ConstTensor target) {
  const Index rows = logits.rows(), cols = logits.cols();
  cuda::expect(is_list(log_prob, rows) && is_list(greedy, rows) && is_list(target, rows),
               "log_prob");
  if (rows == 0) return;
  cuda::with_type(logits.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(rows), threads_for(cols), 0, stream_>>>(
          cuda::data<float>(log_prob), cuda::data<float>(greedy), cuda::rows_of<T>(logits),
          target.ptr<std::int32_t>(), cols);
    };
    if (cuda::aligned(logits))
      run(log_prob_kernel<true, T>);
    else
      run(log_prob_kernel<false, T>);
  });
  cuda::launched("log_prob");
}

void CudaBackend::sum_squares(Tensor out, ConstTensor x, bool accumulate) {
  flat_sum<true>(stream_, "sum_squares", out, x, room().take<float>(kMostSums), accumulate);
}
void CudaBackend::sum(Tensor out, ConstTensor x) {
  flat_sum<false>(stream_, "sum", out, x, room().take<float>(kMostSums), false);
}

}  // namespace mixlora
