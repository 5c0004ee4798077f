#include "kernels/cpu/mask.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/cpu/parallel.h"

namespace mixlora::cpu {
namespace {

constexpr std::int64_t kBlocks = 16, kColumns = 8 * kBlocks;  // calls of Philox side by side

/// The random sixteen bits of kColumns neighbouring columns, from column 8 * block on.
inline __attribute__((always_inline)) void column_bits(std::uint16_t* bits, RandomKey key,
                                                       const Dropout& d, const std::int32_t* id,
                                                       std::int64_t block) {
  const auto sample = static_cast<std::uint32_t>(id[0]),
             position = static_cast<std::uint32_t>(id[1]), step = static_cast<std::uint32_t>(id[2]),
             layer = static_cast<std::uint32_t>(d.layer), at = static_cast<std::uint32_t>(block),
             site = d.site;
  std::uint32_t words[4][kBlocks], ordered[4 * kBlocks];
#pragma omp simd
  for (std::int64_t b = 0; b < kBlocks; ++b) {
    const Philox4 four =
        row_bits(key, layer, site, step, sample, position, at + static_cast<std::uint32_t>(b));
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

enum class Use { mask, multiply, add };

template <Use use>
inline __attribute__((always_inline)) void each_column(float* y, const float* x, const Dropout& d,
                                                       const std::int32_t* id, std::int64_t from,
                                                       std::int64_t n) {
  const RandomKey key = random_key(d.seed, Purpose::dropout);
  const auto threshold = static_cast<std::int32_t>(dropout_threshold(d.p));
  const float scale = dropout_scale(d.p);
  for (std::int64_t begin = 0; begin < n; begin += kColumns) {
    std::uint16_t bits[kColumns];
    column_bits(bits, key, d, id, (from + begin) / 8);
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
