// The gated feed-forward with experts, and the slots around it.
#include "kernels/cases/op_cases.h"
#include "kernels/reference/low_rank.h"
#include "kernels/reference/normalisation.h"
#include "kernels/reference/slots.h"

namespace mixlora::cases {
namespace {

using reference::Choice;
using reference::Index;

struct Block {
  std::string name;
  Index rows, width, experts = 1, slots = 1, rank = 0;
  bool gate = true, up = true, down = true, scales = false, per_slot = false;
  float dropout = 0;
  Activation activation = Activation::silu;
  bool a() const { return rank > 0 && (gate || up); }
  bool routed() const { return experts > 1; }
};

/// Slots with distinct experts a row, now and then none (-1), weights that sum to about 1.
struct SlotArrays {
  Array *expert = nullptr, *weight = nullptr;
  Index experts = 1, count = 1, rank = 0;
  Slots device() const {
    return {expert ? expert->device : Tensor(), weight ? weight->device : Tensor(), experts, count,
            rank};
  }
  Choice<double> host() const {
    return {expert ? expert->index() : nullptr, weight ? weight->data() : nullptr, experts, count,
            rank};
  }
};
SlotArrays random_slots(Workbench& w, Index n, Index e, Index k, Index rank) {
  SlotArrays s{nullptr, nullptr, e, k, rank};
  if (e == 1) return s;
  std::vector<std::int32_t> expert;
  std::vector<double> weight;
  for (Index i = 0; i < n; ++i) {
    const auto first = w.below(e);
    for (Index j = 0; j < k; ++j) {
      const bool none = w.below(8) == 0;
      expert.push_back(none ? -1 : static_cast<std::int32_t>((first + j) % e));
      // A slot without an expert may pass its row on (overflow), or not be there (top-p).
      const double share = 0.75 + w.below(1024) / 2048.0;
      weight.push_back(none && w.below(2) == 0 ? 0 : share / static_cast<double>(k));
    }
  }
  s.expert = &w.integers({n, k}, expert);
  s.weight = &w.numbers({n, k}, DType::f32, weight);
  return s;
}

/// The arrays of one mixture call, absent parts null.
struct Parts {
  Array *gate_up, *a = nullptr, *gate_b = nullptr, *up_b = nullptr, *down_a = nullptr,
                  *gate_scale = nullptr, *up_scale = nullptr, *ids;
  SlotArrays slots;
  Dropout drop;
};
Parts parts(Workbench& w, const Block& b) {
  const Index n = b.rows, f = b.width, e = b.experts, r = b.rank;
  Parts p{};
  p.gate_up = &w.input({n, 2 * f}, w.act());
  if (b.a()) p.a = &w.input({n, 2 * e * r}, w.act(), 0.5);
  if (b.a() && b.gate) p.gate_b = &w.input({e, f, r}, w.act(), 0.2);
  if (b.a() && b.up) p.up_b = &w.input({e, f, r}, w.act(), 0.2);
  if (b.rank > 0 && b.down) p.down_a = &w.input({e, r, f}, w.act(), 0.05);
  if (b.scales) p.gate_scale = &w.input({e, f}, DType::f32, 0.1, 1);
  if (b.scales) p.up_scale = &w.input({e, f}, DType::f32, 0.1, 1);
  p.ids = &w.row_ids(n);
  p.slots = random_slots(w, n, e, b.slots, r);
  p.drop = {b.dropout, w.key(), 2, site_expert_down};
  return p;
}
ConstTensor device(const Array* a) { return a ? ConstTensor(a->device) : ConstTensor(); }
double* host(Array* a) { return a ? a->data() : nullptr; }

Mixture on_device(const Parts& p, const Block& b) {
  Mixture m;
  m.gate_up = p.gate_up->device, m.a = device(p.a);
  m.weights = {device(p.gate_b), device(p.up_b), device(p.down_a), device(p.gate_scale),
               device(p.up_scale)};
  m.slots = p.slots.device(), m.activation = b.activation, m.scale = 2, m.dropout = p.drop;
  m.ids = p.ids->device, m.per_slot = b.per_slot;
  return m;
}
reference::MixtureInput<double> on_host(const Parts& p, const Block& b) {
  return {p.gate_up->data(),
          host(p.a),
          host(p.gate_b),
          host(p.up_b),
          host(p.down_a),
          host(p.gate_scale),
          host(p.up_scale),
          p.slots.host(),
          b.activation,
          2,
          p.drop,
          p.ids->index(),
          b.per_slot,
          b.rows,
          b.width};
}

double work(const Block& b) {
  const double products =
      (b.gate && b.a() ? 1 : 0) + (b.up && b.a() ? 1 : 0) + (b.down && b.rank > 0 ? 1 : 0);
  return static_cast<double>(b.rows * b.slots * b.width) *
         (2 * products * static_cast<double>(b.rank) + 6);
}
Shape out_shape(const Block& b) {
  return b.per_slot ? Shape{b.slots, b.rows, b.width} : Shape{b.rows, b.width};
}

OpCase forward(const Block& b) {
  return {"mixture " + b.name, kChained, work(b), [=](Workbench& w) {
            const Parts p = parts(w, b);
            Array& out = w.output("out", out_shape(b), w.act());
            Array* z = p.down_a ? &w.output("z", {b.rows, b.slots * b.rank}, w.act()) : nullptr;
            w.run = [=, &w, &out] {
              w.ops.mixture(out.device, z ? z->device : Tensor(), on_device(p, b));
            };
            w.reference = [=, &out] { reference::mixture(out.data(), host(z), on_host(p, b)); };
          }};
}

OpCase backward(const Block& b) {
  return {
      "mixture_backward " + b.name, kChained, 3 * work(b), [=](Workbench& w) {
        const Parts p = parts(w, b);
        const Index n = b.rows, f = b.width, e = b.experts, r = b.rank;
        Array& g = w.input(out_shape(b), w.act());
        Array* q = p.down_a ? &w.input({(b.per_slot ? b.slots : 1) * n, e * r}, w.act()) : nullptr;
        Array* z = nullptr;
        if (p.down_a) {
          std::vector<double> out(static_cast<std::size_t>(out_shape(b).numel())),
              z_true(static_cast<std::size_t>(n * b.slots * r));
          reference::mixture(out.data(), z_true.data(), on_host(p, b));
          z = &w.numbers({n, b.slots * r}, w.act(), z_true);
        }
        const auto grad = [&](const char* name, const Array* like) {
          return like ? &w.updated(name, like->device.shape, DType::f32) : nullptr;
        };
        Array& d_gate_up = w.output("d_gate_up", {n, 2 * f}, w.act());
        // Without a choice nobody asks for its gradient; the first cases do all the same.
        const bool weighs = !b.per_slot && (b.routed() || b.rank % 16 != 0);
        Array* d_weight = weighs ? &w.output("d_weight", {n, b.slots}, DType::f32) : nullptr;
        Array* dp = p.a ? &w.output("p", {n, 2 * e * r}, w.act()) : nullptr;
        Array& dots = w.output("row_dots", {n}, DType::f32);
        dots.compared = false;  // unless they are left
        Array *gb = grad("d_gate_b", p.gate_b), *ub = grad("d_up_b", p.up_b),
              *da = grad("d_down_a", p.down_a);
        Array *gs = grad("d_gate_scale", p.gate_scale), *us = grad("d_up_scale", p.up_scale);
        w.run = [=, &w, &g, &d_gate_up, &dots] {
          const auto t = [](const Array* x) { return x ? x->device : Tensor(); };
          dots.compared = w.ops.mixture_backward(d_gate_up.device, t(d_weight), t(dp), dots.device,
                                                 {t(gb), t(ub), t(da), t(gs), t(us)}, g.device,
                                                 device(q), device(z), on_device(p, b));
        };
        w.reference = [=, &g, &d_gate_up, &dots] {
          reference::mixture_backward(d_gate_up.data(), host(d_weight), host(dp), dots.data(),
                                      {host(gb), host(ub), host(da), host(gs), host(us)}, g.data(),
                                      host(q), host(z), on_host(p, b));
        };
      }};
}

OpCase columns(Index n, Index e, Index k, Index r, bool per_slot) {
  return {"slots_to_columns " + times({n, e, k, r}) + (per_slot ? " apart" : ""), kRounded,
          static_cast<double>(n * k * r), [=](Workbench& w) {
            const SlotArrays s = random_slots(w, n, e, k, r);
            Array &z = w.input({n, k * r}, w.act()),
                  &y = w.output("columns", {(per_slot ? k : 1) * n, e * r}, w.act());
            w.run = [=, &w, &z, &y] {
              w.ops.slots_to_columns(y.device, z.device, s.device(), per_slot);
            };
            w.reference = [=, &z, &y] {
              reference::slots_to_columns(y.data(), z.data(), s.host(), per_slot, n);
            };
          }};
}

OpCase norm_with_update(Index n, Index d, Index e, Index k, Index r) {
  constexpr float kEps = 1e-5F;
  return {"add_slots_rmsnorm " + times({n, d, e, k, r}), kSummed,
          static_cast<double>(n * d) * (5 + 2.0 * static_cast<double>(k * r)), [=](Workbench& w) {
            const SlotArrays s = random_slots(w, n, e, k, r);
            Array &x = w.input({n, d}, w.act()), &delta = w.input({n, d}, w.act()),
                  &z = w.input({n, k * r}, w.act()), &b = w.input({d, e * r}, w.act(), 0.3),
                  &scale = w.input({d}, DType::f32, 0.2, 1), &room = w.scratch({n, e * r});
            Array &sum = w.output("sum", {n, d}, w.act()), &y = w.output("y", {n, d}, w.act()),
                  &inverse = w.output("r", {n}, DType::f32);
            w.run = [=, &w, &x, &delta, &z, &b, &scale, &room, &sum, &y, &inverse] {
              w.ops.add_slots_rmsnorm(sum.device, y.device, inverse.device, x.device, delta.device,
                                      z.device, b.device, s.device(), scale.device, kEps,
                                      room.device);
            };
            w.reference = [=, &x, &delta, &z, &b, &scale, &sum, &y, &inverse] {
              std::vector<double> columns(static_cast<std::size_t>(n * e * r)), whole = delta.host;
              reference::slots_to_columns(columns.data(), z.data(), s.host(), false, n);
              reference::lora_b(whole.data(), d, columns.data(), b.data(), n, d, e * r);
              reference::add_rmsnorm(sum.data(), y.data(), inverse.data(), x.data(), whole.data(),
                                     scale.data(), n, d, double{kEps});
            };
          }};
}

OpCase norm_of_combined(Index n, Index d, Index e, Index k, Index r) {
  constexpr float kEps = 1e-5F;
  return {"combine_slots_rmsnorm " + times({n, d, e, k, r}), kSummed,
          static_cast<double>(n * d) *
              (5 + static_cast<double>(k) * (3 + 2.0 * static_cast<double>(r))),
          [=](Workbench& w) {
            const SlotArrays s = random_slots(w, n, e, k, r);
            Array &core = w.updated("core", {k, n, d}, w.act()), &z = w.input({n, k * r}, w.act()),
                  &x = w.input({n, d}, w.act()), &b = w.input({d, e * r}, w.act(), 0.3),
                  &scale = w.input({e, d}, DType::f32, 0.1, 1),
                  &norm = w.input({d}, DType::f32, 0.2, 1), &room = w.scratch({k * n, e * r}),
                  &delta = w.scratch({n, d});
            Array &sum = w.output("sum", {n, d}, w.act()), &y = w.output("y", {n, d}, w.act()),
                  &inverse = w.output("r", {n}, DType::f32);
            w.run = [=, &w, &core, &z, &x, &b, &scale, &norm, &room, &delta, &sum, &y, &inverse] {
              w.ops.combine_slots_rmsnorm(sum.device, y.device, inverse.device, x.device,
                                          delta.device, core.device, z.device, b.device,
                                          scale.device, s.device(), norm.device, kEps, room.device);
            };
            w.reference = [=, &core, &z, &x, &b, &scale, &norm, &sum, &y, &inverse] {
              std::vector<double> columns(static_cast<std::size_t>(k * n * e * r)),
                  whole(static_cast<std::size_t>(n * d));
              reference::slots_to_columns(columns.data(), z.data(), s.host(), true, n);
              reference::lora_b(core.data(), d, columns.data(), b.data(), k * n, d, e * r);
              reference::slot_combine(whole.data(), core.data(), scale.data(), s.host(), n, d);
              reference::add_rmsnorm(sum.data(), y.data(), inverse.data(), x.data(), whole.data(),
                                     norm.data(), n, d, double{kEps});
            };
          }};
}

OpCase b_of_combined(Index n, Index d, Index e, Index k, Index r) {
  return {
      "slots_b_backward " + times({n, d, e, k, r}), kChained,
      static_cast<double>(n * k * d) * (7 + 4.0 * static_cast<double>(r)), [=](Workbench& w) {
        const SlotArrays s = random_slots(w, n, e, k, r);
        std::vector<std::int32_t> own;  // ranks of q, by experts, that are there
        for (Index i = 0; i < n * k; ++i)
          if (const auto chosen = s.expert->ints[static_cast<std::size_t>(i)]; chosen >= 0)
            own.push_back(static_cast<std::int32_t>((i % k * n + i / k) * e + chosen));
        const auto many = static_cast<Index>(own.size());
        Array &core = w.input({k, n, d}, w.act()), &z = w.input({n, k * r}, w.act()),
              &g = w.input({n, d}, w.act()), &b = w.input({d, e * r}, w.act(), 0.3),
              &scale = w.input({e, d}, DType::f32, 0.1, 1), &room = w.scratch({k * n, e * r}),
              &all_q = w.scratch({k * n, e * r}), &index = w.integers({many}, own);
        Array &q = w.output("q", {many, r}, w.act()),
              &d_core = w.output("d_core", {k, n, d}, w.act()),
              &d_w = w.output("d_weight", {n, k}, DType::f32),
              &d_scale = w.updated("d_scale", {e, d}, DType::f32),
              &d_b = w.updated("d_b", {d, e * r}, DType::f32);
        w.run = [=, &w, &core, &z, &g, &b, &scale, &room, &all_q, &index, &q, &d_core, &d_w,
                 &d_scale, &d_b] {
          w.ops.slots_b_backward(
              d_b.device, all_q.device, g.device, z.device, b.device, s.device(),
              {core.device, scale.device, d_core.device, d_w.device, d_scale.device}, room.device);
          w.ops.gather_rows(q.device, all_q.device.reshaped({k * n * e, r}), index.device);
        };
        w.reference = [=, &core, &z, &g, &b, &scale, &index, &q, &d_core, &d_w, &d_scale, &d_b] {
          std::vector<double> columns(static_cast<std::size_t>(k * n * e * r)), whole = columns;
          reference::slot_combine_backward(d_core.data(), d_w.data(), d_scale.data(), g.data(),
                                           core.data(), scale.data(), s.host(), n, d);
          reference::slots_to_columns(columns.data(), z.data(), s.host(), true, n);
          reference::lora_b_backward(d_b.data(), whole.data(), d_core.data(), columns.data(),
                                     b.data(), 1, k * n, d, e * r);
          for (Index i = 0; i < many; ++i)
            std::copy_n(whole.begin() + index.index()[i] * r, r, q.data() + i * r);
        };
      }};
}

void slot_cases(std::vector<OpCase>& t, Index n, Index d, Index e, Index k) {
  const double work = static_cast<double>(n * k * d);
  const auto shape = times({n, d, e, k});
  t.push_back({"slot_combine " + shape, kSummed, 3 * work, [=](Workbench& w) {
                 const SlotArrays s = random_slots(w, n, e, k, 4);
                 Array &core = w.input({k, n, d}, w.act()),
                       &scale = w.input({e, d}, DType::f32, 0.1, 1),
                       &y = w.output("y", {n, d}, w.act());
                 w.run = [=, &w, &core, &scale, &y] {
                   w.ops.slot_combine(y.device, core.device, scale.device, s.device());
                 };
                 w.reference = [=, &core, &scale, &y] {
                   reference::slot_combine(y.data(), core.data(), scale.data(), s.host(), n, d);
                 };
               }});
  t.push_back({"slot_combine_backward " + shape, kSummed, 7 * work, [=](Workbench& w) {
                 const SlotArrays s = random_slots(w, n, e, k, 4);
                 Array &core = w.input({k, n, d}, w.act()),
                       &scale = w.input({e, d}, DType::f32, 0.1, 1), &g = w.input({n, d}, w.act());
                 Array &d_core = w.output("d_core", {k, n, d}, w.act()),
                       &d_w = w.output("d_weight", {n, k}, DType::f32);
                 Array& d_scale = w.updated("d_scale", {e, d}, DType::f32);
                 w.run = [=, &w, &core, &scale, &g, &d_core, &d_w, &d_scale] {
                   w.ops.slot_combine_backward(d_core.device, d_w.device, d_scale.device, g.device,
                                               core.device, scale.device, s.device());
                 };
                 w.reference = [=, &core, &scale, &g, &d_core, &d_w, &d_scale] {
                   reference::slot_combine_backward(d_core.data(), d_w.data(), d_scale.data(),
                                                    g.data(), core.data(), scale.data(), s.host(),
                                                    n, d);
                 };
               }});
  t.push_back(
      {"overflow_input " + times({n, d}), kRounded, static_cast<double>(n * d), [=](Workbench& w) {
         const SlotArrays s = random_slots(w, n, e, 1, 0);
         Array &x = w.input({n, d}, w.act()), &y = w.updated("y", {n, d}, w.act());
         w.run = [=, &w, &x, &y] { w.ops.overflow_input(y.device, x.device, s.device()); };
         w.reference = [=, &x, &y] {
           reference::overflow_input(y.data(), x.data(), s.host(), n, d);
         };
       }});
  t.push_back({"overflow_input_backward " + times({n, d}), kSummed,
               4.0 * static_cast<double>(n * d), [=](Workbench& w) {
                 const SlotArrays s = random_slots(w, n, e, 1, 0);
                 Array &x = w.input({n, d}, w.act()), &d_x = w.updated("d_x", {n, d}, w.act()),
                       &g = w.updated("d_y", {n, d}, w.act());
                 Array& d_w = w.updated("d_weight", {n, 1}, DType::f32);
                 w.run = [=, &w, &x, &d_x, &g, &d_w] {
                   w.ops.overflow_input_backward(d_x.device, d_w.device, g.device, x.device,
                                                 s.device());
                 };
                 w.reference = [=, &x, &d_x, &g, &d_w] {
                   reference::overflow_input_backward(d_x.data(), d_w.data(), g.data(), x.data(),
                                                      s.host(), n, d);
                 };
               }});
}

}  // namespace

void add_mixture_cases(std::vector<OpCase>& t) {
  const std::vector<Block> blocks = {
      {"frozen 5x33", 5, 33},
      {"LoRA 33x129 r4", 33, 129, 1, 1, 4, true, true, true, false, false, 0.1F},
      {"DoRA 7x65 r3", 7, 65, 1, 1, 3, true, true, true, true, true},
      {"gate only 9x17 r2", 9, 17, 1, 1, 2, true, false, false},
      {"down only 9x17 E3 K2 r5 relu", 9, 17, 3, 2, 5, false, false, true, false, false, 0.3F,
       Activation::relu},
      {"MixLoRA 19x41 E3 K3 r1 gelu", 19, 41, 3, 3, 1, true, true, true, false, false, 0,
       Activation::gelu},
      {"Mix, scales 17x41 E4 K1 r8 gelu_new", 17, 41, 4, 1, 8, true, true, true, true, false, 0,
       Activation::gelu_new},
      {"MixDoRA 21x37 E4 K2 r4", 21, 37, 4, 2, 4, true, true, true, true, true, 0.05F},
      {"MixLoRA 64x1536 E8 K2 r16 (SmolLM2)", 64, 1536, 8, 2, 16, true, true, true, false, false,
       0.05F},
      {"MixDoRA 32x1536 E8 K2 r16 (SmolLM2)", 32, 1536, 8, 2, 16, true, true, true, true, true,
       0.05F},
      {"LoRA 45x160 r80", 45, 160, 1, 1, 80, true, true, true, false, false, 0.1F},
      {"LoRA 150x328 r128", 150, 328, 1, 1, 128, true, true, true},
      {"DoRA 131x576 r64", 131, 576, 1, 1, 64, true, true, true, true, false, 0.05F},
      {"DoRA 70x264 r41", 70, 264, 1, 1, 41, true, true, true, true, true, 0.3F},
      {"gate only 64x96 r48", 64, 96, 1, 1, 48, true, false, false},
      {"up and down 33x40 r48 gelu", 33, 40, 1, 1, 48, false, true, true, false, false, 0.1F,
       Activation::gelu},
      {"down only 70x96 r96", 70, 96, 1, 1, 96, false, false, true, false, false, 0.3F},
      {"gate and up 70x64 r16", 70, 64, 1, 1, 16, true, true, false},
      {"frozen 50x96 E3 K2", 50, 96, 3, 2},
      {"gate only 64x96 E3 K2 r16", 64, 96, 3, 2, 16, true, false, false},
      {"down only 40x64 E3 K2 r8", 40, 64, 3, 2, 8, false, false, true, false, false, 0.3F},
      {"MixLoRA 70x256 E5 K3 r24", 70, 256, 5, 3, 24, true, true, true, false, false, 0.1F},
      {"MixLoRA 40x128 E4 K2 r64", 40, 128, 4, 2, 64, true, true, true, false, false, 0.1F},
      {"MixLoRA apart 33x128 E4 K2 r16", 33, 128, 4, 2, 16, true, true, true, false, true, 0.1F},
      {"MixDoRA 40x128 E4 K3 r8", 40, 128, 4, 3, 8, true, true, true, true, true, 0.1F},
      {"DoRA 37x96 r32", 37, 96, 1, 1, 32, true, true, true, true, false, 0.1F},
      {"LoRA 2200x512 r8", 2200, 512, 1, 1, 8, true, true, true, false, false, 0.05F},
      {"MixLoRA 1600x512 E4 K2 r8", 1600, 512, 4, 2, 8, true, true, true, false, false, 0.05F},
      {"MixLoRA 1500x768 E8 K2 r16", 1500, 768, 8, 2, 16, true, true, true, false, false, 0.05F},
      {"MixLoRA 1100x192 E3 K2 r16", 1100, 192, 3, 2, 16, true, true, true, false, false, 0.05F},
      {"DoRA 1100x192 r16", 1100, 192, 1, 1, 16, true, true, true, true, false, 0.05F},
      {"MixDoRA 1100x128 E3 K2 r16", 1100, 128, 3, 2, 16, true, true, true, true, true, 0.05F},
      {"MixDoRA 1500x512 E5 K2 r16", 1500, 512, 5, 2, 16, true, true, true, true, true, 0.05F},
      {"MixLoRA 1500x256 E4 K2 r16", 1500, 256, 4, 2, 16, true, true, true},
      {"LoRA 1100x192 r16", 1100, 192, 1, 1, 16, true, true, true},
      {"LoRA 9x128 r16", 9, 128, 1, 1, 16, true, true, true},
      {"LoRA 75x352 r16", 75, 352, 1, 1, 16, true, true, true, false, false, 0.05F},
      {"DoRA 70x160 r8", 70, 160, 1, 1, 8, true, true, true, true, true, 0.05F},
      {"LoRA 40x11008 r16 (Llama)", 40, 11008, 1, 1, 16, true, true, true, false, false, 0.05F},
      {"MixLoRA 16x11008 E8 K2 r16 (Llama)", 16, 11008, 8, 2, 16, true, true, true, false, false,
       0.05F}};
  for (const Block& b : blocks) {
    t.push_back(forward(b));
    t.push_back(backward(b));
  }
  for (const bool per_slot : {false, true}) {
    t.push_back(columns(7, 3, 2, 5, per_slot));
    t.push_back(columns(257, 8, 2, 16, per_slot));
  }
  t.push_back(norm_of_combined(9, 33, 3, 2, 4));
  t.push_back(norm_of_combined(21, 64, 4, 2, 16));
  t.push_back(norm_of_combined(130, 576, 8, 2, 16));
  t.push_back(norm_with_update(9, 33, 3, 2, 4));
  t.push_back(norm_with_update(21, 64, 4, 2, 16));
  t.push_back(norm_with_update(130, 576, 8, 2, 16));
  t.push_back(norm_with_update(700, 1088, 8, 2, 16));
  t.push_back(norm_of_combined(700, 1088, 8, 2, 16));
  t.push_back(b_of_combined(9, 33, 3, 2, 4));
  t.push_back(b_of_combined(21, 64, 4, 2, 16));
  t.push_back(b_of_combined(130, 576, 8, 2, 16));
  t.push_back(b_of_combined(260, 288, 4, 2, 16));
  t.push_back(b_of_combined(700, 1088, 8, 2, 16));
  slot_cases(t, 9, 33, 3, 2);
  slot_cases(t, 128, 576, 8, 2);
}

}  // namespace mixlora::cases
