#include "engine/transformer.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "kernels/trace.h"

namespace mixlora {
namespace {

/// The selected rows of a step. Their sequences stay unsaid: nothing behind attention and routers
/// asks for them.
Step selected_of(const Step& step) {
  Step s;
  s.rows = step.selected.numel();
  s.ids = step.selected_ids;
  s.training = step.training;
  for (const Group& g : step.groups) {
    s.groups.push_back(g);
    s.groups.back().begin = g.selected_begin;
    s.groups.back().end = g.selected_end;
    s.groups.back().sequences = {};
  }
  return s;
}

}  // namespace

const Step& Transformer::behind_attention(const Step& step, std::size_t i) const {
  const bool needs_all =
      step.training || std::any_of(step.groups.begin(), step.groups.end(), [](const Group& g) {
        return g.adapter != nullptr && g.adapter->router.capacity > 0;
      });
  return needs_all ? step : behind(step, i);
}

ConstTensor Transformer::taken_rows(const Step& step, const Step& taken, ConstTensor all) {
  if (&taken == &step) return all;
  const Tensor some = scratch_.take({taken.rows, all.cols()}, all.dtype);
  gather(step, some, all);
  return some;
}

void Transformer::gather(const Step& step, Tensor to, ConstTensor from) {
  for (const Group& g : step.groups)
    ops_.gather_rows(to.row_range(g.selected_begin, g.selected_end), from.row_range(g.begin, g.end),
                     cut(step.selected, {g.selected_begin, g.selected_end}));
}

void Transformer::scatter_add(const Step& step, Tensor to, ConstTensor from) {
  for (const Group& g : step.groups)
    ops_.scatter_add_rows(to.row_range(g.begin, g.end),
                          from.row_range(g.selected_begin, g.selected_end),
                          cut(step.selected, {g.selected_begin, g.selected_end}));
}

Dropout Transformer::dropout_of(const Group& g, std::size_t layer, std::uint32_t site,
                                float p) const {
  return {p, g.adapter->seed, static_cast<std::int32_t>(layer), site};
}

void Transformer::through_a(const Step& step, const Group& g, std::size_t layer, std::uint32_t site,
                            float p, Tensor a, ConstTensor x, ConstTensor weight, float s) {
  const Scratch::Frame frame(scratch_);
  const float own = rate(step, p);
  const Tensor room = own > 0 ? scratch_.take({x.rows(), x.cols()}, x.dtype) : Tensor();
  ops_.lora_a(a, x, weight, s, dropout_of(g, layer, site, own), ids(step, g), room);
}

void Transformer::through_a_and_router(const Step& step, const Group& g, std::size_t layer,
                                       std::uint32_t site, float p, Tensor a, Tensor logits,
                                       ConstTensor x, ConstTensor weight, ConstTensor router,
                                       float s) {
  const Scratch::Frame frame(scratch_);
  const float own = rate(step, p);
  const Tensor room = own > 0 ? scratch_.take({x.rows(), x.cols()}, x.dtype) : Tensor();
  ops_.lora_a_router(a, logits, x, weight, router, s, dropout_of(g, layer, site, own), ids(step, g),
                     room);
}

void Transformer::through_a_backward(const Step& step, const Group& g, std::size_t layer,
                                     std::uint32_t site, float p, Tensor d_weight, Tensor d_x,
                                     ConstTensor d_a, ConstTensor x, ConstTensor weight) {
  const Scratch::Frame frame(scratch_);
  const float own = rate(step, p);
  const Tensor room = own > 0 ? scratch_.take({x.rows(), x.cols()}, x.dtype) : Tensor();
  ops_.lora_a_backward(d_weight, d_x, d_a, x, weight, dropout_of(g, layer, site, own), ids(step, g),
                       room);
}

void Transformer::through_a_and_router_backward(const Step& step, const Group& g, std::size_t layer,
                                                std::uint32_t site, float p, Tensor d_weight,
                                                Tensor d_router, Tensor d_x, ConstTensor d_a,
                                                ConstTensor d_logits, ConstTensor x,
                                                ConstTensor weight, ConstTensor router) {
  const Scratch::Frame frame(scratch_);
  const float own = rate(step, p);
  const Tensor room = own > 0 ? scratch_.take({x.rows(), x.cols()}, x.dtype) : Tensor();
  ops_.lora_a_router_backward(d_weight, d_router, d_x, d_a, d_logits, x, weight, router,
                              dropout_of(g, layer, site, own), ids(step, g), room);
}

void Transformer::through_a_and_norm_backward(const Step& step, const Group& g, std::size_t layer,
                                              std::uint32_t site, float p, Tensor d_weight,
                                              Tensor d_input, Tensor d_y, ConstTensor d_a,
                                              ConstTensor weight, ConstTensor a, float s,
                                              ConstTensor input, ConstTensor norm, ConstTensor r,
                                              ConstTensor row_dots, Tensor room) {
  const Scratch::Frame frame(scratch_);
  const float own = rate(step, p);
  const Tensor dropped =
      own > 0 ? scratch_.take({input.rows(), input.cols()}, input.dtype) : Tensor();
  ops_.lora_a_rmsnorm_backward(d_weight, d_input, d_y, d_a, weight, a, s,
                               dropout_of(g, layer, site, own), ids(step, g), input, norm, r,
                               row_dots, room, dropped);
}

void Transformer::through_a_router_and_norm_backward(
    const Step& step, const Group& g, std::size_t layer, std::uint32_t site, float p,
    Tensor d_weight, Tensor d_router, Tensor d_input, Tensor d_y, ConstTensor d_a,
    ConstTensor d_logits, ConstTensor weight, ConstTensor router, ConstTensor input,
    ConstTensor norm, ConstTensor r, ConstTensor row_dots, ConstTensor logits, Tensor room) {
  const Scratch::Frame frame(scratch_);
  const float own = rate(step, p);
  const Tensor dropped =
      own > 0 ? scratch_.take({input.rows(), input.cols()}, input.dtype) : Tensor();
  ops_.lora_a_router_rmsnorm_backward(d_weight, d_router, d_input, d_y, d_a, d_logits, weight,
                                      router, dropout_of(g, layer, site, own), ids(step, g), input,
                                      norm, r, row_dots, logits, room, dropped);
}

void Transformer::add_and_norm(const Step& step, Tensor sum, Tensor normed, Tensor r, ConstTensor x,
                               Tensor delta, ConstTensor w) {
  const auto eps = static_cast<float>(model_.config.rms_eps);
  if (std::none_of(pending_.begin(), pending_.end(),
                   [](const Pending& p) { return p.update.a || p.core; })) {
    ops_.add_rmsnorm(sum, normed, r, x, delta, w, eps);
    return;
  }
  for (std::size_t j = 0; j < step.groups.size(); ++j) {
    const Group& g = step.groups[j];
    const auto rows = [&g](auto t) { return t.row_range(g.begin, g.end); };
    const Pending& p = pending_[j];
    const Tensor own = cut(r, {g.begin, g.end});
    if (p.slots.expert) {
      const Scratch::Frame frame(scratch_);
      const Tensor room =
          scratch_.take({(p.core ? p.slots.count : 1) * g.rows(), p.update.b.cols()}, sum.dtype);
      if (p.core)
        ops_.combine_slots_rmsnorm(rows(sum), rows(normed), own, rows(x), rows(delta), p.core,
                                   p.update.a, p.update.b, p.update.scale, p.slots, w, eps, room);
      else
        ops_.add_slots_rmsnorm(rows(sum), rows(normed), own, rows(x), rows(delta), p.update.a,
                               p.update.b, p.slots, w, eps, room);
    } else {
      ops_.add_lora_rmsnorm(rows(sum), rows(normed), own, rows(x), p.core ? p.core : rows(delta),
                            p.update, w, eps);
    }
    pending_[j] = {};
  }
}

void Transformer::layer_forward(const Step& step, std::size_t i, LayerKept& k, Tensor normed,
                                Tensor delta, bool again) {
  const DType type = normed.dtype;
  attention_forward(step, i, k, normed, delta);
  const Step& rows = behind_attention(step, i);
  const std::int64_t n = rows.rows, d = model_.config.hidden;
  normed = normed.row_range(0, n);
  delta = delta.row_range(0, n);
  k.x2 = kept_.take({n, d}, type);
  k.r2 = kept_.take({n}, DType::f32);
  {
    const Scratch::Frame frame(scratch_);
    add_and_norm(rows, k.x2, normed, k.r2, taken_rows(step, rows, k.x), delta,
                 model_.layers[i].post_norm);
  }
  feed_forward(rows, i, k, normed, delta, again);
}

Tensor Transformer::forward(const Step& step) {
  const trace::Range range(ops_, "forward");
  const ModelConfig& c = model_.config;
  const DType type = ops_.activation_type();
  const auto eps = static_cast<float>(c.rms_eps);
  const std::int64_t n = step.rows, d = c.hidden;
  const auto count = model_.layers.size();
  for (const Group& g : step.groups)
    if (g.adapter != nullptr) g.adapter->refresh_scales(ops_, model_, scratch_);

  const Tensor normed = scratch_.take({n, d}, type), delta = scratch_.take({n, d}, type);
  Tensor hidden = normed;
  if (step.selected) selected_ = selected_of(step);
  layers_.assign(count + 1, {});
  pending_.assign(step.groups.size(), {});
  // Without training two inputs take turns; with it every layer keeps its own.
  std::array<std::pair<Tensor, Tensor>, 2> turns;
  if (!step.training)
    for (auto& [x, r] : turns) x = kept_.take({n, d}, type), r = kept_.take({n}, DType::f32);
  const auto open = [&](std::size_t i) {
    LayerKept& k = layers_[i];
    const std::int64_t rows = i < count ? n : behind(step, i - 1).rows;
    if (step.training) {
      k.x = kept_.take({rows, d}, type);
      k.r1 = kept_.take({rows}, DType::f32);
    } else {
      const auto& [x, r] = turns.at(i % 2);
      k.x = x.row_range(0, rows);
      k.r1 = cut(r, {0, rows});
    }
  };
  open(0);
  ops_.embedding(layers_[0].x, model_.embedding, step.tokens);
  ops_.rmsnorm(normed, layers_[0].r1, layers_[0].x, model_.layers[0].input_norm, eps);
  for (std::size_t i = 0; i < count; ++i) {
    const trace::Range layer(ops_, "layer", static_cast<std::int64_t>(i));
    open(i + 1);
    std::optional<Scratch::Frame> frame;
    if (!step.training || recompute_ == Recompute::layer) frame.emplace(kept_);
    layer_forward(step, i, layers_[i], normed, delta, false);
    const Step& rows = behind(step, i);
    const Scratch::Frame room(scratch_);
    const ConstTensor x2 = taken_rows(behind_attention(step, i), rows, layers_[i].x2);
    hidden = normed.row_range(0, rows.rows);
    add_and_norm(rows, layers_[i + 1].x, hidden, layers_[i + 1].r1, x2,
                 delta.row_range(0, rows.rows),
                 i + 1 < count ? model_.layers[i + 1].input_norm : model_.final_norm);
  }
  return hidden;
}

void Transformer::backward(const Step& step, ConstTensor d_hidden) {
  const trace::Range range(ops_, "backward");
  const std::int64_t n = step.rows, d = model_.config.hidden;
  const DType type = ops_.activation_type();
  const auto count = model_.layers.size();
  const Scratch::Frame outer(scratch_);
  const Tensor d_x = scratch_.take({n, d}, type);
  const Tensor d_last = step.selected ? scratch_.take({d_hidden.rows(), d}, type) : d_x;
  ops_.zero(d_last);
  ops_.rmsnorm_backward(d_last, d_hidden, layers_[count].x, model_.final_norm, layers_[count].r1);
  for (std::size_t i = count; i-- > 0;) {
    const trace::Range layer(ops_, "layer", static_cast<std::int64_t>(i));
    LayerKept& k = layers_[i];
    const Scratch::Frame kept(kept_);
    if (recompute_ == Recompute::layer) {
      const trace::Range again(ops_, "recompute");
      const Scratch::Frame frame(scratch_);
      const Tensor normed = scratch_.take({n, d}, type), delta = scratch_.take({n, d}, type);
      ops_.rmsnorm_again(normed, k.x, model_.layers[i].input_norm, k.r1);
      layer_forward(step, i, k, normed, delta, true);
      // Rows that DoRA keeps before their scale: completed as in forward, to the bit.
      const Step& rows = behind(step, i);
      if (std::any_of(pending_.begin(), pending_.end(),
                      [](const Pending& p) { return bool(p.core); }))
        add_and_norm(rows, delta.row_range(0, rows.rows), normed.row_range(0, rows.rows),
                     scratch_.take({rows.rows}, DType::f32), k.x2.row_range(0, rows.rows),
                     delta.row_range(0, rows.rows), model_.final_norm);
    }
    feed_forward_backward(step, i, k, d_x, narrows(step, i) ? d_last : d_x);
    attention_backward(step, i, k, d_x);
    for (const Group& g : step.groups)
      if (g.adapter != nullptr) g.adapter->finish_layer(ops_, i);
  }
}

}  // namespace mixlora
