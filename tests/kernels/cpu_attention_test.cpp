// The CPU's attention against the reference in double, with and without shared prefixes.
#include "kernels/reference/attention.h"
#include "tests/kernels/cpu_values.h"

namespace mixlora::test {
namespace {

struct Case {
  std::vector<std::int32_t> table;  // begin, length, prefix_begin, prefix_length
  Index rows;
  Heads heads;
};

struct Pass {
  Integers table;
  Numbers qkv, o, lse, d_o, d_qkv;
  Heads heads;
  Sequences s;
  explicit Pass(const Case& c)
      : table({static_cast<Index>(c.table.size() / 4), 4}, c.table),
        qkv({c.rows, (c.heads.heads + 2 * c.heads.kv_heads) * c.heads.head_dim}, 1, 2),
        o({c.rows, c.heads.heads * c.heads.head_dim}),
        lse({c.rows, c.heads.heads}),
        d_o(o.shape, 2),
        d_qkv(qkv.shape, 3),
        heads(c.heads) {
    s.table = table.view();
    s.count = table.shape[0];
    for (Index i = 0; i < s.count; ++i) {
      s.max_length = std::max<Index>(s.max_length, c.table[static_cast<std::size_t>(4 * i + 1)]);
      s.max_prefix = std::max<Index>(s.max_prefix, c.table[static_cast<std::size_t>(4 * i + 3)]);
    }
  }
  void run(Backend& ops) {
    ops.attention(o.view(), lse.view(), qkv.view(), s, heads);
    ops.attention_backward(d_qkv.view(), d_o.view(), qkv.view(), o.view(), lse.view(), s, heads);
  }
};

/// Backward subtracts two sums of the same size; it loses a digit more than forward.
constexpr double kBackwardError = 1e-5;

void check(const Case& c) {
  Pass p(c);
  p.run(*make_cpu_backend(Precision::fp32, 2));
  reference::attention(p.o.d(), p.lse.d(), p.qkv.d(), c.table.data(), p.s.count, c.heads);
  reference::attention_backward(p.d_qkv.d(), p.d_o.d(), p.qkv.d(), p.o.d(), p.lse.d(),
                                c.table.data(), p.s.count, c.heads, c.rows);
  CHECK(p.o.error() < kFloatError);
  CHECK(p.lse.error() < kFloatError);
  CHECK(p.d_qkv.error() < kBackwardError);
}

const Case kPlain{{0, 70, 0, 0, 70, 1, 0, 0, 71, 130, 0, 0}, 201, {6, 2, 16}};
const Case kPrefix{{0, 70, 0, 0, 70, 3, 0, 70, 73, 66, 0, 70, 139, 1, 10, 40}, 140, {4, 2, 8}};

TEST_CASE("attention of packed sequences agrees with the reference", "[kernels][cpu]") {
  check(kPlain);
  check({{0, 5, 0, 0}, 5, {3, 3, 10}});
}
TEST_CASE("attention with shared prefixes agrees with the reference", "[kernels][cpu]") {
  check(kPrefix);
}
TEST_CASE("attention's bits do not depend on the number of threads", "[kernels][cpu]") {
  for (const Case& c : {kPlain, kPrefix}) {
    Pass one(c), two(c);
    one.run(*make_cpu_backend(Precision::fp32, 1));
    two.run(*make_cpu_backend(Precision::fp32, 2));
    CHECK(one.o.data == two.o.data);
    CHECK(one.d_qkv.data == two.d_qkv.data);
  }
}
TEST_CASE("very large scores give finite attention", "[kernels][cpu]") {
  Pass p({{0, 40, 0, 0}, 40, {2, 1, 16}});
  for (float& x : p.qkv.data) x *= 100;
  p.run(*make_cpu_backend(Precision::fp32, 2));
  for (const float x : p.o.data) REQUIRE(std::isfinite(x));
  for (const float x : p.d_qkv.data) REQUIRE(std::isfinite(x));
}

}  // namespace
}  // namespace mixlora::test
