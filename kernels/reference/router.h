// Routers: logits, the choice of experts, the balance and z losses, and their gradients.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/backend.h"
#include "kernels/reference/scalar.h"

namespace mixlora::reference {

/// logits = x Wg^T.  logits (N, E)  x (N, D)  wg (E, D)
template <class T>
void router_logits(T* logits, const T* x, const T* wg, Index rows, Index width, Index experts) {
  for (Index n = 0; n < rows; ++n)
    for (Index e = 0; e < experts; ++e)
      logits[n * experts + e] = dot(x + n * width, wg + e * width, width);
}

/// d_wg += d_logits^T x; d_x += d_logits Wg.
template <class T>
void router_backward(T* d_wg, T* d_x, const T* d_logits, const T* x, const T* wg, Index rows,
                     Index width, Index experts) {
  for (Index n = 0; n < rows; ++n)
    for (Index e = 0; e < experts; ++e)
      for (Index j = 0; j < width; ++j) {
        d_wg[e * width + j] += d_logits[n * experts + e] * x[n * width + j];
        d_x[n * width + j] += d_logits[n * experts + e] * wg[e * width + j];
      }
}

/// The slots of one row from its probabilities. Empty slots are {-1, 0}.
///   top_k: the k largest, weights p_e / sum of the kept                      [Jiang et al. 2024]
///   top_p: q = p / temperature in falling order up to and with the one that makes the running sum
///          exceed top_p, weights q                                          [Huang et al. 2024]
///   switch: the largest, weight p                                [Fedus et al. 2022, eq. 1, 2]
template <class T> void choose(std::int32_t* expert, T* weight, const T* p, const Router& r) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(r.experts));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return real(p[a]) > real(p[b]); });
  const bool divided = r.kind == RouterKind::top_p && r.temperature > 0;
  const T divide = divided ? T(r.temperature) : T(1);
  T sum{};
  bool open = true;
  for (Index k = 0; k < r.slots; ++k) {
    const auto e = order[static_cast<std::size_t>(k)];
    expert[k] = open ? e : -1;
    weight[k] = open ? p[e] / divide : T{};
    sum += weight[k];
    if (r.kind == RouterKind::top_p && real(sum) > static_cast<double>(r.top_p)) open = false;
  }
  if (r.kind == RouterKind::top_k)
    for (Index k = 0; k < r.slots; ++k) weight[k] /= sum;
}

/// Tokens beyond an expert's capacity within one sequence, in order of position, lose their expert:
/// {-1, 1} under Overflow::base, {-1, p_max} under Overflow::input. [Fedus et al. 2022,
/// section 2.2]
template <class T>
void apply_capacity(std::int32_t* expert, T* weight, const Router& r, const std::int32_t* table,
                    Index sequences) {
  for (Index s = 0; s < sequences; ++s) {
    std::vector<Index> taken(static_cast<std::size_t>(r.experts));
    for (Index n = table[4 * s]; n < table[4 * s] + table[4 * s + 1]; ++n) {
      if (taken[static_cast<std::size_t>(expert[n])]++ < r.capacity) continue;
      expert[n] = -1;
      if (r.overflow == Overflow::base) weight[n] = T(1);
    }
  }
}

/// p = softmax(logits) over all experts, then `choose` and `apply_capacity`.
/// expert, weight (N, K)  p, logits (N, E)  stats (2 E + 2): slots an expert was chosen by before
/// capacity | sum of p | sum of logsumexp^2 | sum of -p log p
template <class T>
void route(std::int32_t* expert, T* weight, T* p, T* stats, const T* logits, const Router& r,
           const std::int32_t* table, Index sequences, Index rows) {
  const Index e_count = r.experts;
  std::fill_n(stats, 2 * e_count + 2, T{});
  for (Index n = 0; n < rows; ++n) {
    const T lse = log_sum_exp(logits + n * e_count, e_count);
    for (Index e = 0; e < e_count; ++e) {
      const T log_p = logits[n * e_count + e] - lse;
      p[n * e_count + e] = std::exp(log_p);
      stats[e_count + e] += p[n * e_count + e];
      stats[2 * e_count + 1] -= p[n * e_count + e] * log_p;
    }
    stats[2 * e_count] += lse * lse;
    choose(expert + n * r.slots, weight + n * r.slots, p + n * e_count, r);
    for (Index k = 0; k < r.slots; ++k)
      if (expert[n * r.slots + k] >= 0) stats[expert[n * r.slots + k]] += T(1);
  }
  if (r.kind == RouterKind::switch_top1 && r.capacity > 0)
    apply_capacity(expert, weight, r, table, sequences);
}

/// loss[0] = coef E sum_i f_i P_i, f and P means over the rows of all layers, or the mean of the
/// layers' own; loss[1] = z_coef mean(logsumexp^2)  [Fedus et al. 2022, eq. 4; Zoph et al. 2022]
/// stats (L, 2 E + 2)  fraction (L, E): what route_backward reads, divided by L
template <class T>
void balance_loss(T* loss, T* fraction, const T* stats, Index layers, Index experts, Index rows,
                  double coef, double z_coef, bool per_layer) {
  const Index width = 2 * experts + 2;
  const T all = T(layers * rows);
  loss[0] = loss[1] = T{};
  for (Index e = 0; e < experts; ++e) {
    T count{}, probability{};
    for (Index l = 0; l < layers; ++l) {
      const T c = stats[l * width + e], p = stats[l * width + experts + e];
      count += c;
      probability += p;
      fraction[l * experts + e] = c / all;
      if (per_layer) loss[0] += c / T(rows) * p / all;
    }
    if (per_layer) continue;
    loss[0] += count / all * probability / all;
    for (Index l = 0; l < layers; ++l) fraction[l * experts + e] = count / all / T(layers);
  }
  for (Index l = 0; l < layers; ++l) loss[1] += stats[l * width + 2 * experts] / all;
  loss[0] *= T(coef) * T(experts);
  loss[1] *= T(z_coef);
}

/// The gradient of the weights through the choice, plus the gradients of the two losses:
///   top_k: w_e (d_w_e - sum_j w_j d_w_j) of the kept; others: through softmax, d_p_e = d_w_e /
///   temperature balance: factor coef E / M p_j (f_j - sum_i p_i f_i) z: factor z_coef 2 lse p_j /
///   (M L)                        [methods.md section 2]
/// d_logits, p, logits (N, E)  d_weight, expert, weight (N, K)  fraction (E), one layer's row
template <class T>
void route_backward(T* d_logits, const T* d_weight, const std::int32_t* expert, const T* weight,
                    const T* p, const T* logits, const T* fraction, const Router& r, double coef,
                    double z_coef, Index layers, double factor, Index rows) {
  const Index e_count = r.experts, k_count = r.slots;
  const bool divided = r.kind == RouterKind::top_p && r.temperature > 0;
  const T divide = divided ? T(r.temperature) : T(1);
  for (Index n = 0; n < rows; ++n) {
    const T *p_n = p + n * e_count, *w = weight + n * k_count, *g = d_weight + n * k_count;
    T* d = d_logits + n * e_count;
    std::fill_n(d, e_count, T{});
    T mean{};
    for (Index k = 0; k < k_count; ++k) {
      Index e = expert[n * k_count + k];
      if (e < 0 && r.kind == RouterKind::switch_top1 && r.overflow == Overflow::input)
        e = arg_max(p_n, e_count);  // its weight is still p_max
      if (e < 0) continue;
      const T share = (r.kind == RouterKind::top_k ? w[k] : p_n[e] / divide) * g[k];
      d[e] += share;
      mean += share;
    }
    if (r.kind == RouterKind::top_k) {
      for (Index k = 0; k < k_count; ++k) d[expert[n * k_count + k]] -= w[k] * mean;
    } else {
      for (Index e = 0; e < e_count; ++e) d[e] -= p_n[e] * mean;
    }
    const T balance = dot(p_n, fraction, e_count);
    const T lse = log_sum_exp(logits + n * e_count, e_count);
    for (Index e = 0; e < e_count; ++e)
      d[e] += T(factor) * p_n[e] *
              (T(coef) * T(e_count) / T(rows) * (fraction[e] - balance) +
               T(2 * z_coef) * lse / T(rows * layers));
  }
}

}  // namespace mixlora::reference
