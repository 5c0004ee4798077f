// The feed-forward half of a block: one table of experts for LoRA, DoRA, MixLoRA and MixDoRA.
#include <algorithm>

#include "engine/transformer.h"
#include "kernels/trace.h"

namespace mixlora {
namespace {

const AdapterLayer& layer_of(const Group& g, std::size_t i) { return g.adapter->layout.layers[i]; }
bool has_a(const AdapterLayer& l) { return l.gate_a.present() || l.up_a.present(); }
ConstTensor compute_of(const Parameter& p) {
  return p.present() ? ConstTensor(p.compute) : ConstTensor();
}

/// gate_a and up_a as one (2 E R, D) matrix when they lie end to end; absent otherwise.
Tensor stacked(Tensor gate, Tensor up) {
  if (!gate || !up || static_cast<std::byte*>(gate.data) + gate.bytes() != up.data) return {};
  gate.shape = Shape{gate.rows() + up.rows(), gate.cols()};
  return gate;
}

/// Every row's only slot, of weight 1.
bool one_expert(const Slots& s) { return !s.expert && s.experts == 1; }

/// i32 to be moved as it is by what moves f32.
Tensor as_f32(Tensor t) {
  t.dtype = DType::f32;
  return t;
}

Tensor flat_row(Tensor t, std::size_t i) {
  const auto at = static_cast<std::int64_t>(i);
  return t.row_range(at, at + 1).reshaped({t.cols()});
}

}  // namespace

Mixture Transformer::mixture_of(const Step& step, std::size_t i, const Group& g,
                                const GroupKept& gk, ConstTensor gate_up) const {
  Mixture m;
  m.gate_up = gate_up;
  m.activation = model_.config.activation;
  m.ids = ids(step, g);
  if (g.adapter == nullptr) return m;
  const DeviceAdapter& ad = *g.adapter;
  const AdapterLayer& l = layer_of(g, i);
  m.a = gk.a_ffn;
  m.weights = {compute_of(l.gate_b), compute_of(l.up_b), compute_of(l.down_a), {}, {}};
  if (!ad.scales.empty()) {
    m.weights.gate_scale = ad.scales[i].gate;
    m.weights.up_scale = ad.scales[i].up;
  }
  m.slots = gk.slots;
  m.activation = ad.spec.act_fn.value_or(model_.config.activation);
  m.scale = ad.ffn_scale;
  m.dropout = dropout_of(g, i, site_expert_down, rate(step, ad.expert_p));
  m.per_slot = ad.per_slot;
  return m;
}

/// z as B2 of all experts takes it, (rows, E R): z itself where there is one expert and no choice.
Tensor Transformer::by_expert(const GroupKept& gk, std::int64_t rows, bool per_slot) {
  if (one_expert(gk.slots)) return gk.z;
  const Tensor columns = scratch_.take({rows, gk.slots.experts * gk.slots.rank}, gk.z.dtype);
  ops_.slots_to_columns(columns, gk.z, gk.slots, per_slot);
  return columns;
}

void Transformer::feed_forward(const Step& step, std::size_t i, LayerKept& k, Tensor normed,
                               Tensor delta, bool again) {
  const trace::Range range(ops_, "feed_forward");
  const ModelConfig& c = model_.config;
  const Scratch::Frame frame(scratch_);
  for (std::size_t j = 0; j < step.groups.size(); ++j) {
    const Group& g = step.groups[j];
    if (g.adapter != nullptr)
      route_group(step, i, g, k.groups[j], normed.row_range(g.begin, g.end));
  }
  const Step& rows = behind(step, i);
  const ConstTensor x = taken_rows(step, rows, normed);
  const bool keep = step.training && recompute_ != Recompute::gate_up;
  k.gate_up = (keep ? kept_ : scratch_).take({rows.rows, 2 * c.ffn}, normed.dtype);
  ops_.linear(k.gate_up, x, model_.layers[i].gate_up);
  for (std::size_t j = 0; j < rows.groups.size(); ++j) {
    const Group& g = rows.groups[j];
    group_feed_forward(rows, i, j, k.groups[j], x.row_range(g.begin, g.end),
                       k.gate_up.row_range(g.begin, g.end), delta.row_range(g.begin, g.end), again);
  }
}

/// The slots of a group's rows; of the selected ones too where the layer hands on those alone. A of
/// gate and up of the same rows goes with the router.
void Transformer::route_group(const Step& step, std::size_t i, const Group& g, GroupKept& gk,
                              Tensor normed) {
  const DeviceAdapter& ad = *g.adapter;
  gk.slots.experts = ad.experts;
  gk.slots.count = ad.slots;
  gk.slots.rank = ad.rank;
  if (!has_router(ad.spec)) return;
  // Switch's jitter changes what its experts and its router see.
  const float amount = rate(step, static_cast<float>(jitter_noise(ad.spec)));
  if (amount > 0)
    ops_.jitter(normed, normed, amount, g.adapter->seed, static_cast<std::int32_t>(i),
                ids(step, g));
  const auto take = [&](std::int64_t n) {
    Slots s = gk.slots;
    s.expert = kept_.take({n, ad.slots}, DType::i32);
    s.weight = kept_.take({n, ad.slots}, DType::f32);
    return s;
  };
  gk.logits = kept_.take({g.rows(), ad.experts}, DType::f32);
  gk.probabilities = kept_.take({g.rows(), ad.experts}, DType::f32);
  gk.routed = take(g.rows());
  const AdapterLayer& l = layer_of(g, i);
  const Tensor both = stacked(l.gate_a.compute, l.up_a.compute);
  if (both && !narrows(step, i)) {
    gk.a_ffn = kept_.take({g.rows(), both.rows()}, normed.dtype);
    through_a_and_router(step, g, i, site_ffn, ad.expert_p, gk.a_ffn, gk.logits, normed, both,
                         l.router.value, ad.ffn_scale);
  } else {
    ops_.router_logits(gk.logits, normed, l.router.value);
  }
  ops_.route(gk.routed, gk.probabilities, flat_row(ad.stats, i), gk.logits, ad.router, g.sequences);
  gk.slots = gk.routed;
  if (!narrows(step, i)) return;
  gk.slots = take(g.selected_end - g.selected_begin);
  const ConstTensor index = cut(step.selected, {g.selected_begin, g.selected_end});
  ops_.gather_rows(as_f32(gk.slots.expert), as_f32(gk.routed.expert), index);
  ops_.gather_rows(gk.slots.weight, gk.routed.weight, index);
}

void Transformer::group_feed_forward(const Step& step, std::size_t i, std::size_t j, GroupKept& gk,
                                     ConstTensor normed, ConstTensor gate_up, Tensor delta,
                                     bool again) {
  const Group& g = step.groups[j];
  const ModelConfig& c = model_.config;
  const std::int64_t n = g.rows();
  const DType type = normed.dtype;
  const Scratch::Frame frame(scratch_);
  if (g.adapter == nullptr) {
    const Tensor h = scratch_.take({n, c.ffn}, type);
    ops_.mixture(h, {}, mixture_of(step, i, g, gk, gate_up));
    ops_.linear(delta, h, model_.layers[i].down);
    return;
  }
  const DeviceAdapter& ad = *g.adapter;
  const AdapterLayer& l = layer_of(g, i);
  const std::int64_t width = ad.experts * ad.rank;
  if (has_a(l) && !gk.a_ffn) {
    gk.a_ffn = kept_.take({n, 2 * width}, type);
    const auto through = [&](Tensor a, ConstTensor weight) {
      through_a(step, g, i, site_ffn, ad.expert_p, a, normed, weight, ad.ffn_scale);
    };
    if (const Tensor both = stacked(l.gate_a.compute, l.up_a.compute)) {
      through(gk.a_ffn, both);
    } else {
      if (!l.gate_a.present() || !l.up_a.present()) ops_.zero(gk.a_ffn);
      if (l.gate_a.present()) through(gk.a_ffn.col_range(0, width), l.gate_a.compute);
      if (l.up_a.present()) through(gk.a_ffn.col_range(width, 2 * width), l.up_a.compute);
    }
  }
  if (l.down_a.present()) gk.z = kept_.take({n, ad.slots * ad.rank}, type);
  const std::int64_t m = ad.per_slot ? ad.slots * n : n;
  const Tensor h = scratch_.take(ad.per_slot ? Shape{ad.slots, n, c.ffn} : Shape{n, c.ffn}, type);
  ops_.mixture(h, gk.z, mixture_of(step, i, g, gk, gate_up));
  if (again && !ad.per_slot) return;  // recomputing: backward does not need the block's output

  const bool input_overflows = ad.router.capacity > 0 && ad.router.overflow == Overflow::input;
  const float p = rate(step, static_cast<float>(ad.spec.ffn_dropout));
  // What the sum with the residual stream adds must be there then, and nothing change in between.
  const bool later = gk.z && !input_overflows && p == 0;
  if (ad.per_slot) {
    gk.core_down = kept_.take({ad.slots, n, c.hidden}, type);
    const Tensor core = gk.core_down.reshaped({m, c.hidden});
    const ConstTensor b = l.down_b.compute;
    ops_.linear(core, h.reshaped({m, c.ffn}), model_.layers[i].down);
    if (later) {
      const bool one = one_expert(gk.slots);
      pending_[j] = {{gk.z, b, one ? flat_row(ad.scales[i].down, 0) : ad.scales[i].down},
                     one ? core : gk.core_down,
                     one ? Slots() : gk.slots};
    } else {
      if (gk.z) ops_.gemm(core, by_expert(gk, m, true), false, b, true, 1, 1);
      ops_.slot_combine(delta, gk.core_down, ad.scales[i].down, gk.slots);
    }
  } else {
    ops_.linear(delta, h, model_.layers[i].down);
    if (later)
      pending_[j] = {{gk.z, l.down_b.compute, {}}, {}, gk.slots};
    else if (gk.z)
      ops_.gemm(delta, by_expert(gk, m, false), false, l.down_b.compute, true, 1, 1);
  }
  if (input_overflows) ops_.overflow_input(delta, normed, gk.slots);
  if (p > 0) ops_.dropout(delta, delta, dropout_of(g, i, site_ffn_output, p), ids(step, g));
}

/// From d_out, the gradient of x2 + feed_forward(norm(x2)), that of x2 in d_x. They are the same
/// tensor, but where the layer hands on selected rows alone: there d_out has those.
void Transformer::feed_forward_backward(const Step& step, std::size_t i, LayerKept& k, Tensor d_x,
                                        Tensor d_out) {
  const trace::Range range(ops_, "feed_forward_backward");
  const ModelConfig& c = model_.config;
  const LayerWeights& w = model_.layers[i];
  const std::int64_t n = step.rows;
  const DType type = d_x.dtype;
  const Scratch::Frame frame(scratch_);
  const bool narrow = narrows(step, i);
  const Step& rows = behind(step, i);
  const Tensor normed = scratch_.take({n, c.hidden}, type),
               d_normed = scratch_.take({n, c.hidden}, type);
  // What the experts saw, and its gradient.
  Tensor x = normed, d_in = d_normed;
  if (narrow) {
    x = scratch_.take({rows.rows, c.hidden}, type);
    d_in = scratch_.take({rows.rows, c.hidden}, type);
  }
  // A of gate and up, and a router, go with the norm before them where nothing else reads or
  // changes the norm's rows.
  const auto with_norm = [&](const Group& g) {
    if (narrow || g.adapter == nullptr) return false;
    const DeviceAdapter& ad = *g.adapter;
    if (has_router(ad.spec) && (jitter_noise(ad.spec) > 0 ||
                                (ad.router.capacity > 0 && ad.router.overflow == Overflow::input)))
      return false;
    const AdapterLayer& l = layer_of(g, i);
    return stacked(l.gate_a.compute, l.up_a.compute) && stacked(l.gate_a.grad, l.up_a.grad);
  };
  if (recompute_ == Recompute::gate_up ||
      std::any_of(step.groups.begin(), step.groups.end(),
                  [&](const Group& g) { return g.adapter != nullptr && !with_norm(g); }))
    ops_.rmsnorm_again(normed, k.x2, w.post_norm, k.r2);
  for (const Group& g : step.groups) {
    if (g.adapter == nullptr || !has_router(g.adapter->spec)) continue;
    const auto amount = static_cast<float>(jitter_noise(g.adapter->spec));
    const Tensor own = normed.row_range(g.begin, g.end);
    if (amount > 0)
      ops_.jitter(own, own, amount, g.adapter->seed, static_cast<std::int32_t>(i), ids(step, g));
  }
  if (narrow) gather(step, x, normed);
  if (recompute_ == Recompute::gate_up) {
    k.gate_up = scratch_.take({rows.rows, 2 * c.ffn}, type);
    ops_.linear(k.gate_up, x, w.gate_up);
  }
  const Tensor d_gate_up = scratch_.take({rows.rows, 2 * c.ffn}, type);
  std::vector<Tensor> ps(step.groups.size()), row_dots(step.groups.size()),
      d_weights(step.groups.size()), d_overflow(step.groups.size());

  for (std::size_t j = 0; j < rows.groups.size(); ++j) {
    const Group& g = rows.groups[j];
    GroupKept& gk = k.groups[j];
    if (g.adapter != nullptr) {
      const DeviceAdapter& ad = *g.adapter;
      if (has_a(layer_of(g, i))) ps[j] = scratch_.take({g.rows(), 2 * ad.experts * ad.rank}, type);
      if (with_norm(step.groups[j])) row_dots[j] = scratch_.take({g.rows()}, DType::f32);
      if (has_router(ad.spec)) d_weights[j] = scratch_.take({g.rows(), ad.slots}, DType::f32);
      if (ad.router.capacity > 0 && ad.router.overflow == Overflow::input) {
        d_overflow[j] = scratch_.take({g.rows(), c.hidden}, type);
        ops_.zero(d_overflow[j]);
      }
    }
    const Scratch::Frame inner(scratch_);
    Tensor d_y = d_out.row_range(g.begin, g.end);
    const Mixture m = mixture_of(rows, i, g, gk, k.gate_up.row_range(g.begin, g.end));
    const Tensor d_part = d_gate_up.row_range(g.begin, g.end);
    if (g.adapter == nullptr) {
      const Tensor d_h = scratch_.take({g.rows(), c.ffn}, type);
      ops_.linear_backward(d_h, d_y, w.down, false);
      ops_.mixture_backward(d_part, {}, {}, {}, {}, d_h, {}, {}, m);
      continue;
    }
    DeviceAdapter& ad = *g.adapter;
    const AdapterLayer& l = layer_of(g, i);
    const float output_p = static_cast<float>(ad.spec.ffn_dropout);
    if (output_p > 0 || d_overflow[j]) {
      const Tensor own = scratch_.take({g.rows(), c.hidden}, type);
      if (output_p > 0)
        ops_.dropout(own, d_y, dropout_of(g, i, site_ffn_output, output_p), ids(rows, g));
      else
        ops_.copy(own, d_y);
      d_y = own;
    }
    const Tensor d_weight_over =
        d_overflow[j] ? scratch_.take({g.rows(), ad.slots}, DType::f32) : Tensor();
    if (d_overflow[j]) {
      ops_.zero(d_weight_over);
      ops_.overflow_input_backward(d_overflow[j], d_weight_over, d_y, x.row_range(g.begin, g.end),
                                   gk.slots);
    }
    const std::int64_t taken = ad.per_slot ? ad.slots * g.rows() : g.rows();
    const std::int64_t width = ad.experts * ad.rank;
    const bool down = l.down_a.present();
    Tensor d_core = d_y;
    // DoRA's scales go with B's gradients.
    ScaledColumns one_scale;
    ScaledSlots scaled_slots;
    if (ad.per_slot) {
      const Tensor slots_d = scratch_.take({ad.slots, g.rows(), c.hidden}, type);
      d_core = slots_d.reshaped({taken, c.hidden});
      if (one_expert(gk.slots))
        one_scale = {gk.core_down.reshaped({taken, c.hidden}), flat_row(ad.scales[i].down, 0),
                     d_core, flat_row(ad.d_scales.down, 0)};
      else
        scaled_slots = {gk.core_down, ad.scales[i].down, slots_d, d_weights[j], ad.d_scales.down};
    }
    const Tensor d_h = scratch_.take(
        ad.per_slot ? Shape{ad.slots, g.rows(), c.ffn} : Shape{g.rows(), c.ffn}, type);
    Tensor q;
    if (down) q = scratch_.take({taken, width}, type);
    if (down && scaled_slots.scale) {
      ops_.slots_b_backward(l.down_b.grad, q, d_y, gk.z, l.down_b.compute, gk.slots, scaled_slots,
                            scratch_.take({taken, width}, type));
    } else if (scaled_slots.scale) {
      ops_.slot_combine_backward(scaled_slots.d_core, scaled_slots.d_weight, scaled_slots.d_scale,
                                 d_y, scaled_slots.core, scaled_slots.scale, gk.slots);
    } else if (down) {
      const LowRankBackward b{l.down_b.grad,
                              q,
                              one_scale.scale ? d_y : d_core,
                              by_expert(gk, taken, ad.per_slot),
                              l.down_b.compute,
                              one_scale};
      ops_.lora_b_backward({&b, 1}, 1);
    }
    ops_.linear_backward(d_h.reshaped({taken, c.ffn}), d_core, w.down, false);
    const bool scaled = l.gate_m.present() || l.up_m.present();
    const MixtureGrads grads{l.gate_b.grad, l.up_b.grad, l.down_a.grad,
                             scaled ? ad.d_scales.gate : Tensor(),
                             scaled ? ad.d_scales.up : Tensor()};
    if (!ops_.mixture_backward(d_part, ad.per_slot ? Tensor() : d_weights[j], ps[j], row_dots[j],
                               grads, d_h, q, gk.z, m))
      row_dots[j] = {};
    if (d_overflow[j] && d_weights[j]) ops_.add(d_weights[j], d_weight_over);
  }

  ops_.linear_backward(d_in, d_gate_up, w.gate_up, false);
  if (narrow) {
    ops_.zero(d_x);
    scatter_add(step, d_x, d_out);
  }
  for (std::size_t j = 0; j < step.groups.size(); ++j) {
    const Group& g = step.groups[j];
    const Group& taken = rows.groups[j];
    const Tensor own = normed.row_range(g.begin, g.end), d_own = d_normed.row_range(g.begin, g.end),
                 d_x_rows = d_x.row_range(g.begin, g.end),
                 d_in_rows = d_in.row_range(taken.begin, taken.end);
    const ConstTensor x2 = k.x2.row_range(g.begin, g.end),
                      r2 = k.r2.col_range(g.begin, g.end).reshaped({g.rows()}),
                      x_rows = x.row_range(taken.begin, taken.end);
    // From here on of all the group's rows: those that were not taken have no gradient yet.
    const auto widen = [&](Tensor all, ConstTensor some) {
      ops_.zero(all);
      ops_.scatter_add_rows(all, some, cut(step.selected, {taken.begin, taken.end}));
    };
    if (g.adapter == nullptr) {
      if (narrow) widen(d_own, d_in_rows);
      ops_.rmsnorm_backward(d_x_rows, d_own, x2, w.post_norm, r2);
      continue;
    }
    const DeviceAdapter& ad = *g.adapter;
    const AdapterLayer& l = layer_of(g, i);
    const Scratch::Frame inner(scratch_);
    const bool routed = has_router(ad.spec);
    Tensor d_logits;
    if (routed) {
      const bool losses = ad.spec.router_loss;
      const float coef = losses ? static_cast<float>(ad.spec.router_aux_loss_coef) : 0;
      const bool z = losses && ad.spec.routing_strategy == Routing::mixlora_switch;
      Tensor d_weight = d_weights[j];
      if (narrow) widen(d_weight = scratch_.take({g.rows(), ad.slots}, DType::f32), d_weights[j]);
      d_logits = scratch_.take({g.rows(), ad.experts}, DType::f32);
      ops_.route_backward(d_logits, d_weight, k.groups[j].routed, k.groups[j].probabilities,
                          k.groups[j].logits, flat_row(ad.fraction, i), ad.router, coef,
                          z ? static_cast<float>(ad.spec.router_z_loss_coef) : 0,
                          static_cast<std::int64_t>(model_.layers.size()), g.aux_factor);
    }
    const Tensor both = stacked(l.gate_a.compute, l.up_a.compute),
                 d_both = stacked(l.gate_a.grad, l.up_a.grad);
    if (with_norm(g)) {
      if (routed)
        through_a_router_and_norm_backward(step, g, i, site_ffn, ad.expert_p, d_both, l.router.grad,
                                           d_x_rows, d_own, ps[j], d_logits, both, l.router.value,
                                           x2, w.post_norm, r2, row_dots[j], k.groups[j].logits,
                                           own);
      else
        through_a_and_norm_backward(step, g, i, site_ffn, ad.expert_p, d_both, d_x_rows, d_own,
                                    ps[j], both, k.groups[j].a_ffn, ad.ffn_scale, x2, w.post_norm,
                                    r2, row_dots[j], own);
      continue;
    }
    const bool together = ps[j] && both && d_both && routed && !narrow;
    if (together) {
      through_a_and_router_backward(step, g, i, site_ffn, ad.expert_p, d_both, l.router.grad, d_own,
                                    ps[j], d_logits, own, both, l.router.value);
    } else if (ps[j]) {
      const std::int64_t width = ad.experts * ad.rank;
      const auto through = [&](Tensor d_weight, ConstTensor p, ConstTensor weight) {
        through_a_backward(rows, taken, i, site_ffn, ad.expert_p, d_weight, d_in_rows, p, x_rows,
                           weight);
      };
      if (both && d_both) {
        through(d_both, ps[j], both);
      } else {
        if (l.gate_a.present()) through(l.gate_a.grad, ps[j].col_range(0, width), l.gate_a.compute);
        if (l.up_a.present())
          through(l.up_a.grad, ps[j].col_range(width, 2 * width), l.up_a.compute);
      }
    }
    if (d_overflow[j]) ops_.add(d_in_rows, d_overflow[j]);
    if (narrow) widen(d_own, d_in_rows);
    if (routed) {
      if (!together) ops_.router_backward(l.router.grad, d_own, d_logits, own, l.router.value);
      const auto amount = static_cast<float>(jitter_noise(ad.spec));
      if (amount > 0)
        ops_.jitter(d_own, d_own, amount, ad.seed, static_cast<std::int32_t>(i), ids(step, g));
    }
    ops_.rmsnorm_backward(d_x_rows, d_own, x2, w.post_norm, r2);
  }
}

}  // namespace mixlora
