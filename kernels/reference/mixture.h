// The gated feed-forward with experts: deltas, gates, weights and the inner down projection.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels/backend.h"
#include "kernels/reference/dropout.h"
#include "kernels/reference/scalar.h"

namespace mixlora::reference {

/// Slots as plain pointers; null means E = K = 1 with weight 1.
template <class T> struct Choice {
  const std::int32_t* expert = nullptr;  // (N, K)
  const T* weight = nullptr;             // (N, K)
  Index experts = 1, count = 1, rank = 0;
  Index expert_of(Index n, Index k) const { return expert ? expert[n * count + k] : 0; }
  bool empty(Index n, Index k) const { return expert_of(n, k) < 0 && weight_of(n, k) == T{}; }
  T weight_of(Index n, Index k) const { return weight ? weight[n * count + k] : T(1); }
};

/// What both directions read; see Mixture in backend.h. Null pointers are absent parts.
template <class T> struct MixtureInput {
  const T* gate_up = nullptr;                          // (N, 2F)
  const T* a = nullptr;                                // (N, 2 E R)
  const T *gate_b = nullptr, *up_b = nullptr;          // (E, F, R)
  const T* down_a = nullptr;                           // (E, R, F)
  const T *gate_scale = nullptr, *up_scale = nullptr;  // (E, F)
  Choice<T> slots;
  Activation activation = Activation::silu;
  double scale = 1;
  Dropout dropout;
  const std::int32_t* ids = nullptr;  // (N, 4)
  bool per_slot = false;
  Index rows = 0, width = 0;  // N, F
};
template <class T> struct MixtureOutputGrads {
  T *gate_b = nullptr, *up_b = nullptr, *down_a = nullptr, *gate_scale = nullptr,
    *up_scale = nullptr;
};

/// act(x) and act'(x).  silu [Elfwing et al. 2017]  gelu, gelu_new (tanh) [Hendrycks & Gimpel 2016]
template <class T> struct ActivationValue { T value, slope; };
template <class T> ActivationValue<T> activate(Activation kind, T x) {
  switch (kind) {
    case Activation::silu: {
      const T s = T(1) / (T(1) + std::exp(-x));
      return {x * s, s * (T(1) + x * (T(1) - s))};
    }
    case Activation::gelu: {
      const T half = T(0.5) * (T(1) + erf(x * T(0.70710678118654752)));
      return {x * half, half + x * T(0.39894228040143268) * std::exp(T(-0.5) * x * x)};
    }
    case Activation::gelu_new: {
      const T c = T(0.79788456080286536), cubic = T(0.044715);
      const T t = std::tanh(c * (x + cubic * x * x * x));
      return {T(0.5) * x * (T(1) + t), T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * c *
                                                                 (T(1) + T(3) * cubic * x * x)};
    }
    case Activation::relu:
      return real(x) > 0 ? ActivationValue<T>{x, T(1)} : ActivationValue<T>{};
  }
  return {};
}

/// One column of one slot on its way up: the adapted sums, their scales, the activation.
template <class T> struct GatedColumn {
  T gate_sum, up_sum, gate_scale, up_scale;  // c + B a, and DoRA's m / n
  ActivationValue<T> gate;
  T up, h;
};
template <class T>
GatedColumn<T> gated_column(const MixtureInput<T>& m, Index n, Index e, Index f) {
  const Index rank = m.slots.rank, wide = 2 * m.slots.experts * rank;
  GatedColumn<T> c{m.gate_up[n * 2 * m.width + f],
                   m.gate_up[n * 2 * m.width + m.width + f],
                   T(1),
                   T(1),
                   {},
                   {},
                   {}};
  if (e >= 0) {
    const T *a1 = m.a + n * wide + e * rank, *a3 = a1 + m.slots.experts * rank;
    if (m.a && m.gate_b) c.gate_sum += dot(m.gate_b + (e * m.width + f) * rank, a1, rank);
    if (m.a && m.up_b) c.up_sum += dot(m.up_b + (e * m.width + f) * rank, a3, rank);
    if (m.gate_scale) c.gate_scale = m.gate_scale[e * m.width + f];
    if (m.up_scale) c.up_scale = m.up_scale[e * m.width + f];
  }
  c.gate = activate(m.activation, c.gate_scale * c.gate_sum);
  c.up = c.up_scale * c.up_sum;
  c.h = c.gate.value * c.up;
  return c;
}

/// u = c1_e (c1 + B1_e a1_e), v = c3_e (c3 + B3_e a3_e), h_k = act(u) v, z_k = s A2_e drop(h_k)
/// out (N, F) = sum_k w_k h_k, or (K, N, F) = h_k when per_slot.  z (N, K R)
///                                                     [methods.md sections 2 and 3.4]
template <class T> void mixture(T* out, T* z, const MixtureInput<T>& m) {
  const Index k_count = m.slots.count, rank = m.slots.rank, width = m.width;
  std::fill_n(out, (m.per_slot ? k_count : 1) * m.rows * width, T{});
  if (z) std::fill_n(z, m.rows * k_count * rank, T{});
  for (Index n = 0; n < m.rows; ++n)
    for (Index k = 0; k < k_count; ++k) {
      const Index e = m.slots.expert_of(n, k);
      const T w = m.slots.weight_of(n, k);
      if (m.slots.empty(n, k)) continue;
      T* y = out + ((m.per_slot ? k * m.rows : 0) + n) * width;
      for (Index f = 0; f < width; ++f) {
        const T h = gated_column(m, n, e, f).h;
        y[f] += m.per_slot ? h : w * h;
        if (!z || !m.down_a || e < 0) continue;
        const T dropped = T(m.scale * mask(m.dropout, m.ids + 4 * n, f, e)) * h;
        for (Index r = 0; r < rank; ++r)
          z[(n * k_count + k) * rank + r] += m.down_a[(e * rank + r) * width + f] * dropped;
      }
    }
}

/// dh_k = w_k (d_out + s drop(A2_e^T q_e)), w_k = 1 when per_slot (it is inside d_out and q)
/// d_weight (N, K) = <h_k, d_out> + <z_k, q_e>, not written when per_slot, may be null
/// d_gate_up (N, 2F)  p (N, 2 E R) = s B^T d(c + B a)  gradients added
/// d_out (N, F), or (K, N, F) when per_slot  q (N, E R), or (K N, E R) when per_slot
/// row_dots (N) = sum over slots of <u, d_u> + <v, d_v>, may be null
template <class T>
void mixture_backward(T* d_gate_up, T* d_weight, T* p, T* row_dots,
                      const MixtureOutputGrads<T>& grads, const T* d_out, const T* q, const T* z,
                      const MixtureInput<T>& m) {
  const Index k_count = m.slots.count, rank = m.slots.rank, width = m.width;
  const Index experts = m.slots.experts, wide = 2 * experts * rank;
  const T s = T(m.scale);
  std::fill_n(d_gate_up, m.rows * 2 * width, T{});
  if (p) std::fill_n(p, m.rows * wide, T{});
  if (row_dots) std::fill_n(row_dots, m.rows, T{});
  for (Index n = 0; n < m.rows; ++n)
    for (Index k = 0; k < k_count; ++k) {
      const Index e = m.slots.expert_of(n, k), slot_row = (m.per_slot ? k * m.rows : 0) + n;
      const T w = m.per_slot ? T(1) : m.slots.weight_of(n, k);
      const bool down = q && m.down_a && e >= 0;
      if (!m.per_slot && d_weight != nullptr) d_weight[n * k_count + k] = T{};
      if (m.slots.empty(n, k)) continue;
      const T* q_e = down ? q + (slot_row * experts + e) * rank : nullptr;
      T d_w = down && !m.per_slot ? dot(z + (n * k_count + k) * rank, q_e, rank) : T{};
      for (Index f = 0; f < width; ++f) {
        const auto c = gated_column(m, n, e, f);
        T d_h = d_out[slot_row * width + f];
        d_w += c.h * d_h;
        if (down) {
          const T keep = s * T(mask(m.dropout, m.ids + 4 * n, f, e));
          for (Index r = 0; r < rank; ++r) {
            d_h += keep * m.down_a[(e * rank + r) * width + f] * q_e[r];
            if (grads.down_a) grads.down_a[(e * rank + r) * width + f] += w * keep * c.h * q_e[r];
          }
        }
        d_h *= w;
        const T d_u = d_h * c.up * c.gate.slope, d_v = d_h * c.gate.value;
        const T d_gate = d_u * c.gate_scale, d_up = d_v * c.up_scale;
        d_gate_up[n * 2 * width + f] += d_gate;
        d_gate_up[n * 2 * width + width + f] += d_up;
        if (row_dots) row_dots[n] += d_gate * c.gate_sum + d_up * c.up_sum;
        if (e < 0) continue;
        if (grads.gate_scale) grads.gate_scale[e * width + f] += d_u * c.gate_sum;
        if (grads.up_scale) grads.up_scale[e * width + f] += d_v * c.up_sum;
        for (Index r = 0; m.a && r < rank; ++r) {
          const Index at = (e * width + f) * rank + r, i = n * wide + e * rank + r,
                      j = i + experts * rank;
          if (m.gate_b && p) p[i] += s * m.gate_b[at] * d_gate;
          if (m.up_b && p) p[j] += s * m.up_b[at] * d_up;
          if (grads.gate_b) grads.gate_b[at] += d_gate * m.a[i];
          if (grads.up_b) grads.up_b[at] += d_up * m.a[j];
        }
      }
      if (!m.per_slot && d_weight != nullptr) d_weight[n * k_count + k] = d_w;
    }
}

}  // namespace mixlora::reference
