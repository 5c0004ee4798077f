// The CPU's gated feed-forward with experts against the reference in double.
#include "kernels/reference/mixture.h"
#include "kernels/reference/slots.h"
#include "tests/kernels/cpu_values.h"

namespace mixlora::test {
namespace {

struct Setting {
  Index rows = 37, width = 72, experts = 1, count = 1, rank = 4;
  bool slots = false, scales = false, per_slot = false, factors = true;
  float p = 0;
  Activation activation = Activation::silu;
};

/// One mixture, forward and backward, in the backend's numbers and in the reference's.
struct Block {
  Setting s;
  Integers ids, expert;
  Numbers weight, gate_up, a, gate_b, up_b, down_a, gate_scale, up_scale, d_out, q;
  Numbers out, z, d_gate_up, d_weight, p, d_gate_b, d_up_b, d_down_a, d_gate_scale, d_up_scale;

  static Integers choices(const Setting& s) {
    Integers e({s.rows, s.count}, {});
    for (Index i = 0; i < s.rows; ++i)
      for (Index k = 0; k < s.count; ++k)  // distinct in a row; now and then an empty place
        e.data.push_back((i + k) % 11 == 10 ? -1
                                            : static_cast<std::int32_t>((i * i + k) % s.experts));
    return e;
  }
  explicit Block(const Setting& t)
      : s(t),
        ids(row_ids(t.rows)),
        expert(choices(t)),
        weight({t.rows, t.count}, 1),
        gate_up({t.rows, 2 * t.width}, 2, 2),
        a({t.rows, 2 * t.experts * t.rank}, 3),
        gate_b({t.experts, t.width, t.rank}, 4),
        up_b({t.experts, t.width, t.rank}, 5),
        down_a({t.experts, t.rank, t.width}, 6),
        gate_scale({t.experts, t.width}, 7, 2),
        up_scale({t.experts, t.width}, 8, 2),
        d_out({t.per_slot ? t.count * t.rows : t.rows, t.width}, 9),
        q({t.per_slot ? t.count * t.rows : t.rows, t.experts * t.rank}, 10),
        out(d_out.shape),
        z({t.rows, t.count * t.rank}),
        d_gate_up(gate_up.shape),
        d_weight(weight.shape),
        p(a.shape),
        d_gate_b(gate_b.shape, 11),
        d_up_b(up_b.shape, 12),
        d_down_a(down_a.shape, 13),
        d_gate_scale(gate_scale.shape, 14),
        d_up_scale(up_scale.shape, 15) {
    for (std::size_t i = 0; i < weight.data.size(); i += 7) {
      weight.exact[i] = weight.data[i] = 0;  // an expert at weight 0, or with -1 an empty slot
      if (i % 2 == 0) expert.data[i] = -1;
    }
    if (t.per_slot) {
      out.shape = d_out.shape = {t.count, t.rows, t.width};
    }
  }
  Mixture input() {
    Mixture m;
    m.gate_up = gate_up.view();
    m.slots.rank = s.rank;
    if (s.factors) {
      m.a = a.view();
      m.weights.gate_b = gate_b.view();
      m.weights.up_b = up_b.view();
      m.weights.down_a = down_a.view();
    }
    if (s.scales) {
      m.weights.gate_scale = gate_scale.view();
      m.weights.up_scale = up_scale.view();
    }
    if (s.slots) {
      m.slots.expert = expert.view();
      m.slots.weight = weight.view();
    }
    m.slots.experts = s.experts;
    m.slots.count = s.count;
    m.activation = s.activation;
    m.scale = 1.5F;
    m.dropout = {s.p, 42, 3, site_expert_down};
    m.ids = ids.view();
    m.per_slot = s.per_slot;
    return m;
  }
  void run(Backend& ops) {
    const Mixture m = input();
    ops.mixture(out.view(), s.factors ? z.view() : Tensor{}, m);
    MixtureGrads grads;
    if (s.factors) {
      grads.gate_b = d_gate_b.view();
      grads.up_b = d_up_b.view();
      grads.down_a = d_down_a.view();
    }
    if (s.scales) {
      grads.gate_scale = d_gate_scale.view();
      grads.up_scale = d_up_scale.view();
    }
    ops.mixture_backward(d_gate_up.view(), s.per_slot ? Tensor{} : d_weight.view(),
                         s.factors ? p.view() : Tensor{}, {}, grads, d_out.view(),
                         s.factors ? ConstTensor(q.view()) : ConstTensor{},
                         s.factors ? ConstTensor(z.view()) : ConstTensor{}, m);
  }
  void run_reference() {
    reference::MixtureInput<double> m;
    m.gate_up = gate_up.d();
    if (s.factors) {
      m.a = a.d();
      m.gate_b = gate_b.d();
      m.up_b = up_b.d();
      m.down_a = down_a.d();
    }
    if (s.scales) {
      m.gate_scale = gate_scale.d();
      m.up_scale = up_scale.d();
    }
    m.slots = {s.slots ? expert.data.data() : nullptr, s.slots ? weight.d() : nullptr, s.experts,
               s.count, s.rank};
    m.activation = s.activation;
    m.scale = 1.5;
    m.dropout = {s.p, 42, 3, site_expert_down};
    m.ids = ids.data.data();
    m.per_slot = s.per_slot;
    m.rows = s.rows;
    m.width = s.width;
    reference::mixture(out.d(), s.factors ? z.d() : nullptr, m);
    reference::mixture_backward<double>(
        d_gate_up.d(), d_weight.d(), s.factors ? p.d() : nullptr, nullptr,
        {d_gate_b.d(), d_up_b.d(), d_down_a.d(), s.scales ? d_gate_scale.d() : nullptr,
         s.scales ? d_up_scale.d() : nullptr},
        d_out.d(), s.factors ? q.d() : nullptr, z.d(), m);
  }
  std::vector<std::pair<const char*, const Numbers*>> outputs() const {
    return {{"out", &out},
            {"z", &z},
            {"d_gate_up", &d_gate_up},
            {"d_weight", &d_weight},
            {"p", &p},
            {"d_gate_b", &d_gate_b},
            {"d_up_b", &d_up_b},
            {"d_down_a", &d_down_a},
            {"d_gate_scale", &d_gate_scale},
            {"d_up_scale", &d_up_scale}};
  }
};

void check(const Setting& s) {
  Block block(s);
  block.run(*make_cpu_backend(Precision::fp32, 2));
  block.run_reference();
  for (const auto& [name, numbers] : block.outputs()) {
    INFO(name);
    CHECK(numbers->error() < kFloatError);
  }
}

TEST_CASE("plain LoRA's feed-forward agrees with the reference", "[kernels][cpu]") {
  Setting s;
  check(s);
  s.p = 0.25F;
  check(s);
  s.factors = false;
  check(s);
}
TEST_CASE("DoRA's scales of gate and up agree with the reference", "[kernels][cpu]") {
  Setting s;
  s.scales = true;
  check(s);
  s.per_slot = true;
  check(s);
}
TEST_CASE("experts chosen per row agree with the reference", "[kernels][cpu]") {
  Setting s;
  s.slots = true;
  s.experts = 5;
  s.count = 2;
  check(s);
  s.p = 0.25F;
  check(s);
  s.scales = true;
  check(s);
  s.per_slot = true;
  check(s);
  s.factors = false;
  check(s);
}
TEST_CASE("every activation agrees with the reference", "[kernels][cpu]") {
  Setting s;
  s.slots = true;
  s.experts = 3;
  s.count = 3;
  for (const auto kind :
       {Activation::silu, Activation::gelu, Activation::gelu_new, Activation::relu}) {
    s.activation = kind;
    check(s);
  }
}
TEST_CASE("more rows than one block of working memory agree with the reference",
          "[kernels][cpu][slow]") {
  Setting s;
  s.slots = true;
  s.rows = 700;
  s.width = 1100;
  s.experts = 2;
  s.count = 2;
  s.p = 0.1F;
  check(s);
  s.slots = false;
  s.experts = s.count = 1;
  check(s);
}
TEST_CASE("the mixture's bits do not depend on the number of threads", "[kernels][cpu]") {
  Setting s;
  s.slots = s.scales = true;
  s.rows = 301;
  s.width = 520;
  s.experts = 4;
  s.count = 2;
  s.p = 0.1F;
  Block one(s), two(s);
  one.run(*make_cpu_backend(Precision::fp32, 1));
  two.run(*make_cpu_backend(Precision::fp32, 2));
  const auto a = one.outputs(), b = two.outputs();
  for (std::size_t i = 0; i < a.size(); ++i) {
    INFO(a[i].first);
    CHECK(a[i].second->data == b[i].second->data);
  }
}

}  // namespace
}  // namespace mixlora::test
