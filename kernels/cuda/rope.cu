// Rotary embedding of queries and keys.
#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::Rows;

/// A row read, a row written (in place: the values stay unread). Its units are the
/// pairs (j, j + D/2) of the turned heads, then the values' numbers. Aligned: a chunk is one kind,
/// one head.
template <class T> struct Rope {
  Rows<T> y;
  Rows<const T> x;
  Rows<const float> table;
  const std::int32_t* ids;
  int half, pairs;  // D / 2; pairs of a row
  float sign;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    if constexpr (Aligned)
      unit<true>(row, static_cast<int>(col), count);
    else
      for (int i = 0; i < count; ++i) unit<false>(row, static_cast<int>(col) + i, 1);
  }
  template <bool Aligned> __device__ void unit(Index row, int at, int count) const {
    if (at >= pairs) {
      const Index col = pairs + at;  // pairs are two numbers each
      cuda::put<Aligned>(y.at(row, col), cuda::take<Aligned>(x.at(row, col), count), count);
      return;
    }
    const int j = at % half;
    const Index first = 2 * (at - j) + j, second = first + half;
    const float* cosine = table.at(ids[4 * row + 1], j);
    const Eight c = cuda::take<Aligned>(cosine, count),
                s = cuda::take<Aligned>(cosine + half, count),
                a = cuda::take<Aligned>(x.at(row, first), count),
                b = cuda::take<Aligned>(x.at(row, second), count);
    Eight left, right;
#pragma unroll
    for (int i = 0; i < cuda::kChunk; ++i) {
      left.v[i] = a.v[i] * c.v[i] - b.v[i] * (sign * s.v[i]);
      right.v[i] = b.v[i] * c.v[i] + a.v[i] * (sign * s.v[i]);
    }
    cuda::put<Aligned>(y.at(row, first), left, count);
    cuda::put<Aligned>(y.at(row, second), right, count);
  }
};

}  // namespace

void CudaBackend::rope(Tensor y, ConstTensor x, ConstTensor table, RowIds ids, Heads h,
                       bool inverse) {
  const char* op = "rope";
  const Index half = h.head_dim / 2, pairs = (h.heads + h.kv_heads) * half;
  cuda::expect_same(y, x, op);
  cuda::expect(x.cols() == (h.heads + 2 * h.kv_heads) * h.head_dim && h.head_dim % 2 == 0 &&
                   table.cols() == h.head_dim && ids.rows() == x.rows() && ids.cols() == 4 &&
                   ids.contiguous(),
               op);
  const Index units = pairs + (y.data != x.data ? h.kv_heads * h.head_dim : 0);
  const bool whole = half % cuda::kChunk == 0 && cuda::aligned(y, x, table);
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    cuda::each_chunk(stream_, op, x.rows(), units, whole,
                     Rope<T>{cuda::rows_of<T>(y), cuda::rows_of<T>(x), cuda::rows_of<float>(table),
                             ids.ptr<std::int32_t>(), static_cast<int>(half),
                             static_cast<int>(pairs), inverse ? -1.0F : 1.0F});
  });
}

}  // namespace mixlora
