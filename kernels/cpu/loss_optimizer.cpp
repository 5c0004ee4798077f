// The loss at the vocabulary, and the optimizers.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vector_math.h"

namespace mixlora {
namespace {

using cpu::parallel_for;

MIXLORA_CLONES float top_of(const float* x, std::int64_t n) {
  float top = x[0];
#pragma omp simd reduction(max : top)
  for (std::int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}
/// Sum of exp(x - top), in chunks summed in double so that large vocabularies lose nothing.
MIXLORA_CLONES double exp_sum(const float* x, float top, std::int64_t n) {
  constexpr std::int64_t kChunk = 1024;
  double total = 0;
  for (std::int64_t from = 0; from < n; from += kChunk) {
    const std::int64_t end = from + kChunk < n ? from + kChunk : n;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = from; i < end; ++i) sum += cpu::fast_exp(x[i] - top);
    total += static_cast<double>(sum);
  }
  return total;
}
MIXLORA_CLONES void softmax_gradient(float* x, float top, float factor, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) x[i] = factor * cpu::fast_exp(x[i] - top);
}

constexpr std::int64_t kChunk = 4096;  // numbers a task of a flat sum takes, whatever the threads

template <class F> double flat_sum(std::int64_t n, F&& term) {
  const std::int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<double> sums(static_cast<std::size_t>(chunks));
  parallel_for(chunks, [&](std::int64_t c) {
    double sum = 0;
    for (std::int64_t i = c * kChunk; i < std::min(n, (c + 1) * kChunk); ++i) sum += term(i);
    sums[static_cast<std::size_t>(c)] = sum;
  });
  double total = 0;
  for (const double s : sums) total += s;
  return total;
}

float clip(ConstTensor numbers, ConstTensor norm_squared) {
  const float limit = numbers.ptr<float>()[7];
  if (limit <= 0) return 1;
  const float norm = std::sqrt(norm_squared.ptr<float>()[0]);
  return std::min(1.0F, limit / (norm + 1e-6F));
}

MIXLORA_CLONES void adamw_range(float* w, const float* g, float* m, float* v, const float* numbers,
                                float scale, std::int64_t n) {
  const float lr = numbers[0], decay = 1 - numbers[0] * numbers[1], beta1 = numbers[2],
              beta2 = numbers[3], eps = numbers[4], c1 = numbers[5], root2 = std::sqrt(numbers[6]);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float d = g[i] * scale;
    m[i] = beta1 * m[i] + (1 - beta1) * d;
    v[i] = beta2 * v[i] + (1 - beta2) * d * d;
    const float denominator = std::sqrt(v[i]) / root2 + eps;
    w[i] = w[i] * decay - lr / c1 * (m[i] / denominator);
  }
}

}  // namespace

void CpuBackend::cross_entropy(Tensor loss, Tensor logits, ConstTensor target, ConstTensor weight) {
  const std::int64_t v = logits.cols();
  parallel_for(logits.rows(), [&](std::int64_t i) {
    float* x = logits.row<float>(i);
    const float top = top_of(x, v), w = weight.ptr<float>()[i];
    const std::int64_t t = target.ptr<std::int32_t>()[i];
    const double sum = exp_sum(x, top, v);
    loss.ptr<float>()[i] = static_cast<float>(static_cast<double>(w) *
                                              (std::log(sum) - static_cast<double>(x[t] - top)));
    softmax_gradient(x, top, static_cast<float>(static_cast<double>(w) / sum), v);
    x[t] -= w;
  });
}

void CpuBackend::log_prob(Tensor log_prob, Tensor greedy, ConstTensor logits, ConstTensor target) {
  const std::int64_t v = logits.cols();
  parallel_for(logits.rows(), [&](std::int64_t i) {
    const float* x = logits.row<float>(i);
    const float top = top_of(x, v);
    const std::int64_t t = target.ptr<std::int32_t>()[i];
    log_prob.ptr<float>()[i] =
        static_cast<float>(static_cast<double>(x[t] - top) - std::log(exp_sum(x, top, v)));
    greedy.ptr<float>()[i] = std::find(x, x + v, top) - x == t ? 1.0F : 0.0F;
  });
}

void CpuBackend::sum_squares(Tensor out, ConstTensor x, bool accumulate) {
  const float* p = x.ptr<float>();
  const double sum = flat_sum(x.numel(), [p](std::int64_t i) {
    return static_cast<double>(p[i]) * static_cast<double>(p[i]);
  });
  out.ptr<float>()[0] =
      static_cast<float>(sum + (accumulate ? static_cast<double>(out.ptr<float>()[0]) : 0));
}
void CpuBackend::sum(Tensor out, ConstTensor x) {
  const float* p = x.ptr<float>();
  out.ptr<float>()[0] = static_cast<float>(
      flat_sum(x.numel(), [p](std::int64_t i) { return static_cast<double>(p[i]); }));
}

void CpuBackend::adamw(Tensor w, Tensor /*compute*/, ConstTensor g, Tensor m, Tensor v,
                       StepNumbers numbers, ConstTensor norm_squared) {
  const float scale = clip(numbers, norm_squared);
  const std::int64_t n = w.numel(), chunks = (n + kChunk - 1) / kChunk;
  parallel_for(chunks, [&](std::int64_t c) {
    const std::int64_t at = c * kChunk;
    adamw_range(w.ptr<float>() + at, g.ptr<float>() + at, m.ptr<float>() + at, v.ptr<float>() + at,
                numbers.ptr<float>(), scale, std::min(kChunk, n - at));
  });
}
void CpuBackend::sgd(Tensor w, Tensor /*compute*/, ConstTensor g, Tensor v, StepNumbers numbers,
                     ConstTensor norm_squared) {
  const float *p = numbers.ptr<float>(), scale = clip(numbers, norm_squared);
  parallel_for(w.numel(), [&](std::int64_t i) {
    float d = g.ptr<float>()[i] * scale + p[1] * w.ptr<float>()[i];
    if (v) d = v.ptr<float>()[i] = p[2] * v.ptr<float>()[i] + d;
    w.ptr<float>()[i] -= p[0] * d;
  });
}

}  // namespace mixlora
