#include "reports/distributions.h"

#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace mixlora {
namespace {

/// Numerator and denominator of a rational function by Horner's rule, coefficients from x^7 down.
double rational(const std::array<double, 8>& top, const std::array<double, 8>& bottom, double x) {
  double a = 0, b = 0;
  for (std::size_t i = 0; i < top.size(); ++i) {
    a = a * x + top[i];
    b = b * x + bottom[i];
  }
  return a / b;
}

/// The continued fraction of I_x(a, b), by Lentz's method              [DLMF 8.17.22]
double beta_fraction(double a, double b, double x) {
  constexpr double kTiny = 1e-300, kEnough = 1e-16;
  constexpr int kTerms = 100000;
  double c = 1, d = 1 - (a + b) * x / (a + 1);
  d = 1 / (std::abs(d) < kTiny ? kTiny : d);
  double value = d;
  for (int m = 1; m < kTerms; ++m) {
    const double even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
    const double odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
    for (const double term : {even, odd}) {
      d = 1 + term * d;
      c = 1 + term / c;
      if (std::abs(d) < kTiny) d = kTiny;
      if (std::abs(c) < kTiny) c = kTiny;
      d = 1 / d;
      value *= c * d;
    }
    if (std::abs(c * d - 1) < kEnough) break;
  }
  return value;
}

}  // namespace

double normal_cdf(double x) { return std::erfc(-x / std::sqrt(2.0)) / 2; }

double normal_quantile(double p) {
  if (!(p > 0 && p < 1)) throw std::logic_error("normal_quantile: expected 0 < p < 1");
  const double q = p - 0.5;
  if (std::abs(q) <= 0.425)
    return q * rational({2509.0809287301226727, 33430.575583588128105, 67265.770927008700853,
                         45921.953931549871457, 13731.693765509461125, 1971.5909503065514427,
                         133.14166789178437745, 3.387132872796366608},
                        {5226.495278852545925, 28729.085735721942674, 39307.89580009271061,
                         21213.794301586595867, 5394.1960214247511077, 687.1870074920579083,
                         42.313330701600911252, 1.0},
                        0.180625 - q * q);
  const double r = std::sqrt(-std::log(q < 0 ? p : 1 - p));
  const double tail =
      r <= 5
          ? rational({7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177,
                      1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055,
                      4.6303378461565452959, 1.42343711074968357734},
                     {1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966,
                      0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494,
                      2.05319162663775882187, 1.0},
                     r - 1.6)
          : rational({2.01033439929228813265e-7, 2.71155556874348757815e-5,
                      0.0012426609473880784386, 0.026532189526576123093, 0.29656057182850489123,
                      1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772},
                     {2.04426310338993978564e-15, 1.4215117583164458887e-7,
                      1.8463183175100546818e-5, 7.868691311456132591e-4, 0.0148753612908506148525,
                      0.13692988092273580531, 0.59983220655588793769, 1.0},
                     r - 5);
  return q < 0 ? -tail : tail;
}

double incomplete_beta(double a, double b, double x) {
  if (x <= 0) return 0;
  if (x >= 1) return 1;
  const double front = std::exp(std::lgamma(a + b) - std::lgamma(a) - std::lgamma(b) +
                                a * std::log(x) + b * std::log1p(-x));
  if (x < (a + 1) / (a + b + 2)) return front * beta_fraction(a, b, x) / a;
  return 1 - front * beta_fraction(b, a, 1 - x) / b;
}

double student_cdf(double t, double df) {
  if (std::isinf(df)) return normal_cdf(t);
  const double tail = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2;
  return t < 0 ? tail : 1 - tail;
}

double student_quantile(double p, double df) {
  if (std::isinf(df)) return normal_quantile(p);
  if (p == 0.5) return 0;
  if (p < 0.5) return -student_quantile(1 - p, df);
  double low = 0, high = 1;
  while (student_cdf(high, df) < p) high *= 2;
  // Halving to the last bit: the function is monotone, and nothing here is hot.
  for (int i = 0; i < 200 && high - low > 1e-15 * high; ++i) {
    const double middle = (low + high) / 2;
    (student_cdf(middle, df) < p ? low : high) = middle;
  }
  return (low + high) / 2;
}

double binomial_cdf(std::int64_t k, std::int64_t n, double p) {
  if (k < 0) return 0;
  if (k >= n) return 1;
  return incomplete_beta(static_cast<double>(n - k), static_cast<double>(k + 1), 1 - p);
}

std::int64_t binomial_quantile(double q, std::int64_t n, double p) {
  std::int64_t low = 0, high = n;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (binomial_cdf(middle, n, p) >= q)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

}  // namespace mixlora
