// Tiles of rows in shared memory: how they are filled, the tensor core's operands out of them.
#pragma once
#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/tensor_core.cuh"

namespace mixlora::cuda {

/// 2^x by the special function unit, 2 ulp; results below 2^-126 are zero.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Rows of D numbers in shared memory, 16 bytes apart from a multiple of 128, so that eight rows'
/// chunks lie in different banks.
template <int D> struct TileRows {
  static constexpr int kStride = D + 8;
  __nv_bfloat16* at;
  __device__ explicit TileRows(__nv_bfloat16* p) : at(p) {}
  static constexpr int bytes(int rows) { return rows * kStride * 2; }
};

/// Starts copying the first `count` of Size rows, `stride` numbers apart, by all Threads threads;
/// the others become zeros. The first row is readable even when count is 0.
template <int Size, int Threads, int D>
__device__ void copy_rows(TileRows<D> to, const __nv_bfloat16* first, Index stride, int count) {
  constexpr int kChunks = D / 8, kStep = Threads / kChunks;
  static_assert(Threads % kChunks == 0 && Size % kStep == 0);
  const int row = static_cast<int>(threadIdx.x) / kChunks,
            col = static_cast<int>(threadIdx.x) % kChunks * 8;
  const __nv_bfloat16* from = first + row * stride + col;
  __nv_bfloat16* at = to.at + row * TileRows<D>::kStride + col;
#pragma unroll
  for (int i = 0; i < Size / kStep; ++i) {
    const bool there = row + i * kStep < count;
    fetch16(shared_address(at + i * kStep * TileRows<D>::kStride), there ? from : first, there);
    from += kStep * stride;
  }
}

/// A operand: rows [r, r+16) and columns [c, c+16).
template <int D>
__device__ void load_as_a(unsigned (&x)[4], TileRows<D> rows, int r, int c, int lane) {
  read_matrices(
      x, shared_address(rows.at + (r + lane % 16) * TileRows<D>::kStride + c + lane / 16 * 8));
}
/// Two B operands of x = rows^T: inner dimension the columns [c, c+16), outer the rows [r, r+8) in
/// x[0], x[1] and [r+8, r+16) in x[2], x[3].
template <int D>
__device__ void load_as_bt(unsigned (&x)[4], TileRows<D> rows, int r, int c, int lane) {
  read_matrices(x, shared_address(rows.at + (r + lane % 8 + lane / 16 * 8) * TileRows<D>::kStride +
                                  c + lane / 8 % 2 * 8));
}
/// Two B operands of x = rows: inner dimension the rows [r, r+16), outer the columns [c, c+8) and
/// [c+8, c+16).
template <int D>
__device__ void load_as_b(unsigned (&x)[4], TileRows<D> rows, int r, int c, int lane) {
  read_matrices_trans(
      x, shared_address(rows.at + (r + lane % 16) * TileRows<D>::kStride + c + lane / 16 * 8));
}

/// Two neighbouring 16x8 tiles c += a b, b as load_as_bt and load_as_b give it.
__device__ inline void mma2(float (&left)[4], float (&right)[4], const unsigned (&a)[4],
                            const unsigned (&b)[4]) {
  mma(left, a[0], a[1], a[2], a[3], b[0], b[1]);
  mma(right, a[0], a[1], a[2], a[3], b[2], b[3]);
}
/// The same with a of the packed C tiles 2k and 2k + 1.
template <int N>
__device__ void mma2(float (&left)[4], float (&right)[4], const unsigned (&p)[N][2], int k,
                     const unsigned (&b)[4]) {
  mma(left, p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1], b[0], b[1]);
  mma(right, p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1], b[2], b[3]);
}

/// Sums and maxima over the four lanes that share a C tile's row.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}

}  // namespace mixlora::cuda
