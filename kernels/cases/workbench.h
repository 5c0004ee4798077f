// Workbench: one call of one operation, laid out on a backend and in double on the host.
#pragma once
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace mixlora::cases {

/// One tensor twice: on the device, and as the reference reads and writes it.
struct Array {
  std::string name;
  Tensor device;
  std::vector<double> host;        // the device's numbers exactly, after rounding to its type
  std::vector<std::int32_t> ints;  // when the type is i32
  bool compared = false, counted = true;  // against the reference; among the bytes moved
  double least = 0;  // norm of the terms that may cancel in it: no smaller result divides its error
  std::unique_ptr<Memory> memory;
  double* data() { return host.data(); }
  std::int32_t* index() { return ints.data(); }
};

/// Random inputs from a seed, NaN in outputs that are overwritten; then `run` and `reference` are
/// the same call on both sides.
class Workbench {
 public:
  Workbench(Backend& backend, std::uint64_t seed) : ops(backend), random_(seed) {}
  Backend& ops;
  std::function<void()> run, reference;

  DType act() const { return ops.activation_type(); }
  /// Normal numbers around `centre`, rounded to `type`.
  Array& input(Shape shape, DType type, double spread = 1, double centre = 0);
  /// The same, read and written by the operation ("adds", in place): the numbers before and what is
  /// added may cancel, and the sum is rounded at their size.
  Array& updated(std::string name, Shape shape, DType type, double spread = 1);
  /// Given numbers, rounded to `type`.
  Array& numbers(Shape shape, DType type, const std::vector<double>& values);
  /// `a`, an input so far, is written too.
  static void compare(Array& a, std::string name);
  Array& integers(Shape shape, std::vector<std::int32_t> values);
  /// NaN (i32: -7), to be overwritten.
  Array& output(std::string name, Shape shape, DType type);
  /// Activations that an operation may use as it likes.
  Array& scratch(Shape shape);
  /// {sample, position, step, adapter} of `rows` rows, positions from 0.
  Array& row_ids(std::int64_t rows);
  std::int32_t below(std::int64_t n);

  /// Bytes of all counted arrays, each once: what the call must at least move.
  double bytes() const;
  std::uint64_t key() { return random_(); }

  /// ||device - host|| / max(||host||, least) of one array; the share of wrong integers; infinity
  /// for NaN.
  double error(Array& a);
  std::deque<Array>& arrays() { return arrays_; }

 private:
  Array& add(std::string name, Shape shape, DType type);
  void upload(Array& a);
  std::mt19937_64 random_;
  std::deque<Array> arrays_;
};

}  // namespace mixlora::cases
