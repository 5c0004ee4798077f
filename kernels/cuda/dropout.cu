// Dropout and jitter: one Philox call for eight columns of a row.
#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/random.h"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::Rows;

/// The bits of one chunk: which row by ids, which use by key, layer and site.
struct Bits {
  const std::int32_t* ids;
  RandomKey key;
  std::uint32_t layer, site;
  __device__ Philox4 of(Index row, Index col) const {
    const int4 id = *reinterpret_cast<const int4*>(ids + 4 * row);  // sample, position, step
    return row_bits(key, layer, site, static_cast<std::uint32_t>(id.z),
                    static_cast<std::uint32_t>(id.x), static_cast<std::uint32_t>(id.y),
                    static_cast<std::uint32_t>(col / cuda::kChunk));
  }
  static __device__ std::uint32_t sixteen(const Philox4& bits, int i) {
    return (bits.v[i / 2] >> (16 * (i % 2))) & 0xffffU;
  }
};

/// y = mask scale x: a row read, a row written. Add: y += mask scale x, one more read.
template <bool Add, class T> struct Mask {
  Rows<T> y;
  Rows<const T> x;
  Bits bits;
  std::uint32_t threshold;
  float scale;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    const Eight e = cuda::take<Aligned>(x.at(row, col), count);
    Eight out = {};
    if (Add) out = cuda::take<Aligned>(y.at(row, col), count);
    const Philox4 b = bits.of(row, col);
#pragma unroll
    for (int i = 0; i < cuda::kChunk; ++i)
      out.v[i] += (Bits::sixteen(b, i) < threshold ? 0.0F : scale) * e.v[i];
    cuda::put<Aligned>(y.at(row, col), out, count);
  }
};

/// y = x (1 + amount (2 u - 1)): a row read, a row written.
template <class T> struct Jitter {
  Rows<T> y;
  Rows<const T> x;
  Bits bits;
  float amount;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    Eight e = cuda::take<Aligned>(x.at(row, col), count);
    const Philox4 b = bits.of(row, col);
#pragma unroll
    for (int i = 0; i < cuda::kChunk; ++i) {
      const float u = (static_cast<float>(Bits::sixteen(b, i)) + 0.5F) / 65536.0F;
      e.v[i] *= 1.0F + amount * (2.0F * u - 1.0F);
    }
    cuda::put<Aligned>(y.at(row, col), e, count);
  }
};

void expect_ids(Tensor y, ConstTensor x, RowIds ids, const char* op) {
  cuda::expect_same(y, x, op);
  cuda::expect(ids.rows() == x.rows() && ids.cols() == 4 && ids.contiguous(), op);
}

template <bool Add>
void masked(cudaStream_t stream, const char* op, Tensor y, ConstTensor x, const Dropout& d,
            RowIds ids) {
  expect_ids(y, x, ids, op);
  const Bits bits{ids.ptr<std::int32_t>(), random_key(d.seed, Purpose::dropout),
                  static_cast<std::uint32_t>(d.layer), d.site};
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    cuda::each_chunk(stream, op, x.rows(), x.cols(), cuda::aligned(y, x),
                     Mask<Add, T>{cuda::rows_of<T>(y), cuda::rows_of<T>(x), bits,
                                  dropout_threshold(d.p), dropout_scale(d.p)});
  });
}

}  // namespace

void CudaBackend::dropout(Tensor y, ConstTensor x, const Dropout& d, RowIds ids) {
  masked<false>(stream_, "dropout", y, x, d, ids);
}
void CudaBackend::dropout_backward_add(Tensor d_x, ConstTensor d_y, const Dropout& d, RowIds ids) {
  masked<true>(stream_, "dropout_backward_add", d_x, d_y, d, ids);
}
void CudaBackend::jitter(Tensor y, ConstTensor x, float amount, std::uint64_t seed,
                         std::int32_t layer, RowIds ids) {
  expect_ids(y, x, ids, "jitter");
  const Bits bits{ids.ptr<std::int32_t>(), random_key(seed, Purpose::jitter),
                  static_cast<std::uint32_t>(layer), site_router};
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    cuda::each_chunk(stream_, "jitter", x.rows(), x.cols(), cuda::aligned(y, x),
                     Jitter<T>{cuda::rows_of<T>(y), cuda::rows_of<T>(x), bits, amount});
  });
}

}  // namespace mixlora
