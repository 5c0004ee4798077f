// exp and friends as straight-line code that the compiler vectorises.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace mixlora::cpu {

/// e^x to about 2 ulp on [-87, 88]; smaller arguments give e^-87, larger e^88.
inline float fast_exp(float x) {
  x = x < -87.0F ? -87.0F : x > 88.0F ? 88.0F : x;
  const float n = std::floor(x * 1.44269504F + 0.5F);  // x = n log 2 + r, |r| <= log 2 / 2
  float r = x - n * 0.693359375F;
  r = r + n * 2.12194440e-4F;
  float p = 1.9841270e-4F;  // Taylor to r^7: its remainder is under 1e-8 relative here
  p = p * r + 1.3888889e-3F;
  p = p * r + 8.3333333e-3F;
  p = p * r + 4.1666667e-2F;
  p = p * r + 1.6666667e-1F;
  p = p * r + 0.5F;
  p = p * r * r + r + 1.0F;
  const auto bits = (static_cast<std::int32_t>(n) + 127) << 23;
  return p * std::bit_cast<float>(bits);
}
inline float sigmoid(float x) { return 1.0F / (1.0F + fast_exp(-x)); }
inline float fast_tanh(float x) { return 2.0F * sigmoid(2.0F * x) - 1.0F; }

}  // namespace mixlora::cpu
