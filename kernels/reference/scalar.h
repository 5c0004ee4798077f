// Scalars of the reference: float and double for truth, std::complex<double> for exact derivatives.
#pragma once
#include <cmath>
#include <complex>
#include <cstdint>

namespace mixlora::reference {

using Index = std::int64_t;

/// The real part: what comparisons (max, top-k, relu, masks) look at, so that a complex step never
/// changes a choice.
inline double real(float x) { return static_cast<double>(x); }
inline double real(double x) { return x; }
inline double real(const std::complex<double>& x) { return x.real(); }

inline float erf(float x) { return std::erf(x); }
inline double erf(double x) { return std::erf(x); }
/// Exact to first order in the imaginary part, which is all that a complex step of 1e-30 keeps.
inline std::complex<double> erf(const std::complex<double>& x) {
  const double slope = 1.1283791670955126 * std::exp(-x.real() * x.real());  // 2 / sqrt(pi)
  return {std::erf(x.real()), slope * x.imag()};
}

/// log sum_i exp(x_i), shifted by the largest real part.
template <class T> T log_sum_exp(const T* x, Index n) {
  double top = -INFINITY;
  for (Index i = 0; i < n; ++i) top = real(x[i]) > top ? real(x[i]) : top;
  T sum{};
  for (Index i = 0; i < n; ++i) sum += std::exp(x[i] - T(top));
  return T(top) + std::log(sum);
}

/// The index of the largest real part; the first wins.
template <class T> Index arg_max(const T* x, Index n) {
  Index best = 0;
  for (Index i = 1; i < n; ++i)
    if (real(x[i]) > real(x[best])) best = i;
  return best;
}

template <class T> T dot(const T* x, const T* y, Index n) {
  T sum{};
  for (Index i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

}  // namespace mixlora::reference
