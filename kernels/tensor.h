// Tensor: a non-owning view of rows of numbers on a device.
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>

namespace mixlora {

enum class Device : std::uint8_t { cpu, cuda };
enum class DType : std::uint8_t { f32, bf16, i32 };

constexpr std::size_t size_of(DType t) { return t == DType::bf16 ? 2 : 4; }
constexpr const char* name_of(DType t) {
  return t == DType::f32 ? "f32" : t == DType::bf16 ? "bf16" : "i32";
}

/// bfloat16 as bits: the upper half of an IEEE float32. Conversion rounds to nearest, ties to even.
struct Bf16 {
  std::uint16_t bits = 0;
  Bf16() = default;
  explicit Bf16(float value) {
    const auto u = std::bit_cast<std::uint32_t>(value);
    if ((u & 0x7fffffffU) > 0x7f800000U)
      bits = static_cast<std::uint16_t>((u >> 16) | 0x40U);  // quiet NaN
    else
      bits = static_cast<std::uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
  }
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
};

template <class T>
constexpr DType dtype_of = [] {
  static_assert(sizeof(T) == 0, "not a tensor element");
  return DType::f32;
}();
template <> inline constexpr DType dtype_of<float> = DType::f32;
template <> inline constexpr DType dtype_of<std::int32_t> = DType::i32;
template <> inline constexpr DType dtype_of<Bf16> = DType::bf16;

/// Row-major extents, at most four; unused ones are 1, so `numel` needs no rank.
struct Shape {
  std::array<std::int64_t, 4> dim{1, 1, 1, 1};
  int rank = 0;
  constexpr Shape() = default;
  constexpr Shape(std::initializer_list<std::int64_t> extents) {
    for (auto n : extents) dim[static_cast<std::size_t>(rank++)] = n;
  }
  constexpr std::int64_t operator[](int i) const { return dim[static_cast<std::size_t>(i)]; }
  constexpr std::int64_t numel() const { return dim[0] * dim[1] * dim[2] * dim[3]; }
  /// Extent of the last dimension; 1 for a scalar.
  constexpr std::int64_t last() const {
    return rank == 0 ? 1 : dim[static_cast<std::size_t>(rank - 1)];
  }
  friend constexpr bool operator==(const Shape&, const Shape&) = default;
};

/// A non-owning view. The last dimension is contiguous; all leading dimensions together count
/// `rows()`, `stride` elements apart (stride == cols() unless the view is a column slice). The
/// Arena owns the bytes; copy views freely. A default-constructed view is "absent": `!t`.
template <class Void> struct BasicTensor {
  Void* data = nullptr;
  Shape shape;
  std::int64_t stride = 0;  // elements between rows
  DType dtype = DType::f32;
  Device device = Device::cpu;

  BasicTensor() = default;
  BasicTensor(Void* d, Shape s, DType t, Device where)
      : data(d), shape(s), stride(s.last()), dtype(t), device(where) {}
  template <class Other>
  requires(std::is_const_v<Void> && !std::is_const_v<Other>) BasicTensor(
      const BasicTensor<Other>& o)  // NOLINT(google-explicit-constructor): Tensor -> ConstTensor
      : data(o.data), shape(o.shape), stride(o.stride), dtype(o.dtype), device(o.device) {}

  explicit operator bool() const { return data != nullptr; }
  std::int64_t numel() const { return shape.numel(); }
  std::int64_t cols() const { return shape.last(); }
  std::int64_t rows() const { return cols() == 0 ? 0 : numel() / cols(); }
  bool contiguous() const { return stride == cols() || rows() <= 1; }
  std::size_t bytes() const { return static_cast<std::size_t>(numel()) * size_of(dtype); }

  template <class T> auto ptr() const {
    using Element = std::conditional_t<std::is_const_v<Void>, const T, T>;
    if (data != nullptr && dtype != dtype_of<T>) throw std::logic_error("tensor: dtype mismatch");
    return static_cast<Element*>(data);
  }
  /// First element of row `i`.
  template <class T> auto row(std::int64_t i) const { return ptr<T>() + i * stride; }

  /// Rows [begin, end) as a 2-d view.
  BasicTensor row_range(std::int64_t begin, std::int64_t end) const {
    return slice(begin * stride, {end - begin, cols()});
  }
  /// Columns [begin, end) of every row as a 2-d view.
  BasicTensor col_range(std::int64_t begin, std::int64_t end) const {
    return slice(begin, {rows(), end - begin});
  }
  /// The same numbers under another shape; contiguous views only.
  BasicTensor reshaped(Shape s) const {
    if (s.numel() != numel() || !contiguous()) throw std::logic_error("tensor: cannot reshape");
    BasicTensor t = *this;
    t.shape = s;
    t.stride = s.last();
    return t;
  }
  /// Entry `i` of the first dimension (of at least two) as a view of the rest.
  BasicTensor at(std::int64_t i) const {
    BasicTensor t = *this;
    t.shape = Shape{};
    for (int d = 1; d < shape.rank; ++d)
      t.shape.dim[static_cast<std::size_t>(t.shape.rank++)] = shape[d];
    const std::int64_t rows_each = t.shape.numel() / t.shape.last();
    t.data = offset(i * rows_each * stride);
    return t;
  }

 private:
  Void* offset(std::int64_t elements) const {
    using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
    if (data == nullptr) return nullptr;
    return static_cast<Byte*>(data) + elements * static_cast<std::int64_t>(size_of(dtype));
  }
  BasicTensor slice(std::int64_t elements, Shape s) const {
    BasicTensor t = *this;
    t.data = offset(elements);
    t.shape = s;
    return t;
  }
};

using Tensor = BasicTensor<void>;
using ConstTensor = BasicTensor<const void>;

}  // namespace mixlora
