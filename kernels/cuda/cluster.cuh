// Blocks that run together (compute capability 9.0) and write to each other's shared memory.
#pragma once
#include <map>

#include "kernels/cuda/launch.cuh"

namespace mixlora::cuda {

/// This thread has come; what it wrote is seen behind cluster_wait.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
/// Nobody passes before all threads of the cluster's blocks have come.
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_meet() {
  cluster_arrive();
  cluster_wait();
}
/// The address of the same place in a block's shared memory, for store_there.
__device__ inline std::uint32_t place_in(int block, std::uint32_t place) {
  std::uint32_t there = place;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(place), "r"(block));
#endif
  return there;
}
__device__ inline void store_there(std::uint32_t there, std::int32_t x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(there), "r"(x) : "memory");
#endif
}
__device__ inline void store_there(std::uint32_t there, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(x), "f"(y),
               "f"(z), "f"(w)
               : "memory");
#endif
}

/// Whether this device has clusters and the file that asks was built for them: its `kernel`, always
/// the same.
template <class Kernel> bool in_clusters(Kernel* kernel) {
  thread_local std::map<int, bool> known;
  int device = 0;
  check(cudaGetDevice(&device), "the device");
  const auto [found, added] = known.try_emplace(device, false);
  if (added) {
    constexpr int kFirst = 90;
    cudaFuncAttributes built{};
    check(cudaFuncGetAttributes(&built, kernel), "a kernel of clusters");
    found->second = built.ptxVersion >= kFirst;
  }
  return found->second;
}
/// Launches a kernel in clusters of so many blocks; of one, without.
template <class... Parameters, class... Arguments>
void launch_in_clusters(dim3 cluster, void (*kernel)(Parameters...), dim3 grid, int threads,
                        std::size_t shared, cudaStream_t stream, const char* name,
                        const Arguments&... arguments) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace mixlora::cuda
