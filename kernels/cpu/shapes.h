// Checks at an operation's entrance: wrong shapes throw std::logic_error naming the operation.
#pragma once
#include <stdexcept>
#include <string>

#include "kernels/tensor.h"

namespace mixlora::cpu {

/// "(2, 3)", or "absent".
inline std::string shape_text(ConstTensor t) {
  if (!t) return "absent";
  std::string text = "(";
  for (int d = 0; d < t.shape.rank; ++d) text += (d == 0 ? "" : ", ") + std::to_string(t.shape[d]);
  return text + ")";
}
[[noreturn]] inline void wrong_shape(const char* op, const char* what, ConstTensor t,
                                     const std::string& expected) {
  throw std::logic_error(std::string(op) + ": " + what + " is " + shape_text(t) + ", expected " +
                         expected);
}
/// `t` has `rows` rows of `cols` numbers.
inline void expect_rows(const char* op, const char* what, ConstTensor t, std::int64_t rows,
                        std::int64_t cols) {
  if (t.rows() != rows || t.cols() != cols)
    wrong_shape(op, what, t, "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")");
}
inline void expect_count(const char* op, const char* what, ConstTensor t, std::int64_t count) {
  if (t.numel() != count || !t.contiguous())
    wrong_shape(op, what, t, std::to_string(count) + " numbers end to end");
}
inline void expect_same(const char* op, const char* what, ConstTensor t, ConstTensor like) {
  if (t.rows() != like.rows() || t.cols() != like.cols())
    wrong_shape(op, what, t, shape_text(like));
}

}  // namespace mixlora::cpu
