// Products: cuBLASLt's plans, one for each shape met, algorithms chosen once for each kind of
// shape.
#pragma once
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>

#include "kernels/cuda/cuda_backend.h"

namespace mixlora {

struct CudaBackend::Products {
  static constexpr std::size_t kWorkspaceBytes = std::size_t{64} << 20;

  /// What decides a plan. Row-major; strides in elements, alignments in bytes (a power of two).
  struct Key {
    std::int64_t m, n, k, stride_a, stride_b, stride_c;
    std::uint32_t align_a, align_b, align_c;
    DType type, type_c;
    bool transpose_a, transpose_b, adds;
    auto operator<=>(const Key&) const = default;
  };
  struct Plan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
  };

  Products(std::byte* workspace, cudaStream_t stream);
  ~Products();
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;
  const Plan& plan(const Key& key);
  /// The shape that stands for `key` when an algorithm is chosen.
  static Key kind_of(Key key);
  static Plan describe(const Key& key);
  static void release(const Plan& p);
  cublasLtMatmulAlgo_t ask(const Key& key, const Plan& p) const;
  cublasLtMatmulAlgo_t algorithm(const Key& key, const Plan& p);

  cublasLtHandle_t handle = nullptr;
  std::byte* workspace;
  cudaStream_t stream;
  std::map<Key, Plan> plans;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms;  // by kind_of
};

}  // namespace mixlora
