// Blocks that run together (compute capability 9.0) and write to each other's shared memory.
#pragma once
#include "kernels/cuda/launch.cuh"

namespace mixlora::cuda {

/// Nobody passes before all threads of the cluster's blocks have come, and what they wrote is seen.
__device__ inline void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/// The address of the same place in a block's shared memory, for store_there.
__device__ inline std::uint32_t place_in(int block, std::uint32_t place) {
  std::uint32_t there = place;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(place), "r"(block));
#endif
  return there;
}
__device__ inline void store_there(std::uint32_t there, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(x), "f"(y),
               "f"(z), "f"(w)
               : "memory");
#endif
}

}  // namespace mixlora::cuda
