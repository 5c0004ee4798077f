// Matrix products in f32 by register tiles. Every number is summed over k in order, so neither
// blocks nor threads change a bit.
#pragma once
#include <cstdint>

namespace mixlora::cpu {

/// op(x) as the product reads it: row-major, `stride` numbers between the stored rows.
struct Factor {
  const float* data = nullptr;
  std::int64_t stride = 0;
  bool transposed = false;
};

/// Numbers that `gemm` needs of working memory.
inline constexpr std::int64_t kGemmRoom = std::int64_t{1} << 18;

/// c (m, n) = alpha op(a) b + beta c, b (k, n) row-major, on the calling thread. With beta 0 c is
/// only written.
void multiply(float* c, std::int64_t stride_c, Factor a, const float* b, std::int64_t stride_b,
              std::int64_t m, std::int64_t n, std::int64_t k, float alpha, float beta);

/// c (m, n) = alpha op(a) op(b) + beta c in parallel; `room` holds kGemmRoom numbers.
void gemm(float* c, std::int64_t stride_c, Factor a, Factor b, std::int64_t m, std::int64_t n,
          std::int64_t k, float alpha, float beta, float* room);

}  // namespace mixlora::cpu
