// Causal attention of sequences that lie end to end, with an optional shared prefix.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vector_math.h"

namespace mixlora {
namespace {

using cpu::parallel_tasks;

MIXLORA_CLONES float dot(const float* a, const float* b, std::int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
MIXLORA_CLONES void axpy(float* y, float s, const float* x, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] += s * x[i];
}
/// x becomes exp(x - top); returns the sum.
MIXLORA_CLONES float exp_row(float* x, float top, std::int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    x[i] = cpu::fast_exp(x[i] - top);
    sum += x[i];
  }
  return sum;
}

struct SequenceRow {
  std::int64_t begin, length, prefix_begin, prefix_length;
  explicit SequenceRow(const std::int32_t* t)
      : begin(t[0]), length(t[1]), prefix_begin(t[2]), prefix_length(t[3]) {}
  std::int64_t seen(std::int64_t i) const { return prefix_length + i + 1; }
  /// Row of the j-th key that a row of this sequence sees.
  std::int64_t key_row(std::int64_t j) const {
    return j < prefix_length ? prefix_begin + j : begin + j - prefix_length;
  }
};

}  // namespace

void CpuBackend::attention(Tensor o, Tensor lse, ConstTensor qkv, const Sequences& s, Heads h) {
  const std::int64_t d = h.head_dim, group = h.heads / h.kv_heads;
  const float scale = 1.0F / std::sqrt(static_cast<float>(d));
  parallel_tasks(s.count * h.heads, [&](std::int64_t task) {
    const SequenceRow seq(s.table.row<std::int32_t>(task / h.heads));
    const std::int64_t head = task % h.heads, kv = head / group;
    const std::int64_t key_at = (h.heads + kv) * d, value_at = (h.heads + h.kv_heads + kv) * d;
    thread_local std::vector<float> p;
    p.resize(static_cast<std::size_t>(seq.prefix_length + seq.length));
    for (std::int64_t i = 0; i < seq.length; ++i) {
      const std::int64_t row = seq.begin + i, n = seq.seen(i);
      const float* q = qkv.row<float>(row) + head * d;
      float top = -INFINITY;
      for (std::int64_t j = 0; j < n; ++j) {
        p[static_cast<std::size_t>(j)] = scale * dot(q, qkv.row<float>(seq.key_row(j)) + key_at, d);
        top = std::max(top, p[static_cast<std::size_t>(j)]);
      }
      const float sum = exp_row(p.data(), top, n);
      float* out = o.row<float>(row) + head * d;
      std::fill_n(out, d, 0.0F);
      for (std::int64_t j = 0; j < n; ++j)
        axpy(out, p[static_cast<std::size_t>(j)] / sum, qkv.row<float>(seq.key_row(j)) + value_at,
             d);
      lse.row<float>(row)[head] = top + std::log(sum);
    }
  });
}

void CpuBackend::attention_backward(Tensor d_qkv, ConstTensor d_o, ConstTensor qkv, ConstTensor o,
                                    ConstTensor lse, const Sequences& s, Heads h) {
  const std::int64_t d = h.head_dim, group = h.heads / h.kv_heads;
  const float scale = 1.0F / std::sqrt(static_cast<float>(d));
  zero(d_qkv);
  const auto backward = [&](const SequenceRow& seq, std::int64_t kv) {
    const std::int64_t key_at = (h.heads + kv) * d, value_at = (h.heads + h.kv_heads + kv) * d;
    thread_local std::vector<float> p;
    p.resize(static_cast<std::size_t>(seq.prefix_length + seq.length));
    for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head) {
      for (std::int64_t i = 0; i < seq.length; ++i) {
        const std::int64_t row = seq.begin + i, n = seq.seen(i);
        const float* q = qkv.row<float>(row) + head * d;
        const float* g = d_o.row<float>(row) + head * d;
        float* d_q = d_qkv.row<float>(row) + head * d;
        const float delta = dot(g, o.row<float>(row) + head * d, d);
        for (std::int64_t j = 0; j < n; ++j)
          p[static_cast<std::size_t>(j)] =
              scale * dot(q, qkv.row<float>(seq.key_row(j)) + key_at, d);
        exp_row(p.data(), lse.row<float>(row)[head], n);
        for (std::int64_t j = 0; j < n; ++j) {
          const std::int64_t other = seq.key_row(j);
          const float weight = p[static_cast<std::size_t>(j)];
          axpy(d_qkv.row<float>(other) + value_at, weight, g, d);
          const float d_score =
              scale * weight * (dot(g, qkv.row<float>(other) + value_at, d) - delta);
          axpy(d_q, d_score, qkv.row<float>(other) + key_at, d);
          axpy(d_qkv.row<float>(other) + key_at, d_score, q, d);
        }
      }
    }
  };
  if (s.max_prefix == 0) {  // sequences do not meet: one task each and key head
    parallel_tasks(s.count * h.kv_heads, [&](std::int64_t task) {
      backward(SequenceRow(s.table.row<std::int32_t>(task / h.kv_heads)), task % h.kv_heads);
    });
    return;
  }
  parallel_tasks(h.kv_heads,
                 [&](std::int64_t kv) {  // prefix rows collect in the order of the sequences
                   for (std::int64_t i = 0; i < s.count; ++i)
                     backward(SequenceRow(s.table.row<std::int32_t>(i)), kv);
                 });
}

}  // namespace mixlora
