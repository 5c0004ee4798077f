// Rows of numbers in chunks of eight columns: how the kernels that only move bytes walk them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/cuda/launch.cuh"

namespace mixlora::cuda {

constexpr int kChunk = 8;          // columns a thread takes at once: 16 bytes of bf16
constexpr int kMostThreads = 256;  // of a block whose threads do not meet

/// A view as kernels see it.
template <class T> struct Rows {
  T* data = nullptr;
  Index stride = 0;
  __device__ T* at(Index row, Index col) const { return data + row * stride + col; }
};
template <class T> Rows<T> rows_of(const Tensor& t) { return {cuda::data<T>(t), t.stride}; }
template <class T> Rows<const T> rows_of(const ConstTensor& t) {
  return {cuda::data<T>(t), t.stride};
}

/// True when every row of every view starts at a multiple of eight elements and has a multiple of
/// eight columns: its chunks are read and written by 16-byte accesses. Absent views do not count.
template <class... View> bool aligned(const View&... views) {
  const auto one = [](const auto& t) {
    if (!t) return true;
    return t.cols() % kChunk == 0 && (t.stride % kChunk == 0 || t.rows() <= 1) &&
           reinterpret_cast<std::uintptr_t>(t.data) % (kChunk * size_of(t.dtype)) == 0;
  };
  return (one(views) && ...);
}

/// The first `count` (at most eight) numbers from p on, zeros behind them. Here and below, Aligned
/// means whole chunks at aligned addresses, whatever `count` says: no branch keeps a load from
/// being sent behind another.
template <bool Aligned, class T> __device__ Eight take(const T* p, int count) {
  if constexpr (Aligned) {
    return load8(p);
  } else {
    Eight e;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) e.v[i] = i < count ? to_float(p[i]) : 0.0F;
    return e;
  }
}
/// The same, unpacked where it is used.
template <bool Aligned, class T> __device__ Packed<T> take_packed(const T* p, int count) {
  if constexpr (Aligned)
    return load_packed(p);
  else
    return packed(take<false>(p, count), T{});
}
template <bool Aligned, class T> __device__ void put(T* p, const Eight& e, int count) {
  if constexpr (Aligned) {
    store8(p, e);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < count) p[i] = from_float<T>(e.v[i]);
  }
}
__device__ inline int chunk_at(Index col, Index cols) {
  return cols - col < kChunk ? static_cast<int>(cols - col) : kChunk;
}

/// f.at<Aligned>(row, col, count) for every chunk of a (rows, cols) area.
template <bool Aligned, class F> __global__ void chunks_kernel(F f, Index rows, Index cols) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const Index step = static_cast<Index>(gridDim.y) * blockDim.x * kChunk;
  for (Index col = (static_cast<Index>(blockIdx.y) * blockDim.x + threadIdx.x) * kChunk; col < cols;
       col += step)
    f.template at<Aligned>(row, col, chunk_at(col, cols));
}

/// Neighbouring blocks share columns, so that what all rows read (weights, scales) stays near.
template <class F>
void each_chunk(cudaStream_t stream, const char* op, Index rows, Index cols, bool whole, F f) {
  if (rows == 0 || cols == 0) return;
  const Index chunks = ceil_div<Index>(cols, kChunk), tiles = ceil_div<Index>(chunks, kMostThreads);
  const Index across = tiles == 1 ? chunks : ceil_div(chunks, tiles * kWarp) * kWarp;
  const dim3 threads(static_cast<unsigned>(across),
                     static_cast<unsigned>(std::max<Index>(1, kMostThreads / across)));
  const dim3 blocks(static_cast<unsigned>(ceil_div<Index>(rows, threads.y)),
                    static_cast<unsigned>(std::min<Index>(tiles, 65535)));
  if (whole)
    chunks_kernel<true><<<blocks, threads, 0, stream>>>(f, rows, cols);
  else
    chunks_kernel<false><<<blocks, threads, 0, stream>>>(f, rows, cols);
  launched(op);
}

/// How `sums` sums over rows are cut into ranges of `length` rows, whatever the device: at least 16
/// rows a range, and about 8 MiB of partial sums, which stay in L2.
struct Parts {
  Index count = 0, length = 0;
};
inline Parts parts_of(Index rows, Index sums) {
  const Index most = std::clamp<Index>((Index{2} << 20) / std::max<Index>(sums, 1), 16, 256);
  const Index length = std::max<Index>(16, ceil_div(rows, most));
  return {ceil_div(rows, length), length};
}

/// Threads of a block that walks down rows, each with a chunk of columns of its own.
inline unsigned column_threads(Index cols) {
  unsigned threads = 128;
  while (threads > kWarp && cols <= Index{threads} / 2 * kChunk) threads /= 2;
  return threads;
}
constexpr int kTogether = 4;  // rows that such a thread loads before it uses the first

/// out[i] += sum over parts of partial[part][i], always in the same order: warp w of a block takes
/// parts w, w + 16, ... of 32 columns, then the warps' sums are added one after another.
template <int kWarps>
__global__ void add_partials_kernel(float* out, const float* partial, Index parts, Index count) {
  __shared__ float sums[kWarps][kWarp];
  const Index i = static_cast<Index>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0;
  if (i < count) {
#pragma unroll 4
    for (Index part = threadIdx.y; part < parts; part += kWarps) sum += partial[part * count + i];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= count) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][threadIdx.x];
  out[i] += sum;
}
template <int kWarps = 16>
void add_partials(cudaStream_t stream, const char* op, float* out, const float* partial,
                  Index parts, Index count) {
  const dim3 threads(kWarp, kWarps);
  add_partials_kernel<kWarps>
      <<<static_cast<unsigned>(ceil_div<Index>(count, kWarp)), threads, 0, stream>>>(out, partial,
                                                                                     parts, count);
  launched(op);
}

inline void expect(bool right, const char* op) {
  if (!right) throw std::logic_error(std::string(op) + ": shapes do not match");
}
template <class A, class B> void expect_same(const A& a, const B& b, const char* op) {
  expect(a.rows() == b.rows() && a.cols() == b.cols(), op);
}

}  // namespace mixlora::cuda
