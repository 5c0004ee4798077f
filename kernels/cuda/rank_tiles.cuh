// Tiles of 16 rows by 32 columns beside low-rank factors: how a warp fetches them ahead, and where
// a lane finds its numbers.
//
// Lane l = 4g + q owns the eight neighbouring columns 8q .. 8q+7 of rows g and g+8: product tile j
// of the four 16x8 tiles holds column 8q + 2j + i as its column 2q + i. So a lane reads and writes
// 16 bytes of a row at a time, one Philox call covers its columns, and what one product leaves in C
// is what the next one wants as A. Two neighbouring tiles j make a pair.
//
// Each warp has a ring of two stages in shared memory of its own, filled by asynchronous copies: it
// works on one while the next columns (or rows) are on their way, and meets no other warp.
#pragma once
#include <algorithm>
#include <map>
#include <utility>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/tensor_core.cuh"
#include "kernels/random.h"

namespace mixlora::cuda {

using Number = __nv_bfloat16;
constexpr int kRows = 16, kColumns = 32;
constexpr int kMostWarps = 4;
constexpr int kPiece = 16 * kWarp;    // bytes: 16 of every lane
constexpr int kFactorBytes = 1024;    // 32 columns by 16 ranks
constexpr int kFragment = 4 * kWarp;  // numbers of an accumulator tile

/// The A operands of a row pair's ranks, 16 at a time: numbers of `row0` and `row1` from `at` on,
/// `rank` of them; zeros when the array is absent.
template <int C>
__device__ void load_ranks(unsigned (&a)[C][4], const Number* array, int row0, int row1, int rank,
                           int q) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const bool lower = array != nullptr && 16 * c < rank, upper = lower && 16 * c + 8 < rank;
    const int at = 16 * c + 2 * q;
    a[c][0] = lower ? load_pair(array + row0 + at) : 0;
    a[c][1] = lower ? load_pair(array + row1 + at) : 0;
    a[c][2] = upper ? load_pair(array + row0 + at + 8) : 0;
    a[c][3] = upper ? load_pair(array + row1 + at + 8) : 0;
  }
}

/// A factor of 32 columns by 16 C ranks in shared memory, a column's ranks together: column 8a + b
/// at row 4b + a of 32 bytes, its halves exchanged when b is odd, so that the eight rows which one
/// matrix of read_matrices takes lie in different banks.
/// Eight neighbouring lanes write different banks and read whole sectors of four columns.
template <int C>
__device__ void fetch_factor(std::uint32_t to, const Number* from, int rank, int lane) {
  const int b = lane / 8, a = lane / 2 % 4, half = lane % 2;
  const std::uint32_t at =
      to + static_cast<std::uint32_t>((4 * b + a) * 32 + 16 * (half ^ (b & 1)));
  const Number* mine = from + (8 * a + b) * rank + 8 * half;
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = 16 * c + 8 * half < rank;
      fetch16_near(at + static_cast<std::uint32_t>(c * kFactorBytes + i * 512),
                   there ? mine + 4 * i * rank + 16 * c : from, there);
    }
}
/// Where a lane points read_matrices for the first two of a factor's four tiles; the others are
/// 512 bytes on, the next 16 ranks kFactorBytes.
__device__ inline std::uint32_t factor_row(int lane) {
  const int n = lane % 8, j = lane / 16, half = lane / 8 % 2;
  return static_cast<std::uint32_t>((4 * (2 * j + n % 2) + n / 2) * 32 + 16 * (half ^ (n & 1)));
}
/// u += ranks times factor, of two tiles: w[2t + i] are the ranks 8i of tile t.
template <int C>
__device__ void add_factor(float (&u)[2][4], const unsigned (&a)[C][4], std::uint32_t factor) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    unsigned w[4];
    read_matrices(w, factor + static_cast<std::uint32_t>(c * kFactorBytes));
    mma(u[0], a[c][0], a[c][1], a[c][2], a[c][3], w[0], w[1]);
    mma(u[1], a[c][0], a[c][1], a[c][2], a[c][3], w[2], w[3]);
  }
}
/// The same with the rows' sixteen ranks in shared memory, where rank_row points.
__device__ inline void add_factor(float (&u)[2][4], std::uint32_t ranks, std::uint32_t factor) {
  unsigned a[1][4];
  read_matrices(a[0], ranks);
  add_factor<1>(u, a, factor);
}
/// p += x times the factor turned over, of two tiles x: x[t][h] rows g + 8h of tile t.
template <int C>
__device__ void collect_ranks(float (&p)[2 * C][4], const unsigned (&x)[2][2],
                              std::uint32_t factor) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    unsigned w[4];
    read_matrices_trans(w, factor + static_cast<std::uint32_t>(c * kFactorBytes));
    mma(p[2 * c], x[0][0], x[0][1], x[1][0], x[1][1], w[0], w[2]);
    mma(p[2 * c + 1], x[0][0], x[0][1], x[1][0], x[1][1], w[1], w[3]);
  }
}

/// Sums by columns, a column a row: += x turned over times the rows' ranks, `a` as
/// read_matrices_trans gives them, of two tiles x.
__device__ inline void collect_columns(float (&sums)[2][4], const unsigned (&x)[2][2],
                                       const unsigned (&a)[4]) {
  const unsigned x0 = transposed(x[0][0]), x1 = transposed(x[1][0]), x2 = transposed(x[0][1]),
                 x3 = transposed(x[1][1]);
  mma(sums[0], x0, x1, x2, x3, a[0], a[1]);
  mma(sums[1], x0, x1, x2, x3, a[2], a[3]);
}
/// The same turned over, a rank a row: the two tiles from `sums` on.
__device__ inline void collect_turned(float (*sums)[4], const unsigned (&x)[2][2],
                                      const unsigned (&a)[4]) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
    mma(sums[t], a[0], a[2], a[1], a[3], transposed(x[t][0]), transposed(x[t][1]));
}

/// 16 rows by 16 C ranks: row r at 32 r bytes, its halves exchanged in rows 4 .. 7 of eight, so
/// that read_matrices meets no bank twice. `from` is row lane / 2.
template <int C>
__device__ void fetch_ranks(std::uint32_t to, const Number* from, int rank, int lane) {
  const int r = lane / 2, half = lane % 2;
  const std::uint32_t at = to + static_cast<std::uint32_t>(32 * r + 16 * (half ^ (r / 4 % 2)));
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const bool there = 16 * c + 8 * half < rank;
    fetch16(at + static_cast<std::uint32_t>(c * kPiece), there ? from + 16 * c + 8 * half : from,
            there);
  }
}

/// Where a lane points read_matrices for the 16 rows by 16 ranks of fetch_ranks.
__device__ inline std::uint32_t rank_row(int lane) {
  return static_cast<std::uint32_t>(32 * (lane % 8 + lane / 8 % 2 * 8) +
                                    16 * (lane / 16 ^ (lane % 8 / 4)));
}

/// Numbers 4 * pair .. 4 * pair + 3 of this lane's 16 bytes of piece i.
__device__ inline uint2 read_piece(const std::byte* stage, int i, int pair, int lane) {
  return *reinterpret_cast<const uint2*>(stage + i * kPiece + 16 * lane + 8 * pair);
}
/// u (or v) of two tiles: the frozen projection's numbers of rows g and g + 8.
__device__ inline void start(float (&u)[2][4], uint2 row0, uint2 row1) {
  u[0][0] = low(row0.x), u[0][1] = high(row0.x), u[1][0] = low(row0.y), u[1][1] = high(row0.y);
  u[0][2] = low(row1.x), u[0][3] = high(row1.x), u[1][2] = low(row1.y), u[1][3] = high(row1.y);
}
/// The other way: two tiles' numbers of row g + 8 h, packed.
__device__ inline uint2 packed_row(const float (&x)[2][4], int h) {
  return make_uint2(pack2(x[0][2 * h], x[0][2 * h + 1]), pack2(x[1][2 * h], x[1][2 * h + 1]));
}
__device__ inline void write4(Number* p, const unsigned (&x)[4]) {
  *reinterpret_cast<uint4*>(p) = make_uint4(x[0], x[1], x[2], x[3]);
}

/// Whether column i of the eight is kept; `threshold` in the upper half of its word.
__device__ inline bool kept(const Philox4& bits, int i, std::uint32_t threshold) {
  const std::uint32_t word = bits.v[i / 2];
  return (i % 2 == 0 ? word << 16 : word) >= threshold;
}
/// Bit c of eight columns' bits: c is kept.
__device__ inline unsigned kept_bits(const Philox4& bits, std::uint32_t threshold) {
  unsigned own = 0;
#pragma unroll
  for (int c = 0; c < 8; ++c) own |= kept(bits, c, threshold) ? 1U << c : 0U;
  return own;
}

/// Adds the warps' accumulator tiles, in the order of the warps, and leaves the block's sums in
/// `to` (fragment, lane, 4). `shared` has Count * warps * kFragment floats and is free.
template <int Count>
__device__ void leave_sums(float* to, float* shared, const float (&mine)[Count][4]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  auto* numbers = reinterpret_cast<float4*>(shared);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Count; ++i)
    numbers[(warp * Count + i) * kWarp + lane] =
        make_float4(mine[i][0], mine[i][1], mine[i][2], mine[i][3]);
  __syncthreads();
  for (int i = warp; i < Count; i += warps) {
    float4 sum = make_float4(0, 0, 0, 0);
    for (int w = 0; w < warps; ++w) {
      add_to(sum, numbers[(w * Count + i) * kWarp + lane]);
    }
    reinterpret_cast<float4*>(to)[i * kWarp + lane] = sum;
  }
}

/// How a kernel of warps with rings of their own runs on this device.
struct Fit {
  int warps, bytes;  // of a block; shared memory
  int together;      // blocks that the device runs at a time
};
/// As many warps a block (at most `warps`) as `bytes` and `bytes_a_warp` of shared memory admit;
/// asked of the driver once for each kernel.
inline Fit fit_of(const void* kernel, int bytes, int bytes_a_warp, int warps = kMostWarps) {
  thread_local std::map<std::pair<const void*, int>, Fit> known;
  int device = 0, processors = 0, blocks = 0;
  check(cudaGetDevice(&device), "the device");
  const auto [found, added] = known.try_emplace({kernel, device}, Fit{warps, 0, 0});
  Fit& fit = found->second;
  if (!added) return fit;
  const int most = most_shared();
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "processors");
  while (fit.warps > 1 && bytes + fit.warps * bytes_a_warp > most) fit.warps /= 2;
  fit.bytes = bytes + fit.warps * bytes_a_warp;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, fit.bytes),
        "shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, fit.warps * kWarp,
                                                      static_cast<std::size_t>(fit.bytes)),
        "occupancy");
  fit.together = std::max(1, blocks * processors);
  return fit;
}
template <class Kernel, class... Arguments>
void launch_warps(Kernel* kernel, const Fit& fit, dim3 grid, cudaStream_t stream, const char* name,
                  const Arguments&... arguments) {
  kernel<<<grid, static_cast<unsigned>(fit.warps * kWarp), static_cast<std::size_t>(fit.bytes),
           stream>>>(arguments...);
  launched(name);
}

}  // namespace mixlora::cuda
