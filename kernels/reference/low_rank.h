// The second factor of a low-rank update: y += a B^T, where a = s x A^T (dropout.h).
#pragma once
#include "kernels/reference/scalar.h"

namespace mixlora::reference {

/// y += a B^T, in columns of rows `stride` apart.  a (N, R)  b (O, R)
template <class T>
void lora_b(T* y, Index stride, const T* a, const T* b, Index rows, Index out, Index rank) {
  for (Index n = 0; n < rows; ++n)
    for (Index o = 0; o < out; ++o) y[n * stride + o] += dot(a + n * rank, b + o * rank, rank);
}

/// d_a = s d_y B; d_b += d_y^T a.
template <class T>
void lora_b_backward(T* d_b, T* d_a, const T* d_y, const T* a, const T* b, double s, Index rows,
                     Index out, Index rank) {
  for (Index n = 0; n < rows; ++n)
    for (Index r = 0; r < rank; ++r) {
      T sum{};
      for (Index o = 0; o < out; ++o) {
        sum += d_y[n * out + o] * b[o * rank + r];
        d_b[o * rank + r] += d_y[n * out + o] * a[n * rank + r];
      }
      d_a[n * rank + r] = T(s) * sum;
    }
}

}  // namespace mixlora::reference
