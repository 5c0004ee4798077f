// RMSNorm, forward and backward, alone and after a residual sum.
#pragma once
#include "kernels/reference/scalar.h"

namespace mixlora::reference {

/// y = x r w, r = 1 / sqrt(mean(x^2) + eps)                       [Zhang & Sennrich 2019, eq. 4]
/// y, x (N, D)  w (D)  r (N)
template <class T>
void rmsnorm(T* y, T* r, const T* x, const T* w, Index rows, Index width, double eps) {
  for (Index n = 0; n < rows; ++n, x += width, y += width) {
    r[n] = T(1) / std::sqrt(dot(x, x, width) / T(width) + T(eps));
    for (Index j = 0; j < width; ++j) y[j] = x[j] * r[n] * w[j];
  }
}

/// d_x += r (w d_y - x r^2 mean(x w d_y)).  d_x, d_y, x (N, D)
template <class T>
void rmsnorm_backward(T* d_x, const T* d_y, const T* x, const T* w, const T* r, Index rows,
                      Index width) {
  for (Index n = 0; n < rows; ++n, x += width, d_x += width, d_y += width) {
    T mean{};
    for (Index j = 0; j < width; ++j) mean += x[j] * w[j] * d_y[j];
    mean /= T(width);
    for (Index j = 0; j < width; ++j) d_x[j] += r[n] * (w[j] * d_y[j] - x[j] * r[n] * r[n] * mean);
  }
}

/// sum = x + delta, y = rmsnorm(sum).  sum, y, x, delta (N, D)
template <class T>
void add_rmsnorm(T* sum, T* y, T* r, const T* x, const T* delta, const T* w, Index rows,
                 Index width, double eps) {
  for (Index i = 0; i < rows * width; ++i) sum[i] = x[i] + delta[i];
  rmsnorm(y, r, sum, w, rows, width, eps);
}

}  // namespace mixlora::reference
