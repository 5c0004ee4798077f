// Philox 4x32-10: counter-based random numbers, one text for host and device.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MIXLORA_HOST_DEVICE __host__ __device__
#else
#define MIXLORA_HOST_DEVICE
#endif

namespace mixlora {

/// What a random number is for; part of the key, so that no two uses share a stream.
enum class Purpose : std::uint32_t {
  init = 1,
  dropout = 2,
  jitter = 3,
  shuffle = 4,
  test = 5,
  bootstrap = 6
};

/// Where in a layer a mask is applied; part of the counter.
/// `expert_down + e` is the input of expert e's down projection.
enum Site : std::uint32_t {
  site_qkv = 0,
  site_o = 1,
  site_ffn = 2,
  site_ffn_output = 3,
  site_router = 4,
  site_expert_down = 16
};

struct Philox4 {
  std::uint32_t v[4];
};

/// Philox 4x32, of ten rounds unless said otherwise               [Salmon et al. 2011, section 3.3]
template <int Rounds = 10>
MIXLORA_HOST_DEVICE inline Philox4 philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2,
                                          std::uint32_t c3, std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < Rounds; ++round) {
    const std::uint64_t p0 = 0xD2511F53ULL * c0;
    const std::uint64_t p1 = 0xCD9E8D57ULL * c2;
    const auto hi0 = static_cast<std::uint32_t>(p0 >> 32), lo0 = static_cast<std::uint32_t>(p0);
    const auto hi1 = static_cast<std::uint32_t>(p1 >> 32), lo1 = static_cast<std::uint32_t>(p1);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return {{c0, c1, c2, c3}};
}

/// The stream of one (seed, purpose): the key of Philox. Seeds are mixed first (SplitMix64's
/// finaliser), so that neighbouring seeds and steps do not meet in one key.
struct RandomKey {
  std::uint32_t k0 = 0, k1 = 0;
};
MIXLORA_HOST_DEVICE inline RandomKey random_key(std::uint64_t seed, Purpose purpose) {
  std::uint64_t z = seed + 0x9E3779B97F4A7C15ULL * (1 + static_cast<std::uint64_t>(purpose));
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  z ^= z >> 31;
  return {static_cast<std::uint32_t>(z), static_cast<std::uint32_t>(z >> 32)};
}

/// Rounds of row_bits: the fewest that pass every test of the paper, for a mask is drawn three
/// times a step for each element of the widest rows.                  [Salmon et al. 2011, table 2]
constexpr int kMaskRounds = 7;

/// Sixteen random bits for each of eight neighbouring columns of one row; column = 8 * block + i
/// takes bits 16 * (i % 2) of word i / 2. A row is (sample, position) at a training step, so its
/// bits do not depend on what else is in the batch.
///   counter = (block, position, sample, layer << 20 | site << 12), key = stream ^ step
MIXLORA_HOST_DEVICE inline Philox4 row_bits(RandomKey key, std::uint32_t layer, std::uint32_t site,
                                            std::uint32_t step, std::uint32_t sample,
                                            std::uint32_t position, std::uint32_t block) {
  return philox<kMaskRounds>(block, position, sample, (layer << 20) | (site << 12), key.k0 ^ step,
                             key.k1);
}

/// An element is dropped when its 16 bits are below this; the true rate is threshold / 65536.
MIXLORA_HOST_DEVICE inline std::uint32_t dropout_threshold(float p) {
  return static_cast<std::uint32_t>(p * 65536.0F + 0.5F);
}
/// 1 / (1 - true rate), so that the expectation is exact.
MIXLORA_HOST_DEVICE inline float dropout_scale(float p) {
  return 65536.0F / static_cast<float>(65536U - dropout_threshold(p));
}

/// Uniform on (0, 1) from 32 bits.
MIXLORA_HOST_DEVICE inline double unit_open(std::uint32_t bits) {
  return (static_cast<double>(bits) + 0.5) * (1.0 / 4294967296.0);
}

}  // namespace mixlora
