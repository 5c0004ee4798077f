#include "engine/device_adapter.h"

#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/trace.h"

namespace mixlora {
namespace {

bool all_qkv(const AdapterLayer& l) {
  return std::all_of(l.qkv_m.begin(), l.qkv_m.end(), [](const auto& m) { return m.present(); });
}
/// Declares (scale, inverse) pairs beside every present magnitude; those of q, k, v as one.
void declare_scales(Arena& arena, const ModelConfig& c, const AdapterLayer& l, DoraScales& s,
                    bool inverses) {
  const auto declare = [&](Shape shape, Tensor& scale, Tensor& inverse) {
    arena.declare("dora_scale", scale, shape, DType::f32);
    if (inverses) arena.declare("dora_inverse", inverse, shape, DType::f32);
  };
  const auto pair = [&](const Parameter& m, Tensor& scale, Tensor& inverse) {
    if (m.present()) declare(m.shape, scale, inverse);
  };
  if (std::any_of(l.qkv_m.begin(), l.qkv_m.end(), [](const auto& m) { return m.present(); }))
    declare({c.qkv_width()}, s.qkv, s.qkv_inverse);
  pair(l.o_m, s.o, s.o_inverse);
  pair(l.gate_m, s.gate, s.gate_inverse);
  pair(l.up_m, s.up, s.up_inverse);
  pair(l.down_m, s.down, s.down_inverse);
}

}  // namespace

std::array<Span, 3> qkv_spans(const ModelConfig& c) {
  const std::int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  return {{{0, q}, {q, q + kv}, {q + kv, q + 2 * kv}}};
}

DeviceAdapter::DeviceAdapter(Backend& ops, const ModelConfig& model, const AdapterSpec& adapter,
                             std::uint64_t trial_seed, Update update)
    : spec(adapter),
      seed(trial_seed),
      layout(model, adapter),
      router(router_of(adapter)),
      qkv_spans_(qkv_spans(model)),
      arena_("trainable"),
      update_(update) {
  const bool trainable = update != Update::none, by_layer = update == Update::by_layer;
  const auto target = [&](Projection p) {
    return spec.target_modules.at(static_cast<std::size_t>(p));
  };
  experts = has_router(spec) ? spec.num_experts : 1;
  slots = router.slots;
  rank = expert_rank(spec);
  attention_scale = static_cast<float>(mixlora::attention_scale(spec));
  ffn_scale = static_cast<float>(expert_scale(spec));
  attention_p = trainable ? static_cast<float>(spec.lora_dropout) : 0;
  expert_p = trainable ? static_cast<float>(expert_dropout(spec)) : 0;
  per_slot = ffn_dora(spec) && target(Projection::down);

  const Shape flat{layout.elements};
  const bool copies = ops.activation_type() != DType::f32;
  arena_.declare("values", values, flat, DType::f32);
  if (copies) arena_.declare("compute", compute, flat, ops.activation_type());
  if (trainable) {
    const Shape one_layer{layout.slow_stride() + layout.fast_stride()};
    arena_.declare("grads", grads, by_layer ? one_layer : flat, DType::f32);
    const bool momentum = spec.method != Method::base;
    if (momentum) arena_.declare("moment1", moment1, flat, DType::f32);
    if (momentum) arena_.declare("moment2", moment2, flat, DType::f32);
    arena_.declare("norm_squared", norm_squared, {1}, DType::f32);
  }
  if (attention_dora(spec) || ffn_dora(spec)) {
    scales.resize(layout.layers.size());
    for (std::size_t i = 0; i < scales.size(); ++i)
      declare_scales(arena_, model, layout.layers[i], scales[i], true);
    if (trainable) declare_scales(arena_, model, layout.layers.front(), d_scales, false);
  }
  if (has_router(spec)) {
    const auto layers = static_cast<std::int64_t>(layout.layers.size());
    arena_.declare("stats", stats, {layers, 2 * experts + 2}, DType::f32);
    arena_.declare("fraction", fraction, {layers, experts}, DType::f32);
    arena_.declare("aux", aux, {2}, DType::f32);
  }
  arena_.commit(ops);
  layout.bind(values.data, grads.data, compute.data, ops.activation_type(), ops.device(), by_layer);
  const std::vector<float> ones(static_cast<std::size_t>(model.qkv_width()), 1.0F);
  for (std::size_t i = 0; i < scales.size(); ++i)
    if (scales[i].qkv && !all_qkv(layout.layers[i])) ops.upload(scales[i].qkv, ones.data());
}

void DeviceAdapter::upload(Backend& ops, std::span<const float> numbers) {
  if (layout.elements == 0) return;
  ops.upload(values, numbers.data());
  if (compute) ops.copy(compute, values);
  stale_ = true;
}

void DeviceAdapter::download(Backend& ops, std::span<float> numbers) const {
  if (!numbers.empty()) ops.download(numbers.data(), values);
}

void DeviceAdapter::begin_step(Backend& ops, Optim optim, StepNumbers slow, StepNumbers fast) {
  optim_ = optim;
  slow_ = slow;
  fast_ = fast;
  ops.zero(grads);
  if (update_ == Update::by_layer) ops.zero(norm_squared);
}

void DeviceAdapter::update(Backend& ops, std::int64_t begin, std::int64_t count,
                           std::int64_t grad_begin, StepNumbers numbers) {
  if (count == 0) return;
  const auto part = [&](Tensor t, std::int64_t at) {
    return t ? t.col_range(at, at + count).reshaped({count}) : t;
  };
  const Tensor w = part(values, begin), half = part(compute, begin), g = part(grads, grad_begin),
               m = part(moment1, begin), v = part(moment2, begin);
  if (optim_ == Optim::adamw)
    ops.adamw(w, half, g, m, v, numbers, norm_squared);
  else
    ops.sgd(w, half, g, m, numbers, norm_squared);
}

void DeviceAdapter::finish_magnitudes(Backend& ops, std::size_t i) {
  if (scales.empty()) return;
  const AdapterLayer& l = layout.layers[i];
  const DoraScales& s = scales[i];
  std::vector<DoraMagnitude> all;
  const auto one = [&](const Parameter& m, Tensor d_scale, ConstTensor inverse) {
    if (m.present()) all.push_back({m.grad, d_scale, inverse});
  };
  for (std::size_t p = 0; p < 3; ++p) {
    if (!l.qkv_m.at(p).present()) continue;
    const Span span = qkv_spans_.at(p);
    one(l.qkv_m.at(p), cut(d_scales.qkv, span), cut(s.qkv_inverse, span));
  }
  one(l.o_m, d_scales.o, s.o_inverse);
  one(l.gate_m, d_scales.gate, s.gate_inverse);
  one(l.up_m, d_scales.up, s.up_inverse);
  one(l.down_m, d_scales.down, s.down_inverse);
  ops.dora_magnitudes_backward(all);
}

void DeviceAdapter::finish_layer(Backend& ops, std::size_t i) {
  finish_magnitudes(ops, i);
  if (update_ != Update::by_layer || layout.elements == 0) return;
  const trace::Range range(ops, "optimizer");
  const auto at = static_cast<std::int64_t>(i);
  const std::int64_t slow = layout.slow_stride(), fast = layout.fast_stride();
  ops.sum_squares(norm_squared, grads, true);
  update(ops, at * slow, slow, 0, slow_);
  update(ops, layout.fast_begin + at * fast, fast, slow, fast_);
  ops.zero(grads);
}

void DeviceAdapter::finish_step(Backend& ops) {
  stale_ = true;
  if (update_ != Update::after_backward) return;
  const trace::Range range(ops, "optimizer");
  ops.sum_squares(norm_squared, grads, false);
  update(ops, 0, layout.fast_begin, 0, slow_);
  update(ops, layout.fast_begin, layout.elements - layout.fast_begin, layout.fast_begin, fast_);
}

void DeviceAdapter::refresh_scales(Backend& ops, const Model& model, Scratch& scratch) {
  if (!stale_ || scales.empty()) return;
  stale_ = false;
  const trace::Range range(ops, "dora_scales");
  const ModelConfig& c = model.config;
  const DType type = ops.activation_type();
  for (std::size_t i = 0; i < scales.size(); ++i) {
    const LayerWeights& w = model.layers[i];
    AdapterLayer& l = layout.layers[i];
    DoraScales& s = scales[i];
    const Scratch::Frame frame(scratch);
    std::vector<DoraScale> calls;
    // A W^T of several A in one product where they lie end to end; calls use(k, A W^T of the k-th).
    const auto each_product = [&](std::span<const ConstTensor> as, const FrozenMatrix& matrix,
                                  auto&& use) {
      std::int64_t rows = 0;
      bool together = true;
      for (std::size_t k = 0; k < as.size(); ++k) {
        rows += as[k].rows();
        together = together &&
                   (k == 0 || static_cast<const std::byte*>(as[k - 1].data) + as[k - 1].bytes() ==
                                  as[k].data);
      }
      const Tensor all = scratch.take({rows, matrix.out}, type);
      std::int64_t at = 0;
      for (std::size_t k = 0; k < as.size(); ++k) {
        const Tensor own = all.row_range(at, at + as[k].rows());
        ConstTensor a = as[k];
        a.shape = Shape{rows, a.cols()};
        if (!together)
          ops.linear(own, as[k], matrix);
        else if (k == 0)
          ops.linear(all, a, matrix);
        use(k, ConstTensor(own));
        at += as[k].rows();
      }
    };
    std::vector<ConstTensor> as;
    std::vector<std::size_t> which;
    for (std::size_t p = 0; p < 3; ++p) {
      if (!l.qkv_m.at(p).present()) continue;
      as.emplace_back(l.qkv_a.at(p).compute);
      which.push_back(p);
    }
    if (!as.empty())
      each_product(as, w.qkv, [&](std::size_t k, ConstTensor wa) {
        const std::size_t p = which[k];
        const Span own = qkv_spans_.at(p);
        calls.push_back({cut(s.qkv, own), cut(s.qkv_inverse, own), l.qkv_m.at(p).value,
                         cut(w.qkv_squared, own), as[k], wa.col_range(own.begin, own.end),
                         l.qkv_b.at(p).compute, attention_scale});
      });
    if (l.o_m.present()) {
      const ConstTensor a = l.o_a.compute;
      each_product({&a, 1}, w.o, [&](std::size_t, ConstTensor wa) {
        calls.push_back(
            {s.o, s.o_inverse, l.o_m.value, w.o_squared, a, wa, l.o_b.compute, attention_scale});
      });
    }
    const auto by_expert = [&](Tensor scale, Tensor inverse, const Parameter& m,
                               ConstTensor squared, ConstTensor a, ConstTensor wa, auto&& b) {
      for (std::int64_t e = 0; e < experts; ++e) {
        const auto row = [&](auto t) { return t.row_range(e, e + 1).reshaped({t.cols()}); };
        calls.push_back({row(scale), row(inverse), row(m.value), squared,
                         a.row_range(e * rank, e * rank + rank),
                         wa.row_range(e * rank, e * rank + rank), b(e), ffn_scale});
      }
    };
    as.clear();
    which.clear();
    for (const std::size_t up : {0, 1}) {
      if (!(up == 1 ? l.up_m : l.gate_m).present()) continue;
      as.emplace_back((up == 1 ? l.up_a : l.gate_a).compute);
      which.push_back(up);
    }
    if (!as.empty())
      each_product(as, w.gate_up, [&](std::size_t k, ConstTensor wa) {
        const bool up = which[k] == 1;
        const std::int64_t begin = up ? c.ffn : 0;
        by_expert(up ? s.up : s.gate, up ? s.up_inverse : s.gate_inverse, up ? l.up_m : l.gate_m,
                  cut(ConstTensor(w.gate_up_squared), {begin, begin + c.ffn}), as[k],
                  wa.col_range(begin, begin + c.ffn), [&](std::int64_t e) {
                    return ConstTensor((up ? l.up_b : l.gate_b).compute.at(e));
                  });
      });
    if (l.down_m.present()) {
      const ConstTensor a = l.down_a.compute.reshaped({experts * rank, c.ffn});
      each_product({&a, 1}, w.down, [&](std::size_t, ConstTensor wa) {
        by_expert(s.down, s.down_inverse, l.down_m, w.down_squared, a, wa, [&](std::int64_t e) {
          return ConstTensor(l.down_b.compute.col_range(e * rank, e * rank + rank));
        });
      });
    }
    ops.dora_scales(calls);
  }
}

}  // namespace mixlora
