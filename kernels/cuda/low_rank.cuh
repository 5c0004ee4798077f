// a B^T in passes that read and write y anyway: rope's, and RMSNorm's.
//
// A warp takes 8 rows. B's columns are the tensor core's 16 rows and the 8 rows its columns, so
// that a lane has P neighbouring columns of two rows, 2q and 2q + 1: columns P g .. P g + P - 1 of
// a tile of 8 P. B's tiles go through shared memory, where what a warp reads together lies in
// different banks.
#pragma once
#include <type_traits>
#include <utility>

#include "kernels/backend.h"
#include "kernels/cuda/rank_tiles.cuh"

namespace mixlora::cuda {

constexpr int kUpdateRows = 8, kUpdateWarps = 8;  // rows of a warp; warps of a block
constexpr int kRankChunks = 4;                    // sixteens of ranks that these kernels take

/// An update as kernels see it; `a` is null where there is none, `scale` where that is 1.
struct Update {
  const __nv_bfloat16 *a, *b;
  Index stride_a;
  int rank;
  const float* scale;
  /// The tensor core's operand of row `g` of a, ranks 16 c and on.
  __device__ uint2 ranks(Index row, int c, int q) const {
    const int at = 16 * c + 2 * q;
    const __nv_bfloat16* p = a + row * stride_a + at;
    return make_uint2(at < rank ? load_pair(p) : 0, at + 8 < rank ? load_pair(p + 8) : 0);
  }
};

/// Bytes of a tile of 8 P columns by 16 ranks.
template <int P> constexpr int kUpdateTile = 8 * P * 32;
/// Sends C of them on their way, thread `own` of `threads`; `b` is the first column's ranks. Four
/// columns share 128 bytes, in which a lane group's sixteen bytes have a place of its own.
template <int P, int C>
__device__ void fetch_update(std::uint32_t to, const __nv_bfloat16* b, int rank, int own,
                             int threads) {
  for (int i = own; i < 16 * P * C; i += threads) {
    const int chunk = i / (16 * P), c = i % (16 * P) / 2, half = i % 2, at = 16 * chunk + 8 * half;
    const bool there = at < rank;
    fetch16(to + static_cast<std::uint32_t>(chunk * kUpdateTile<P> + c / 4 * 128 +
                                            16 * ((c % 4 * 2 + half) ^ (c / P))),
            there ? b + c * rank + at : b, there);
  }
}
/// Where a lane points read_matrices for add_update's columns of a tile.
template <int P> __device__ std::uint32_t update_row(std::uint32_t tile, int j, int lane) {
  const int g = lane % 8, unit = (4 * (j % 2) + 2 * (lane / 8 % 2) + lane / 16) ^ g;
  return tile + static_cast<std::uint32_t>((P / 4 * g + j / 2) * 128 + 16 * unit);
}
/// y += a B^T for columns P g + 2j and P g + 2j + 1 of the tile: sums[0], [1] are rows 2q, 2q + 1
/// of the first, [2], [3] of the second.
template <int P, int C>
__device__ void add_update(float (&sums)[4], std::uint32_t tile, const uint2 (&a)[C], int j,
                           int lane) {
  const std::uint32_t at = update_row<P>(tile, j, lane);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    unsigned b[4];
    read_matrices(b, at + static_cast<std::uint32_t>(c * kUpdateTile<P>));
    mma(sums, b[0], b[1], b[2], b[3], a[c].x, a[c].y);
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
         rank <= 16 * kRankChunks && by_eights(u.a) && by_eights(u.b) &&
         (!u.scale || (u.scale.numel() == cols && u.scale.contiguous() && by_eights(u.scale)));
}
inline Update update_of(const LowRank& u) {
  if (!u.a) return {};
  return {data<__nv_bfloat16>(u.a), data<__nv_bfloat16>(u.b), u.a.stride,
          static_cast<int>(u.a.cols()), u.scale ? data<float>(u.scale) : nullptr};
}
/// f of the sixteens of ranks, as compiled.
template <class F> void with_rank_chunks(Index rank, F&& f) {
  switch (ceil_div<Index>(rank, 16)) {
    case 0:
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, kRankChunks>{});
  }
}

}  // namespace mixlora::cuda
