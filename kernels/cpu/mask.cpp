#include "kernels/cpu/mask.h"

#include <algorithm>

#include "kernels/cpu/parallel.h"

namespace mixlora::cpu {

MIXLORA_CLONES void mask_row(float* mask, const Dropout& d, const std::int32_t* id,
                             std::int64_t n) {
  const RandomKey key = random_key(d.seed, Purpose::dropout);
  const std::uint32_t threshold = dropout_threshold(d.p);
  const float scale = dropout_scale(d.p);
  const auto sample = static_cast<std::uint32_t>(id[0]),
             position = static_cast<std::uint32_t>(id[1]), step = static_cast<std::uint32_t>(id[2]),
             layer = static_cast<std::uint32_t>(d.layer);
  constexpr std::int64_t kBlocks = 16;
  for (std::int64_t from = 0; from < n; from += 8 * kBlocks) {
    std::uint32_t words[4][kBlocks];
#pragma omp simd
    for (std::int64_t b = 0; b < kBlocks; ++b) {
      const Philox4 bits = row_bits(key, layer, d.site, step, sample, position,
                                    static_cast<std::uint32_t>(from / 8 + b));
      words[0][b] = bits.v[0];
      words[1][b] = bits.v[1];
      words[2][b] = bits.v[2];
      words[3][b] = bits.v[3];
    }
    const std::int64_t end = std::min(n, from + 8 * kBlocks);
    for (std::int64_t c = from; c < end; ++c) {
      const std::int64_t at = c - from;
      const std::uint32_t bits = (words[at % 8 / 2][at / 8] >> (16 * (at % 2))) & 0xffffU;
      mask[c] = bits < threshold ? 0.0F : scale;
    }
  }
}

}  // namespace mixlora::cpu
