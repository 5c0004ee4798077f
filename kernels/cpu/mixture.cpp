// The gated feed-forward with experts, by columns: a task owns a span of the F columns and takes
// all rows through it in tiles that stay in cache, so gradients of factors need no reduction. What
// sums over F (z, p, d_weight) is kept apart by span and summed in their order.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

#include "kernels/cpu/activation.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/pairs.h"
#include "kernels/cpu/parallel.h"

namespace mixlora {
namespace {

using cpu::Pairs;
using cpu::parallel_for;

constexpr std::int64_t kColumns = 128, kPairs = 32;  // a tile
constexpr std::int64_t kSpans = 16;                  // tasks at most
using Tile = std::array<float, static_cast<std::size_t>(kColumns* kPairs)>;

MIXLORA_CLONES void multiply_by(float* y, const float* x, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] *= x[i];
}
MIXLORA_CLONES void scale_by(float* y, float s, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] *= s;
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
/// du = dh v f'(u), dv = dh f(u), from act = f(u), slope = f'(u); du, dv take u's and v's place.
MIXLORA_CLONES void gate_backward(float* u, float* v, const float* dh, const float* act,
                                  const float* slope, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    u[i] = dh[i] * v[i] * slope[i];
    v[i] = dh[i] * act[i];
  }
}

/// How a call is cut: columns into spans, rows into runs whose sums by span fit the room.
struct Cut {
  std::int64_t f, span, spans, run;
  /// `numbers` of a pair are kept by span.
  Cut(const Mixture& m, std::int64_t columns, std::int64_t numbers, std::int64_t room)
      : f(columns) {
    const std::int64_t slots = m.slots.expert ? m.slots.count : 1,
                       tiles = (f + kColumns - 1) / kColumns,
                       row = std::max<std::int64_t>(slots * numbers, 1);
    spans = std::clamp<std::int64_t>(std::min(tiles, room / row), 1, kSpans);
    span = (tiles + spans - 1) / spans * kColumns;
    spans = (f + span - 1) / span;
    run = std::max<std::int64_t>(room / (row * spans), 1);
    if (run > kPairs) run = run / kPairs * kPairs;
  }
};

/// One tile's pairs: some places of one expert's group, some columns.
struct Block {
  const Mixture& m;
  const Pairs& pairs;
  std::int64_t expert, first, n;  // places [first, first + n)
  std::int64_t column, width;
  std::int64_t row(std::int64_t i) const { return pairs.row[static_cast<std::size_t>(first + i)]; }
  std::int64_t slot(std::int64_t i) const {
    return pairs.slot[static_cast<std::size_t>(first + i)];
  }
  std::int64_t size() const { return n * width; }
  float weight(std::int64_t i) const {
    return m.per_slot || !m.slots.expert ? 1.0F : m.slots.weight.row<float>(row(i))[slot(i)];
  }
  /// Row of (N, F) or, when per slot, (K, N, F).
  std::int64_t output_row(std::int64_t i) const {
    return m.per_slot ? slot(i) * m.gate_up.rows() + row(i) : row(i);
  }
};

/// What an expert's columns [column, column + width) need, laid out for the products.
struct ExpertColumns {
  ConstTensor b[2], scale[2], a2;         // gate, up; absent where the expert has none
  std::vector<float> b_rows[2], a2_rows;  // B^T (R, width), A2^T (width, R)

  void prepare(const Mixture& m, std::int64_t expert, std::int64_t column, std::int64_t width,
               bool forward) {
    const std::array<ConstTensor, 2> factors{m.weights.gate_b, m.weights.up_b},
        scales{m.weights.gate_scale, m.weights.up_scale};
    const std::int64_t rank = m.slots.rank;
    for (std::size_t i = 0; i < 2; ++i) {
      b[i] = expert >= 0 && factors.at(i)
                 ? factors.at(i).at(expert).row_range(column, column + width)
                 : ConstTensor();
      scale[i] = expert >= 0 && scales.at(i)
                     ? scales.at(i).row_range(expert, expert + 1).col_range(column, column + width)
                     : ConstTensor();
      if (!b[i]) continue;
      b_rows[i].resize(static_cast<std::size_t>(rank * width));
      for (std::int64_t c = 0; c < width; ++c)
        for (std::int64_t r = 0; r < rank; ++r)
          b_rows[i][static_cast<std::size_t>(r * width + c)] = b[i].row<float>(c)[r];
    }
    a2 = expert >= 0 && m.weights.down_a
             ? m.weights.down_a.at(expert).col_range(column, column + width)
             : ConstTensor();
    if (!a2 || !forward) return;
    a2_rows.resize(static_cast<std::size_t>(rank * width));
    for (std::int64_t r = 0; r < rank; ++r)
      for (std::int64_t c = 0; c < width; ++c)
        a2_rows[static_cast<std::size_t>(c * rank + r)] = a2.row<float>(r)[c];
  }
};

/// The pairs' rows of their expert's columns of `a`, end to end.
void gather_a(std::vector<float>& out, const Block& t, bool up) {
  const std::int64_t rank = t.m.slots.rank, at = ((up ? t.m.slots.experts : 0) + t.expert) * rank;
  out.resize(static_cast<std::size_t>(kPairs * rank));
  for (std::int64_t i = 0; i < t.n; ++i)
    std::copy_n(t.m.a.row<float>(t.row(i)) + at, rank, out.begin() + i * rank);
}

/// x = c (gate) or c3 (up) of the pairs, plus B a; `a` receives the gathered rows.
void projection(Tile& x, std::vector<float>& a, const Block& t, const ExpertColumns& e, bool up) {
  const std::int64_t rank = t.m.slots.rank, f = t.m.gate_up.cols() / 2;
  for (std::int64_t i = 0; i < t.n; ++i)
    std::copy_n(t.m.gate_up.row<float>(t.row(i)) + (up ? f : 0) + t.column, t.width,
                x.data() + i * t.width);
  if (!e.b[up]) return;
  gather_a(a, t, up);
  cpu::multiply(x.data(), t.width, {a.data(), rank, false}, e.b_rows[up].data(), t.width, t.n,
                t.width, rank, 1, 1);
}
void scale_rows(Tile& x, const Block& t, ConstTensor scale) {
  for (std::int64_t i = 0; i < t.n; ++i)
    multiply_by(x.data() + i * t.width, scale.ptr<float>(), t.width);
}

Dropout dropout_of(const Block& t) {
  Dropout d = t.m.dropout;
  d.site += static_cast<std::uint32_t>(std::max<std::int64_t>(t.expert, 0));
  return d;
}
void mask_rows(Tile& mask, const Block& t) {
  const Dropout d = dropout_of(t);
  for (std::int64_t i = 0; i < t.n; ++i)
    cpu::mask_row(mask.data() + i * t.width, d, t.m.ids.row<std::int32_t>(t.row(i)), t.column,
                  t.width);
}

/// f(block, what its expert has there) for every tile of a span, by columns, experts, pairs.
template <class F>
void each_block(const Mixture& m, const Pairs& pairs, const Cut& cut, std::int64_t span,
                bool forward, F&& f) {
  thread_local ExpertColumns own;
  for (std::int64_t c = span * cut.span; c < std::min(cut.f, (span + 1) * cut.span);
       c += kColumns) {
    const std::int64_t width = std::min(kColumns, cut.f - c);
    for (const Pairs::Group& g : pairs.groups) {
      own.prepare(m, g.expert, c, width, forward);
      for (std::int64_t at = g.begin; at < g.end; at += kPairs)
        f(Block{m, pairs, g.expert, at, std::min(kPairs, g.end - at), c, width}, own);
    }
  }
}

/// Zeros where pairs will add, or where no pair writes.
void zero_columns(Tensor t, std::int64_t from, std::int64_t to, std::int64_t begin,
                  std::int64_t end) {
  for (std::int64_t i = from; i < to; ++i)
    std::fill(t.row<float>(i) + begin, t.row<float>(i) + end, 0.0F);
}

}  // namespace

void CpuBackend::mixture(Tensor out, Tensor z, const Mixture& m) {
  const std::int64_t n = m.gate_up.rows(), f = m.gate_up.cols() / 2, rank = m.slots.rank;
  if (out.cols() != f || out.rows() != (m.per_slot ? m.slots.count * n : n))
    throw std::logic_error("mixture: shapes do not match");
  const bool direct = !m.slots.expert;  // one expert for all rows: its h is the output
  const Cut cut(m, f, rank, cpu::kGemmRoom);
  float* room = gemm_room();
  for (std::int64_t from = 0; from < n; from += cut.run) {
    const std::int64_t to = std::min(n, from + cut.run);
    const Pairs pairs = cpu::pairs_of(m.slots, from, to);
    const auto count = static_cast<std::int64_t>(pairs.row.size());
    parallel_for(cut.spans, [&](std::int64_t span) {
      const std::int64_t begin = span * cut.span, end = std::min(f, begin + cut.span);
      for (std::int64_t k = 0; !direct && k < (m.per_slot ? m.slots.count : 1); ++k)
        zero_columns(out, k * n + from, k * n + to, begin, end);
      Tile u, v, mask;
      thread_local std::vector<float> a;
      each_block(m, pairs, cut, span, true, [&](const Block& t, const ExpertColumns& e) {
        projection(u, a, t, e, false);
        projection(v, a, t, e, true);
        if (e.scale[0]) scale_rows(u, t, e.scale[0]);
        if (e.scale[1]) scale_rows(v, t, e.scale[1]);
        cpu::activate(m.activation, u.data(), nullptr, u.data(), t.size());
        multiply_by(u.data(), v.data(), t.size());
        for (std::int64_t i = 0; i < t.n; ++i) {
          float* to_row = out.row<float>(t.output_row(i)) + t.column;
          if (direct || m.per_slot)
            std::copy_n(u.data() + i * t.width, t.width, to_row);
          else
            axpy(to_row, t.weight(i), u.data() + i * t.width, t.width);
        }
        if (!e.a2) return;
        if (m.dropout.active()) {
          mask_rows(mask, t);
          multiply_by(u.data(), mask.data(), t.size());
        }
        cpu::multiply(room + (span * count + t.first) * rank, rank, {u.data(), t.width, false},
                      e.a2_rows.data(), rank, t.n, rank, t.width, 1,
                      t.column == begin ? 0.0F : 1.0F);
      });
    });
    if (!z) continue;
    parallel_for(to - from, [&](std::int64_t i) {
      float* row = z.row<float>(from + i);
      std::fill_n(row, z.cols(), 0.0F);
      for (std::int64_t k = 0; k < pairs.slots; ++k) {
        const std::int64_t at = pairs.place_of(i, k);
        if (at < 0 || (!direct && m.slots.expert.row<std::int32_t>(from + i)[k] < 0)) continue;
        for (std::int64_t span = 0; span < cut.spans; ++span)
          axpy(row + k * rank, m.scale, room + (span * count + at) * rank, rank);
      }
    });
  }
}

bool CpuBackend::mixture_backward(Tensor d_gate_up, Tensor d_weight, Tensor p, Tensor /*row_dots*/,
                                  const MixtureGrads& grads, ConstTensor d_out, ConstTensor q,
                                  ConstTensor z, const Mixture& m) {
  const std::int64_t n = m.gate_up.rows(), f = m.gate_up.cols() / 2, rank = m.slots.rank;
  const bool direct = !m.slots.expert;
  const std::int64_t numbers = 2 * rank + 1;  // of a pair and span: p of gate and up, d_weight
  const Cut cut(m, f, numbers, cpu::kGemmRoom);
  float* room = gemm_room();
  const auto own_q = [&](std::int64_t row, std::int64_t slot, std::int64_t expert) {
    return q.row<float>(m.per_slot ? slot * n + row : row) + expert * rank;
  };
  for (std::int64_t from = 0; from < n; from += cut.run) {
    const std::int64_t to = std::min(n, from + cut.run);
    const Pairs pairs = cpu::pairs_of(m.slots, from, to);
    const auto count = static_cast<std::int64_t>(pairs.row.size());
    parallel_for(cut.spans, [&](std::int64_t span) {
      const std::int64_t begin = span * cut.span, end = std::min(f, begin + cut.span);
      if (!direct) {
        zero_columns(d_gate_up, from, to, begin, end);
        zero_columns(d_gate_up, from, to, f + begin, f + end);
      }
      std::array<Tile, 2> x, core;
      Tile act, slope, d, h, mask;
      thread_local std::array<std::vector<float>, 2> a;
      thread_local std::vector<float> qs;
      qs.resize(static_cast<std::size_t>(kPairs * std::max<std::int64_t>(rank, 1)));
      each_block(m, pairs, cut, span, false, [&](const Block& t, const ExpertColumns& e) {
        float* sums = room + (span * count + t.first) * numbers;
        const float keep = t.column == begin ? 0.0F : 1.0F;
        for (std::size_t i = 0; i < 2; ++i) {  // u and v again, from what forward read
          projection(x[i], a[i], t, e, i == 1);
          if (!e.scale[i]) continue;
          std::copy_n(x[i].begin(), t.size(), core[i].begin());
          scale_rows(x[i], t, e.scale[i]);
        }
        cpu::activate(m.activation, act.data(), slope.data(), x[0].data(), t.size());
        std::copy_n(act.begin(), t.size(), h.begin());
        multiply_by(h.data(), x[1].data(), t.size());
        for (std::int64_t i = 0; d_weight && i < t.n; ++i) {
          float& sum = sums[i * numbers + 2 * rank];
          sum = keep * (keep != 0 ? sum : 0) +
                dot(h.data() + i * t.width, d_out.row<float>(t.output_row(i)) + t.column, t.width);
        }
        // d: dh = w (d_out + s drop(A2^T q)); h: w drop(h), for dA2
        if (e.a2) {
          for (std::int64_t i = 0; i < t.n; ++i)
            std::copy_n(own_q(t.row(i), t.slot(i), t.expert), rank, qs.begin() + i * rank);
          cpu::multiply(d.data(), t.width, {qs.data(), rank, false}, e.a2.ptr<float>(), e.a2.stride,
                        t.n, t.width, rank, m.scale, 0);
          if (m.dropout.active()) {
            mask_rows(mask, t);
            multiply_by(d.data(), mask.data(), t.size());
            multiply_by(h.data(), mask.data(), t.size());
          }
        } else {
          std::fill_n(d.begin(), t.size(), 0.0F);
        }
        for (std::int64_t i = 0; i < t.n; ++i) {
          float* dh = d.data() + i * t.width;
          axpy(dh, 1, d_out.row<float>(t.output_row(i)) + t.column, t.width);
          const float w = t.weight(i);
          if (w == 1.0F) continue;
          scale_by(dh, w, t.width);
          if (e.a2) scale_by(h.data() + i * t.width, w, t.width);
        }
        gate_backward(x[0].data(), x[1].data(), d.data(), act.data(), slope.data(), t.size());
        if (e.a2) {
          const Tensor d_a2 = grads.down_a.at(t.expert);
          cpu::multiply(d_a2.ptr<float>() + t.column, d_a2.stride, {qs.data(), rank, true},
                        h.data(), t.width, rank, t.width, t.n, m.scale, 1);
        }
        for (std::size_t i = 0; i < 2; ++i) {
          float* dx = x[i].data();
          if (e.scale[i]) {
            float* d_scale = (i == 0 ? grads.gate_scale : grads.up_scale).row<float>(t.expert);
            multiply_by(core[i].data(), dx, t.size());
            for (std::int64_t j = 0; j < t.n; ++j)
              axpy(d_scale + t.column, 1, core[i].data() + j * t.width, t.width);
            scale_rows(x[i], t, e.scale[i]);
          }
          for (std::int64_t j = 0; j < t.n; ++j) {
            float* to_row = d_gate_up.row<float>(t.row(j)) + (i == 1 ? f : 0) + t.column;
            if (direct)
              std::copy_n(dx + j * t.width, t.width, to_row);
            else
              axpy(to_row, 1, dx + j * t.width, t.width);
          }
          if (!e.b[i]) continue;
          const Tensor d_b = (i == 0 ? grads.gate_b : grads.up_b).at(t.expert);
          cpu::multiply(d_b.row<float>(t.column), d_b.stride, {dx, t.width, true}, a[i].data(),
                        rank, t.width, rank, t.n, 1, 1);
          cpu::multiply(sums + static_cast<std::int64_t>(i) * rank, numbers, {dx, t.width, false},
                        e.b[i].ptr<float>(), e.b[i].stride, t.n, rank, t.width, 1, keep);
        }
      });
    });
    const bool factors[2] = {static_cast<bool>(m.weights.gate_b),
                             static_cast<bool>(m.weights.up_b)};
    parallel_for(to - from, [&](std::int64_t i) {
      const std::int64_t row = from + i;
      if (p) std::fill_n(p.row<float>(row), p.cols(), 0.0F);
      for (std::int64_t k = 0; k < pairs.slots; ++k) {
        const std::int64_t at = pairs.place_of(i, k),
                           expert = direct ? 0 : m.slots.expert.row<std::int32_t>(row)[k];
        const auto sums = [&](std::int64_t span) { return room + (span * count + at) * numbers; };
        for (std::int64_t up = 0; p && at >= 0 && expert >= 0 && up < 2; ++up)
          for (std::int64_t span = 0; factors[up] && span < cut.spans; ++span)
            axpy(p.row<float>(row) + (up * m.slots.experts + expert) * rank, m.scale,
                 sums(span) + up * rank, rank);
        if (!d_weight) continue;
        float own = 0;
        for (std::int64_t span = 0; at >= 0 && span < cut.spans; ++span)
          own += sums(span)[2 * rank];
        if (at >= 0 && expert >= 0 && m.weights.down_a)
          own += dot(z.row<float>(row) + k * rank, own_q(row, k, expert), rank);
        d_weight.row<float>(row)[k] = own;
      }
    });
  }
  return false;
}

}  // namespace mixlora
