// Routers: logits, choice, losses and gradients.
#include "kernels/cases/op_cases.h"
#include "kernels/reference/router.h"

namespace mixlora::cases {
namespace {

using reference::Index;

struct Routing {
  std::string name;
  Router router;
  bool ties = false;  // of many logits of a row
};
/// Two or three experts of a row have each of these logits.
std::vector<double> tied_logits(Index n, Index e) {
  std::vector<double> logits;
  for (Index row = 0; row < n; ++row)
    for (Index i = 0; i < e; ++i)
      logits.push_back(static_cast<double>((row * row + i * i) % 5) / 2);
  return logits;
}

std::vector<Routing> routings(Index e) {
  const Index k = e < 2 ? 1 : 2;
  std::string x(" E");
  x += std::to_string(e);
  return {{"top_k" + x, {RouterKind::top_k, e, k}},
          {"top_p" + x, {RouterKind::top_p, e, e, 0.6F, 0}},
          {"top_p warm" + x, {RouterKind::top_p, e, e, 0.8F, 1.5F}},
          {"switch base" + x, {RouterKind::switch_top1, e, 1, 0, 0, 3, Overflow::base}},
          {"switch input" + x, {RouterKind::switch_top1, e, 1, 0, 0, 3, Overflow::input}},
          {"switch free" + x, {RouterKind::switch_top1, e, 1}}};
}

/// Everything `route` writes, computed on the host from random logits.
struct Routed {
  std::vector<double> weight, p, stats;
  std::vector<std::int32_t> expert;
};
Routed routed(const Array& logits, const Router& r, const std::vector<std::int32_t>& table,
              Index n) {
  const auto size = [](Index i) { return static_cast<std::size_t>(i); };
  Routed out{std::vector<double>(size(n * r.slots)), std::vector<double>(size(n * r.experts)),
             std::vector<double>(size(2 * r.experts + 2)),
             std::vector<std::int32_t>(size(n * r.slots))};
  reference::route(out.expert.data(), out.weight.data(), out.p.data(), out.stats.data(),
                   logits.host.data(), r, table.data(), static_cast<Index>(table.size()) / 4, n);
  return out;
}

std::vector<std::int32_t> two_sequences(Index n) {
  const auto half = static_cast<std::int32_t>(n / 2), rest = static_cast<std::int32_t>(n) - half;
  return {0, half, 0, 0, half, rest, 0, 0};
}

OpCase route(const Routing& g, Index n) {
  const Router r = g.router;
  const auto table = two_sequences(n);
  return {
      "route " + g.name + " x" + std::to_string(n), kSummed,
      10.0 * static_cast<double>(n * r.experts), [=](Workbench& w) {
        Array& logits = g.ties ? w.numbers({n, r.experts}, DType::f32, tied_logits(n, r.experts))
                               : w.input({n, r.experts}, DType::f32);
        Array& t = w.integers({2, 4}, table);
        Array &expert = w.output("expert", {n, r.slots}, DType::i32),
              &weight = w.output("weight", {n, r.slots}, DType::f32);
        Array &p = w.output("probabilities", {n, r.experts}, DType::f32),
              &stats = w.output("stats", {2 * r.experts + 2}, DType::f32);
        w.run = [=, &w, &logits, &t, &expert, &weight, &p, &stats] {
          Slots slots{expert.device, weight.device, r.experts, r.slots, 4};
          w.ops.route(slots, p.device, stats.device, logits.device, r, {t.device, 2, n - n / 2, 0});
        };
        w.reference = [=, &logits, &expert, &weight, &p, &stats] {
          reference::route(expert.index(), weight.data(), p.data(), stats.data(), logits.data(), r,
                           table.data(), 2, n);
        };
      }};
}

OpCase route_backward(const Routing& g, Index n) {
  const Router r = g.router;
  return {"route_backward " + g.name + " x" + std::to_string(n), kSummed,
          12.0 * static_cast<double>(n * r.experts), [=](Workbench& w) {
            Array& logits = w.input({n, r.experts}, DType::f32);
            const Routed on = routed(logits, r, two_sequences(n), n);
            Array &expert = w.integers({n, r.slots}, on.expert),
                  &weight = w.numbers({n, r.slots}, DType::f32, on.weight);
            Array &p = w.numbers({n, r.experts}, DType::f32, on.p),
                  &g_w = w.input({n, r.slots}, DType::f32);
            Array &fraction = w.input({r.experts}, DType::f32, 0.02, 0.1),
                  &d = w.output("d_logits", {n, r.experts}, DType::f32);
            w.run = [=, &w, &logits, &expert, &weight, &p, &g_w, &fraction, &d] {
              const Slots slots{expert.device, weight.device, r.experts, r.slots, 4};
              w.ops.route_backward(d.device, g_w.device, slots, p.device, logits.device,
                                   fraction.device, r, 8, 4, 3, 0.5F);
            };
            w.reference = [=, &logits, &expert, &weight, &p, &g_w, &fraction, &d] {
              reference::route_backward(d.data(), g_w.data(), expert.index(), weight.data(),
                                        p.data(), logits.data(), fraction.data(), r, 8, 4, 3, 0.5,
                                        n);
            };
          }};
}

OpCase balance(Index layers, Index e, Index n, bool per_layer) {
  return {"balance_loss " + times({layers, e}) + (per_layer ? " layer" : " global"), kRounded,
          4.0 * static_cast<double>(layers * e), [=](Workbench& w) {
            Array& stats = w.input({layers, 2 * e + 2}, DType::f32, 20, 200);
            Array &loss = w.output("loss", {2}, DType::f32),
                  &fraction = w.output("fraction", {layers, e}, DType::f32);
            w.run = [=, &w, &stats, &loss, &fraction] {
              w.ops.balance_loss(loss.device, fraction.device, stats.device, n, 0.01F, 0.001F,
                                 per_layer);
            };
            w.reference = [=, &stats, &loss, &fraction] {
              reference::balance_loss(loss.data(), fraction.data(), stats.data(), layers, e, n,
                                      double{0.01F}, double{0.001F}, per_layer);
            };
          }};
}

void product_cases(std::vector<OpCase>& t, Index n, Index d, Index e) {
  const double work = 2.0 * static_cast<double>(n * d * e);
  t.push_back({"router_logits " + times({n, d, e}), kSummed, work, [=](Workbench& w) {
                 Array &x = w.input({n, d}, w.act()), &wg = w.input({e, d}, DType::f32, 0.02);
                 Array& logits = w.output("logits", {n, e}, DType::f32);
                 w.run = [&] { w.ops.router_logits(logits.device, x.device, wg.device); };
                 w.reference = [=, &x, &wg, &logits] {
                   reference::router_logits(logits.data(), x.data(), wg.data(), n, d, e);
                 };
               }});
  t.push_back({"router_backward " + times({n, d, e}), kSummed, 2 * work, [=](Workbench& w) {
                 Array &x = w.input({n, d}, w.act()), &wg = w.input({e, d}, DType::f32, 0.02),
                       &g = w.input({n, e}, DType::f32);
                 Array &d_wg = w.updated("d_wg", {e, d}, DType::f32),
                       &d_x = w.updated("d_x", {n, d}, w.act());
                 w.run = [&] {
                   w.ops.router_backward(d_wg.device, d_x.device, g.device, x.device, wg.device);
                 };
                 w.reference = [=, &x, &wg, &g, &d_wg, &d_x] {
                   reference::router_backward(d_wg.data(), d_x.data(), g.data(), x.data(),
                                              wg.data(), n, d, e);
                 };
               }});
}

}  // namespace

void add_router_cases(std::vector<OpCase>& t) {
  product_cases(t, 7, 33, 3);
  product_cases(t, 257, 576, 8);
  product_cases(t, 64, 4096, 8);
  for (const Index e : {3, 8})
    for (const Routing& g : routings(e))
      for (const Index n : {17, 512}) {
        t.push_back(route(g, n));
        t.push_back(route_backward(g, n));
      }
  // More lanes a row, several experts a lane, more rows than there are lanes.
  for (const Routing& g : routings(12)) {
    t.push_back(route(g, 130));
    t.push_back(route_backward(g, 130));
  }
  for (const Routing& g : routings(40)) {
    t.push_back(route(g, 2100));
    t.push_back(route_backward(g, 65));
  }
  t.push_back(route({"top_k E8", {RouterKind::top_k, 8, 2}}, 8300));
  for (const Index e : {5, 8, 40}) {
    const std::string name = "ties E" + std::to_string(e);
    t.push_back(route({"top_k " + name, {RouterKind::top_k, e, 3}, true}, 90));
    t.push_back(route({"switch " + name, {RouterKind::switch_top1, e, 1}, true}, 90));
  }
  for (const bool per_layer : {false, true}) {
    t.push_back(balance(1, 3, 300, per_layer));
    t.push_back(balance(32, 8, 500, per_layer));
  }
}

}  // namespace mixlora::cases
