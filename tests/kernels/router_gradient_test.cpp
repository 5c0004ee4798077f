#include "kernels/reference/router.h"
#include "tests/kernels/complex_step.h"

namespace mixlora::test {
namespace {

namespace ref = reference;

constexpr std::int64_t kRows = 9, kExperts = 4, kLayers = 2;
constexpr double kCoef = 0.3, kZCoef = 0.2, kFactor = 0.7;
const std::vector<std::int32_t> kSequences = {0, 5, 0, 0, 5, 4, 0, 0};

/// What `route` gives for all layers, and the two losses.
template <class T> struct Routed {
  std::vector<std::int32_t> expert;
  std::vector<T> weight, p, stats, loss = std::vector<T>(2), fraction;
};
template <class T>
Routed<T> route_layers(const std::vector<T>& logits, const Router& r, bool per_layer) {
  Routed<T> x;
  x.expert.resize(kLayers * kRows * r.slots);
  x.weight.resize(x.expert.size());
  x.p.resize(kLayers * kRows * kExperts);
  x.stats.resize(kLayers * (2 * kExperts + 2));
  x.fraction.resize(kLayers * kExperts);
  for (std::int64_t l = 0; l < kLayers; ++l)
    ref::route(x.expert.data() + l * kRows * r.slots, x.weight.data() + l * kRows * r.slots,
               x.p.data() + l * kRows * kExperts, x.stats.data() + l * (2 * kExperts + 2),
               logits.data() + l * kRows * kExperts, r, kSequences.data(), 2, kRows);
  ref::balance_loss(x.loss.data(), x.fraction.data(), x.stats.data(), kLayers, kExperts, kRows,
                    kCoef, kZCoef, per_layer);
  return x;
}

void check(const Router& r, bool per_layer) {
  Numbers random(11);
  const Real logits = random.normal(kLayers * kRows * kExperts);
  const Real g = random.normal(kLayers * kRows * r.slots);
  const auto x = route_layers(logits, r, per_layer);
  Real d = zeros(kLayers * kRows * kExperts);
  for (std::int64_t l = 0; l < kLayers; ++l) {
    const std::int64_t at = l * kRows * kExperts, slot = l * kRows * r.slots;
    ref::route_backward(&d[at], &g[slot], &x.expert[slot], &x.weight[slot], &x.p[at], &logits[at],
                        &x.fraction[l * kExperts], r, kCoef, kZCoef, kLayers, kFactor, kRows);
  }
  require_gradients(
      [&](const std::vector<Complex>& a) {
        const auto y = route_layers(a[0], r, per_layer);
        return inner(g, y.weight) + kFactor * (y.loss[0] + y.loss[1]);
      },
      {{"logits", logits, d}});
}

std::vector<std::int32_t> chosen(const Router& r, const Real& p, Real* weight) {
  std::vector<std::int32_t> expert(static_cast<std::size_t>(r.slots));
  weight->resize(expert.size());
  ref::choose(expert.data(), weight->data(), p.data(), r);
  return expert;
}
using Ints = std::vector<std::int32_t>;

}  // namespace

TEST_CASE("route_backward is the derivative of the weights, the balance and the z loss",
          "[kernels][gradient]") {
  for (const bool per_layer : {false, true}) {
    for (const std::int64_t k : {1, 2, 4}) check({RouterKind::top_k, kExperts, k}, per_layer);
    check({RouterKind::top_p, kExperts, kExperts, 0.6F, 0}, per_layer);
    check({RouterKind::top_p, kExperts, kExperts, 0.6F, 1.5F}, per_layer);
    check({RouterKind::switch_top1, kExperts, 1}, per_layer);
    for (const Overflow overflow : {Overflow::base, Overflow::input})
      check({RouterKind::switch_top1, kExperts, 1, 0, 0, 1, overflow}, per_layer);
  }
}

TEST_CASE("router_backward is the derivative of router_logits", "[kernels][gradient]") {
  constexpr std::int64_t n = 3, d = 5, e = 4;
  Numbers random(12);
  const Real x = random.normal(n * d), wg = random.normal(e * d), g = random.normal(n * e);
  Real d_x = zeros(n * d), d_wg = zeros(e * d);
  ref::router_backward(d_wg.data(), d_x.data(), g.data(), x.data(), wg.data(), n, d, e);
  require_gradients(
      [&](const std::vector<Complex>& a) {
        Complex y(n * e);
        ref::router_logits(y.data(), a[0].data(), a[1].data(), n, d, e);
        return inner(g, y);
      },
      {{"x", x, d_x}, {"Wg", wg, d_wg}});
}

TEST_CASE("top-k takes the largest in falling order, the lower index first on a tie",
          "[kernels][reference]") {
  Real w;
  CHECK(chosen({RouterKind::top_k, 4, 2}, {0.1, 0.4, 0.1, 0.4}, &w) == Ints{1, 3});
  CHECK(w[0] == Approx(0.5));
  CHECK(chosen({RouterKind::top_k, 4, 3}, {0.2, 0.5, 0.2, 0.1}, &w) == Ints{1, 0, 2});
  CHECK(w[0] == Approx(0.5 / 0.9));
}

TEST_CASE("top-p keeps the expert that crosses and its raw weights", "[kernels][reference]") {
  Real w;
  CHECK(chosen({RouterKind::top_p, 4, 4, 0.6F, 0}, {0.125, 0.5, 0.125, 0.25}, &w) ==
        Ints{1, 3, -1, -1});
  CHECK(w == Real{0.5, 0.25, 0, 0});
  // exactly top_p is not beyond it
  CHECK(chosen({RouterKind::top_p, 4, 4, 0.5F, 0}, {0.125, 0.5, 0.125, 0.25}, &w) ==
        Ints{1, 3, -1, -1});
  // a temperature of 2 halves what counts, and the weights
  CHECK(chosen({RouterKind::top_p, 4, 4, 0.4F, 2}, {0.125, 0.5, 0.125, 0.25}, &w) ==
        Ints{1, 3, 0, -1});
  CHECK(w == Real{0.25, 0.125, 0.0625, 0});
}

TEST_CASE("capacity is counted for each sequence, first come first served",
          "[kernels][reference]") {
  const Ints table = {0, 3, 0, 0, 3, 2, 0, 0};
  for (const Overflow overflow : {Overflow::base, Overflow::input}) {
    const Router r{RouterKind::switch_top1, 2, 1, 0, 0, 1, overflow};
    Ints expert = {0, 0, 1, 0, 0};
    Real weight = {0.9, 0.8, 0.7, 0.6, 0.55};
    ref::apply_capacity(expert.data(), weight.data(), r, table.data(), 2);
    CHECK(expert == Ints{0, -1, 1, 0, -1});
    CHECK(weight == (overflow == Overflow::base ? Real{0.9, 1, 0.7, 0.6, 1}
                                                : Real{0.9, 0.8, 0.7, 0.6, 0.55}));
  }
}

TEST_CASE("a perfectly even router pays coef times K", "[kernels][reference]") {
  const Real stats = {50, 50, 50, 50, 25, 25, 25, 25, 0, 0};  // 100 rows, K = 2, p = 1/4
  Real loss(2), fraction(4);
  ref::balance_loss(loss.data(), fraction.data(), stats.data(), 1, 4, 100, 0.01, 0.001, false);
  CHECK(loss[0] == Approx(0.02));
}

}  // namespace mixlora::test
