// The gated feed-forward with experts: (row, slot) pairs grouped by expert, small dense products
// per expert.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels/cpu/activation.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/parallel.h"

namespace mixlora {
namespace {

using cpu::parallel_for;

/// The pairs one expert serves, in row order; expert -1 is the frozen projections alone.
struct ExpertRows {
  std::int64_t expert = 0, count = 0;
  const std::int32_t* pairs = nullptr;  // row * slots + slot; null: all rows, slot 0
  std::int64_t slots = 1;
  std::int64_t row(std::int64_t i) const { return pairs == nullptr ? i : pairs[i] / slots; }
  std::int64_t slot(std::int64_t i) const { return pairs == nullptr ? 0 : pairs[i] % slots; }
};

/// Counting sort of the pairs by expert. Empty slots (no expert, weight 0) are left out.
std::vector<ExpertRows> grouped(const Slots& s, std::int64_t rows, std::int32_t* room) {
  if (!s.expert) return {{0, rows, nullptr, 1}};
  std::vector<std::int64_t> counts(static_cast<std::size_t>(s.experts + 1));
  const auto used = [&](std::int64_t i, std::int64_t j) {
    return s.expert.row<std::int32_t>(i)[j] >= 0 || s.weight.row<float>(i)[j] != 0;
  };
  const auto bin = [&](std::int64_t i, std::int64_t j) {
    return static_cast<std::size_t>(s.expert.row<std::int32_t>(i)[j] + 1);
  };
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < s.count; ++j)
      if (used(i, j)) ++counts[bin(i, j)];
  std::vector<ExpertRows> groups;
  std::vector<std::int64_t> next;
  std::int64_t at = 0;
  for (std::size_t b = 0; b < counts.size(); ++b) {
    groups.push_back({static_cast<std::int64_t>(b) - 1, counts[b], room + at, s.count});
    next.push_back(at);
    at += counts[b];
  }
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < s.count; ++j)
      if (used(i, j)) room[next[bin(i, j)]++] = static_cast<std::int32_t>(i * s.count + j);
  return groups;
}

Tensor floats(float* data, std::int64_t rows, std::int64_t cols) {
  return {data, {rows, cols}, DType::f32, Device::cpu};
}

MIXLORA_CLONES void multiply(float* y, const float* x, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] *= x[i];
}
MIXLORA_CLONES void axpy(float* y, float s, const float* x, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] += s * x[i];
}
MIXLORA_CLONES float dot(const float* a, const float* b, std::int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
/// du = dh v f'(u), dv = dh f(u), from act = f(u), slope = f'(u).
MIXLORA_CLONES void gate_backward(float* du, float* dv, const float* dh, const float* v,
                                  const float* act, const float* slope, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float g = dh[i];
    du[i] = g * v[i] * slope[i];
    dv[i] = g * act[i];
  }
}

/// Sums a (m, n) matrix product x * y by column into out, in row order; a task owns 64 columns.
void add_column_products(float* out, const float* x, const float* y, std::int64_t m,
                         std::int64_t n) {
  constexpr std::int64_t kColumns = 64;
  parallel_for((n + kColumns - 1) / kColumns, [&](std::int64_t block) {
    const std::int64_t from = block * kColumns, to = std::min(n, from + kColumns);
    double sums[kColumns] = {};
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t c = from; c < to; ++c)
        sums[c - from] += static_cast<double>(x[i * n + c]) * static_cast<double>(y[i * n + c]);
    for (std::int64_t c = from; c < to; ++c) out[c] += static_cast<float>(sums[c - from]);
  });
}

enum Buffer : std::size_t {
  buffer_pairs = 1,
  buffer_u,
  buffer_v,
  buffer_h,
  buffer_d,
  buffer_core_u,
  buffer_core_v,
  buffer_a,
  buffer_q
};

}  // namespace

void CpuBackend::mixture(Tensor out, Tensor z, const Mixture& m) {
  const std::int64_t n = m.gate_up.rows(), f = m.gate_up.cols() / 2, rank = m.slots.rank;
  if (out.cols() != f || out.rows() != (m.per_slot ? m.slots.count * n : n))
    throw std::logic_error("mixture: shapes do not match");
  const auto groups =
      grouped(m.slots, n, index_buffer(buffer_pairs, static_cast<std::size_t>(n * m.slots.count)));
  const bool direct = !m.slots.expert;  // one expert for all rows: its h is the output
  if (!direct) zero(out);
  if (z && !direct) zero(z);
  for (const ExpertRows& g : groups) {
    if (g.count == 0) continue;
    const bool adapted = g.expert >= 0;
    const auto size = static_cast<std::size_t>(g.count * f);
    float *u = buffer(buffer_u, size), *v = buffer(buffer_v, size);
    parallel_for(g.count, [&](std::int64_t i) {
      const float* c = m.gate_up.row<float>(g.row(i));
      std::memcpy(u + i * f, c, static_cast<std::size_t>(f) * sizeof(float));
      std::memcpy(v + i * f, c + f, static_cast<std::size_t>(f) * sizeof(float));
    });
    for (const bool up : {false, true}) {
      const ConstTensor b = up ? m.weights.up_b : m.weights.gate_b,
                        scale = up ? m.weights.up_scale : m.weights.gate_scale;
      float* x = up ? v : u;
      if (adapted && b) {
        const std::int64_t column = (up ? m.slots.experts * rank : 0) + g.expert * rank;
        ConstTensor a = m.a.col_range(column, column + rank);
        if (g.pairs != nullptr) {
          float* room = buffer(buffer_a, static_cast<std::size_t>(g.count * rank));
          for (std::int64_t i = 0; i < g.count; ++i)
            std::copy_n(a.row<float>(g.row(i)), rank, room + i * rank);
          a = floats(room, g.count, rank);
        }
        gemm(floats(x, g.count, f), a, false, b.at(g.expert), true, 1, 1);
      }
      if (adapted && scale)
        parallel_for(g.count,
                     [&](std::int64_t i) { multiply(x + i * f, scale.row<float>(g.expert), f); });
    }
    const bool down = adapted && m.weights.down_a;
    Dropout d = m.dropout;
    d.site += static_cast<std::uint32_t>(std::max<std::int64_t>(g.expert, 0));
    const bool masked = down && d.active();
    float* dropped = masked ? buffer(buffer_h, size) : u;
    parallel_for(g.count, [&](std::int64_t i) {
      const std::int64_t row = g.row(i), slot = g.slot(i);
      float* h = u + i * f;
      cpu::activate(m.activation, h, nullptr, h, f);
      multiply(h, v + i * f, f);
      if (m.per_slot || direct)
        std::copy_n(h, f, out.row<float>(m.per_slot ? slot * n + row : row));
      else
        axpy(out.row<float>(row), m.slots.weight.row<float>(row)[slot], h, f);
      if (!masked) return;
      cpu::masked_row(dropped + i * f, h, d, m.ids.row<std::int32_t>(row), f);
    });
    if (!down) continue;
    const ConstTensor a2 = m.weights.down_a.at(g.expert);
    if (direct) {
      gemm(z, floats(dropped, g.count, f), false, a2, true, m.scale, 0);
      continue;
    }
    float* room = buffer(buffer_a, static_cast<std::size_t>(g.count * rank));
    gemm(floats(room, g.count, rank), floats(dropped, g.count, f), false, a2, true, m.scale, 0);
    for (std::int64_t i = 0; i < g.count; ++i)
      std::copy_n(room + i * rank, rank, z.row<float>(g.row(i)) + g.slot(i) * rank);
  }
}

void CpuBackend::mixture_backward(Tensor d_gate_up, Tensor d_weight, Tensor p,
                                  const MixtureGrads& grads, ConstTensor d_out, ConstTensor q,
                                  ConstTensor z, const Mixture& m) {
  const std::int64_t n = m.gate_up.rows(), f = m.gate_up.cols() / 2, rank = m.slots.rank;
  const auto groups =
      grouped(m.slots, n, index_buffer(buffer_pairs, static_cast<std::size_t>(n * m.slots.count)));
  const bool direct = !m.slots.expert;
  if (!direct) zero(d_gate_up);
  if (p) zero(p);
  if (d_weight) zero(d_weight);
  for (const ExpertRows& g : groups) {
    if (g.count == 0) continue;
    const bool adapted = g.expert >= 0, down = adapted && m.weights.down_a;
    const auto size = static_cast<std::size_t>(g.count * f);
    const std::array<ConstTensor, 2> b{m.weights.gate_b, m.weights.up_b},
        scale{m.weights.gate_scale, m.weights.up_scale};
    const std::array<float*, 2> x{buffer(buffer_u, size), buffer(buffer_v, size)};
    std::array<float*, 2> core{nullptr, nullptr};
    const auto gathered_a = [&](std::size_t i) {
      const std::int64_t column = (i == 1 ? m.slots.experts * rank : 0) + g.expert * rank;
      const ConstTensor a = m.a.col_range(column, column + rank);
      if (g.pairs == nullptr) return a;
      float* room = buffer(buffer_a, static_cast<std::size_t>(g.count * rank));
      for (std::int64_t j = 0; j < g.count; ++j)
        std::copy_n(a.row<float>(g.row(j)), rank, room + j * rank);
      return ConstTensor(floats(room, g.count, rank));
    };
    for (std::size_t i = 0; i < 2; ++i) {  // u and v again, from what forward read
      parallel_for(g.count, [&](std::int64_t j) {
        std::memcpy(x.at(i) + j * f, m.gate_up.row<float>(g.row(j)) + (i == 1 ? f : 0),
                    static_cast<std::size_t>(f) * sizeof(float));
      });
      if (adapted && b.at(i))
        gemm(floats(x.at(i), g.count, f), gathered_a(i), false, b.at(i).at(g.expert), true, 1, 1);
      if (!adapted || !scale.at(i)) continue;
      core.at(i) = buffer(i == 0 ? buffer_core_u : buffer_core_v, size);
      parallel_for(g.count, [&](std::int64_t j) {
        std::copy_n(x.at(i) + j * f, f, core.at(i) + j * f);
        multiply(x.at(i) + j * f, scale.at(i).row<float>(g.expert), f);
      });
    }
    // d: s A2^T q, then dh; dropped: drop(h) times w, for dA2
    float *d = buffer(buffer_d, size), *dropped = buffer(buffer_h, size);
    ConstTensor own_q;
    if (down) {
      own_q = q.col_range(g.expert * rank, g.expert * rank + rank);
      if (g.pairs != nullptr) {
        float* room = buffer(buffer_q, static_cast<std::size_t>(g.count * rank));
        for (std::int64_t i = 0; i < g.count; ++i)
          std::copy_n(own_q.row<float>(m.per_slot ? g.slot(i) * n + g.row(i) : g.row(i)), rank,
                      room + i * rank);
        own_q = floats(room, g.count, rank);
      }
      gemm(floats(d, g.count, f), own_q, false, m.weights.down_a.at(g.expert), false, m.scale, 0);
    }
    Dropout drop = m.dropout;
    drop.site += static_cast<std::uint32_t>(std::max<std::int64_t>(g.expert, 0));
    parallel_for(g.count, [&](std::int64_t i) {
      thread_local std::vector<float> act, slope;
      act.resize(static_cast<std::size_t>(f));
      slope.resize(static_cast<std::size_t>(f));
      const std::int64_t row = g.row(i), slot = g.slot(i);
      const float w = m.per_slot || direct ? 1.0F : m.slots.weight.row<float>(row)[slot];
      const float* gh = d_out.row<float>(m.per_slot ? slot * n + row : row);
      float *u = x[0] + i * f, *v = x[1] + i * f, *dh = d + i * f, *h = dropped + i * f;
      cpu::activate(m.activation, act.data(), slope.data(), u, f);
      if (d_weight || down) {
        std::copy_n(act.data(), f, h);
        multiply(h, v, f);
      }
      if (d_weight) {
        float own = dot(h, gh, f);
        if (down) own += dot(z.row<float>(row) + slot * rank, own_q.row<float>(i), rank);
        d_weight.row<float>(row)[slot] = own;
      }
      if (!down) std::fill_n(dh, f, 0.0F);
      if (down && drop.active()) {
        thread_local std::vector<float> mask;
        mask.resize(static_cast<std::size_t>(f));
        cpu::mask_row(mask.data(), drop, m.ids.row<std::int32_t>(row), 0, f);
        multiply(dh, mask.data(), f);
        multiply(h, mask.data(), f);
      }
      axpy(dh, 1, gh, f);
      if (w != 1.0F) {
        for (std::int64_t c = 0; c < f; ++c) dh[c] *= w;
        if (down)
          for (std::int64_t c = 0; c < f; ++c) h[c] *= w;
      }
      gate_backward(u, v, dh, v, act.data(), slope.data(), f);
    });
    if (down)
      gemm(grads.down_a.at(g.expert), own_q, true, floats(dropped, g.count, f), false, m.scale, 1);
    for (std::size_t i = 0; i < 2; ++i) {
      float* dx = x.at(i);
      if (core.at(i) != nullptr) {
        const Tensor d_scale = i == 0 ? grads.gate_scale : grads.up_scale;
        add_column_products(d_scale.row<float>(g.expert), dx, core.at(i), g.count, f);
        parallel_for(g.count, [&](std::int64_t j) {
          multiply(dx + j * f, scale.at(i).row<float>(g.expert), f);
        });
      }
      parallel_for(g.count, [&](std::int64_t j) {
        float* to = d_gate_up.row<float>(g.row(j)) + (i == 1 ? f : 0);
        if (direct)
          std::copy_n(dx + j * f, f, to);
        else
          axpy(to, 1, dx + j * f, f);
      });
      if (!adapted || !b.at(i)) continue;
      const Tensor d_b = (i == 0 ? grads.gate_b : grads.up_b).at(g.expert);
      gemm(d_b, floats(dx, g.count, f), true, gathered_a(i), false, 1, 1);
      const std::int64_t column = (i == 1 ? m.slots.experts * rank : 0) + g.expert * rank;
      const Tensor own_p = p.col_range(column, column + rank);
      if (g.pairs == nullptr) {
        gemm(own_p, floats(dx, g.count, f), false, b.at(i).at(g.expert), false, m.scale, 0);
        continue;
      }
      float* room = buffer(buffer_q, static_cast<std::size_t>(g.count * rank));
      gemm(floats(room, g.count, rank), floats(dx, g.count, f), false, b.at(i).at(g.expert), false,
           m.scale, 0);
      for (std::int64_t j = 0; j < g.count; ++j)
        std::copy_n(room + j * rank, rank, own_p.row<float>(g.row(j)));
    }
  }
}

}  // namespace mixlora
