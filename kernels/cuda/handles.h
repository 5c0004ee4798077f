// Errors of CUDA and cuBLASLt as exceptions that say what was tried.
#pragma once
#include <new>
#include <stdexcept>
#include <string>

#include <cublasLt.h>
#include <cuda_runtime_api.h>

namespace mixlora::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // else the next launch would report it again
    throw std::bad_alloc();
  }
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}
inline void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("cuBLASLt: ") + what + ": " +
                             cublasLtGetStatusString(status));
}

}  // namespace mixlora::cuda
