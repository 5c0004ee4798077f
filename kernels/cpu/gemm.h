// Matrix products in f32: blocks fixed by the shape alone, so threads change no bit.
#pragma once
#include <cstdint>

namespace mixlora::cpu {

/// op(x) as the product reads it: row-major, `stride` numbers between the stored rows.
struct Factor {
  const float* data = nullptr;
  std::int64_t stride = 0;
  bool transposed = false;
};

/// c (m, n) = alpha op(a) op(b) + beta c, inner length k, on the calling thread.
void gemm_block(float* c, std::int64_t stride_c, Factor a, Factor b, std::int64_t m, std::int64_t n,
                std::int64_t k, float alpha, float beta);

/// The same in parallel: c is cut into blocks whose size depends on the shape only.
void gemm(float* c, std::int64_t stride_c, Factor a, Factor b, std::int64_t m, std::int64_t n,
          std::int64_t k, float alpha, float beta);

}  // namespace mixlora::cpu
