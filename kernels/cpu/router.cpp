// Routing: which experts a row uses, how evenly, and the gradient to the router.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

namespace mixlora {
namespace {

using cpu::parallel_for;

struct Softmax {
  double lse = 0, entropy = 0;
};
/// p = softmax(x) in double on the way, f32 in the end.
Softmax softmax(float* p, const float* x, std::int64_t n) {
  double top = -INFINITY, sum = 0, dot = 0;
  for (std::int64_t e = 0; e < n; ++e) top = std::max(top, static_cast<double>(x[e]));
  for (std::int64_t e = 0; e < n; ++e) sum += std::exp(static_cast<double>(x[e]) - top);
  const double lse = top + std::log(sum);
  for (std::int64_t e = 0; e < n; ++e) {
    const double q = std::exp(static_cast<double>(x[e]) - lse);
    p[e] = static_cast<float>(q);
    dot += q * static_cast<double>(x[e]);
  }
  return {lse, lse - dot};
}

/// Experts by falling probability, ties by index.
void by_probability(std::int32_t* order, const float* p, std::int64_t n) {
  std::iota(order, order + n, 0);
  std::stable_sort(order, order + n, [&](std::int32_t a, std::int32_t b) { return p[a] > p[b]; });
}

void choose_top_k(std::int32_t* expert, float* weight, const float* p, std::int64_t n,
                  std::int64_t k) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(n));
  by_probability(order.data(), p, n);
  float sum = 0;
  for (std::int64_t i = 0; i < k; ++i) sum += p[order[static_cast<std::size_t>(i)]];
  for (std::int64_t i = 0; i < k; ++i) {
    expert[i] = order[static_cast<std::size_t>(i)];
    weight[i] = p[expert[i]] / sum;
  }
}
void choose_top_p(std::int32_t* expert, float* weight, const float* p, std::int64_t n,
                  const Router& r) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(n));
  by_probability(order.data(), p, n);
  const float divide = r.temperature > 0 ? r.temperature : 1;
  float sum = 0;
  bool open = true;
  for (std::int64_t i = 0; i < n; ++i) {
    const float q = p[order[static_cast<std::size_t>(i)]] / divide;
    expert[i] = open ? order[static_cast<std::size_t>(i)] : -1;
    weight[i] = open ? q : 0;
    sum += q;
    if (sum > r.top_p) open = false;  // the one that crosses is kept
  }
}

}  // namespace

void CpuBackend::router_logits(Tensor logits, ConstTensor x, ConstTensor wg) {
  gemm(logits, x, false, wg, true, 1, 0);
}

void CpuBackend::route(Slots& slots, Tensor probabilities, Tensor stats, ConstTensor logits,
                       const Router& router, const Sequences& s) {
  const std::int64_t n = logits.rows(), experts = router.experts, k = router.slots;
  if (slots.expert.cols() != k || stats.numel() != 2 * experts + 2)
    throw std::logic_error("route: shapes do not match");
  std::vector<Softmax> rows(static_cast<std::size_t>(n));
  parallel_for(n, [&](std::int64_t i) {
    float* p = probabilities.row<float>(i);
    rows[static_cast<std::size_t>(i)] = softmax(p, logits.row<float>(i), experts);
    auto* expert = slots.expert.row<std::int32_t>(i);
    float* weight = slots.weight.row<float>(i);
    switch (router.kind) {
      case RouterKind::top_k:
        choose_top_k(expert, weight, p, experts, k);
        break;
      case RouterKind::top_p:
        choose_top_p(expert, weight, p, experts, router);
        break;
      case RouterKind::switch_top1:
        expert[0] = static_cast<std::int32_t>(std::max_element(p, p + experts) - p);
        weight[0] = p[expert[0]];
        break;
    }
  });
  std::vector<double> sums(static_cast<std::size_t>(2 * experts + 2));
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < k; ++j)
      if (const auto e = slots.expert.row<std::int32_t>(i)[j]; e >= 0)
        sums[static_cast<std::size_t>(e)] += 1;
    for (std::int64_t e = 0; e < experts; ++e)
      sums[static_cast<std::size_t>(experts + e)] +=
          static_cast<double>(probabilities.row<float>(i)[e]);
    const Softmax& row = rows[static_cast<std::size_t>(i)];
    sums[static_cast<std::size_t>(2 * experts)] += row.lse * row.lse;
    sums[static_cast<std::size_t>(2 * experts + 1)] += row.entropy;
  }
  std::transform(sums.begin(), sums.end(), stats.ptr<float>(),
                 [](double v) { return static_cast<float>(v); });
  if (router.capacity == 0) return;
  parallel_for(s.count, [&](std::int64_t i) {  // first come, first served by position
    const auto* t = s.table.row<std::int32_t>(i);
    std::vector<std::int64_t> taken(static_cast<std::size_t>(experts));
    for (std::int64_t row = t[0]; row < t[0] + t[1]; ++row) {
      auto& e = slots.expert.row<std::int32_t>(row)[0];
      if (taken[static_cast<std::size_t>(e)]++ < router.capacity) continue;
      e = -1;
      if (router.overflow == Overflow::base) slots.weight.row<float>(row)[0] = 1;
    }
  });
}

void CpuBackend::balance_loss(Tensor loss, Tensor fraction, ConstTensor stats, std::int64_t rows,
                              float coef, float z_coef, bool per_layer) {
  const std::int64_t layers = stats.rows(), experts = fraction.cols();
  const double total = static_cast<double>(rows) * static_cast<double>(layers);
  double aux = 0, z = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    double count = 0, probability = 0;
    for (std::int64_t l = 0; l < layers; ++l) {
      count += static_cast<double>(stats.row<float>(l)[e]);
      probability += static_cast<double>(stats.row<float>(l)[experts + e]);
      if (per_layer) {
        const double f = static_cast<double>(stats.row<float>(l)[e]) / static_cast<double>(rows);
        aux += f * static_cast<double>(stats.row<float>(l)[experts + e]) / total;
        fraction.row<float>(l)[e] = static_cast<float>(f / static_cast<double>(layers));
      }
    }
    if (per_layer) continue;
    aux += count / total * (probability / total);
    for (std::int64_t l = 0; l < layers; ++l)
      fraction.row<float>(l)[e] = static_cast<float>(count / total / static_cast<double>(layers));
  }
  for (std::int64_t l = 0; l < layers; ++l)
    z += static_cast<double>(stats.row<float>(l)[2 * experts]);
  loss.ptr<float>()[0] =
      static_cast<float>(static_cast<double>(coef) * static_cast<double>(experts) * aux);
  loss.ptr<float>()[1] = static_cast<float>(static_cast<double>(z_coef) * z / total);
}

void CpuBackend::route_backward(Tensor d_logits, ConstTensor d_weight, const Slots& slots,
                                ConstTensor probabilities, ConstTensor logits, ConstTensor fraction,
                                const Router& router, float coef, float z_coef, std::int64_t layers,
                                float factor) {
  const std::int64_t experts = router.experts, k = router.slots;
  const float aux = factor * coef * static_cast<float>(experts) / static_cast<float>(logits.rows());
  const float z =
      factor * z_coef * 2 / (static_cast<float>(logits.rows()) * static_cast<float>(layers));
  const float divide =
      router.kind == RouterKind::top_p && router.temperature > 0 ? router.temperature : 1;
  parallel_for(logits.rows(), [&](std::int64_t i) {
    const float* p = probabilities.row<float>(i);
    const auto* expert = slots.expert.row<std::int32_t>(i);
    const float *weight = slots.weight.row<float>(i), *d_w = d_weight.row<float>(i),
                *f = fraction.ptr<float>();
    float* d = d_logits.row<float>(i);
    std::fill_n(d, experts, 0.0F);
    if (router.kind == RouterKind::top_k) {
      float mean = 0;
      for (std::int64_t j = 0; j < k; ++j) mean += weight[j] * d_w[j];
      for (std::int64_t j = 0; j < k; ++j) d[expert[j]] += weight[j] * (d_w[j] - mean);
    } else {
      float mean = 0;  // through the whole softmax: d_p_e = d_w_e / temperature
      for (std::int64_t j = 0; j < k; ++j) {
        std::int32_t e = expert[j];
        if (router.kind == RouterKind::switch_top1 && e < 0 && router.overflow == Overflow::input)
          e = static_cast<std::int32_t>(std::max_element(p, p + experts) - p);
        if (e < 0) continue;
        d[e] += p[e] * d_w[j] / divide;
        mean += p[e] * d_w[j] / divide;
      }
      for (std::int64_t e = 0; e < experts; ++e) d[e] -= p[e] * mean;
    }
    double top = -INFINITY, sum = 0;
    float balance = 0;
    for (std::int64_t e = 0; e < experts; ++e) {
      balance += p[e] * f[e];
      top = std::max(top, static_cast<double>(logits.row<float>(i)[e]));
    }
    for (std::int64_t e = 0; e < experts; ++e)
      sum += std::exp(static_cast<double>(logits.row<float>(i)[e]) - top);
    const auto lse = static_cast<float>(top + std::log(sum));
    for (std::int64_t e = 0; e < experts; ++e) d[e] += p[e] * (aux * (f[e] - balance) + z * lse);
  });
}

void CpuBackend::router_backward(Tensor d_wg, Tensor d_x, ConstTensor d_logits, ConstTensor x,
                                 ConstTensor wg) {
  gemm(d_wg, d_logits, true, x, false, 1, 1);
  gemm(d_x, d_logits, false, wg, false, 1, 1);
}

void CpuBackend::slots_to_columns(Tensor columns, ConstTensor z, const Slots& slots,
                                  bool per_slot) {
  const std::int64_t n = z.rows(), rank = slots.rank, k = slots.count;
  parallel_for(columns.rows(), [&](std::int64_t m) {
    float* out = columns.row<float>(m);
    std::fill_n(out, columns.cols(), 0.0F);
    const std::int64_t row = per_slot ? m % n : m;
    for (std::int64_t j = per_slot ? m / n : 0; j < (per_slot ? m / n + 1 : k); ++j) {
      const std::int64_t e = slots.expert ? slots.expert.row<std::int32_t>(row)[j] : 0;
      if (e < 0) continue;
      const float w = per_slot || !slots.weight ? 1 : slots.weight.row<float>(row)[j];
      for (std::int64_t r = 0; r < rank; ++r)
        out[e * rank + r] += w * z.row<float>(row)[j * rank + r];
    }
  });
}

namespace {
std::int64_t expert_of(const Slots& s, std::int64_t row, std::int64_t j) {
  return s.expert ? s.expert.row<std::int32_t>(row)[j] : 0;
}
float weight_of(const Slots& s, std::int64_t row, std::int64_t j) {
  return s.weight ? s.weight.row<float>(row)[j] : 1;
}
}  // namespace

void CpuBackend::slot_combine(Tensor y, ConstTensor core, ConstTensor scale, const Slots& slots) {
  const std::int64_t n = y.rows();
  parallel_for(n, [&](std::int64_t i) {
    float* out = y.row<float>(i);
    std::fill_n(out, y.cols(), 0.0F);
    for (std::int64_t j = 0; j < slots.count; ++j) {
      const std::int64_t e = expert_of(slots, i, j);
      const float w = weight_of(slots, i, j);
      if (w == 0) continue;
      const float* c = core.row<float>(j * n + i);
      const float* s = e < 0 ? nullptr : scale.row<float>(e);
      for (std::int64_t t = 0; t < y.cols(); ++t) out[t] += w * (s != nullptr ? s[t] : 1.0F) * c[t];
    }
  });
}

void CpuBackend::slot_combine_backward(Tensor d_core, Tensor d_weight, Tensor d_scale,
                                       ConstTensor d_y, ConstTensor core, ConstTensor scale,
                                       const Slots& slots) {
  const std::int64_t n = d_y.rows(), cols = d_y.cols();
  parallel_for(n, [&](std::int64_t i) {
    for (std::int64_t j = 0; j < slots.count; ++j) {
      const std::int64_t e = expert_of(slots, i, j);
      const float w = weight_of(slots, i, j);
      const float* s = e < 0 ? nullptr : scale.row<float>(e);
      const float *c = core.row<float>(j * n + i), *g = d_y.row<float>(i);
      float* d = d_core.row<float>(j * n + i);
      double sum = 0;
      for (std::int64_t t = 0; t < cols; ++t) {
        const float scaled = (s != nullptr ? s[t] : 1.0F) * g[t];
        d[t] = w * scaled;
        sum += static_cast<double>(scaled) * static_cast<double>(c[t]);
      }
      d_weight.row<float>(i)[j] = static_cast<float>(sum);
    }
  });
  constexpr std::int64_t kColumns = 64;  // a task sums its own columns over all rows, in order
  parallel_for((cols + kColumns - 1) / kColumns, [&](std::int64_t block) {
    const std::int64_t from = block * kColumns, to = std::min(cols, from + kColumns);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < slots.count; ++j) {
        const std::int64_t e = expert_of(slots, i, j);
        if (e < 0) continue;
        const float w = weight_of(slots, i, j);
        float* out = d_scale.row<float>(e);
        const float *c = core.row<float>(j * n + i), *g = d_y.row<float>(i);
        for (std::int64_t t = from; t < to; ++t) out[t] += w * g[t] * c[t];
      }
    }
  });
}

void CpuBackend::overflow_input(Tensor y, ConstTensor x, const Slots& slots) {
  parallel_for(y.rows(), [&](std::int64_t i) {
    if (expert_of(slots, i, 0) >= 0) return;
    for (std::int64_t c = 0; c < y.cols(); ++c)
      y.row<float>(i)[c] = weight_of(slots, i, 0) * x.row<float>(i)[c];
  });
}
void CpuBackend::overflow_input_backward(Tensor d_x, Tensor d_weight, Tensor d_y, ConstTensor x,
                                         const Slots& slots) {
  parallel_for(d_y.rows(), [&](std::int64_t i) {
    if (expert_of(slots, i, 0) >= 0) return;
    double sum = 0;
    for (std::int64_t c = 0; c < d_y.cols(); ++c) {
      float& g = d_y.row<float>(i)[c];
      d_x.row<float>(i)[c] += weight_of(slots, i, 0) * g;
      sum += static_cast<double>(g) * static_cast<double>(x.row<float>(i)[c]);
      g = 0;
    }
    d_weight.row<float>(i)[0] = static_cast<float>(sum);
  });
}

}  // namespace mixlora
