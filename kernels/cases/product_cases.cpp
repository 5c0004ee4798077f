// Products with frozen matrices, small products, row selection.
#include <memory>

#include "kernels/cases/op_cases.h"
#include "kernels/reference/scalar.h"

namespace mixlora::cases {
namespace {

using reference::Index;

/// A frozen matrix with its rows uploaded and packed, and the same numbers on the host.
struct Packed {
  FrozenMatrix matrix;
  Array* rows = nullptr;
};
Packed frozen(Workbench& w, Index out, Index in) {
  Packed p;
  p.matrix.out = out, p.matrix.in = in, p.matrix.dtype = w.ops.matrix_type();
  const auto words = static_cast<Index>((w.ops.matrix_bytes(out, in) + 3) / 4);
  Array& storage = w.integers({words}, std::vector<std::int32_t>(static_cast<std::size_t>(words)));
  storage.counted = false;  // the rows count
  p.matrix.storage = storage.device;
  p.rows = &w.input({out, in}, w.ops.matrix_type(), 0.05);
  w.ops.copy(w.ops.matrix_rows(p.matrix), p.rows->device);
  w.ops.pack_matrix(p.matrix);
  return p;
}

/// c = alpha op(a) op(b) + beta c on the host.
void multiply(double* c, const double* a, bool ta, const double* b, bool tb, double alpha,
              double beta, Index m, Index n, Index k) {
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) {
      double sum = 0;
      for (Index l = 0; l < k; ++l)
        sum += a[ta ? l * m + i : i * k + l] * b[tb ? j * k + l : l * n + j];
      c[i * n + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * n + j]);
    }
}

OpCase linear(Index n, Index out, Index in) {
  return {"linear " + times({n, out, in}), kSummed, 2.0 * static_cast<double>(n * out * in),
          [=](Workbench& w) {
            const auto p = std::make_shared<Packed>(frozen(w, out, in));
            Array &x = w.input({n, in}, w.act()), &y = w.output("y", {n, out}, w.act());
            w.run = [&w, &x, &y, p] { w.ops.linear(y.device, x.device, p->matrix); };
            w.reference = [=, &x, &y] {
              multiply(y.data(), x.data(), false, p->rows->data(), true, 1, 0, n, out, in);
            };
          }};
}
OpCase linear_backward(Index n, Index out, Index in, bool accumulate) {
  return {"linear_backward " + times({n, out, in}) + (accumulate ? " adds" : ""), kSummed,
          2.0 * static_cast<double>(n * out * in), [=](Workbench& w) {
            const auto p = std::make_shared<Packed>(frozen(w, out, in));
            Array& g = w.input({n, out}, w.act());
            Array& d_x =
                accumulate ? w.updated("d_x", {n, in}, w.act()) : w.output("d_x", {n, in}, w.act());
            w.run = [&w, &g, &d_x, p, accumulate] {
              w.ops.linear_backward(d_x.device, g.device, p->matrix, accumulate);
            };
            w.reference = [=, &g, &d_x] {
              multiply(d_x.data(), g.data(), false, p->rows->data(), false, 1, accumulate, n, in,
                       out);
            };
          }};
}
OpCase row_norms(Index out, Index in) {
  return {"row_norms_squared " + times({out, in}), kSummed, 2.0 * static_cast<double>(out * in),
          [=](Workbench& w) {
            const auto p = std::make_shared<Packed>(frozen(w, out, in));
            Array& y = w.output("norms", {out}, DType::f32);
            w.run = [&w, &y, p] { w.ops.row_norms_squared(y.device, p->matrix); };
            w.reference = [=, &y] {
              for (Index o = 0; o < out; ++o)
                y.host[static_cast<std::size_t>(o)] =
                    reference::dot(p->rows->data() + o * in, p->rows->data() + o * in, in);
            };
          }};
}
OpCase gemm(Index m, Index n, Index k, bool ta, bool tb, float beta, bool f32_out) {
  const std::string name = std::string("gemm ") + (ta ? "t" : "n") + (tb ? "t " : "n ") +
                           times({m, n, k}) + (beta == 0 ? "" : " adds") +
                           (f32_out ? " to f32" : "");
  return {name, kSummed, 2.0 * static_cast<double>(m * n * k), [=](Workbench& w) {
            const DType type = f32_out ? DType::f32 : w.act();
            Array &a = w.input(ta ? Shape{k, m} : Shape{m, k}, w.act()),
                  &b = w.input(tb ? Shape{n, k} : Shape{k, n}, w.act());
            Array& c = beta == 0 ? w.output("c", {m, n}, type) : w.updated("c", {m, n}, type);
            w.run = [=, &w, &a, &b, &c] {
              w.ops.gemm(c.device, a.device, ta, b.device, tb, 0.5F, beta);
            };
            w.reference = [=, &a, &b, &c] {
              multiply(c.data(), a.data(), ta, b.data(), tb, 0.5, static_cast<double>(beta), m, n,
                       k);
            };
          }};
}
OpCase gather(Index m, Index n, Index c) {
  return {"gather_rows " + times({m, c}), kExact, 0, [=](Workbench& w) {
            std::vector<std::int32_t> at(static_cast<std::size_t>(m));
            for (auto& i : at) i = w.below(n);
            Array &x = w.input({n, c}, w.act()), &index = w.integers({m}, at),
                  &y = w.output("y", {m, c}, w.act());
            w.run = [&] { w.ops.gather_rows(y.device, x.device, index.device); };
            w.reference = [=, &x, &y] {
              for (Index i = 0; i < m * c; ++i)
                y.data()[i] = x.data()[at[static_cast<std::size_t>(i / c)] * c + i % c];
            };
          }};
}
OpCase scatter(Index m, Index c) {
  return {"scatter_add_rows " + times({m, c}), kRounded, static_cast<double>(m * c),
          [=](Workbench& w) {
            std::vector<std::int32_t> at;
            for (Index i = 0; i < m; ++i) at.push_back(static_cast<std::int32_t>(2 * (m - 1 - i)));
            Array &x = w.updated("x", {2 * m, c}, w.act()), &index = w.integers({m}, at),
                  &y = w.input({m, c}, w.act());
            w.run = [&] { w.ops.scatter_add_rows(x.device, y.device, index.device); };
            w.reference = [=, &x, &y] {
              for (Index i = 0; i < m * c; ++i)
                x.data()[at[static_cast<std::size_t>(i / c)] * c + i % c] += y.data()[i];
            };
          }};
}

}  // namespace

void add_product_cases(std::vector<OpCase>& t) {
  for (const auto& s :
       {std::array<Index, 3>{7, 13, 31}, {64, 576, 576}, {33, 1536, 576}, {16, 1024, 4096}}) {
    t.push_back(linear(s[0], s[1], s[2]));
    t.push_back(linear_backward(s[0], s[1], s[2], false));
    t.push_back(linear_backward(s[0], s[1], s[2], true));
    t.push_back(row_norms(s[1], s[2]));
  }
  t.push_back(gemm(33, 16, 576, false, true, 0, false));
  t.push_back(gemm(33, 576, 16, false, true, 1, false));
  t.push_back(gemm(128, 37, 65, true, false, 1, true));
  t.push_back(gemm(19, 23, 5, false, false, 0, true));
  t.push_back(gather(37, 19, 129));
  t.push_back(gather(512, 512, 576));
  t.push_back(scatter(13, 33));
  t.push_back(scatter(256, 576));
}

}  // namespace mixlora::cases
