#include "kernels/cases/workbench.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mixlora::cases {
namespace {

double rounded(double x, DType type) {
  const auto f = static_cast<float>(x);
  return static_cast<double>(type == DType::bf16 ? static_cast<float>(Bf16(f)) : f);
}

}  // namespace

Array& Workbench::add(std::string name, Shape shape, DType type) {
  Array& a = arrays_.emplace_back();
  a.name = std::move(name);
  a.device = Tensor(nullptr, shape, type, ops.device());
  a.memory = ops.allocate(std::max<std::size_t>(a.device.bytes(), 4));
  a.device.data = a.memory->data();
  (type == DType::i32 ? a.ints.resize(static_cast<std::size_t>(shape.numel()), -7)
                      : a.host.resize(static_cast<std::size_t>(shape.numel()), NAN));
  return a;
}

void Workbench::upload(Array& a) {
  if (a.device.dtype == DType::i32) {
    ops.upload(a.device, a.ints.data());
  } else if (a.device.dtype == DType::f32) {
    ops.upload(a.device, std::vector<float>(a.host.begin(), a.host.end()).data());
  } else {
    std::vector<Bf16> bits;
    for (const double x : a.host) bits.emplace_back(static_cast<float>(x));
    ops.upload(a.device, bits.data());
  }
}

Array& Workbench::input(Shape shape, DType type, double spread, double centre) {
  Array& a = add("", shape, type);
  std::normal_distribution<double> normal(centre, spread);
  for (double& x : a.host) x = rounded(normal(random_), type);
  upload(a);
  return a;
}
Array& Workbench::updated(std::string name, Shape shape, DType type, double spread) {
  Array& a = input(shape, type, spread);
  compare(a, std::move(name));
  a.least = spread * std::sqrt(static_cast<double>(shape.numel()));
  return a;
}
void Workbench::compare(Array& a, std::string name) {
  a.name = std::move(name);
  a.compared = true;
}
Array& Workbench::numbers(Shape shape, DType type, const std::vector<double>& values) {
  Array& a = add("", shape, type);
  for (std::size_t i = 0; i < values.size(); ++i) a.host.at(i) = rounded(values[i], type);
  upload(a);
  return a;
}
Array& Workbench::integers(Shape shape, std::vector<std::int32_t> values) {
  Array& a = add("", shape, DType::i32);
  a.ints = std::move(values);
  upload(a);
  return a;
}
Array& Workbench::output(std::string name, Shape shape, DType type) {
  Array& a = add(std::move(name), shape, type);
  a.compared = true;
  upload(a);
  return a;
}
Array& Workbench::scratch(Shape shape) {
  Array& a = output("room", std::move(shape), act());
  a.compared = a.counted = false;
  return a;
}
Array& Workbench::row_ids(std::int64_t rows) {
  std::vector<std::int32_t> ids;
  for (std::int64_t n = 0; n < rows; ++n)
    for (const auto x : {below(1 << 20), static_cast<std::int32_t>(n), 7, 0}) ids.push_back(x);
  return integers({rows, 4}, std::move(ids));
}
std::int32_t Workbench::below(std::int64_t n) {
  return static_cast<std::int32_t>(std::uniform_int_distribution<std::int64_t>(0, n - 1)(random_));
}

double Workbench::bytes() const {
  double sum = 0;
  for (const Array& a : arrays_)
    if (a.counted) sum += static_cast<double>(a.device.bytes());
  return sum;
}

double Workbench::error(Array& a) {
  const auto count = static_cast<std::size_t>(a.device.numel());
  if (a.device.dtype == DType::i32) {
    std::vector<std::int32_t> got(count);
    ops.download(got.data(), a.device);
    double wrong = 0;
    for (std::size_t i = 0; i < count; ++i) wrong += got[i] != a.ints[i] ? 1 : 0;
    return wrong / static_cast<double>(count);
  }
  std::vector<float> got(count);
  if (a.device.dtype == DType::f32) {
    ops.download(got.data(), a.device);
  } else {
    std::vector<Bf16> bits(count);
    ops.download(bits.data(), a.device);
    std::transform(bits.begin(), bits.end(), got.begin(),
                   [](Bf16 b) { return static_cast<float>(b); });
  }
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const double d = static_cast<double>(got[i]) - a.host[i];
    difference += d * d;
    size += a.host[i] * a.host[i];
  }
  if (!std::isfinite(difference)) return std::numeric_limits<double>::infinity();
  const double divisor = std::max(std::sqrt(size), a.least);
  return divisor > 0 ? std::sqrt(difference) / divisor : std::sqrt(difference);
}

}  // namespace mixlora::cases
