// Tensors for the CPU tests: seeded values, in float for the backend and double for the reference.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/support/catch.h"

namespace mixlora::test {

using Index = std::int64_t;

/// Uniform on (-size, size), one stream for each `stream`.
inline std::vector<double> values(Index count, std::uint32_t stream, double size = 1) {
  const RandomKey key = random_key(7, Purpose::test);
  std::vector<double> x(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto bits = philox(static_cast<std::uint32_t>(i), stream, 0, 0, key.k0, key.k1).v[0];
    x[i] = static_cast<double>(static_cast<float>(size * (2 * unit_open(bits) - 1)));
  }
  return x;
}

/// Numbers the backend works on, beside the doubles that the reference works on.
struct Numbers {
  std::vector<double> exact;
  std::vector<float> data;
  Shape shape;
  explicit Numbers(Shape s, std::uint32_t stream = 0, double size = 1)
      : exact(stream == 0 ? std::vector<double>(static_cast<std::size_t>(s.numel()))
                          : values(s.numel(), stream, size)),
        data(exact.begin(), exact.end()),
        shape(s) {}
  Tensor view() { return {data.data(), shape, DType::f32, Device::cpu}; }
  double* d() { return exact.data(); }
  /// Root mean square of the difference over that of the exact numbers.
  double error() const {
    double difference = 0, size = 1e-30;
    for (std::size_t i = 0; i < data.size(); ++i) {
      const double e = static_cast<double>(data[i]) - exact[i];
      difference += e * e;
      size += exact[i] * exact[i];
    }
    return std::sqrt(difference / size);
  }
};

struct Integers {
  std::vector<std::int32_t> data;
  Shape shape;
  Integers(Shape s, std::vector<std::int32_t> d) : data(std::move(d)), shape(s) {}
  Tensor view() { return {data.data(), shape, DType::i32, Device::cpu}; }
};

/// {sample, position, step, adapter} of each row.
inline Integers row_ids(Index rows) {
  std::vector<std::int32_t> ids;
  for (std::int32_t n = 0; n < rows; ++n) ids.insert(ids.end(), {n / 5 + 3, n % 5, 17, 0});
  return {{rows, 4}, std::move(ids)};
}

/// Sums of some hundred float products keep about six digits; root mean square over all elements.
constexpr double kFloatError = 2e-6;

}  // namespace mixlora::test
