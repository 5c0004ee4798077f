// Rows looked up, gathered, scattered and added.
#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::Rows;

/// y[m] = x[index[m]]: a row read, a row written.
template <class To, class From> struct Gather {
  Rows<To> y;
  Rows<const From> x;
  const std::int32_t* index;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    cuda::put<Aligned>(y.at(row, col), cuda::take<Aligned>(x.at(index[row], col), count), count);
  }
};

/// y[index[m]] += x[m], or y[m] += x[m] without an index: two rows read, one written.
template <class T> struct AddRows {
  Rows<T> y;
  Rows<const T> x;
  const std::int32_t* index;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    T* to = y.at(index != nullptr ? index[row] : row, col);
    Eight sum = cuda::take<Aligned>(to, count);
    const Eight more = cuda::take<Aligned>(x.at(row, col), count);
#pragma unroll
    for (int i = 0; i < cuda::kChunk; ++i) sum.v[i] += more.v[i];
    cuda::put<Aligned>(to, sum, count);
  }
};

void gather(cudaStream_t stream, const char* op, Tensor y, ConstTensor x, ConstTensor index) {
  cuda::expect(y.cols() == x.cols() && y.rows() == index.numel() && index.contiguous(), op);
  cuda::with_type(y.dtype, [&](auto to) {
    cuda::with_type(x.dtype, [&](auto from) {
      using To = decltype(to);
      using From = decltype(from);
      cuda::each_chunk(stream, op, y.rows(), y.cols(), cuda::aligned(y, x),
                       Gather<To, From>{cuda::rows_of<To>(y), cuda::rows_of<From>(x),
                                        index.ptr<std::int32_t>()});
    });
  });
}

void add_rows(cudaStream_t stream, const char* op, Tensor y, ConstTensor x,
              const std::int32_t* index) {
  cuda::with_type(y.dtype, [&](auto number) {
    using T = decltype(number);
    cuda::each_chunk(stream, op, x.rows(), x.cols(), cuda::aligned(y, x),
                     AddRows<T>{cuda::rows_of<T>(y), cuda::rows_of<T>(x), index});
  });
}

}  // namespace

void CudaBackend::embedding(Tensor y, ConstTensor table, ConstTensor tokens) {
  gather(stream_, "embedding", y, table, tokens);
}
void CudaBackend::gather_rows(Tensor y, ConstTensor x, ConstTensor index) {
  gather(stream_, "gather_rows", y, x, index);
}
void CudaBackend::scatter_add_rows(Tensor x, ConstTensor y, ConstTensor index) {
  cuda::expect(y.cols() == x.cols() && y.rows() == index.numel() && index.contiguous(),
               "scatter_add_rows");
  add_rows(stream_, "scatter_add_rows", x, y, index.ptr<std::int32_t>());
}
void CudaBackend::add(Tensor y, ConstTensor x) {
  cuda::expect_same(y, x, "add");
  if (y.contiguous() && x.contiguous())
    add_rows(stream_, "add", y.reshaped({y.numel()}), x.reshaped({x.numel()}), nullptr);
  else
    add_rows(stream_, "add", y, x, nullptr);
}

}  // namespace mixlora
