// DoRA: the norm of the adapted rows, and magnitudes as a scale of columns.
#pragma once
#include <vector>

#include "kernels/reference/attention.h"
#include "kernels/reference/scalar.h"

namespace mixlora::reference {

/// n_o^2 = |W_o|^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T, scale = m / n
///                                        [Liu et al. 2024, eq. 5; factored: methods.md section 1]
/// scale, inverse_norm, m, w_squared (O)  a (R, I)  wa (R, O)  b (O, R)
template <class T>
void dora_scale(T* scale, T* inverse_norm, const T* m, const T* w_squared, const T* a, const T* wa,
                const T* b, double s, Index out, Index in, Index rank) {
  for (Index o = 0; o < out; ++o) {
    T cross{}, square{};
    for (Index i = 0; i < rank; ++i) cross += wa[i * out + o] * b[o * rank + i];
    for (Index c = 0; c < in; ++c) {  // B_o (A A^T) B_o^T = |B_o A|^2
      T delta{};
      for (Index i = 0; i < rank; ++i) delta += b[o * rank + i] * a[i * in + c];
      square += delta * delta;
    }
    inverse_norm[o] = T(1) / std::sqrt(w_squared[o] + T(2 * s) * cross + T(s * s) * square);
    scale[o] = m[o] * inverse_norm[o];
    if (std::abs(real(scale[o])) < double{kLeastScale})
      scale[o] = T(std::copysign(double{kLeastScale}, real(m[o])));
  }
}

/// d_m += d_scale inverse_norm: n is a constant of the step [Liu et al. 2024, section 4.3]; then
/// d_scale = 0.  all (O)
template <class T>
void dora_magnitude_backward(T* d_m, T* d_scale, const T* inverse_norm, Index out) {
  for (Index o = 0; o < out; ++o) {
    d_m[o] += d_scale[o] * inverse_norm[o];
    d_scale[o] = T(0);
  }
}

/// y = scale * core by column.  y, core (N, O)  scale (O)
template <class T> void scale_columns(T* y, const T* core, const T* scale, Index rows, Index out) {
  for (Index n = 0; n < rows; ++n)
    for (Index o = 0; o < out; ++o) y[n * out + o] = scale[o] * core[n * out + o];
}

/// d_core = scale d_y; d_scale[o] += sum_n d_y core.
template <class T>
void scale_columns_backward(T* d_core, T* d_scale, const T* d_y, const T* core, const T* scale,
                            Index rows, Index out) {
  for (Index n = 0; n < rows; ++n)
    for (Index o = 0; o < out; ++o) {
      const T g = d_y[n * out + o];
      d_scale[o] += g * core[n * out + o];
      d_core[n * out + o] = scale[o] * g;
    }
}

/// Backward of y = rope(scale core) from d_y, the gradient of scale core: scale_columns_backward
/// with core = rope's inverse of y, over scale.
template <class T>
void scale_rope_backward(T* d_core, T* d_scale, const T* d_y, const T* y, const T* scale,
                         const T* table, const std::int32_t* ids, const Heads& h, Index rows) {
  const Index width = (h.heads + 2 * h.kv_heads) * h.head_dim;
  std::vector<T> core(static_cast<std::size_t>(rows * width));
  rope(core.data(), y, table, ids, h, true, rows);
  for (Index i = 0; i < rows * width; ++i) core[static_cast<std::size_t>(i)] /= scale[i % width];
  scale_columns_backward(d_core, d_scale, d_y, core.data(), scale, rows, width);
}

}  // namespace mixlora::reference
