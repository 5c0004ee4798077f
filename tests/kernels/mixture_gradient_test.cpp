#include "kernels/reference/mixture.h"
#include "kernels/reference/slots.h"
#include "tests/kernels/complex_step.h"

namespace mixlora::test {
namespace {

namespace ref = reference;
using ref::Index;

constexpr Index kRows = 4, kWidth = 5, kExperts = 3, kSlots = 2, kRank = 2;
constexpr double kScale = 1.5;
/// Row 1 has a slot without an expert, row 2 an empty one.
const std::vector<std::int32_t> kExpert = {0, 2, -1, 1, 1, -1, 2, 0};
const std::vector<std::int32_t> kIds = {5, 0, 1, 0, 5, 1, 1, 0, 6, 0, 1, 0, 6, 1, 1, 0};

struct Variant {
  bool gate, up, down, scales, per_slot, routed;
  Activation activation;
  float dropout;
};
enum Part : std::size_t { gate_up, a, gate_b, up_b, down_a, gate_scale, up_scale, weight, parts };

template <class T>
ref::MixtureInput<T> input(const std::vector<std::vector<T>>& v, const Variant& x) {
  const auto at = [&](Part p, bool present) { return present ? v[p].data() : nullptr; };
  ref::Choice<T> slots{nullptr, nullptr, 1, 1, kRank};
  if (x.routed) slots = {kExpert.data(), v[weight].data(), kExperts, kSlots, kRank};
  return {at(gate_up, true),
          at(a, x.gate || x.up),
          at(gate_b, x.gate),
          at(up_b, x.up),
          at(down_a, x.down),
          at(gate_scale, x.scales),
          at(up_scale, x.scales),
          slots,
          x.activation,
          kScale,
          {x.dropout, 17, 1, site_expert_down},
          kIds.data(),
          x.per_slot,
          kRows,
          kWidth};
}

/// <d_out, out> + sum of w <q_e, z> (w inside q when per_slot): the rest of the block is linear.
C loss(const std::vector<Complex>& v, const Variant& x, const Real& d_out, const Real& q) {
  const Index e_count = x.routed ? kExperts : 1, k_count = x.routed ? kSlots : 1;
  const auto m = input<C>(v, x);
  Complex out(d_out.size()), z(kRows * k_count * kRank);
  ref::mixture(out.data(), x.down ? z.data() : nullptr, m);
  C sum = inner(d_out, out);
  for (Index n = 0; x.down && n < kRows; ++n)
    for (Index k = 0; k < k_count; ++k) {
      const Index e = m.slots.expert_of(n, k), row = (x.per_slot ? k * kRows : 0) + n;
      for (Index r = 0; e >= 0 && r < kRank; ++r)
        sum += (x.per_slot ? C(1) : m.slots.weight_of(n, k)) * q[(row * e_count + e) * kRank + r] *
               z[(n * k_count + k) * kRank + r];
    }
  return sum;
}

void check(const Variant& x, unsigned seed) {
  const Index e = x.routed ? kExperts : 1, k = x.routed ? kSlots : 1, copies = x.per_slot ? k : 1;
  Numbers random(seed);
  std::vector<Real> v(parts), d(parts);
  v[gate_up] = random.normal(kRows * 2 * kWidth), v[a] = random.normal(kRows * 2 * e * kRank);
  v[gate_b] = random.normal(e * kWidth * kRank), v[up_b] = random.normal(e * kWidth * kRank);
  v[down_a] = random.normal(e * kRank * kWidth), v[gate_scale] = random.normal(e * kWidth, 0.1, 1);
  v[up_scale] = random.normal(e * kWidth, 0.1, 1), v[weight] = random.normal(kRows * k, 0.1, 0.5);
  if (x.routed) v[weight][5] = 0;  // the empty slot
  for (std::size_t i = 0; i < parts; ++i) d[i] = zeros(static_cast<Index>(v[i].size()));
  const Real d_out = random.normal(copies * kRows * kWidth),
             q = random.normal(copies * kRows * e * kRank);
  const auto m = input<double>(v, x);
  Real out = zeros(copies * kRows * kWidth), z = zeros(kRows * k * kRank);
  ref::mixture(out.data(), z.data(), m);
  Real row_dots = zeros(kRows);
  ref::mixture_backward(
      d[gate_up].data(), x.per_slot ? nullptr : d[weight].data(), d[a].data(), row_dots.data(),
      {x.gate ? d[gate_b].data() : nullptr, x.up ? d[up_b].data() : nullptr,
       x.down ? d[down_a].data() : nullptr, x.scales ? d[gate_scale].data() : nullptr,
       x.scales ? d[up_scale].data() : nullptr},
      d_out.data(), x.down ? q.data() : nullptr, z.data(), m);
  for (double& p : d[a]) p /= kScale;  // p = s d_a, for a holds s A x
  // u and v are linear in gate_up and a together, and so are the rows before them.
  const Index wide = 2 * e * kRank;
  for (Index n = 0; n < kRows; ++n) {
    const double of_c = ref::dot(v[gate_up].data() + n * 2 * kWidth,
                                 d[gate_up].data() + n * 2 * kWidth, 2 * kWidth),
                 of_a = ref::dot(v[a].data() + n * wide, d[a].data() + n * wide, wide);
    CHECK(row_dots[static_cast<std::size_t>(n)] == Approx(of_c + of_a));
  }
  const char* names[] = {"gate_up", "a",          "gate_b",   "up_b",
                         "down_a",  "gate_scale", "up_scale", "weight"};
  const bool present[] = {true,   x.gate || x.up, x.gate,   x.up,
                          x.down, x.scales,       x.scales, x.routed && !x.per_slot};
  if (present[weight]) {  // an empty slot has no gradient: nothing reads it
    CHECK(d[weight][5] == 0);
  }
  for (std::size_t i = 0; i < parts; ++i) {
    if (!present[i]) continue;
    INFO("activation " << static_cast<int>(x.activation) << ", per slot " << x.per_slot
                       << ", routed " << x.routed);
    require_gradients(
        [&](const std::vector<Complex>& one) {
          std::vector<Complex> all;
          for (const Real& u : v) all.push_back(complex(u));
          all[i] = one[0];
          if (x.routed) all[weight][5] = 0;
          return loss(all, x, d_out, q);
        },
        {{names[i], v[i], d[i]}});
  }
}

}  // namespace

TEST_CASE("mixture_backward is the derivative for every activation, with every part",
          "[kernels][gradient]") {
  for (const auto act :
       {Activation::silu, Activation::gelu, Activation::gelu_new, Activation::relu})
    for (const bool per_slot : {false, true})
      for (const bool routed : {false, true})
        check({true, true, true, true, per_slot, routed, act, 0.3F}, 21);
}

TEST_CASE("mixture_backward is the derivative when parts are absent", "[kernels][gradient]") {
  for (int bits = 0; bits < 16; ++bits)
    for (const bool per_slot : {false, true})
      check({(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, per_slot, true,
             Activation::silu, 0},
            22);
}

TEST_CASE("slot_combine_backward is the derivative of slot_combine", "[kernels][gradient]") {
  Numbers random(23);
  const Real core = random.normal(kSlots * kRows * kWidth),
             scale = random.normal(kExperts * kWidth, 0.1, 1), w = random.normal(kRows * kSlots),
             g = random.normal(kRows * kWidth);
  const ref::Choice<double> slots{kExpert.data(), w.data(), kExperts, kSlots, kRank};
  Real d_core = zeros(kSlots * kRows * kWidth), d_w = zeros(kRows * kSlots),
       d_scale = zeros(kExperts * kWidth);
  ref::slot_combine_backward(d_core.data(), d_w.data(), d_scale.data(), g.data(), core.data(),
                             scale.data(), slots, kRows, kWidth);
  require_gradients(
      [&](const std::vector<Complex>& v) {
        Complex y(kRows * kWidth);
        ref::slot_combine(y.data(), v[0].data(), v[1].data(),
                          ref::Choice<C>{kExpert.data(), v[2].data(), kExperts, kSlots, kRank},
                          kRows, kWidth);
        return inner(g, y);
      },
      {{"core", core, d_core}, {"scale", scale, d_scale}, {"weight", w, d_w}});
}

TEST_CASE("slots in columns times B2 are the sum over slots", "[kernels][reference]") {
  Numbers random(24);
  const Real z = random.normal(kRows * kSlots * kRank), w = random.normal(kRows * kSlots),
             b = random.normal(kExperts * kRank);
  const ref::Choice<double> slots{kExpert.data(), w.data(), kExperts, kSlots, kRank};
  Real columns = zeros(kRows * kExperts * kRank), apart = zeros(kSlots * kRows * kExperts * kRank);
  ref::slots_to_columns(columns.data(), z.data(), slots, false, kRows);
  ref::slots_to_columns(apart.data(), z.data(), slots, true, kRows);
  for (Index n = 0; n < kRows; ++n) {
    double sum = 0;
    for (Index k = 0; k < kSlots; ++k) {
      const Index e = kExpert[n * kSlots + k];
      const double one = e < 0 ? 0 : ref::dot(&z[(n * kSlots + k) * kRank], &b[e * kRank], kRank);
      CHECK(ref::dot(&apart[(k * kRows + n) * kExperts * kRank], b.data(), kExperts * kRank) ==
            Approx(one));
      sum += w[n * kSlots + k] * one;
    }
    CHECK(ref::dot(&columns[n * kExperts * kRank], b.data(), kExperts * kRank) == Approx(sum));
  }
}

TEST_CASE("overflow_input_backward is the derivative of overflow_input", "[kernels][gradient]") {
  const std::vector<std::int32_t> expert = {0, -1, 2, -1};
  Numbers random(25);
  const Real x = random.normal(kRows * kWidth), y = random.normal(kRows * kWidth),
             w = random.normal(kRows), g = random.normal(kRows * kWidth);
  const ref::Choice<double> slots{expert.data(), w.data(), kExperts, 1, 0};
  Real d_x = zeros(kRows * kWidth), d_w = zeros(kRows), d_y = g;
  ref::overflow_input_backward(d_x.data(), d_w.data(), d_y.data(), x.data(), slots, kRows, kWidth);
  require_gradients(
      [&](const std::vector<Complex>& v) {
        Complex out = v[0];
        ref::overflow_input(out.data(), v[1].data(),
                            ref::Choice<C>{expert.data(), v[2].data(), kExperts, 1, 0}, kRows,
                            kWidth);
        return inner(g, out);
      },
      {{"y", y, d_y}, {"x", x, d_x}, {"weight", w, d_w}});
}

}  // namespace mixlora::test
