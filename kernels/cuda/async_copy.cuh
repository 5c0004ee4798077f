// Copies from global to shared memory that run while the warp goes on, and reads of 8 x 8 matrices.
#pragma once
#include "kernels/cuda/launch.cuh"

namespace mixlora::cuda {

/// An address in shared memory as the copy instructions want it.
__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
/// Sixteen bytes on their way, past L1; zeros when they are not there. Both addresses are aligned.
__device__ inline void fetch16(std::uint32_t to, const void* from, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
/// The same by way of L1, for what neighbouring warps read too.
__device__ inline void fetch16_near(std::uint32_t to, const void* from, bool there = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
/// The same, L2 reading 256 bytes at once: for a narrow piece of a row whose neighbours are wanted
/// soon. Memory gives 64 bytes of a row at a time at half its rate.
__device__ inline void fetch16_wide(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
/// What is read again and again while much else streams by: L2 gives it up last.
__device__ inline std::uint64_t kept_longest() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline void fetch16(std::uint32_t to, const void* from, bool there,
                               std::uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(from), "r"(there ? 16 : 0), "l"(policy)
               : "memory");
}
/// The same for eight and for four bytes.
__device__ inline void fetch8(std::uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void fetch4(std::uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(there ? 4 : 0)
               : "memory");
}
__device__ inline void fetch_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most N of this thread's groups are on their way.
template <int N> __device__ void fetch_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// Four 8 x 8 matrices of 16-bit numbers; lane 8 m + r gives the address of row r of matrix m, and
/// lane 4 g + q gets numbers 2q, 2q + 1 of row g (trans: of column g).
__device__ inline void read_matrices(unsigned (&to)[4], std::uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}
__device__ inline void read_matrices_trans(unsigned (&to)[4], std::uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

}  // namespace mixlora::cuda
