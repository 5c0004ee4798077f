#include "kernels/cpu/gemm.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cpu/parallel.h"

#ifdef MIXLORA_HAS_ONEDNN
#include <dnnl.h>
#endif

namespace mixlora::cpu {
namespace {

const float* element(const Factor& x, std::int64_t row, std::int64_t col) {
  return x.transposed ? x.data + col * x.stride + row : x.data + row * x.stride + col;
}

#ifndef MIXLORA_HAS_ONEDNN
constexpr std::int64_t kInner = 256, kColumns = 16, kRows = 4;  // one tile of b stays in L1

/// acc (4, 16) += a (4, k) b (k, 16), both packed along k.
MIXLORA_CLONES void tile(float* acc, const float* a, const float* b, std::int64_t k) {
  float sums[kRows][kColumns];
  for (std::int64_t i = 0; i < kRows; ++i)
    for (std::int64_t j = 0; j < kColumns; ++j) sums[i][j] = acc[i * kColumns + j];
  for (std::int64_t p = 0; p < k; ++p)
    for (std::int64_t i = 0; i < kRows; ++i) {
      const float s = a[p * kRows + i];
#pragma omp simd
      for (std::int64_t j = 0; j < kColumns; ++j) sums[i][j] += s * b[p * kColumns + j];
    }
  for (std::int64_t i = 0; i < kRows; ++i)
    for (std::int64_t j = 0; j < kColumns; ++j) acc[i * kColumns + j] = sums[i][j];
}
#endif

}  // namespace

void gemm_block(float* c, std::int64_t stride_c, Factor a, Factor b, std::int64_t m, std::int64_t n,
                std::int64_t k, float alpha, float beta) {
#ifdef MIXLORA_HAS_ONEDNN
  const auto wide = [](std::int64_t x) { return std::max<std::int64_t>(x, 1); };
  const auto status = dnnl_sgemm(a.transposed ? 'T' : 'N', b.transposed ? 'T' : 'N', m, n, k, alpha,
                                 a.data, wide(a.stride), b.data, wide(b.stride), beta, c, stride_c);
  if (status != dnnl_success)
    throw std::runtime_error("oneDNN: sgemm failed, status " + std::to_string(status));
#else
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j)
      c[i * stride_c + j] = beta == 0 ? 0 : beta * c[i * stride_c + j];
  float packed_a[kInner * kRows], packed_b[kInner * kColumns], sums[kRows * kColumns];
  for (std::int64_t p0 = 0; p0 < k; p0 += kInner) {
    const std::int64_t inner = std::min(kInner, k - p0);
    for (std::int64_t j0 = 0; j0 < n; j0 += kColumns) {
      const std::int64_t cols = std::min(kColumns, n - j0);
      std::fill_n(packed_b, inner * kColumns, 0.0F);
      for (std::int64_t p = 0; p < inner; ++p)
        for (std::int64_t j = 0; j < cols; ++j)
          packed_b[p * kColumns + j] = *element(b, p0 + p, j0 + j);
      for (std::int64_t i0 = 0; i0 < m; i0 += kRows) {
        const std::int64_t rows = std::min(kRows, m - i0);
        std::fill_n(packed_a, inner * kRows, 0.0F);
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t p = 0; p < inner; ++p)
            packed_a[p * kRows + i] = *element(a, i0 + i, p0 + p);
        std::fill_n(sums, kRows * kColumns, 0.0F);
        tile(sums, packed_a, packed_b, inner);
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t j = 0; j < cols; ++j)
            c[(i0 + i) * stride_c + j0 + j] += alpha * sums[i * kColumns + j];
      }
    }
  }
#endif
}

void gemm(float* c, std::int64_t stride_c, Factor a, Factor b, std::int64_t m, std::int64_t n,
          std::int64_t k, float alpha, float beta) {
  if (m == 0 || n == 0) return;
  // Few rows against many columns: cut columns, else every block would pack all of b again.
  const bool by_columns = n > 4 * m;
  const std::int64_t size = by_columns ? 192 : 96, length = by_columns ? n : m;
  const std::int64_t blocks = 2 * m * n * k < (1 << 18) ? 1 : (length + size - 1) / size;
  parallel_for(blocks, [&](std::int64_t i) {
    const std::int64_t from = i * size,
                       count = blocks == 1 ? length : std::min(size, length - from);
    if (by_columns)
      gemm_block(c + from, stride_c, a, {element(b, 0, from), b.stride, b.transposed}, m, count, k,
                 alpha, beta);
    else
      gemm_block(c + from * stride_c, stride_c, {element(a, from, 0), a.stride, a.transposed}, b,
                 count, n, k, alpha, beta);
  });
}

}  // namespace mixlora::cpu
