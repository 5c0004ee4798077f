// Exact derivatives: Im f(x + i h) / h with h = 1e-30 has no cancellation.
#pragma once
#include <cmath>
#include <complex>
#include <functional>
#include <random>
#include <vector>

#include "tests/support/catch.h"

namespace mixlora::test {

using C = std::complex<double>;
using Real = std::vector<double>;
using Complex = std::vector<C>;

class Numbers {
 public:
  explicit Numbers(unsigned seed) : random_(seed) {}
  Real normal(std::int64_t n, double spread = 1, double centre = 0) {
    std::normal_distribution<double> d(centre, spread);
    Real x(static_cast<std::size_t>(n));
    for (double& v : x) v = d(random_);
    return x;
  }

 private:
  std::mt19937 random_;
};

inline Real zeros(std::int64_t n) { return Real(static_cast<std::size_t>(n)); }
inline Complex complex(const Real& x) { return {x.begin(), x.end()}; }
inline C inner(const Real& g, const Complex& y) {
  C sum{};
  for (std::size_t i = 0; i < y.size(); ++i) sum += g.at(i) * y[i];
  return sum;
}

/// A differentiated argument: its value and the gradient that the backward gave.
struct Argument {
  const char* name;
  Real value, gradient;
};

/// The gradient of `loss` by complex steps agrees with every argument's to 1e-10, relative to its
/// norm: double rounding of a few hundred terms stays below 1e-12.
inline void require_gradients(const std::function<C(const std::vector<Complex>&)>& loss,
                              const std::vector<Argument>& arguments) {
  constexpr double kStep = 1e-30, kBound = 1e-10;
  std::vector<Complex> at;
  for (const Argument& a : arguments) at.push_back(complex(a.value));
  for (std::size_t k = 0; k < arguments.size(); ++k) {
    double difference = 0, size = 0;
    REQUIRE(arguments[k].gradient.size() == at[k].size());
    for (std::size_t i = 0; i < at[k].size(); ++i) {
      at[k][i] += C(0, kStep);
      const double slope = loss(at).imag() / kStep;
      at[k][i] = at[k][i].real();
      difference += std::pow(slope - arguments[k].gradient[i], 2);
      size += slope * slope;
    }
    INFO("gradient of " << arguments[k].name);
    REQUIRE(size > 0);
    REQUIRE(std::sqrt(difference / size) <= kBound);
  }
}

}  // namespace mixlora::test
