// The attention half of a block: q, k, v and o with their low-rank updates, rotary embedding,
// attention.
#include <algorithm>
#include <array>

#include "engine/transformer.h"
#include "kernels/trace.h"

namespace mixlora {
namespace {

std::int64_t rank_of(const Parameter& a) { return a.present() ? a.shape[0] : 0; }
std::int64_t qkv_rank(const AdapterLayer& l) {
  return rank_of(l.qkv_a[0]) + rank_of(l.qkv_a[1]) + rank_of(l.qkv_a[2]);
}

/// Calls f(p, first column in a_qkv, end column) for the targeted ones of q, k, v.
template <class F> void each_qkv(const AdapterLayer& l, F&& f) {
  std::int64_t at = 0;
  for (std::size_t p = 0; p < 3; ++p) {
    if (!l.qkv_a.at(p).present()) continue;
    f(p, at, at + rank_of(l.qkv_a.at(p)));
    at += rank_of(l.qkv_a.at(p));
  }
}

/// The A factors of q, k, v as one matrix when they lie end to end in memory (they do when all
/// ranks fill whole 256-byte lines); absent otherwise.
ConstTensor stacked(const AdapterLayer& l, bool grad) {
  ConstTensor whole;
  for (const Parameter& a : l.qkv_a) {
    if (!a.present()) continue;
    const ConstTensor t = grad ? ConstTensor(a.grad) : ConstTensor(a.compute);
    if (!whole) {
      whole = t;
      continue;
    }
    const auto* end = static_cast<const std::byte*>(whole.data) + whole.bytes();
    if (end != t.data) return {};
    whole.shape = Shape{whole.rows() + t.rows(), t.cols()};
  }
  return whole;
}
/// DoRA on some of q, k, v; on o.
bool scaled_qkv(const Group& g, std::size_t i) {
  return g.adapter != nullptr && !g.adapter->scales.empty() && g.adapter->scales[i].qkv;
}
bool scaled_o(const Group& g, std::size_t i) {
  return g.adapter != nullptr && g.adapter->layout.layers[i].o_m.present();
}
bool any_scaled_o(const Step& step, std::size_t i) {
  return std::any_of(step.groups.begin(), step.groups.end(),
                     [i](const Group& g) { return scaled_o(g, i); });
}
Tensor writable(ConstTensor t) {
  return {const_cast<void*>(t.data), t.shape, t.dtype,
          t.device};  // NOLINT: gradients are ours to write
}

}  // namespace

void Transformer::attention_forward(const Step& step, std::size_t i, LayerKept& k,
                                    ConstTensor normed, Tensor delta) {
  const trace::Range range(ops_, "attention");
  const ModelConfig& c = model_.config;
  const LayerWeights& w = model_.layers[i];
  const std::int64_t n = step.rows;
  const DType type = normed.dtype;
  const auto spans = qkv_spans(c);
  k.groups.assign(step.groups.size(), {});
  k.qkv = kept_.take({n, c.qkv_width()}, type);
  k.o = kept_.take({n, c.heads * c.head_dim}, type);
  k.lse = kept_.take({n, c.heads}, DType::f32);
  ops_.linear(k.qkv, normed, w.qkv);

  std::vector<std::array<LowRank, 3>> updates(step.groups.size());  // for rope to add
  for (std::size_t j = 0; j < step.groups.size(); ++j) {
    const Group& g = step.groups[j];
    if (g.adapter == nullptr) continue;
    const AdapterLayer& l = g.adapter->layout.layers[i];
    if (qkv_rank(l) == 0) continue;
    Tensor& a = k.groups[j].a_qkv = kept_.take({g.rows(), qkv_rank(l)}, type);
    const ConstTensor x = normed.row_range(g.begin, g.end);
    const float p_drop = g.adapter->attention_p, s = g.adapter->attention_scale;
    if (const ConstTensor whole = stacked(l, false))
      through_a(step, g, i, site_qkv, p_drop, a, x, whole, s);
    else
      each_qkv(l, [&](std::size_t p, std::int64_t from, std::int64_t to) {
        through_a(step, g, i, site_qkv, p_drop, a.col_range(from, to), x, l.qkv_a.at(p).compute, s);
      });
    each_qkv(l, [&](std::size_t p, std::int64_t from, std::int64_t to) {
      updates[j].at(p) = {a.col_range(from, to), l.qkv_b.at(p).compute, {}};
      if (l.qkv_m.at(p).present())
        updates[j].at(p).scale = cut(g.adapter->scales[i].qkv, spans.at(p));
    });
  }

  for (std::size_t j = 0; j < step.groups.size(); ++j) {
    const Group& g = step.groups[j];
    ops_.lora_rope(k.qkv.row_range(g.begin, g.end), updates[j], model_.rope, ids(step, g),
                   c.attention_heads());
  }
  ops_.attention(k.o, k.lse, k.qkv, step.sequences, c.attention_heads());

  const Step& rows = behind_attention(step, i);
  const Scratch::Frame frame(scratch_);
  const ConstTensor o = taken_rows(step, rows, k.o);
  // With DoRA the rows before its scale are kept: made there, scaled on their way into the sum.
  const bool apart = any_scaled_o(step, i);
  const Tensor core =
      apart ? kept_.take({rows.rows, c.hidden}, type) : delta.row_range(0, rows.rows);
  ops_.linear(core, o, w.o);
  for (std::size_t j = 0; j < rows.groups.size(); ++j) {
    const Group& g = rows.groups[j];
    if (apart) pending_[j].core = core.row_range(g.begin, g.end);
    if (g.adapter == nullptr || !g.adapter->layout.layers[i].o_a.present()) continue;
    const AdapterLayer& l = g.adapter->layout.layers[i];
    Tensor& a = k.groups[j].a_o = kept_.take({g.rows(), rank_of(l.o_a)}, type);
    through_a(rows, g, i, site_o, g.adapter->attention_p, a, o.row_range(g.begin, g.end),
              l.o_a.compute, g.adapter->attention_scale);
    pending_[j].update = {a, l.o_b.compute, {}};
    if (!scaled_o(g, i)) continue;
    pending_[j].update.scale = g.adapter->scales[i].o;
    k.groups[j].core_o = pending_[j].core;
  }
}

/// Adds the attention half's gradient to d_x, which holds the gradient of x2 = x +
/// attention(norm(x)).
void Transformer::attention_backward(const Step& step, std::size_t i, LayerKept& k, Tensor d_x) {
  const trace::Range range(ops_, "attention_backward");
  const ModelConfig& c = model_.config;
  const LayerWeights& w = model_.layers[i];
  const std::int64_t n = step.rows;
  const DType type = d_x.dtype;
  const auto spans = qkv_spans(c);
  const Scratch::Frame frame(scratch_);

  const auto has_o = [i](const Group& g) {
    return g.adapter != nullptr && g.adapter->layout.layers[i].o_a.present();
  };
  const bool apart = any_scaled_o(step, i);
  const Tensor d_core = apart ? scratch_.take({n, c.hidden}, type) : d_x,
               d_o = scratch_.take({n, c.heads * c.head_dim}, type);
  {
    const Scratch::Frame inner(scratch_);
    std::vector<Tensor> d_as(step.groups.size());
    // B's gradients go before the frozen product, since what makes its input goes with them.
    for (std::size_t j = 0; j < step.groups.size(); ++j) {
      const Group& g = step.groups[j];
      const Tensor d_y = d_x.row_range(g.begin, g.end), own = d_core.row_range(g.begin, g.end);
      if (apart && !scaled_o(g, i)) ops_.copy(own, d_y);
      if (!has_o(g)) continue;
      const AdapterLayer& l = g.adapter->layout.layers[i];
      d_as[j] = scratch_.take({g.rows(), rank_of(l.o_a)}, type);
      LowRankBackward b{l.o_b.grad, d_as[j], d_y, k.groups[j].a_o, l.o_b.compute};
      if (scaled_o(g, i))
        b.scaled = {k.groups[j].core_o, g.adapter->scales[i].o, own, g.adapter->d_scales.o};
      ops_.lora_b_backward({&b, 1}, g.adapter->attention_scale);
    }
    ops_.linear_backward(d_o, d_core, w.o, false);
    for (std::size_t j = 0; j < step.groups.size(); ++j) {
      const Group& g = step.groups[j];
      if (!has_o(g)) continue;
      const AdapterLayer& l = g.adapter->layout.layers[i];
      through_a_backward(step, g, i, site_o, g.adapter->attention_p, l.o_a.grad,
                         d_o.row_range(g.begin, g.end), d_as[j], k.o.row_range(g.begin, g.end),
                         l.o_a.compute);
    }
  }

  const Tensor d_qkv = scratch_.take({n, c.qkv_width()}, type);
  QkvScale scale;  // of a single adapter; of several each scales its own rows below
  if (step.groups.size() == 1 && scaled_qkv(step.groups.front(), i)) {
    const DeviceAdapter& adapter = *step.groups.front().adapter;
    scale = {adapter.scales[i].qkv, adapter.d_scales.qkv};
  }
  // What the norm before q, k and v asks of each row, where attention has it.
  Tensor row_dots = scratch_.take({n}, DType::f32);
  if (!ops_.attention_rope_backward(d_qkv, row_dots, d_o, k.qkv, k.o, k.lse, step.sequences,
                                    model_.rope, step.ids, c.attention_heads(), scale))
    row_dots = {};

  const Tensor d_normed = scratch_.take({n, c.hidden}, type),
               normed = scratch_.take({n, c.hidden}, type);
  // The embedding below layer 0 is frozen: nothing needs its gradient.
  const bool needs_input = i > 0;
  for (const Group& g : step.groups) {
    if (scale.scale || !scaled_qkv(g, i)) continue;
    const DoraScales &s = g.adapter->scales[i], &d_s = g.adapter->d_scales;
    const Tensor d = d_qkv.row_range(g.begin, g.end);
    ops_.scale_rope_backward(d, d_s.qkv, d, k.qkv.row_range(g.begin, g.end), s.qkv, model_.rope,
                             ids(step, g), c.attention_heads());
  }
  if (needs_input) ops_.linear_backward(d_normed, d_qkv, w.qkv, false);
  for (std::size_t j = 0; j < step.groups.size(); ++j) {
    const Group& g = step.groups[j];
    const ConstTensor x = k.x.row_range(g.begin, g.end),
                      r1 = k.r1.col_range(g.begin, g.end).reshaped({g.rows()});
    const Tensor d_x_rows = d_x.row_range(g.begin, g.end),
                 d_y_rows = d_normed.row_range(g.begin, g.end),
                 y = normed.row_range(g.begin, g.end);
    const auto through_norm = [&] {
      if (needs_input) ops_.rmsnorm_backward(d_x_rows, d_y_rows, x, w.input_norm, r1);
    };
    if (g.adapter == nullptr || qkv_rank(g.adapter->layout.layers[i]) == 0) {
      through_norm();
      continue;
    }
    const AdapterLayer& l = g.adapter->layout.layers[i];
    const Scratch::Frame inner(scratch_);
    const Tensor d_a = scratch_.take({g.rows(), qkv_rank(l)}, type);
    std::array<LowRankBackward, 3> bs;
    std::size_t count = 0;
    each_qkv(l, [&](std::size_t p, std::int64_t from, std::int64_t to) {
      const ConstTensor d_y =
          d_qkv.row_range(g.begin, g.end).col_range(spans.at(p).begin, spans.at(p).end);
      bs.at(count++) = {l.qkv_b.at(p).grad, d_a.col_range(from, to), d_y,
                        k.groups[j].a_qkv.col_range(from, to), l.qkv_b.at(p).compute};
    });
    ops_.lora_b_backward({bs.data(), count}, g.adapter->attention_scale);
    const float p_drop = g.adapter->attention_p;
    const ConstTensor a = stacked(l, false), d_a_weight = stacked(l, true);
    if (a && d_a_weight && needs_input) {
      through_a_and_norm_backward(step, g, i, site_qkv, p_drop, writable(d_a_weight), d_x_rows,
                                  d_y_rows, d_a, a, k.groups[j].a_qkv, g.adapter->attention_scale,
                                  x, w.input_norm, r1,
                                  row_dots ? cut(row_dots, {g.begin, g.end}) : row_dots, y);
      continue;
    }
    ops_.rmsnorm_again(y, x, w.input_norm, r1);
    const auto through = [&](Tensor d_weight, ConstTensor d_a_own, ConstTensor weight) {
      through_a_backward(step, g, i, site_qkv, p_drop, d_weight, needs_input ? d_y_rows : Tensor(),
                         d_a_own, y, weight);
    };
    if (a && d_a_weight)
      through(writable(d_a_weight), d_a, a);
    else
      each_qkv(l, [&](std::size_t p, std::int64_t from, std::int64_t to) {
        through(l.qkv_a.at(p).grad, d_a.col_range(from, to), l.qkv_a.at(p).compute);
      });
    through_norm();
  }
}

}  // namespace mixlora
