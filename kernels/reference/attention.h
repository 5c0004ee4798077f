// Rotary embedding and causal grouped-query attention with shared prefixes.
#pragma once
#include <vector>

#include "kernels/backend.h"
#include "kernels/reference/scalar.h"

namespace mixlora::reference {

/// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves of each query and key head; the
/// values are copied. `inverse` negates the sines.                  [Su et al. 2021, eq. 34]
/// y, x (N, (H + 2 Hkv) D)  table (positions, D): cos | sin  ids (N, 4)
template <class T>
void rope(T* y, const T* x, const T* table, const std::int32_t* ids, const Heads& h, bool inverse,
          Index rows) {
  const Index d = h.head_dim, half = d / 2, width = (h.heads + 2 * h.kv_heads) * d;
  for (Index n = 0; n < rows; ++n, x += width, y += width) {
    const T *cosine = table + ids[4 * n + 1] * d, *sine = cosine + half;
    for (Index head = 0; head < h.heads + 2 * h.kv_heads; ++head)
      for (Index j = 0; j < half; ++j) {
        const Index lo = head * d + j, hi = lo + half;
        const bool turned = head < h.heads + h.kv_heads;
        const T c = turned ? cosine[j] : T(1), s = turned ? (inverse ? -sine[j] : sine[j]) : T(0);
        const T x1 = x[lo], x2 = x[hi];
        y[lo] = x1 * c - x2 * s;
        y[hi] = x2 * c + x1 * s;
      }
  }
}

/// The rows that row `own` of a sequence {begin, length, prefix_begin, prefix_length} sees: its
/// prefix, then its sequence up to itself.
inline std::vector<Index> seen_rows(const std::int32_t* sequence, Index own) {
  std::vector<Index> rows;
  for (Index i = 0; i < sequence[3]; ++i) rows.push_back(sequence[2] + i);
  for (Index i = 0; i <= own; ++i) rows.push_back(sequence[0] + i);
  return rows;
}

/// o = softmax(q k^T / sqrt(D)) v                              [Vaswani et al. 2017, eq. 1]
/// qkv (N, (H + 2 Hkv) D)  o (N, H D)  lse (N, H)  table (S, 4)
template <class T>
void attention(T* o, T* lse, const T* qkv, const std::int32_t* table, Index sequences,
               const Heads& h) {
  const Index d = h.head_dim, width = (h.heads + 2 * h.kv_heads) * d, group = h.heads / h.kv_heads;
  const T inverse_root = T(1 / std::sqrt(static_cast<double>(d)));
  for (Index s = 0; s < sequences; ++s)
    for (Index i = 0; i < table[4 * s + 1]; ++i) {
      const Index n = table[4 * s] + i;
      const auto rows = seen_rows(table + 4 * s, i);
      std::vector<T> score(rows.size());
      for (Index head = 0; head < h.heads; ++head) {
        const T* q = qkv + n * width + head * d;
        const Index k_at = (h.heads + head / group) * d, v_at = k_at + h.kv_heads * d;
        for (std::size_t j = 0; j < rows.size(); ++j)
          score[j] = inverse_root * dot(q, qkv + rows[j] * width + k_at, d);
        const T total = log_sum_exp(score.data(), static_cast<Index>(rows.size()));
        lse[n * h.heads + head] = total;
        T* out = o + (n * h.heads + head) * d;
        for (Index c = 0; c < d; ++c) out[c] = T{};
        for (std::size_t j = 0; j < rows.size(); ++j) {
          const T p = std::exp(score[j] - total);
          for (Index c = 0; c < d; ++c) out[c] += p * qkv[rows[j] * width + v_at + c];
        }
      }
    }
}

/// p = exp(score - lse); dv += p d_o; d_score = p (d_o . v - d_o . o); dq, dk from d_score.
///                                                             [Dao et al. 2022, appendix B.2]
/// d_qkv (N, (H + 2 Hkv) D) overwritten; prefix rows collect from every sequence that saw them.
template <class T>
void attention_backward(T* d_qkv, const T* d_o, const T* qkv, const T* o, const T* lse,
                        const std::int32_t* table, Index sequences, const Heads& h, Index total) {
  const Index d = h.head_dim, width = (h.heads + 2 * h.kv_heads) * d, group = h.heads / h.kv_heads;
  const T inverse_root = T(1 / std::sqrt(static_cast<double>(d)));
  for (Index i = 0; i < total * width; ++i) d_qkv[i] = T{};
  for (Index s = 0; s < sequences; ++s)
    for (Index i = 0; i < table[4 * s + 1]; ++i) {
      const Index n = table[4 * s] + i;
      const auto rows = seen_rows(table + 4 * s, i);
      for (Index head = 0; head < h.heads; ++head) {
        const Index at = n * h.heads + head, q_at = n * width + head * d;
        const Index k_at = (h.heads + head / group) * d, v_at = k_at + h.kv_heads * d;
        const T* g = d_o + at * d;
        const T mean = dot(g, o + at * d, d);
        for (const Index row : rows) {
          const T *k = qkv + row * width + k_at, *v = qkv + row * width + v_at;
          const T p = std::exp(inverse_root * dot(qkv + q_at, k, d) - lse[at]);
          const T d_score = inverse_root * p * (dot(g, v, d) - mean);
          for (Index c = 0; c < d; ++c) {
            d_qkv[q_at + c] += d_score * k[c];
            d_qkv[row * width + k_at + c] += d_score * qkv[q_at + c];
            d_qkv[row * width + v_at + c] += p * g[c];
          }
        }
      }
    }
}

/// <x, d_x> of each row over all heads.  x, d_x (N, (H + 2 Hkv) D)
template <class T> void row_dots(T* dots, const T* x, const T* d_x, const Heads& h, Index rows) {
  const Index width = (h.heads + 2 * h.kv_heads) * h.head_dim;
  for (Index n = 0; n < rows; ++n) dots[n] = dot(x + n * width, d_x + n * width, width);
}

}  // namespace mixlora::reference
