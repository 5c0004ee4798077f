// B of low-rank updates: its gradients, and a B^T added on the way through rope and RMSNorm.
#include <array>
#include <cmath>

#include "kernels/cases/op_cases.h"
#include "kernels/reference/attention.h"
#include "kernels/reference/dora.h"
#include "kernels/reference/dropout.h"
#include "kernels/reference/low_rank.h"
#include "kernels/reference/normalisation.h"
#include "kernels/reference/router.h"

namespace mixlora::cases {
namespace {

using reference::Index;

struct Pair {
  Array *a = nullptr, *b = nullptr, *scale = nullptr;
  LowRank on() const {
    if (a == nullptr) return {};
    return {a->device, b->device, scale == nullptr ? ConstTensor() : ConstTensor(scale->device)};
  }
};
Pair update(Workbench& w, Index n, Index out, Index rank, bool scaled) {
  return {&w.input({n, rank}, w.act()), &w.input({out, rank}, w.act(), 0.3),
          scaled ? &w.input({out}, DType::f32, 0.2, 1) : nullptr};
}

/// Several matrices, as q, k and v are: columns of one y, their ranks' columns of one a.
/// Scaled: behind DoRA's scale.
OpCase backward(Index n, const std::vector<Index>& outs, Index rank, bool scaled = false) {
  Index width = 0;
  std::string shape = std::to_string(n);
  for (const Index o : outs) {
    shape += width == 0 ? 'x' : '+';
    shape += std::to_string(o);
    width += o;
  }
  shape += 'x';
  shape += std::to_string(rank);
  if (scaled) shape += " scaled";
  return {
      "lora_b_backward " + shape, kSummed, 4.0 * static_cast<double>(n * width * rank),
      [=](Workbench& w) {
        const auto count = static_cast<Index>(outs.size());
        Array &d_y = w.input({n, width}, w.act()), &a = w.input({n, count * rank}, w.act());
        Array& d_a = w.output("d_a", {n, count * rank}, w.act());
        std::vector<Array*> bs, d_bs, cores, scales, d_cores, d_scales;
        for (const Index o : outs) {
          bs.push_back(&w.input({o, rank}, w.act(), 0.3));
          d_bs.push_back(&w.updated("d_b", {o, rank}, DType::f32));
          if (!scaled) continue;
          cores.push_back(&w.input({n, o}, w.act()));
          scales.push_back(&w.input({o}, DType::f32, 0.2, 1));
          d_cores.push_back(&w.output("d_core", {n, o}, w.act()));
          d_scales.push_back(&w.updated("d_scale", {o}, DType::f32));
        }
        w.run = [=, &w, &d_y, &a, &d_a] {
          std::vector<LowRankBackward> all;
          Index at = 0, r = 0;
          for (std::size_t i = 0; i < outs.size(); ++i, r += rank) {
            all.push_back({d_bs[i]->device, d_a.device.col_range(r, r + rank),
                           ConstTensor(d_y.device).col_range(at, at + outs[i]),
                           ConstTensor(a.device).col_range(r, r + rank), bs[i]->device});
            if (scaled)
              all.back().scaled = {cores[i]->device, scales[i]->device, d_cores[i]->device,
                                   d_scales[i]->device};
            at += outs[i];
          }
          w.ops.lora_b_backward(all, 2);
        };
        w.reference = [=, &d_y, &a, &d_a] {
          const auto columns = [n](Array& from, Index begin, Index size) {
            std::vector<double> part;
            const Index stride = static_cast<Index>(from.host.size()) / n;
            for (Index i = 0; i < n * size; ++i)
              part.push_back(from.data()[i / size * stride + begin + i % size]);
            return part;
          };
          Index at = 0, r = 0;
          for (std::size_t i = 0; i < outs.size(); ++i, r += rank) {
            std::vector<double> own(static_cast<std::size_t>(n * rank)),
                d = columns(d_y, at, outs[i]);
            if (scaled) {
              reference::scale_columns_backward(d_cores[i]->data(), d_scales[i]->data(), d.data(),
                                                cores[i]->data(), scales[i]->data(), n, outs[i]);
              d = d_cores[i]->host;
            }
            reference::lora_b_backward(d_bs[i]->data(), own.data(), d.data(),
                                       columns(a, r, rank).data(), bs[i]->data(), 2, n, outs[i],
                                       rank);
            for (Index k = 0; k < n * rank; ++k)
              d_a.data()[k / rank * count * rank + r + k % rank] = own[static_cast<std::size_t>(k)];
            at += outs[i];
          }
        };
      }};
}

OpCase norm(Index n, Index d, Index rank, bool scaled = false) {
  constexpr float kEps = 1e-5F;
  return {"add_lora_rmsnorm " + times({n, d, rank}) + (scaled ? " scaled" : ""), kSummed,
          static_cast<double>(n * d) * (5 + 2.0 * static_cast<double>(rank)), [=](Workbench& w) {
            Array &x = w.input({n, d}, w.act()), &delta = w.input({n, d}, w.act());
            const Pair u = rank == 0 ? Pair() : update(w, n, d, rank, scaled);
            if (scaled) Workbench::compare(delta, "delta");
            Array &scale = w.input({d}, DType::f32, 0.2, 1),
                  &sum = w.output("sum", {n, d}, w.act()), &y = w.output("y", {n, d}, w.act()),
                  &r = w.output("r", {n}, DType::f32);
            w.run = [=, &w, &x, &delta, &scale, &sum, &y, &r] {
              w.ops.add_lora_rmsnorm(sum.device, y.device, r.device, x.device, delta.device, u.on(),
                                     scale.device, kEps);
            };
            w.reference = [=, &x, &delta, &scale, &sum, &y, &r] {
              std::vector<double> whole = delta.host;
              if (rank > 0)
                reference::lora_b(whole.data(), d, u.a->data(), u.b->data(), n, d, rank);
              if (scaled) {
                delta.host = whole;
                reference::scale_columns(whole.data(), whole.data(), u.scale->data(), n, d);
              }
              reference::add_rmsnorm(sum.data(), y.data(), r.data(), x.data(), whole.data(),
                                     scale.data(), n, d, double{kEps});
            };
          }};
}

/// Dotted: with the rows' <y, d_y>.
OpCase norm_backward(Index n, Index d, Index rank, float p, bool dotted = false) {
  constexpr float kScale = 2;
  return {
      "lora_a_rmsnorm_backward " + times({n, d, rank}) + (p > 0 ? "" : " kept") +
          (dotted ? " dotted" : ""),
      kSummed, static_cast<double>(n * d) * (9 + 4.0 * static_cast<double>(rank)),
      [=](Workbench& w) {
        const Dropout drop{p, w.key(), 7, site_ffn};
        Array &x = w.input({n, d}, w.act()), &a = w.input({rank, d}, w.act(), 0.1),
              &scale = w.input({d}, DType::f32, 0.2, 1), &r = w.input({n}, DType::f32, 0.1, 1),
              &d_a = w.input({n, rank}, w.act());
        Array &d_y = w.input({n, d}, w.act()), &ids = w.row_ids(n), &y = w.scratch({n, d}),
              &room = w.scratch({n, d});
        Array &d_weight = w.updated("d_weight", {rank, d}, DType::f32),
              &d_x = w.updated("d_x", {n, d}, w.act());
        std::vector<double> seen(static_cast<std::size_t>(n * d)),
            ranks(static_cast<std::size_t>(n * rank));
        for (Index i = 0; i < n * d; ++i)
          seen[static_cast<std::size_t>(i)] = x.data()[i] * r.data()[i / d] * scale.data()[i % d];
        reference::lora_a(ranks.data(), seen.data(), a.data(), double{kScale}, drop, ids.index(), n,
                          d, rank);
        Array& kept = w.numbers({n, rank}, w.act(), ranks);
        Array* row_dots = nullptr;
        if (dotted) {
          std::vector<double> unused(static_cast<std::size_t>(rank * d)), whole = d_y.host, dots;
          reference::lora_a_backward(unused.data(), whole.data(), d_a.data(), seen.data(), a.data(),
                                     drop, ids.index(), n, d, rank);
          for (Index i = 0; i < n; ++i)
            dots.push_back(reference::dot(seen.data() + i * d, whole.data() + i * d, d));
          row_dots = &w.numbers({n}, DType::f32, dots);
        }
        w.run = [=, &w, &x, &a, &scale, &r, &d_a, &d_y, &ids, &y, &room, &d_weight, &d_x, &kept] {
          w.ops.lora_a_rmsnorm_backward(
              d_weight.device, d_x.device, d_y.device, d_a.device, a.device, kept.device, kScale,
              drop, ids.device, x.device, scale.device, r.device,
              row_dots ? ConstTensor(row_dots->device) : ConstTensor(), y.device, room.device);
        };
        w.reference = [=, &x, &a, &scale, &r, &d_a, &d_y, &ids, &d_weight, &d_x] {
          std::vector<double> whole = d_y.host;
          reference::lora_a_backward(d_weight.data(), whole.data(), d_a.data(), seen.data(),
                                     a.data(), drop, ids.index(), n, d, rank);
          reference::rmsnorm_backward(d_x.data(), whole.data(), x.data(), scale.data(), r.data(), n,
                                      d);
        };
      }};
}

/// Both ways back to one x: A's and a router's.
OpCase router_backward(Index n, Index d, Index rank, Index experts, float p) {
  return {"lora_a_router_backward " + times({n, d, rank, experts}) + (p > 0 ? "" : " kept"),
          kSummed, 4.0 * static_cast<double>(n * d * (rank + experts)), [=](Workbench& w) {
            const Dropout drop{p, w.key(), 7, site_ffn};
            Array &x = w.input({n, d}, w.act()), &a = w.input({rank, d}, w.act(), 0.1),
                  &wg = w.input({experts, d}, DType::f32, 0.02), &d_a = w.input({n, rank}, w.act()),
                  &d_logits = w.input({n, experts}, DType::f32), &ids = w.row_ids(n),
                  &room = w.scratch({n, d});
            Array &d_weight = w.updated("d_weight", {rank, d}, DType::f32),
                  &d_wg = w.updated("d_wg", {experts, d}, DType::f32),
                  &d_x = w.updated("d_x", {n, d}, w.act());
            w.run = [=, &w, &x, &a, &wg, &d_a, &d_logits, &ids, &room, &d_weight, &d_wg, &d_x] {
              w.ops.lora_a_router_backward(d_weight.device, d_wg.device, d_x.device, d_a.device,
                                           d_logits.device, x.device, a.device, wg.device, drop,
                                           ids.device, room.device);
            };
            w.reference = [=, &x, &a, &wg, &d_a, &d_logits, &ids, &d_weight, &d_wg, &d_x] {
              reference::lora_a_backward(d_weight.data(), d_x.data(), d_a.data(), x.data(),
                                         a.data(), drop, ids.index(), n, d, rank);
              reference::router_backward(d_wg.data(), d_x.data(), d_logits.data(), x.data(),
                                         wg.data(), n, d, experts);
            };
          }};
}

/// A and a router beside it.
OpCase router_forward(Index n, Index d, Index rank, Index experts, float p) {
  return {"lora_a_router " + times({n, d, rank, experts}) + (p > 0 ? "" : " kept"), kSummed,
          2.0 * static_cast<double>(n * d * (rank + experts)), [=](Workbench& w) {
            const Dropout drop{p, w.key(), 7, site_ffn};
            Array &x = w.input({n, d}, w.act()), &weight = w.input({rank, d}, w.act(), 0.1),
                  &wg = w.input({experts, d}, DType::f32, 0.02), &ids = w.row_ids(n),
                  &room = w.scratch({n, d});
            Array &a = w.output("a", {n, rank}, w.act()),
                  &logits = w.output("logits", {n, experts}, DType::f32);
            w.run = [=, &w, &x, &weight, &wg, &ids, &room, &a, &logits] {
              w.ops.lora_a_router(a.device, logits.device, x.device, weight.device, wg.device, 2,
                                  drop, ids.device, room.device);
            };
            w.reference = [=, &x, &weight, &wg, &ids, &a, &logits] {
              reference::lora_a(a.data(), x.data(), weight.data(), 2, drop, ids.index(), n, d,
                                rank);
              reference::router_logits(logits.data(), x.data(), wg.data(), n, d, experts);
            };
          }};
}

/// Both ways back to one norm. Dotted: with the rows' <y, d_y>, the router's share left out.
OpCase router_norm_backward(Index n, Index d, Index rank, Index experts, float p,
                            bool dotted = false) {
  return {
      "lora_a_router_rmsnorm_backward " + times({n, d, rank, experts}) + (p > 0 ? "" : " kept") +
          (dotted ? " dotted" : ""),
      kSummed, static_cast<double>(n * d) * (9 + 4.0 * static_cast<double>(rank + experts)),
      [=](Workbench& w) {
        const Dropout drop{p, w.key(), 7, site_ffn};
        Array &x = w.input({n, d}, w.act()), &a = w.input({rank, d}, w.act(), 0.1),
              &wg = w.input({experts, d}, DType::f32, 0.02),
              &scale = w.input({d}, DType::f32, 0.2, 1), &r = w.input({n}, DType::f32, 0.1, 1),
              &d_a = w.input({n, rank}, w.act()), &d_logits = w.input({n, experts}, DType::f32);
        Array &d_y = w.input({n, d}, w.act()), &ids = w.row_ids(n), &y = w.scratch({n, d}),
              &room = w.scratch({n, d});
        Array &d_weight = w.updated("d_weight", {rank, d}, DType::f32),
              &d_wg = w.updated("d_wg", {experts, d}, DType::f32),
              &d_x = w.updated("d_x", {n, d}, w.act());
        Array *row_dots = nullptr, *logits = nullptr;
        if (dotted) {
          std::vector<double> seen(static_cast<std::size_t>(n * d)),
              whole = d_y.host, dots, unused(static_cast<std::size_t>(rank * d)),
              chosen(static_cast<std::size_t>(n * experts));
          for (Index i = 0; i < n * d; ++i)
            seen[static_cast<std::size_t>(i)] = x.data()[i] * r.data()[i / d] * scale.data()[i % d];
          reference::lora_a_backward(unused.data(), whole.data(), d_a.data(), seen.data(), a.data(),
                                     drop, ids.index(), n, d, rank);
          for (Index i = 0; i < n; ++i)
            dots.push_back(reference::dot(seen.data() + i * d, whole.data() + i * d, d));
          reference::router_logits(chosen.data(), seen.data(), wg.data(), n, d, experts);
          row_dots = &w.numbers({n}, DType::f32, dots);
          logits = &w.numbers({n, experts}, DType::f32, chosen);
        }
        w.run = [=, &w, &x, &a, &wg, &scale, &r, &d_a, &d_logits, &d_y, &ids, &y, &room, &d_weight,
                 &d_wg, &d_x] {
          w.ops.lora_a_router_rmsnorm_backward(
              d_weight.device, d_wg.device, d_x.device, d_y.device, d_a.device, d_logits.device,
              a.device, wg.device, drop, ids.device, x.device, scale.device, r.device,
              dotted ? ConstTensor(row_dots->device) : ConstTensor(),
              dotted ? ConstTensor(logits->device) : ConstTensor(), y.device, room.device);
        };
        w.reference = [=, &x, &a, &wg, &scale, &r, &d_a, &d_logits, &d_y, &ids, &d_weight, &d_wg,
                       &d_x] {
          std::vector<double> seen(static_cast<std::size_t>(n * d)), whole = d_y.host;
          for (Index i = 0; i < n * d; ++i)
            seen[static_cast<std::size_t>(i)] = x.data()[i] * r.data()[i / d] * scale.data()[i % d];
          reference::lora_a_backward(d_weight.data(), whole.data(), d_a.data(), seen.data(),
                                     a.data(), drop, ids.index(), n, d, rank);
          reference::router_backward(d_wg.data(), whole.data(), d_logits.data(), seen.data(),
                                     wg.data(), n, d, experts);
          reference::rmsnorm_backward(d_x.data(), whole.data(), x.data(), scale.data(), r.data(), n,
                                      d);
        };
      }};
}

/// ranks of q, k, v; 0: not adapted. The first `scaled` of them have a scale.
OpCase rope(Index n, Heads h, std::array<Index, 3> ranks, std::size_t scaled = 0) {
  const Index d = h.head_dim, width = (h.heads + 2 * h.kv_heads) * d;
  return {
      "lora_rope " + times({n, width, ranks[0], ranks[1], ranks[2]}) +
          (scaled > 0 ? " scaled " + std::to_string(scaled) : ""),
      kSummed, static_cast<double>(n * width) * (3 + 2.0 * static_cast<double>(ranks[0])),
      [=](Workbench& w) {
        Array& y = w.updated("y", {n, width}, w.act());
        std::array<Index, 3> outs{h.heads * d, h.kv_heads * d, h.kv_heads * d};
        std::array<Pair, 3> us;
        for (std::size_t i = 0; i < 3; ++i)
          if (ranks[i] > 0) us[i] = update(w, n, outs[i], ranks[i], i < scaled);
        std::vector<double> angles;
        for (Index i = 0; i < n * d; ++i) {
          const double angle = static_cast<double>(i / d) / static_cast<double>(1 + i % (d / 2));
          angles.push_back(i % d < d / 2 ? std::cos(angle) : std::sin(angle));
        }
        Array &table = w.numbers({n, d}, DType::f32, angles), &ids = w.row_ids(n);
        w.run = [=, &w, &y, &table, &ids] {
          w.ops.lora_rope(y.device, {us[0].on(), us[1].on(), us[2].on()}, table.device, ids.device,
                          h);
        };
        w.reference = [=, &y, &table, &ids] {
          Index at = 0;
          for (std::size_t i = 0; i < 3; at += outs[i++]) {
            if (ranks[i] == 0) continue;
            reference::lora_b(y.data() + at, width, us[i].a->data(), us[i].b->data(), n, outs[i],
                              ranks[i]);
            for (Index k = 0; i < scaled && k < n * outs[i]; ++k)
              y.data()[k / outs[i] * width + at + k % outs[i]] *= us[i].scale->data()[k % outs[i]];
          }
          reference::rope(y.data(), y.data(), table.data(), ids.index(), h, false, n);
        };
      }};
}

}  // namespace

void add_low_rank_cases(std::vector<OpCase>& t) {
  t.push_back(backward(5, {13}, 3));
  t.push_back(backward(1, {32}, 8));
  t.push_back(backward(37, {96, 32, 32}, 8));
  t.push_back(backward(250, {576, 192, 192}, 16));
  t.push_back(backward(130, {1056}, 24));
  t.push_back(backward(64, {576}, 128));
  t.push_back(backward(256, {4096}, 16));
  t.push_back(backward(37, {29}, 5, true));
  t.push_back(backward(37, {96, 32, 32}, 8, true));
  t.push_back(backward(250, {576, 192, 192}, 16, true));
  t.push_back(backward(130, {1056}, 24, true));
  t.push_back(backward(300, {4096}, 16, true));
  t.push_back(norm(37, 29, 5));
  t.push_back(norm(7, 96, 0));
  t.push_back(norm(1, 64, 8));
  t.push_back(norm(37, 576, 24));
  t.push_back(norm(129, 576, 64));
  t.push_back(norm(60, 4096, 16));
  t.push_back(norm(37, 29, 5, true));
  t.push_back(norm(37, 576, 24, true));
  t.push_back(norm(60, 4096, 16, true));
  t.push_back(norm_backward(37, 29, 5, 0.3F));
  t.push_back(norm_backward(21, 64, 16, 0));
  t.push_back(norm_backward(1, 64, 8, 0.1F));
  t.push_back(norm_backward(37, 576, 24, 0.05F));
  t.push_back(norm_backward(131, 576, 48, 0.05F));
  t.push_back(norm_backward(66, 4096, 32, 0.05F));
  t.push_back(norm_backward(21, 320, 64, 0.05F));
  t.push_back(norm_backward(271, 16384, 8, 0.05F));
  t.push_back(norm_backward(37, 29, 5, 0.3F, true));
  t.push_back(norm_backward(21, 64, 16, 0, true));
  t.push_back(norm_backward(131, 576, 48, 0.05F, true));
  t.push_back(norm_backward(66, 4096, 32, 0.05F, true));
  t.push_back(router_backward(37, 29, 5, 3, 0.3F));
  t.push_back(router_backward(37, 96, 72, 3, 0.1F));
  t.push_back(router_backward(150, 288, 256, 8, 0.05F));
  t.push_back(router_backward(33, 96, 128, 8, 0));
  t.push_back(router_backward(21, 64, 80, 11, 0.1F));
  t.push_back(router_backward(130, 160, 72, 4, 0.1F));
  t.push_back(router_backward(70, 1120, 328, 8, 0.1F));
  t.push_back(router_forward(37, 29, 5, 3, 0.3F));
  t.push_back(router_forward(37, 96, 72, 4, 0.1F));
  t.push_back(router_forward(150, 1120, 256, 8, 0.05F));
  t.push_back(router_forward(70, 288, 328, 8, 0.1F));
  t.push_back(router_forward(33, 96, 128, 8, 0));
  t.push_back(router_norm_backward(37, 29, 5, 3, 0.3F));
  t.push_back(router_norm_backward(37, 96, 72, 4, 0.1F));
  t.push_back(router_norm_backward(530, 288, 256, 8, 0.05F));
  t.push_back(router_norm_backward(1100, 96, 72, 4, 0.1F));
  t.push_back(router_norm_backward(33, 96, 128, 8, 0));
  t.push_back(router_norm_backward(37, 29, 5, 3, 0.3F, true));
  t.push_back(router_norm_backward(37, 96, 72, 4, 0.1F, true));
  t.push_back(router_norm_backward(530, 1344, 256, 8, 0.05F, true));
  t.push_back(router_norm_backward(1100, 96, 264, 4, 0.1F, true));
  t.push_back(rope(7, {1, 1, 6}, {3, 2, 0}));
  t.push_back(rope(11, {2, 1, 64}, {8, 0, 8}));
  t.push_back(rope(70, {9, 3, 64}, {16, 16, 16}));
  t.push_back(rope(65, {3, 3, 128}, {0, 40, 0}));
  t.push_back(rope(100, {4, 2, 128}, {64, 24, 16}));
  t.push_back(rope(7, {1, 1, 6}, {3, 2, 0}, 1));
  t.push_back(rope(70, {9, 3, 64}, {16, 16, 16}, 3));
  t.push_back(rope(65, {4, 2, 128}, {16, 40, 8}, 2));
}

}  // namespace mixlora::cases
