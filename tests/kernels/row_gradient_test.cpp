#include "kernels/reference/attention.h"
#include "kernels/reference/dora.h"
#include "kernels/reference/dropout.h"
#include "kernels/reference/loss.h"
#include "kernels/reference/low_rank.h"
#include "kernels/reference/normalisation.h"
#include "tests/kernels/complex_step.h"

namespace mixlora::test {
namespace {

namespace ref = reference;

std::vector<std::int32_t> ids_of(std::int32_t rows) {
  std::vector<std::int32_t> ids;
  for (std::int32_t n = 0; n < rows; ++n)
    for (const std::int32_t x : {11 * n, n, 3, 0}) ids.push_back(x);
  return ids;
}

}  // namespace

TEST_CASE("rmsnorm's backward is its derivative, alone and after a sum", "[kernels][gradient]") {
  constexpr std::int64_t n = 3, d = 7;
  Numbers random(1);
  const Real x = random.normal(n * d), delta = random.normal(n * d), w = random.normal(d, 0.2, 1),
             g = random.normal(n * d);
  Real sum = zeros(n * d), y = zeros(n * d), r = zeros(n), d_x = zeros(n * d);
  ref::add_rmsnorm(sum.data(), y.data(), r.data(), x.data(), delta.data(), w.data(), n, d, 1e-5);
  ref::rmsnorm_backward(d_x.data(), g.data(), sum.data(), w.data(), r.data(), n, d);
  require_gradients(
      [&](const std::vector<Complex>& a) {
        Complex s(n * d), out(n * d), rs(n);
        ref::add_rmsnorm(s.data(), out.data(), rs.data(), a[0].data(), a[1].data(),
                         complex(w).data(), n, d, 1e-5);
        return inner(g, out);
      },
      {{"x", x, d_x}, {"delta", delta, d_x}});
}

TEST_CASE("dropout's backward draws the forward's mask", "[kernels][gradient]") {
  constexpr std::int64_t n = 4, c = 19;
  Numbers random(2);
  const Dropout drop{0.4F, 99, 2, site_o};
  const auto ids = ids_of(n);
  const Real x = random.normal(n * c), g = random.normal(n * c);
  Real d_x = zeros(n * c);
  ref::dropout_backward_add(d_x.data(), g.data(), drop, ids.data(), n, c);
  require_gradients(
      [&](const std::vector<Complex>& a) {
        Complex y(n * c);
        ref::dropout(y.data(), a[0].data(), drop, ids.data(), n, c);
        return inner(g, y);
      },
      {{"x", x, d_x}});
}

TEST_CASE("a low-rank update's backward is its derivative", "[kernels][gradient]") {
  constexpr std::int64_t n = 4, out = 7, rank = 3;
  Numbers random(9);
  const Real a = random.normal(n * rank), b = random.normal(out * rank), g = random.normal(n * out);
  Real d_a = zeros(n * rank), d_b = zeros(out * rank);
  ref::lora_b_backward(d_b.data(), d_a.data(), g.data(), a.data(), b.data(), 1, n, out, rank);
  require_gradients(
      [&](const std::vector<Complex>& v) {
        Complex y(n * out);
        ref::lora_b(y.data(), out, v[0].data(), v[1].data(), n, out, rank);
        return inner(g, y);
      },
      {{"a", a, d_a}, {"B", b, d_b}});
}

TEST_CASE("jitter is its own transpose", "[kernels][gradient]") {
  constexpr std::int64_t n = 2, c = 11;
  Numbers random(3);
  const auto ids = ids_of(n);
  const Real x = random.normal(n * c), g = random.normal(n * c);
  Real d_x = zeros(n * c);
  ref::jitter(d_x.data(), g.data(), 0.1, 5, 1, ids.data(), n, c);
  require_gradients(
      [&](const std::vector<Complex>& a) {
        Complex y(n * c);
        ref::jitter(y.data(), a[0].data(), 0.1, 5, 1, ids.data(), n, c);
        return inner(g, y);
      },
      {{"x", x, d_x}});
}

TEST_CASE("DoRA's norm is that of the rows of W + s B A", "[kernels][reference]") {
  constexpr std::int64_t out = 5, in = 6, rank = 2;
  constexpr double s = 1.5;
  Numbers random(4);
  const Real w = random.normal(out * in), a = random.normal(rank * in),
             b = random.normal(out * rank), m = random.normal(out, 0.1, 2);
  Real squares = zeros(out), wa = zeros(rank * out), scale = zeros(out), inverse = zeros(out);
  for (std::int64_t o = 0; o < out; ++o) {
    squares[o] = ref::dot(&w[o * in], &w[o * in], in);
    for (std::int64_t r = 0; r < rank; ++r) wa[r * out + o] = ref::dot(&w[o * in], &a[r * in], in);
  }
  ref::dora_scale(scale.data(), inverse.data(), m.data(), squares.data(), a.data(), wa.data(),
                  b.data(), s, out, in, rank);
  for (std::int64_t o = 0; o < out; ++o) {
    double norm = 0;
    for (std::int64_t i = 0; i < in; ++i) {
      double v = w[o * in + i];
      for (std::int64_t r = 0; r < rank; ++r) v += s * b[o * rank + r] * a[r * in + i];
      norm += v * v;
    }
    CHECK(inverse[o] == Approx(1 / std::sqrt(norm)).epsilon(1e-12));
    CHECK(scale[o] == Approx(m[o] / std::sqrt(norm)).epsilon(1e-12));
  }
}

TEST_CASE("DoRA's backward is the derivative with the norm held constant", "[kernels][gradient]") {
  constexpr std::int64_t n = 4, out = 5, in = 6, rank = 2;
  constexpr double s = 1.5;
  Numbers random(5);
  const Real base = random.normal(n * out), xa = random.normal(n * rank),
             g = random.normal(n * out), a = random.normal(rank * in),
             b = random.normal(out * rank), wa = random.normal(rank * out, 0.1),
             squares = random.normal(out, 0.1, 9), m = random.normal(out, 0.1, 2);
  Real scale = zeros(out), inverse = zeros(out), core = base;
  ref::dora_scale(scale.data(), inverse.data(), m.data(), squares.data(), a.data(), wa.data(),
                  b.data(), s, out, in, rank);
  for (std::int64_t i = 0; i < n * out; ++i)
    core[i] += s * ref::dot(&xa[i / out * rank], &b[i % out * rank], rank);
  Real d_core = zeros(n * out), d_scale = zeros(out), d_m = zeros(out), d_b = zeros(out * rank);
  ref::scale_columns_backward(d_core.data(), d_scale.data(), g.data(), core.data(), scale.data(), n,
                              out);
  ref::dora_magnitude_backward(d_m.data(), d_scale.data(), inverse.data(), out);
  for (std::int64_t i = 0; i < n * out; ++i)
    for (std::int64_t r = 0; r < rank; ++r)
      d_b[i % out * rank + r] += s * d_core[i] * xa[i / out * rank + r];
  require_gradients(
      [&](const std::vector<Complex>& v) {  // v = {m, B}; n = 1 / inverse stays
        Complex c = complex(base), sc(out), y(n * out);
        for (std::int64_t o = 0; o < out; ++o) sc[o] = v[0][o] * inverse[o];
        for (std::int64_t i = 0; i < n * out; ++i)
          c[i] += s * ref::dot(complex(xa).data() + i / out * rank, &v[1][i % out * rank], rank);
        ref::scale_columns(y.data(), c.data(), sc.data(), n, out);
        return inner(g, y);
      },
      {{"m", m, d_m}, {"B", b, d_b}});
}

TEST_CASE("the backward of scale and rope has core back from what they left",
          "[kernels][gradient]") {
  const Heads heads{2, 1, 4};
  constexpr std::int64_t n = 3, width = 16;
  Numbers random(11);
  const auto ids = ids_of(n);
  Real table;
  for (int p = 0; p < n; ++p)
    for (int j = 0; j < 4; ++j)
      table.push_back(j < 2 ? std::cos(p * std::pow(0.1, j)) : std::sin(p * std::pow(0.1, j - 2)));
  const Real core = random.normal(n * width), scale = random.normal(width, 0.2, 1.5),
             g = random.normal(n * width);
  Real y = zeros(n * width), d_y = zeros(n * width), d_core = zeros(n * width),
       d_scale = zeros(width);
  ref::scale_columns(y.data(), core.data(), scale.data(), n, width);
  ref::rope(y.data(), y.data(), table.data(), ids.data(), heads, false, n);
  ref::rope(d_y.data(), g.data(), table.data(), ids.data(), heads, true, n);
  ref::scale_rope_backward(d_core.data(), d_scale.data(), d_y.data(), y.data(), scale.data(),
                           table.data(), ids.data(), heads, n);
  require_gradients(
      [&](const std::vector<Complex>& a) {
        Complex out(n * width);
        ref::scale_columns(out.data(), a[0].data(), a[1].data(), n, width);
        ref::rope(out.data(), out.data(), complex(table).data(), ids.data(), heads, false, n);
        return inner(g, out);
      },
      {{"core", core, d_core}, {"scale", scale, d_scale}});
}

TEST_CASE("rope turned the other way is its backward", "[kernels][gradient]") {
  const Heads heads{2, 1, 4};
  constexpr std::int64_t n = 3, width = 16;
  Numbers random(6);
  const auto ids = ids_of(n);
  Real table;
  for (int p = 0; p < n; ++p)
    for (int j = 0; j < 4; ++j)
      table.push_back(j < 2 ? std::cos(p * std::pow(0.1, j)) : std::sin(p * std::pow(0.1, j - 2)));
  const Real x = random.normal(n * width), g = random.normal(n * width);
  Real d_x = zeros(n * width);
  ref::rope(d_x.data(), g.data(), table.data(), ids.data(), heads, true, n);
  require_gradients(
      [&](const std::vector<Complex>& a) {
        Complex y(n * width);
        ref::rope(y.data(), a[0].data(), complex(table).data(), ids.data(), heads, false, n);
        return inner(g, y);
      },
      {{"x", x, d_x}});
}

TEST_CASE("attention's backward is its derivative with grouped heads and a shared prefix",
          "[kernels][gradient]") {
  const Heads heads{4, 2, 3};
  const std::vector<std::int32_t> table = {0, 4, 0, 0, 4, 2, 0, 4, 6, 3, 0, 2, 9, 1, 0, 0};
  constexpr std::int64_t n = 10, width = 24, out = 12;
  Numbers random(7);
  const Real qkv = random.normal(n * width), g = random.normal(n * out);
  Real o = zeros(n * out), lse = zeros(n * 4), d_qkv = zeros(n * width);
  ref::attention(o.data(), lse.data(), qkv.data(), table.data(), 4, heads);
  ref::attention_backward(d_qkv.data(), g.data(), qkv.data(), o.data(), lse.data(), table.data(), 4,
                          heads, n);
  require_gradients(
      [&](const std::vector<Complex>& a) {
        Complex y(n * out), l(n * 4);
        ref::attention(y.data(), l.data(), a[0].data(), table.data(), 4, heads);
        return inner(g, y);
      },
      {{"qkv", qkv, d_qkv}});
}

TEST_CASE("cross entropy leaves its derivative in the logits", "[kernels][gradient]") {
  constexpr std::int64_t n = 3, v = 9;
  Numbers random(8);
  const Real logits = random.normal(n * v, 2), weight = random.normal(n, 0.2, 1);
  const std::vector<std::int32_t> target = {4, 0, 8};
  Real d = logits, loss = zeros(n);
  ref::cross_entropy(loss.data(), d.data(), target.data(), weight.data(), n, v);
  require_gradients(
      [&](const std::vector<Complex>& a) {
        Complex l = a[0], out(n);
        ref::cross_entropy(out.data(), l.data(), target.data(), complex(weight).data(), n, v);
        return out[0] + out[1] + out[2];
      },
      {{"logits", logits, d}});
}

}  // namespace mixlora::test
