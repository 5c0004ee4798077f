#include "kernels/cpu/gemm.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/parallel.h"

#define MIXLORA_INLINE inline __attribute__((always_inline))

namespace mixlora::cpu {
namespace {

/// Sixteen numbers: one register of AVX-512, two of AVX2, four of SSE.
using Vector = float __attribute__((vector_size(64)));
constexpr std::int64_t kWidth = 16;

MIXLORA_INLINE void load(Vector& v, const float* p) { std::memcpy(&v, p, sizeof v); }
MIXLORA_INLINE void store(float* p, const Vector& v) { std::memcpy(p, &v, sizeof v); }

/// A register tile: (Rows, 16 Vectors) numbers of c, over all of k.
template <int Rows, int Vectors, bool Transposed>
MIXLORA_INLINE void tile(float* c, std::int64_t stride_c, const float* a, std::int64_t stride_a,
                         const float* b, std::int64_t stride_b, std::int64_t k, float alpha,
                         float beta) {
  Vector sums[Rows][Vectors] = {};
  for (std::int64_t p = 0; p < k; ++p) {
    Vector right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) load(right[v], b + p * stride_b + v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const float left = Transposed ? a[p * stride_a + i] : a[i * stride_a + p];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* to = c + i * stride_c + v * kWidth;
      Vector sum = alpha * sums[i][v];
      if (beta != 0) {
        Vector old;
        load(old, to);
        sum += beta * old;
      }
      store(to, sum);
    }
}

/// All rows of one panel of 16 Vectors columns: tiles of Rows, then one at a time.
template <int Rows, int Vectors, bool Transposed>
MIXLORA_INLINE void panel(float* c, std::int64_t stride_c, const float* a, std::int64_t stride_a,
                          const float* b, std::int64_t stride_b, std::int64_t m, std::int64_t k,
                          float alpha, float beta) {
  const std::int64_t step = Transposed ? 1 : stride_a;
  std::int64_t i = 0;
  for (; i + Rows <= m; i += Rows)
    tile<Rows, Vectors, Transposed>(c + i * stride_c, stride_c, a + i * step, stride_a, b, stride_b,
                                    k, alpha, beta);
  if constexpr (Rows > 4)
    for (; i + 4 <= m; i += 4)
      tile<4, Vectors, Transposed>(c + i * stride_c, stride_c, a + i * step, stride_a, b, stride_b,
                                   k, alpha, beta);
  for (; i < m; ++i)
    tile<1, Vectors, Transposed>(c + i * stride_c, stride_c, a + i * step, stride_a, b, stride_b, k,
                                 alpha, beta);
}

/// The last columns, fewer than 16: b's are copied beside zeros, c's through a tile of its own.
template <int Rows, bool Transposed>
MIXLORA_INLINE void last_columns(float* c, std::int64_t stride_c, const float* a,
                                 std::int64_t stride_a, const float* b, std::int64_t stride_b,
                                 std::int64_t m, std::int64_t n, std::int64_t k, float alpha,
                                 float beta) {
  constexpr std::int64_t kInner = 256, kBlock = 64;
  float right[kInner * kWidth] = {}, sums[kBlock * kWidth];
  const std::int64_t step = Transposed ? 1 : stride_a;
  for (std::int64_t i0 = 0; i0 < m; i0 += kBlock) {
    const std::int64_t rows = std::min(kBlock, m - i0);
    for (std::int64_t p0 = 0; p0 < k || p0 == 0; p0 += kInner) {
      const std::int64_t inner = std::min(kInner, k - p0);
      for (std::int64_t p = 0; p < inner; ++p)
        std::copy_n(b + (p0 + p) * stride_b, n, right + p * kWidth);
      panel<Rows, 1, Transposed>(sums, kWidth, a + i0 * step + p0 * (Transposed ? stride_a : 1),
                                 stride_a, right, kWidth, rows, inner, 1, p0 == 0 ? 0 : 1);
    }
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        float& to = c[(i0 + i) * stride_c + j];
        to = alpha * sums[i * kWidth + j] + (beta == 0 ? 0 : beta * to);
      }
  }
}

template <int Rows, int Vectors, bool Transposed>
MIXLORA_INLINE void product(float* c, std::int64_t stride_c, const float* a, std::int64_t stride_a,
                            const float* b, std::int64_t stride_b, std::int64_t m, std::int64_t n,
                            std::int64_t k, float alpha, float beta) {
  std::int64_t j = 0;
  for (; j + Vectors * kWidth <= n; j += Vectors * kWidth)
    panel<Rows, Vectors, Transposed>(c + j, stride_c, a, stride_a, b + j, stride_b, m, k, alpha,
                                     beta);
  if constexpr (Vectors > 1)
    for (; j + kWidth <= n; j += kWidth)
      panel<Rows, 1, Transposed>(c + j, stride_c, a, stride_a, b + j, stride_b, m, k, alpha, beta);
  if (j < n)
    last_columns<Rows, Transposed>(c + j, stride_c, a, stride_a, b + j, stride_b, m, n - j, k,
                                   alpha, beta);
}

// One body for three instruction sets; the tile fills each one's registers.
#define MIXLORA_PRODUCT(NAME, TARGET, ROWS, VECTORS)                                            \
  TARGET void NAME(float* c, std::int64_t stride_c, Factor a, const float* b,                   \
                   std::int64_t stride_b, std::int64_t m, std::int64_t n, std::int64_t k,       \
                   float alpha, float beta) {                                                   \
    if (a.transposed)                                                                           \
      product<ROWS, VECTORS, true>(c, stride_c, a.data, a.stride, b, stride_b, m, n, k, alpha,  \
                                   beta);                                                       \
    else                                                                                        \
      product<ROWS, VECTORS, false>(c, stride_c, a.data, a.stride, b, stride_b, m, n, k, alpha, \
                                    beta);                                                      \
  }
MIXLORA_PRODUCT(product_plain, , 2, 1)
#if defined(__x86_64__)
MIXLORA_PRODUCT(product_avx2, __attribute__((target("avx2,fma"))), 4, 1)
MIXLORA_PRODUCT(product_avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw"))), 8, 2)
#endif

auto chosen_product() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
    return product_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return product_avx2;
#endif
  return product_plain;
}

/// Rows [from, to) of op(b), columns [0, n), as plain rows of `stride` numbers.
void pack(float* packed, std::int64_t stride, Factor b, std::int64_t from, std::int64_t to,
          std::int64_t column, std::int64_t n) {
  if (!b.transposed) {
    for (std::int64_t p = from; p < to; ++p)
      std::copy_n(b.data + p * b.stride + column, n, packed + p * stride);
    return;
  }
  constexpr std::int64_t kBlock = 16;  // a block's lines stay in the first cache
  for (std::int64_t j0 = 0; j0 < n; j0 += kBlock)
    for (std::int64_t p = from; p < to; ++p)
      for (std::int64_t j = j0; j < std::min(n, j0 + kBlock); ++j)
        packed[p * stride + j] = b.data[(column + j) * b.stride + p];
}

}  // namespace

void multiply(float* c, std::int64_t stride_c, Factor a, const float* b, std::int64_t stride_b,
              std::int64_t m, std::int64_t n, std::int64_t k, float alpha, float beta) {
  static const auto run = chosen_product();
  run(c, stride_c, a, b, stride_b, m, n, k, alpha, beta);
}

void gemm(float* c, std::int64_t stride_c, Factor a, Factor b, std::int64_t m, std::int64_t n,
          std::int64_t k, float alpha, float beta, float* room) {
  if (m == 0 || n == 0) return;
  constexpr std::int64_t kRows = 64, kColumns = 96, kInner = 4096, kFewRows = 64, kSmall = 1 << 16;
  const auto left = [&](std::int64_t row, std::int64_t p) {
    const float* at = a.transposed ? a.data + p * a.stride + row : a.data + row * a.stride + p;
    return Factor{at, a.stride, a.transposed};
  };
  // Few rows of c: b is read where it lies, once or a few times.
  if (!b.transposed && m <= kFewRows) {
    const std::int64_t blocks = m * n * k < kSmall ? 1 : (n + kColumns - 1) / kColumns;
    parallel_for(blocks, [&](std::int64_t block) {
      const std::int64_t j = block * kColumns, count = blocks == 1 ? n : std::min(kColumns, n - j);
      multiply(c + j, stride_c, a, b.data + j, b.stride, m, count, k, alpha, beta);
    });
    return;
  }
  // Else b in groups of columns that fit `room`, as plain rows, shared by all rows of c.
  for (std::int64_t p = 0; p < k || p == 0; p += kInner) {
    const std::int64_t inner = std::min(kInner, k - p);
    const std::int64_t width =
        std::clamp<std::int64_t>(kGemmRoom / std::max<std::int64_t>(inner, 1) / 32 * 32, 32, 2048);
    const Factor right{b.transposed ? b.data + p : b.data + p * b.stride, b.stride, b.transposed};
    for (std::int64_t j = 0; j < n; j += width) {
      const std::int64_t count = std::min(width, n - j);
      constexpr std::int64_t kPack = 64;
      const std::int64_t packs = inner * count < kSmall ? 1 : (inner + kPack - 1) / kPack;
      parallel_for(packs, [&](std::int64_t i) {
        pack(room, count, right, i * kPack, packs == 1 ? inner : std::min(inner, (i + 1) * kPack),
             j, count);
      });
      const std::int64_t blocks = m * count * inner < kSmall ? 1 : (m + kRows - 1) / kRows;
      parallel_for(blocks, [&](std::int64_t block) {
        const std::int64_t i = block * kRows, rows = blocks == 1 ? m : std::min(kRows, m - i);
        multiply(c + i * stride_c + j, stride_c, left(i, p), room, count, rows, count, inner, alpha,
                 p == 0 ? beta : 1);
      });
    }
  }
}

}  // namespace mixlora::cpu
