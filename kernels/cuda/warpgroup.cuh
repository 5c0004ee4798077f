// What compute capability 9.0 adds: products by four warps together out of swizzled shared memory,
// tiles fetched by the copy engine, barriers that count bytes. For code built for sm_90a alone.
//
// A tile of R rows of 128 numbers lies in shared memory as two halves of 64 columns, each R rows of
// 128 bytes, 16-byte chunk c of row r at place c ^ (r % 8): how the copy engine writes and the
// tensor core reads it. Tiles begin at multiples of 1024 bytes.
#pragma once
#include <cuda.h>

#include "kernels/cuda/async_copy.cuh"

namespace mixlora::cuda {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kTileColumns = 128, kHalfColumns = kTileColumns / 2, kRowBytes = 2 * kHalfColumns;
constexpr int kBoxRows = 64;  // rows of one fetch
constexpr __host__ __device__ int tile_bytes(int rows) { return 2 * rows * kRowBytes; }

/// Bytes from the start of a tile of `rows` rows to chunk `chunk` (of 16) of row `row`.
__device__ inline int place_in_tile(int rows, int row, int chunk) {
  return chunk / 8 * rows * kRowBytes + row * kRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
}

// ---- barriers ------------------------------------------------------------------------------

using Barrier = std::uint64_t;

__device__ inline void barrier_init(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
               : "memory");
}
/// Makes the barriers of this thread's barrier_init known to the copy engine.
__device__ inline void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
/// Arrives, and has the phase wait for so many bytes of the copy engine too.
__device__ inline void arrive_expecting(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes)
               : "memory");
}
/// Waits for the end of the phase of this parity; of the phase before the first it returns at once.
__device__ inline void wait(Barrier* b, unsigned parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}
/// A ring's place: which stage, and how often around.
template <int Stages> struct Turn {
  int stage = 0;
  unsigned parity = 0;
  __device__ void next() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};
/// Orders this thread's accesses to shared memory before the copy engine's and tensor core's next.
__device__ inline void fence_to_engines() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// Meets the threads of one warpgroup; `id` from 1 on.
__device__ inline void meet_group(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kGroup) : "memory");
}
template <int Count> __device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count> __device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- the copy engine -----------------------------------------------------------------------

/// A matrix of bf16, its rows `stride` numbers apart, as the copy engine wants it: by boxes of 64 x
/// 64. In attention_forward_90a.cu.
CUtensorMap map_of(const __nv_bfloat16* x, Index rows, Index columns, Index stride);

/// Fetches 64 rows from `row` on and their 64 columns from `column` on; those past the matrix
/// become zeros, and their bytes count.
__device__ inline void fetch_box(std::uint32_t to, const CUtensorMap& from, int column, int row,
                                 Barrier* done) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&from), "r"(column), "r"(row), "r"(shared_address(done))
      : "memory");
}
/// Fetches a tile's Rows rows from `row` on and its 128 columns from `column` on.
template <int Rows>
__device__ void fetch_tile(std::uint32_t to, const CUtensorMap& from, int column, int row,
                           Barrier* done) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int r = 0; r < Rows; r += kBoxRows)
      fetch_box(to + (half * Rows + r) * kRowBytes, from, column + half * kHalfColumns, row + r,
                done);
}
/// Fetches bytes as they lie; addresses and their number by sixteens.
__device__ inline void fetch_bytes(std::uint32_t to, const void* from, int bytes, Barrier* done) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(shared_address(done))
      : "memory");
}
/// Sends a box as fetch_box brings it, what is past the matrix left out: a group of its own.
__device__ inline void store_box(const CUtensorMap& to, std::uint32_t from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(&to),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}
/// Waits until at most Pending of this thread's boxes are still to be read.
template <int Pending> __device__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
/// Waits until this thread's boxes are written.
__device__ inline void stores_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// ---- products ------------------------------------------------------------------------------

/// How the tensor core finds an operand: 128-byte swizzle, groups of 8 rows 1024 bytes apart;
/// `halves` bytes between the halves of a tile, where an operand spans both.
__device__ inline std::uint64_t operand_at(std::uint32_t address, int halves) {
  return static_cast<std::uint64_t>(address >> 4) | static_cast<std::uint64_t>(halves >> 4) << 16 |
         static_cast<std::uint64_t>(1024 >> 4) << 32 | std::uint64_t{1} << 62;
}
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most Pending groups of products are under way.
template <int Pending> __device__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
/// Says to the compiler that x changes here, so that no use of it moves before.
template <int N> __device__ void changed(float (&x)[N][4]) {
#pragma unroll
  for (auto& tile : x)
#pragma unroll
    for (float& value : tile) asm volatile("" : "+f"(value)::"memory");
}

// A product's operands: eight C tiles of four numbers, and the names of 32 and 64 of them.
#define MIXLORA_TILE(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define MIXLORA_TILES_8(d, j)                                                                 \
  MIXLORA_TILE(d, j), MIXLORA_TILE(d, j + 1), MIXLORA_TILE(d, j + 2), MIXLORA_TILE(d, j + 3), \
      MIXLORA_TILE(d, j + 4), MIXLORA_TILE(d, j + 5), MIXLORA_TILE(d, j + 6),                 \
      MIXLORA_TILE(d, j + 7)
#define MIXLORA_FIRST_32                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22," \
  "%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MIXLORA_FIRST_64                                              \
  MIXLORA_FIRST_32                                                    \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d = a b, or d += a b when `add`; d is 64 x N, its rows 16 w + ... warp w's C tiles. One inner
// step of 16. multiply_shared takes both operands as rows of the inner dimension's columns (a b^T);
// multiply_columns takes both, multiply_registers b as rows of the inner dimension.
__device__ inline void multiply_shared(float (&d)[8][4], std::uint64_t a, std::uint64_t b,
                                       bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %34, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MIXLORA_FIRST_32
      "}, %32, %33, p, 1, 1, 0, 0;}"
      : MIXLORA_TILES_8(d, 0)
      : "l"(a), "l"(b), "r"(add ? 1 : 0));
}
__device__ inline void multiply_shared(float (&d)[16][4], std::uint64_t a, std::uint64_t b,
                                       bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MIXLORA_FIRST_64
      "}, %64, %65, p, 1, 1, 0, 0;}"
      : MIXLORA_TILES_8(d, 0), MIXLORA_TILES_8(d, 8)
      : "l"(a), "l"(b), "r"(add ? 1 : 0));
}
__device__ inline void multiply_columns(float (&d)[16][4], std::uint64_t a, std::uint64_t b,
                                        bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MIXLORA_FIRST_64
      "}, %64, %65, p, 1, 1, 1, 1;}"
      : MIXLORA_TILES_8(d, 0), MIXLORA_TILES_8(d, 8)
      : "l"(a), "l"(b), "r"(add ? 1 : 0));
}
__device__ inline void multiply_registers(float (&d)[8][4], const unsigned (&a)[4], std::uint64_t b,
                                          bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MIXLORA_FIRST_32
      "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"
      : MIXLORA_TILES_8(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add ? 1 : 0));
}
__device__ inline void multiply_registers(float (&d)[16][4], const unsigned (&a)[4],
                                          std::uint64_t b, bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MIXLORA_FIRST_64
      "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;}"
      : MIXLORA_TILES_8(d, 0), MIXLORA_TILES_8(d, 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add ? 1 : 0));
}

#undef MIXLORA_TILE
#undef MIXLORA_TILES_8
#undef MIXLORA_FIRST_32
#undef MIXLORA_FIRST_64

/// x = rows a (64 of a tile of ARows) times rows b (8 N of a tile of BRows) transposed.
template <int ARows, int BRows, int N>
__device__ void multiply_rows(float (&x)[N][4], std::uint32_t a, std::uint32_t b) {
#pragma unroll
  for (int k = 0; k < kTileColumns / 16; ++k) {
    const int within = k % 4 * 32;
    multiply_shared(x, operand_at(a + k / 4 * ARows * kRowBytes + within, 16),
                    operand_at(b + k / 4 * BRows * kRowBytes + within, 16), k > 0);
  }
}
/// x (+)= p times the first 8 N rows of b, a tile of Rows; p the packed C tiles of 64 x 8 N.
template <int Rows, int N>
__device__ void multiply_packed(float (&x)[kTileColumns / 8][4], const unsigned (&p)[N][2],
                                std::uint32_t b, bool add) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    const unsigned a[4] = {p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1]};
    multiply_registers(x, a, operand_at(b + k * 16 * kRowBytes, Rows * kRowBytes), add || k > 0);
  }
}

}  // namespace mixlora::cuda
