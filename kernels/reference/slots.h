// Slots apart: spreading them over experts, combining them, and rows over capacity.
#pragma once
#include <algorithm>

#include "kernels/reference/mixture.h"

namespace mixlora::reference {

/// columns (N, E R) = sum_k w_k z_k in the columns of its expert; per_slot: (K N, E R), no weight.
template <class T>
void slots_to_columns(T* columns, const T* z, const Choice<T>& s, bool per_slot, Index rows) {
  const Index wide = s.experts * s.rank;
  std::fill_n(columns, (per_slot ? s.count : 1) * rows * wide, T{});
  for (Index n = 0; n < rows; ++n)
    for (Index k = 0; k < s.count; ++k) {
      const Index e = s.expert_of(n, k);
      if (e < 0) continue;
      T* row = columns + ((per_slot ? k * rows : 0) + n) * wide + e * s.rank;
      for (Index r = 0; r < s.rank; ++r)
        row[r] += (per_slot ? T(1) : s.weight_of(n, k)) * z[(n * s.count + k) * s.rank + r];
    }
}

/// y (N, D) = sum_k w_k scale_e core_k.  core (K, N, D)  scale (E, D), 1 for e = -1
template <class T>
void slot_combine(T* y, const T* core, const T* scale, const Choice<T>& s, Index rows,
                  Index width) {
  std::fill_n(y, rows * width, T{});
  for (Index k = 0; k < s.count; ++k)
    for (Index n = 0; n < rows; ++n)
      for (Index j = 0; j < width; ++j) {
        const Index e = s.expert_of(n, k);
        const T c = e < 0 ? T(1) : scale[e * width + j];
        y[n * width + j] += s.weight_of(n, k) * c * core[(k * rows + n) * width + j];
      }
}

/// d_core = w_k scale_e d_y; d_weight (N, K) = sum_j d_y scale_e core_k; d_scale += d_y w_k core_k
template <class T>
void slot_combine_backward(T* d_core, T* d_weight, T* d_scale, const T* d_y, const T* core,
                           const T* scale, const Choice<T>& s, Index rows, Index width) {
  for (Index n = 0; n < rows; ++n)
    for (Index k = 0; k < s.count; ++k) {
      const Index e = s.expert_of(n, k);
      const T w = s.weight_of(n, k);
      T sum{};
      for (Index j = 0; j < width; ++j) {
        const T c = e < 0 ? T(1) : scale[e * width + j], g = d_y[n * width + j];
        const Index at = (k * rows + n) * width + j;
        sum += g * c * core[at];
        if (e >= 0) d_scale[e * width + j] += g * w * core[at];
        d_core[at] = w * c * g;
      }
      d_weight[n * s.count + k] = sum;
    }
}

/// y[n] = weight[n] x[n] where expert is -1, others untouched: the official Switch overflow.
/// y, x (N, D); one slot a row                                  [methods.md section 2]
template <class T>
void overflow_input(T* y, const T* x, const Choice<T>& s, Index rows, Index width) {
  for (Index n = 0; n < rows; ++n)
    for (Index j = 0; s.expert_of(n, 0) < 0 && j < width; ++j)
      y[n * width + j] = s.weight_of(n, 0) * x[n * width + j];
}

/// Those rows: d_x += w d_y, d_weight = <d_y, x>, and d_y becomes 0.
template <class T>
void overflow_input_backward(T* d_x, T* d_weight, T* d_y, const T* x, const Choice<T>& s,
                             Index rows, Index width) {
  for (Index n = 0; n < rows; ++n) {
    if (s.expert_of(n, 0) >= 0) continue;
    d_weight[n] = dot(d_y + n * width, x + n * width, width);
    for (Index j = 0; j < width; ++j) {
      d_x[n * width + j] += s.weight_of(n, 0) * d_y[n * width + j];
      d_y[n * width + j] = T{};
    }
  }
}

}  // namespace mixlora::reference
