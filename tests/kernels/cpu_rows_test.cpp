// Row operations, products and memory of the CPU backend: cases worked by hand, and its promises.
#include <limits>

#include "tests/kernels/cpu_values.h"

namespace mixlora::test {
namespace {

TEST_CASE("RMSNorm of (3, 4) is (3, 4) over the root of 12.5", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  Numbers x({1, 2}), w({2}), y({1, 2}), r({1});
  x.data = {3, 4};
  w.data = {1, 2};
  ops->rmsnorm(y.view(), r.view(), x.view(), w.view(), 0);
  CHECK(r.data[0] == Approx(1 / std::sqrt(12.5)).epsilon(1e-6));
  CHECK(y.data[0] == Approx(3 / std::sqrt(12.5)).epsilon(1e-6));
  CHECK(y.data[1] == Approx(8 / std::sqrt(12.5)).epsilon(1e-6));
}

TEST_CASE("products take transposed and strided views and keep the rest", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  Numbers a({2, 3}), b({2, 3}), c({2, 4});
  a.data = {1, 2, 3, 4, 5, 6};
  b.data = {1, 0, 2, 0, 1, 1};
  c.data = {9, 1, 1, 9, 9, 1, 1, 9};
  ops->gemm(c.view().col_range(1, 3), a.view(), false, b.view(), true, 2, 1);
  CHECK(c.data == std::vector<float>{9, 15, 11, 9, 9, 33, 23, 9});
  Numbers d({3, 3});
  ops->gemm(d.view(), a.view(), true, b.view(), false, 1, 0);
  CHECK(d.data == std::vector<float>{1, 4, 6, 2, 5, 9, 3, 6, 12});
}

TEST_CASE("a product into NaN with beta 0 overwrites it", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  Numbers a({1, 1}), c({1, 1});
  a.data = {3};
  c.data = {std::numeric_limits<float>::quiet_NaN()};
  ops->gemm(c.view(), a.view(), false, a.view(), false, 1, 0);
  CHECK(c.data[0] == 9);
}

TEST_CASE("products agree with double sums for many shapes", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  for (const auto& [m, n, k] : std::vector<std::array<Index, 3>>{
           {1, 1, 1}, {1, 300, 70}, {5, 7, 300}, {130, 16, 33}, {200, 517, 16}, {16, 400, 90}}) {
    for (const bool ta : {false, true})
      for (const bool tb : {false, true}) {
        Numbers a(ta ? Shape{k, m} : Shape{m, k}, 1), b(tb ? Shape{n, k} : Shape{k, n}, 2);
        Numbers c({m, n}, 3);
        for (Index i = 0; i < m; ++i)
          for (Index j = 0; j < n; ++j) {
            double sum = 0;
            for (Index p = 0; p < k; ++p)
              sum += a.d()[ta ? p * m + i : i * k + p] * b.d()[tb ? j * k + p : p * n + j];
            c.d()[i * n + j] = 0.5 * sum + 2 * c.d()[i * n + j];
          }
        ops->gemm(c.view(), a.view(), ta, b.view(), tb, 0.5F, 2);
        INFO(m << " x " << n << " x " << k << (ta ? " T" : " N") << (tb ? "T" : "N"));
        CHECK(c.error() < kFloatError);
      }
  }
}

TEST_CASE("frozen matrices multiply forward and backward", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const Index rows = 9, in = 70, out = 131;
  Numbers w({out, in}, 1), x({rows, in}, 2), y({rows, out}), d_x({rows, in}, 3);
  const auto storage = ops->allocate(ops->matrix_bytes(out, in));
  FrozenMatrix frozen;
  frozen.storage = Tensor(storage->data(), {static_cast<Index>(ops->matrix_bytes(out, in) / 4)},
                          DType::i32, Device::cpu);
  frozen.out = out;
  frozen.in = in;
  frozen.dtype = ops->matrix_type();
  ops->upload(ops->matrix_rows(frozen), w.data.data());
  ops->pack_matrix(frozen);
  ops->linear(y.view(), x.view(), frozen);
  for (Index n = 0; n < rows; ++n)
    for (Index o = 0; o < out; ++o)
      for (Index i = 0; i < in; ++i) y.d()[n * out + o] += x.d()[n * in + i] * w.d()[o * in + i];
  CHECK(y.error() < kFloatError);
  ops->linear_backward(d_x.view(), y.view(), frozen, true);
  for (Index n = 0; n < rows; ++n)
    for (Index i = 0; i < in; ++i)
      for (Index o = 0; o < out; ++o) d_x.d()[n * in + i] += y.d()[n * out + o] * w.d()[o * in + i];
  CHECK(d_x.error() < kFloatError);
}

TEST_CASE("dropout's mask is row_bits, bit for bit", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const Index rows = 6, cols = 203;  // neither a multiple of a block nor of a vector
  const Dropout d{0.3F, 0x123456789abcdefULL, 29, site_ffn};
  Integers ids = row_ids(rows);
  Numbers x({rows, cols}), y({rows, cols});
  std::fill(x.data.begin(), x.data.end(), 1.0F);
  ops->dropout(y.view(), x.view(), d, ids.view());
  const RandomKey key = random_key(d.seed, Purpose::dropout);
  for (Index n = 0; n < rows; ++n)
    for (Index c = 0; c < cols; ++c) {
      const auto* id = ids.data.data() + 4 * n;
      const Philox4 bits = row_bits(
          key, 29, site_ffn, static_cast<std::uint32_t>(id[2]), static_cast<std::uint32_t>(id[0]),
          static_cast<std::uint32_t>(id[1]), static_cast<std::uint32_t>(c / 8));
      const std::uint32_t own = bits.v[c % 8 / 2] >> (c % 2 == 0 ? 0 : 16) & 0xffffU;
      const float expected = own < dropout_threshold(d.p) ? 0 : dropout_scale(d.p);
      REQUIRE(y.data[static_cast<std::size_t>(n * cols + c)] == expected);
    }
  Numbers g({rows, cols});
  ops->dropout_backward_add(g.view(), x.view(), d, ids.view());
  CHECK(g.data == y.data);
}

TEST_CASE("dropout drops its share and keeps the mean", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const Index rows = 400, cols = 1000;
  Integers ids = row_ids(rows);
  Numbers x({rows, cols}), y({rows, cols});
  std::fill(x.data.begin(), x.data.end(), 1.0F);
  ops->dropout(y.view(), x.view(), {0.1F, 5, 0, site_qkv}, ids.view());
  double dropped = 0, total = 0;
  for (const float v : y.data) dropped += v == 0 ? 1 : 0, total += static_cast<double>(v);
  const double n = static_cast<double>(rows * cols), sigma = std::sqrt(0.1 * 0.9 / n);
  CHECK(std::abs(dropped / n - 0.1) < 5 * sigma);
  CHECK(std::abs(total / n - 1) < 5 * sigma / 0.9);
}

TEST_CASE("the loss of equal logits is the log of their number", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  Numbers logits({2, 4}), weight({2}), loss({2}), log_p({2}), greedy({2});
  Integers target({2}, {2, 0});
  logits.data = {1, 1, 1, 1, -5, -5, -5, -5};
  weight.data = {1, 0.5F};
  ops->log_prob(log_p.view(), greedy.view(), logits.view(), target.view());
  CHECK(log_p.data[0] == Approx(-std::log(4.0)).epsilon(1e-6));
  CHECK(greedy.data == std::vector<float>{0, 1});  // the first of equals wins
  ops->cross_entropy(loss.view(), logits.view(), target.view(), weight.view());
  CHECK(loss.data[0] == Approx(std::log(4.0)).epsilon(1e-6));
  CHECK(loss.data[1] == Approx(0.5 * std::log(4.0)).epsilon(1e-6));
  const std::vector<float> expected{0.25F, 0.25F, -0.75F, 0.25F, -0.375F, 0.125F, 0.125F, 0.125F};
  for (std::size_t i = 0; i < 8; ++i) CHECK(logits.data[i] == Approx(expected[i]).margin(1e-6));
}

TEST_CASE("the first step of AdamW moves by the learning rate", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  Numbers w({2}), g({2}), m({2}), v({2}), numbers({8}), norm({1});
  w.data = {1, 1};
  g.data = {3, -4};
  numbers.data = {0.1F, 0.5F, 0.9F, 0.999F, 0, 0.1F, 0.001F, 1};
  ops->sum_squares(norm.view(), g.view(), false);
  CHECK(norm.data[0] == 25);
  ops->adamw(w.view(), {}, g.view(), m.view(), v.view(), numbers.view(), norm.view());
  CHECK(w.data[0] == Approx(1 - 0.1 * (1 + 0.5)).epsilon(1e-5));
  CHECK(w.data[1] == Approx(1 - 0.1 * (-1 + 0.5)).epsilon(1e-5));
  CHECK(m.data[0] == Approx(0.1 * 3 / 5).epsilon(1e-5));  // the norm is clipped to 1
}

TEST_CASE("wrong shapes name the operation and the shapes", "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  Numbers a({2, 3}), b({2, 4});
  CHECK_THROWS_AS(ops->gemm(a.view(), a.view(), false, b.view(), false, 1, 0), std::logic_error);
  CHECK_THROWS_WITH(ops->add(a.view(), b.view()), Catch::Matchers::Contains("add") &&
                                                      Catch::Matchers::Contains("(2, 3)") &&
                                                      Catch::Matchers::Contains("(2, 4)"));
}

TEST_CASE("memory is zeroed, aligned and counted, and too much of it is bad_alloc",
          "[kernels][cpu]") {
  const auto ops = make_cpu_backend(Precision::fp32);
  const std::size_t before = ops->allocated_bytes();
  {
    const auto block = ops->allocate(1000);
    CHECK(reinterpret_cast<std::uintptr_t>(block->data()) % 64 == 0);
    for (int i = 0; i < 1000; ++i) REQUIRE(static_cast<const char*>(block->data())[i] == 0);
    CHECK(ops->allocated_bytes() >= before + 1000);
  }
  CHECK(ops->allocated_bytes() == before);
  CHECK(ops->peak_bytes() >= before + 1000);
  CHECK_THROWS_AS(ops->allocate(std::size_t{1} << 60), std::bad_alloc);
}

}  // namespace
}  // namespace mixlora::test
