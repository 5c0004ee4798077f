#include "kernels/cpu/activation.h"

#include <cmath>
#include <numbers>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vector_math.h"

namespace mixlora::cpu {
namespace {

MIXLORA_CLONES void silu(float* act, float* slope, const float* u, std::int64_t n) {
  if (slope == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) act[i] = u[i] * sigmoid(u[i]);
    return;
  }
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float s = sigmoid(u[i]);
    act[i] = u[i] * s;
    slope[i] = s * (1.0F + u[i] * (1.0F - s));
  }
}
/// tanh form                                                        [Hendrycks & Gimpel 2016,
/// section 2]
MIXLORA_CLONES void gelu_new(float* act, float* slope, const float* u, std::int64_t n) {
  constexpr float kRoot = 0.7978845608F, kCubic = 0.044715F;  // sqrt(2 / pi)
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = u[i], t = fast_tanh(kRoot * (x + kCubic * x * x * x));
    act[i] = 0.5F * x * (1.0F + t);
    if (slope != nullptr)
      slope[i] =
          0.5F * (1.0F + t) + 0.5F * x * (1.0F - t * t) * kRoot * (1.0F + 3.0F * kCubic * x * x);
  }
}
void gelu(float* act, float* slope, const float* u, std::int64_t n) {
  const float inverse_root_2 = 1.0F / std::numbers::sqrt2_v<float>;
  const float density = std::numbers::inv_sqrtpi_v<float> * inverse_root_2;  // 1 / sqrt(2 pi)
  for (std::int64_t i = 0; i < n; ++i) {
    const float cdf = 0.5F * (1.0F + std::erf(u[i] * inverse_root_2));
    act[i] = u[i] * cdf;
    if (slope != nullptr) slope[i] = cdf + u[i] * density * std::exp(-0.5F * u[i] * u[i]);
  }
}
void relu(float* act, float* slope, const float* u, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    act[i] = u[i] > 0 ? u[i] : 0;
    if (slope != nullptr) slope[i] = u[i] > 0 ? 1 : 0;
  }
}

}  // namespace

void activate(Activation kind, float* act, float* slope, const float* u, std::int64_t n) {
  switch (kind) {
    case Activation::silu:
      return silu(act, slope, u, n);
    case Activation::gelu:
      return gelu(act, slope, u, n);
    case Activation::gelu_new:
      return gelu_new(act, slope, u, n);
    case Activation::relu:
      return relu(act, slope, u, n);
  }
}

}  // namespace mixlora::cpu
