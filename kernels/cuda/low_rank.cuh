// a B^T in passes that read and write y anyway: rope's, and RMSNorm's.
//
// A warp takes 8 rows. B's columns are the tensor core's 16 rows and the 8 rows its columns, so
// that a lane has eight neighbouring columns of two rows, 2q and 2q + 1, and the ranks' order is
// its own: lane q takes four neighbours of a sixteen.
#pragma once
#include <type_traits>
#include <utility>

#include "kernels/backend.h"
#include "kernels/cuda/rank_tiles.cuh"

namespace mixlora::cuda {

constexpr int kUpdateRows = 8, kUpdateWarps = 8;  // rows of a warp; warps of a block
constexpr int kUpdateChunks = 4;                  // sixteens of ranks that these kernels take

/// An update as kernels see it; `a` is null where there is none.
struct Update {
  const __nv_bfloat16 *a, *b;
  Index stride_a;
  int rank;
  /// This lane's four ranks of chunk c, of one row of a or of B.
  __device__ uint2 ranks(const __nv_bfloat16* row, int c, int q) const {
    const int at = 16 * c + 4 * q;
    return at < rank ? __ldg(reinterpret_cast<const uint2*>(row + at)) : make_uint2(0, 0);
  }
};

/// y += a B^T for columns `column` (of this lane's first rows) and `column` + 1 of 8 rows:
/// sums[0], [1] are rows 2q, 2q + 1 of the first, [2], [3] of the second.
template <int C>
__device__ void add_update(float (&sums)[4], const Update& u, const uint2 (&a)[C], int column,
                           int q) {
  const __nv_bfloat16* b = u.b + static_cast<Index>(column) * u.rank;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const uint2 first = u.ranks(b, c, q), second = u.ranks(b + u.rank, c, q);
    mma(sums, first.x, second.x, first.y, second.y, a[c].x, a[c].y);
  }
}

/// Words of N neighbouring numbers, in one access.
template <int N> __device__ void load_words(unsigned (&to)[N / 2], const __nv_bfloat16* p) {
  if constexpr (N == 8) {
    const uint4 x = *reinterpret_cast<const uint4*>(p);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
    static_assert(N == 4);
    const uint2 x = *reinterpret_cast<const uint2*>(p);
    to[0] = x.x, to[1] = x.y;
  }
}
template <int N> __device__ void store_words(__nv_bfloat16* p, const unsigned (&x)[N / 2]) {
  if constexpr (N == 8)
    *reinterpret_cast<uint4*>(p) = make_uint4(x[0], x[1], x[2], x[3]);
  else
    *reinterpret_cast<uint2*>(p) = make_uint2(x[0], x[1]);
}

/// Whether the kernels take an update of (rows, cols).
inline bool takes_update(const LowRank& u, Index rows, Index cols) {
  const Index rank = u.a.cols();
  return u.a.dtype == DType::bf16 && u.b.dtype == DType::bf16 && u.a.rows() == rows &&
         u.b.rows() == cols && u.b.cols() == rank && u.b.contiguous() && rank % 8 == 0 &&
         rank <= 16 * kUpdateChunks && by_eights(u.a) && by_eights(u.b);
}
inline Update update_of(const LowRank& u) {
  if (!u.a) return {};
  return {data<__nv_bfloat16>(u.a), data<__nv_bfloat16>(u.b), u.a.stride,
          static_cast<int>(u.a.cols())};
}
/// RMSNorm's backward where a low-rank product behind dropout, drop(a B^T), adds to d_y; B is
/// (columns, ranks). See lora_norm.cu.
struct NormBackward {
  __nv_bfloat16* d_x;
  const __nv_bfloat16 *d_y, *x;
  Index stride_d_x, stride_d_y, stride_x;
  const float *w, *r;
  int rows, cols;
  Update update;
  const std::int32_t* ids;  // the mask's: see lora_a.cu
  RandomKey key;
  std::uint32_t threshold, layer, site;
  float keep;
};
/// Whether rows of `cols` numbers fit.
bool takes_norm_backward(Index cols);
void norm_backward(const NormBackward& m, cudaStream_t stream);

/// f of the sixteens of ranks, as compiled.
template <class F> void with_update_chunks(Index rank, F&& f) {
  switch (ceil_div<Index>(rank, 16)) {
    case 0:
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, kUpdateChunks>{});
  }
}

}  // namespace mixlora::cuda
