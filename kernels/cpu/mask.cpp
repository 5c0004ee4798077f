#include "kernels/cpu/mask.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 sees its own undefined operands
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "kernels/cpu/parallel.h"

namespace mixlora::cpu {
namespace {

constexpr std::int64_t kBlocks = 32, kColumns = 8 * kBlocks;  // calls of Philox side by side

/// What one row's masks are drawn from.
struct Draw {
  RandomKey key;
  std::uint32_t layer, site, step, sample, position;
};

/// The random sixteen bits of kColumns neighbouring columns, from column 8 * block on.
MIXLORA_CLONES void column_bits(std::uint16_t* bits, const Draw& d, std::uint32_t block) {
  std::uint32_t words[4][kBlocks], ordered[4 * kBlocks];
#pragma omp simd
  for (std::int64_t b = 0; b < kBlocks; ++b) {
    const Philox4 four = row_bits(d.key, d.layer, d.site, d.step, d.sample, d.position,
                                  block + static_cast<std::uint32_t>(b));
    words[0][b] = four.v[0];
    words[1][b] = four.v[1];
    words[2][b] = four.v[2];
    words[3][b] = four.v[3];
  }
  for (std::int64_t b = 0; b < kBlocks; ++b)
    for (std::int64_t w = 0; w < 4; ++w) ordered[4 * b + w] = words[w][b];
  static_assert(std::endian::native == std::endian::little, "a word's low half comes first");
  std::memcpy(bits, ordered, sizeof ordered);
}

#if defined(__x86_64__)
#define MIXLORA_AVX512 __attribute__((target("avx512f"), always_inline)) inline
MIXLORA_AVX512 __m512i every_lane(std::uint32_t x) {
  return _mm512_set1_epi64(static_cast<std::int64_t>(x));
}
/// Of each lane, b's low half above a's.
MIXLORA_AVX512 __m512i low_halves(__m512i a, __m512i b) {
  return _mm512_mask_blend_epi32(0xAAAA, a, _mm512_slli_epi64(b, 32));
}
/// As column_bits, with every word of Philox in the low half of a 64-bit lane: a round is then two
/// multiplications, two shifts and two three-way xors, and what is above the low half does not
/// matter. Compilers do not find this form.
__attribute__((target("avx512f"))) void column_bits_avx512(std::uint16_t* bits, const Draw& d,
                                                           std::uint32_t block) {
  constexpr int kSets = kBlocks / 8;  // independent, to fill the multiplier's pipeline
  const __m512i m0 = every_lane(0xD2511F53U), m1 = every_lane(0xCD9E8D57U);
  __m512i c0[kSets], c1[kSets], c2[kSets], c3[kSets];
  for (int s = 0; s < kSets; ++s) {
    c0[s] = _mm512_add_epi64(every_lane(block + static_cast<std::uint32_t>(8 * s)),
                             _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    c1[s] = every_lane(d.position);
    c2[s] = every_lane(d.sample);
    c3[s] = every_lane((d.layer << 20) | (d.site << 12));
  }
  std::uint32_t k0 = d.key.k0 ^ d.step, k1 = d.key.k1;
  for (int round = 0; round < kMaskRounds; ++round) {
    const __m512i key0 = every_lane(k0), key1 = every_lane(k1);
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) {
      const __m512i p0 = _mm512_mul_epu32(m0, c0[s]), p1 = _mm512_mul_epu32(m1, c2[s]);
      c0[s] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[s], key0, 0x96);
      c1[s] = p1;
      c2[s] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[s], key1, 0x96);
      c3[s] = p0;
    }
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  const __m512i first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0),
                second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  for (int s = 0; s < kSets; ++s) {
    const __m512i low = low_halves(c0[s], c1[s]), high = low_halves(c2[s], c3[s]);
    _mm512_storeu_si512(bits + 64 * s, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(bits + 64 * s + 32, _mm512_permutex2var_epi64(low, second, high));
  }
}
#endif

auto chosen_bits() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return column_bits_avx512;
#endif
  return +[](std::uint16_t* bits, const Draw& d, std::uint32_t block) {
    column_bits(bits, d, block);
  };
}

enum class Use { mask, multiply, add };

template <Use use>
inline __attribute__((always_inline)) void each_column(float* y, const float* x, const Dropout& d,
                                                       const std::int32_t* id, std::int64_t from,
                                                       std::int64_t n) {
  static const auto bits_of = chosen_bits();
  const Draw draw{random_key(d.seed, Purpose::dropout),
                  static_cast<std::uint32_t>(d.layer),
                  d.site,
                  static_cast<std::uint32_t>(id[2]),
                  static_cast<std::uint32_t>(id[0]),
                  static_cast<std::uint32_t>(id[1])};
  const auto threshold = static_cast<std::int32_t>(dropout_threshold(d.p));
  const float scale = dropout_scale(d.p);
  for (std::int64_t begin = 0; begin < n; begin += kColumns) {
    std::uint16_t bits[kColumns];
    bits_of(bits, draw, static_cast<std::uint32_t>((from + begin) / 8));
    const std::int64_t count = std::min(kColumns, n - begin);
#pragma omp simd
    for (std::int64_t c = 0; c < count; ++c) {
      const float mask = static_cast<std::int32_t>(bits[c]) < threshold ? 0.0F : scale;
      if constexpr (use == Use::mask) y[begin + c] = mask;
      if constexpr (use == Use::multiply) y[begin + c] = x[begin + c] * mask;
      if constexpr (use == Use::add) y[begin + c] += x[begin + c] * mask;
    }
  }
}

}  // namespace

MIXLORA_CLONES void mask_row(float* mask, const Dropout& d, const std::int32_t* id,
                             std::int64_t from, std::int64_t n) {
  each_column<Use::mask>(mask, nullptr, d, id, from, n);
}
MIXLORA_CLONES void masked_row(float* y, const float* x, const Dropout& d, const std::int32_t* id,
                               std::int64_t n) {
  each_column<Use::multiply>(y, x, d, id, 0, n);
}
MIXLORA_CLONES void add_masked_row(float* y, const float* x, const Dropout& d,
                                   const std::int32_t* id, std::int64_t n) {
  each_column<Use::add>(y, x, d, id, 0, n);
}

}  // namespace mixlora::cpu
