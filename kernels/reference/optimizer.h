// AdamW and SGD on flat parameters, and the sums that clipping needs.
#pragma once
#include "kernels/reference/scalar.h"

namespace mixlora::reference {

/// min(1, max_norm / (norm + 1e-6)) when max_norm > 0                [Pascanu et al. 2013, alg. 1]
template <class T> T clip_factor(T norm_squared, T max_norm) {
  if (!(real(max_norm) > 0)) return T(1);
  const T factor = max_norm / (std::sqrt(norm_squared) + T(1e-6));
  return real(factor) < 1 ? factor : T(1);
}

/// m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
/// w = w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd w) [Loshchilov & Hutter 2019,
/// alg. 2] numbers = {lr, wd, b1, b2, eps, 1 - b1^t, 1 - b2^t, max_grad_norm}
template <class T>
void adamw(T* w, const T* g, T* m, T* v, const T* numbers, T norm_squared, Index count) {
  const T lr = numbers[0], decay = numbers[1], b1 = numbers[2], b2 = numbers[3];
  const T clip = clip_factor(norm_squared, numbers[7]);
  for (Index i = 0; i < count; ++i) {
    const T x = clip * g[i];
    m[i] = b1 * m[i] + (T(1) - b1) * x;
    v[i] = b2 * v[i] + (T(1) - b2) * x * x;
    const T step = m[i] / numbers[5] / (std::sqrt(v[i] / numbers[6]) + numbers[4]);
    w[i] -= lr * (step + decay * w[i]);
  }
}

/// v = momentum v + (g + wd w), w -= lr v; without v: w -= lr (g + wd w).
template <class T> void sgd(T* w, const T* g, T* v, const T* numbers, T norm_squared, Index count) {
  const T clip = clip_factor(norm_squared, numbers[7]);
  for (Index i = 0; i < count; ++i) {
    T step = clip * g[i] + numbers[1] * w[i];
    if (v) step = v[i] = numbers[2] * v[i] + step;
    w[i] -= numbers[0] * step;
  }
}

template <class T> T sum(const T* x, Index count) {
  T total{};
  for (Index i = 0; i < count; ++i) total += x[i];
  return total;
}
/// sum x^2, not |x|^2: a complex step passes through.
template <class T> T sum_squares(const T* x, Index count) { return dot(x, x, count); }

}  // namespace mixlora::reference
