// Causal attention of sequences that lie end to end, with an optional shared prefix.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vector_math.h"

namespace mixlora {
namespace {

using cpu::multiply;
using cpu::parallel_tasks;

constexpr std::int64_t kRows = 32;  // query rows whose scores are held at a time

MIXLORA_CLONES float dot(const float* a, const float* b, std::int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
/// x becomes softmax(x); returns the log of its denominator.
MIXLORA_CLONES float softmax_row(float* x, std::int64_t n) {
  float top = x[0], sum = 0;
#pragma omp simd reduction(max : top)
  for (std::int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    x[i] = cpu::fast_exp(x[i] - top);
    sum += x[i];
  }
  const float inverse = 1.0F / sum;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) x[i] *= inverse;
  return top + std::log(sum);
}
/// p: scores -> probabilities; d_p: dLoss/dp -> dLoss/dscore before the scale of the scores.
MIXLORA_CLONES void score_gradient(float* p, float* d_p, float lse, float delta, float scale,
                                   std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    p[i] = cpu::fast_exp(p[i] - lse);
    d_p[i] = scale * p[i] * (d_p[i] - delta);
  }
}

std::int64_t padded(std::int64_t n) { return (n + 15) / 16 * 16; }

/// One sequence's keys or values: its prefix's rows, then its own.
struct SequenceRow {
  std::int64_t begin, length, prefix_begin, prefix_length;
  explicit SequenceRow(const std::int32_t* t)
      : begin(t[0]), length(t[1]), prefix_begin(t[2]), prefix_length(t[3]) {}
  std::int64_t keys() const { return prefix_length + length; }
  /// Calls f(first row in the batch, first key, keys) for the keys below `seen`.
  template <class F> void each_part(std::int64_t seen, F&& f) const {
    if (prefix_length > 0) f(prefix_begin, std::int64_t{0}, std::min(prefix_length, seen));
    if (seen > prefix_length) f(begin, prefix_length, seen - prefix_length);
  }
};

/// Columns [column, column + d) of the sequence's key rows as (d, padded keys), zeros beyond.
void transpose_keys(std::vector<float>& out, ConstTensor qkv, const SequenceRow& seq,
                    std::int64_t column, std::int64_t d) {
  const std::int64_t width = padded(seq.keys());
  out.resize(static_cast<std::size_t>(d * width));
  seq.each_part(seq.keys(), [&](std::int64_t row, std::int64_t key, std::int64_t n) {
    constexpr std::int64_t kBlock = 16;
    for (std::int64_t j0 = 0; j0 < n; j0 += kBlock)
      for (std::int64_t c = 0; c < d; ++c)
        for (std::int64_t j = j0; j < std::min(n, j0 + kBlock); ++j)
          out[static_cast<std::size_t>(c * width + key + j)] = qkv.row<float>(row + j)[column + c];
  });
  for (std::int64_t c = 0; c < d; ++c)
    std::fill(out.begin() + c * width + seq.keys(), out.begin() + (c + 1) * width, 0.0F);
}

}  // namespace

void CpuBackend::attention(Tensor o, Tensor lse, ConstTensor qkv, const Sequences& s, Heads h) {
  const std::int64_t d = h.head_dim, group = h.heads / h.kv_heads;
  const float scale = 1.0F / std::sqrt(static_cast<float>(d));
  parallel_tasks(s.count * h.kv_heads, [&](std::int64_t task) {
    const SequenceRow seq(s.table.row<std::int32_t>(task / h.kv_heads));
    if (seq.length == 0) return;
    const std::int64_t kv = task % h.kv_heads, width = padded(seq.keys());
    const std::int64_t key_at = (h.heads + kv) * d, value_at = key_at + h.kv_heads * d;
    thread_local std::vector<float> keys, p;
    transpose_keys(keys, qkv, seq, key_at, d);
    p.resize(static_cast<std::size_t>(kRows * width));
    for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head)
      for (std::int64_t i0 = 0; i0 < seq.length; i0 += kRows) {
        const std::int64_t rows = std::min(kRows, seq.length - i0), first = seq.begin + i0;
        const std::int64_t seen = seq.prefix_length + i0 + rows;  // by the last of these rows
        multiply(p.data(), width, {qkv.row<float>(first) + head * d, qkv.stride, false},
                 keys.data(), width, rows, padded(seen), d, scale, 0);
        for (std::int64_t i = 0; i < rows; ++i) {
          float* x = p.data() + i * width;
          const std::int64_t n = seen - rows + i + 1;
          lse.row<float>(first + i)[head] = softmax_row(x, n);
          std::fill(x + n, x + seen, 0.0F);
        }
        seq.each_part(seen, [&](std::int64_t row, std::int64_t key, std::int64_t n) {
          multiply(o.row<float>(first) + head * d, o.stride, {p.data() + key, width, false},
                   qkv.row<float>(row) + value_at, qkv.stride, rows, d, n, 1,
                   key == 0 ? 0.0F : 1.0F);
        });
      }
  });
}

void CpuBackend::attention_backward(Tensor d_qkv, ConstTensor d_o, ConstTensor qkv, ConstTensor o,
                                    ConstTensor lse, const Sequences& s, Heads h) {
  const std::int64_t d = h.head_dim, group = h.heads / h.kv_heads;
  const float scale = 1.0F / std::sqrt(static_cast<float>(d));
  zero(d_qkv);
  const auto backward = [&](const SequenceRow& seq, std::int64_t kv) {
    if (seq.length == 0) return;
    const std::int64_t key_at = (h.heads + kv) * d, value_at = key_at + h.kv_heads * d,
                       width = padded(seq.keys());
    thread_local std::vector<float> keys, values, p, d_p;
    transpose_keys(keys, qkv, seq, key_at, d);
    transpose_keys(values, qkv, seq, value_at, d);
    p.resize(static_cast<std::size_t>(kRows * width));
    d_p.resize(static_cast<std::size_t>(kRows * width));
    for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head)
      for (std::int64_t i0 = 0; i0 < seq.length; i0 += kRows) {
        const std::int64_t rows = std::min(kRows, seq.length - i0), first = seq.begin + i0;
        const std::int64_t seen = seq.prefix_length + i0 + rows;
        const float* q = qkv.row<float>(first) + head * d;
        const float* g = d_o.row<float>(first) + head * d;
        multiply(p.data(), width, {q, qkv.stride, false}, keys.data(), width, rows, padded(seen), d,
                 scale, 0);
        multiply(d_p.data(), width, {g, d_o.stride, false}, values.data(), width, rows,
                 padded(seen), d, 1, 0);
        for (std::int64_t i = 0; i < rows; ++i) {
          float *x = p.data() + i * width, *d_x = d_p.data() + i * width;
          const std::int64_t n = seen - rows + i + 1;
          const float delta = dot(g + i * d_o.stride, o.row<float>(first + i) + head * d, d);
          score_gradient(x, d_x, lse.row<float>(first + i)[head], delta, scale, n);
          std::fill(x + n, x + seen, 0.0F);
          std::fill(d_x + n, d_x + seen, 0.0F);
        }
        seq.each_part(seen, [&](std::int64_t row, std::int64_t key, std::int64_t n) {
          multiply(d_qkv.row<float>(row) + value_at, d_qkv.stride, {p.data() + key, width, true}, g,
                   d_o.stride, n, d, rows, 1, 1);
          multiply(d_qkv.row<float>(row) + key_at, d_qkv.stride, {d_p.data() + key, width, true}, q,
                   qkv.stride, n, d, rows, 1, 1);
          multiply(d_qkv.row<float>(first) + head * d, d_qkv.stride,
                   {d_p.data() + key, width, false}, qkv.row<float>(row) + key_at, qkv.stride, rows,
                   d, n, 1, 1);
        });
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
