// Normalisation, dropout, jitter and DoRA.
#include "kernels/cases/op_cases.h"
#include "kernels/reference/dora.h"
#include "kernels/reference/dropout.h"
#include "kernels/reference/normalisation.h"

namespace mixlora::cases {
namespace {

using reference::Index;

void norm_cases(std::vector<OpCase>& t, Index n, Index d) {
  const double work = static_cast<double>(n * d);
  constexpr float kEps = 1e-5F;
  t.push_back({"rmsnorm " + times({n, d}), kSummed, 4 * work, [=](Workbench& w) {
                 Array &x = w.input({n, d}, w.act()), &s = w.input({d}, DType::f32, 0.2, 1);
                 Array &y = w.output("y", {n, d}, w.act()), &r = w.output("r", {n}, DType::f32);
                 w.run = [&] { w.ops.rmsnorm(y.device, r.device, x.device, s.device, kEps); };
                 w.reference = [=, &x, &s, &y, &r] {
                   reference::rmsnorm(y.data(), r.data(), x.data(), s.data(), n, d, double{kEps});
                 };
               }});
  t.push_back({"rmsnorm_again " + times({n, d}), kRounded, 2 * work, [=](Workbench& w) {
                 Array &x = w.input({n, d}, w.act()), &s = w.input({d}, DType::f32, 0.2, 1);
                 Array &r = w.input({n}, DType::f32, 0.1, 1), &y = w.output("y", {n, d}, w.act());
                 w.run = [&] { w.ops.rmsnorm_again(y.device, x.device, s.device, r.device); };
                 w.reference = [=, &x, &s, &y, &r] {
                   for (Index i = 0; i < n * d; ++i)
                     y.data()[i] = x.data()[i] * r.data()[i / d] * s.data()[i % d];
                 };
               }});
  t.push_back({"rmsnorm_backward " + times({n, d}), kSummed, 9 * work, [=](Workbench& w) {
                 Array &x = w.input({n, d}, w.act()), &s = w.input({d}, DType::f32, 0.2, 1);
                 Array &g = w.input({n, d}, w.act()), &d_x = w.updated("d_x", {n, d}, w.act());
                 Array& r = w.input({n}, DType::f32, 0.1, 1);
                 w.run = [&] {
                   w.ops.rmsnorm_backward(d_x.device, g.device, x.device, s.device, r.device);
                 };
                 w.reference = [=, &x, &s, &g, &d_x, &r] {
                   reference::rmsnorm_backward(d_x.data(), g.data(), x.data(), s.data(), r.data(),
                                               n, d);
                 };
               }});
  t.push_back({"add_rmsnorm " + times({n, d}), kSummed, 5 * work, [=](Workbench& w) {
                 Array &x = w.input({n, d}, w.act()), &delta = w.input({n, d}, w.act());
                 Array& s = w.input({d}, DType::f32, 0.2, 1);
                 Array &sum = w.output("sum", {n, d}, w.act()), &y = w.output("y", {n, d}, w.act());
                 Array& r = w.output("r", {n}, DType::f32);
                 w.run = [&] {
                   w.ops.add_rmsnorm(sum.device, y.device, r.device, x.device, delta.device,
                                     s.device, kEps);
                 };
                 w.reference = [=, &x, &delta, &s, &sum, &y, &r] {
                   reference::add_rmsnorm(sum.data(), y.data(), r.data(), x.data(), delta.data(),
                                          s.data(), n, d, double{kEps});
                 };
               }});
}

void mask_cases(std::vector<OpCase>& t, Index n, Index c) {
  const double work = static_cast<double>(n * c);
  t.push_back({"dropout " + times({n, c}), kRounded, work, [=](Workbench& w) {
                 const Dropout drop{0.3F, w.key(), 5, site_qkv};
                 Array &x = w.input({n, c}, w.act()), &ids = w.row_ids(n),
                       &y = w.output("y", {n, c}, w.act());
                 w.run = [=, &w, &x, &y, &ids] {
                   w.ops.dropout(y.device, x.device, drop, ids.device);
                 };
                 w.reference = [=, &x, &y, &ids] {
                   reference::dropout(y.data(), x.data(), drop, ids.index(), n, c);
                 };
               }});
  t.push_back({"dropout_backward_add " + times({n, c}), kRounded, 2 * work, [=](Workbench& w) {
                 const Dropout drop{0.05F, w.key(), 31, site_ffn};
                 Array &g = w.input({n, c}, w.act()), &ids = w.row_ids(n),
                       &d_x = w.updated("d_x", {n, c}, w.act());
                 w.run = [=, &w, &g, &d_x, &ids] {
                   w.ops.dropout_backward_add(d_x.device, g.device, drop, ids.device);
                 };
                 w.reference = [=, &g, &d_x, &ids] {
                   reference::dropout_backward_add(d_x.data(), g.data(), drop, ids.index(), n, c);
                 };
               }});
  t.push_back({"jitter " + times({n, c}), kRounded, 2 * work, [=](Workbench& w) {
                 const std::uint64_t seed = w.key();
                 Array &x = w.input({n, c}, w.act()), &ids = w.row_ids(n),
                       &y = w.output("y", {n, c}, w.act());
                 w.run = [=, &w, &x, &y, &ids] {
                   w.ops.jitter(y.device, x.device, 0.01F, seed, 3, ids.device);
                 };
                 w.reference = [=, &x, &y, &ids] {
                   reference::jitter(y.data(), x.data(), double{0.01F}, seed, 3, ids.index(), n, c);
                 };
               }});
}

void lora_a_cases(std::vector<OpCase>& t, Index n, Index c, Index rank, float p,
                  bool through = true) {
  const double work = 2.0 * static_cast<double>(n * c * rank);
  const std::string shape =
      times({n, c, rank}) + (p > 0 ? "" : " kept") + (through ? "" : " alone");
  t.push_back({"lora_a " + shape, kSummed, work, [=](Workbench& w) {
                 const Dropout drop{p, w.key(), 7, site_o};
                 Array &x = w.input({n, c}, w.act()), &a = w.input({rank, c}, w.act(), 0.1),
                       &ids = w.row_ids(n), &room = w.scratch({n, c});
                 Array& y = w.output("a", {n, rank}, w.act());
                 w.run = [=, &w, &x, &a, &ids, &room, &y] {
                   w.ops.lora_a(y.device, x.device, a.device, 2, drop, ids.device, room.device);
                 };
                 w.reference = [=, &x, &a, &ids, &y] {
                   reference::lora_a(y.data(), x.data(), a.data(), 2, drop, ids.index(), n, c,
                                     rank);
                 };
               }});
  t.push_back({"lora_a_backward " + shape, kSummed, 2 * work, [=](Workbench& w) {
                 const Dropout drop{p, w.key(), 7, site_o};
                 Array &x = w.input({n, c}, w.act()), &a = w.input({rank, c}, w.act(), 0.1),
                       &g = w.input({n, rank}, w.act()), &ids = w.row_ids(n),
                       &room = w.scratch({n, c});
                 Array& d_a = w.updated("d_weight", {rank, c}, DType::f32);
                 Array* d_x = through ? &w.updated("d_x", {n, c}, w.act()) : nullptr;
                 w.run = [=, &w, &x, &a, &g, &ids, &room, &d_a] {
                   w.ops.lora_a_backward(d_a.device, d_x ? d_x->device : Tensor(), g.device,
                                         x.device, a.device, drop, ids.device, room.device);
                 };
                 w.reference = [=, &x, &a, &g, &ids, &d_a] {
                   reference::lora_a_backward(d_a.data(), d_x ? d_x->data() : nullptr, g.data(),
                                              x.data(), a.data(), drop, ids.index(), n, c, rank);
                 };
               }});
}

void dora_cases(std::vector<OpCase>& t, Index n, Index out, Index in, Index rank) {
  const double work = static_cast<double>(n * out);
  t.push_back(
      {"dora_scale " + times({out, in, rank}), kSummed,
       2.0 * static_cast<double>(rank * (rank * in + out * (rank + 1))), [=](Workbench& w) {
         // Some magnitudes are 0 or hardly more.
         std::vector<double> magnitudes(static_cast<std::size_t>(out));
         for (Index i = 0; i < out; ++i)
           magnitudes[static_cast<std::size_t>(i)] =
               i % 5 == 0   ? 0
               : i % 7 == 0 ? -1e-25
                            : 1 + static_cast<double>(w.below(1000)) / 1000;
         Array &m = w.numbers({out}, DType::f32, magnitudes),
               &squares = w.input({out}, DType::f32, 0.2, 4);
         Array &a = w.input({rank, in}, w.act(), 0.05), &wa = w.input({rank, out}, w.act(), 0.1);
         Array& b = w.input({out, rank}, w.act(), 0.1);
         Array &scale = w.output("scale", {out}, DType::f32),
               &inverse = w.output("inverse_norm", {out}, DType::f32);
         w.run = [&] {
           w.ops.dora_scale(scale.device, inverse.device, m.device, squares.device, a.device,
                            wa.device, b.device, 2);
         };
         w.reference = [=, &m, &squares, &a, &wa, &b, &scale, &inverse] {
           reference::dora_scale(scale.data(), inverse.data(), m.data(), squares.data(), a.data(),
                                 wa.data(), b.data(), 2, out, in, rank);
         };
       }});
  t.push_back(
      {"dora_scales 2 of " + times({out, in, rank}), kSummed,
       4.0 * static_cast<double>(rank * (rank * in + out * (rank + 1))), [=](Workbench& w) {
         // The second is smaller and of half the rank, its A the first rows of the first's.
         const Index less = out / 2 + 1, half = (rank + 1) / 2;
         Array &m = w.input({out}, DType::f32, 0.2, 2),
               &squares = w.input({out}, DType::f32, 0.2, 4);
         Array &a = w.input({rank, in}, w.act(), 0.05), &wa = w.input({rank, out}, w.act(), 0.1);
         Array &b = w.input({out, rank}, w.act(), 0.1), &b2 = w.input({less, half}, w.act(), 0.1);
         Array& wa2 = w.input({half, less}, w.act(), 0.1);
         Array &scale = w.output("scale", {out}, DType::f32),
               &inverse = w.output("inverse_norm", {out}, DType::f32),
               &scale2 = w.output("scale of the second", {less}, DType::f32),
               &inverse2 = w.output("inverse_norm of the second", {less}, DType::f32);
         w.run = [=, &w, &m, &squares, &a, &wa, &b, &b2, &wa2, &scale, &inverse, &scale2,
                  &inverse2] {
           const auto front = [less](const Array& x) {
             return ConstTensor(x.device).col_range(0, less).reshaped({less});
           };
           const DoraScale both[] = {
               {scale.device, inverse.device, m.device, squares.device, a.device, wa.device,
                b.device, 2},
               {scale2.device, inverse2.device, front(m), front(squares),
                ConstTensor(a.device).row_range(0, half), wa2.device, b2.device, 0.5F}};
           w.ops.dora_scales(both);
         };
         w.reference = [=, &m, &squares, &a, &wa, &b, &b2, &wa2, &scale, &inverse, &scale2,
                        &inverse2] {
           reference::dora_scale(scale.data(), inverse.data(), m.data(), squares.data(), a.data(),
                                 wa.data(), b.data(), 2, out, in, rank);
           reference::dora_scale(scale2.data(), inverse2.data(), m.data(), squares.data(), a.data(),
                                 wa2.data(), b2.data(), 0.5, less, in, half);
         };
       }});
  t.push_back(
      {"dora_magnitudes_backward 9 of " + times({out}), kRounded, 18.0 * static_cast<double>(out),
       [=](Workbench& w) {
         std::vector<std::array<Array*, 3>> all;
         for (Index i = 0; i < 9; ++i) {  // the last smaller
           const Index own = i < 8 ? out : out / 2 + 1;
           all.push_back({&w.updated("d_m", {own}, DType::f32),
                          &w.updated("d_scale", {own}, DType::f32), &w.input({own}, DType::f32)});
         }
         w.run = [=, &w] {
           std::vector<DoraMagnitude> calls;
           for (const auto& [d_m, d_scale, inverse] : all)
             calls.push_back({d_m->device, d_scale->device, inverse->device});
           w.ops.dora_magnitudes_backward(calls);
         };
         w.reference = [=] {
           for (const auto& [d_m, d_scale, inverse] : all)
             reference::dora_magnitude_backward(d_m->data(), d_scale->data(), inverse->data(),
                                                static_cast<Index>(d_m->host.size()));
         };
       }});
  t.push_back({"scale_columns " + times({n, out}), kRounded, work, [=](Workbench& w) {
                 Array &core = w.input({n, out}, w.act()), &s = w.input({out}, DType::f32, 0.1, 1);
                 Array& y = w.output("y", {n, out}, w.act());
                 w.run = [&] { w.ops.scale_columns(y.device, core.device, s.device); };
                 w.reference = [=, &core, &s, &y] {
                   reference::scale_columns(y.data(), core.data(), s.data(), n, out);
                 };
               }});
  t.push_back({"scale_columns_backward " + times({n, out}), kSummed, 3 * work, [=](Workbench& w) {
                 Array &core = w.input({n, out}, w.act()), &s = w.input({out}, DType::f32, 0.1, 1),
                       &g = w.input({n, out}, w.act());
                 Array &d_core = w.output("d_core", {n, out}, w.act()),
                       &d_s = w.updated("d_scale", {out}, DType::f32);
                 w.run = [&] {
                   w.ops.scale_columns_backward(d_core.device, d_s.device, g.device, core.device,
                                                s.device);
                 };
                 w.reference = [=, &core, &s, &g, &d_core, &d_s] {
                   reference::scale_columns_backward(d_core.data(), d_s.data(), g.data(),
                                                     core.data(), s.data(), n, out);
                 };
               }});
}

}  // namespace

void add_row_cases(std::vector<OpCase>& t) {
  for (const auto& [n, d] : {std::pair<Index, Index>{1, 1}, {7, 33}, {257, 576}, {64, 4096}}) {
    norm_cases(t, n, d);
    mask_cases(t, n, d);
  }
  lora_a_cases(t, 37, 29, 5, 0.3F);
  lora_a_cases(t, 37, 96, 8, 0.1F);
  lora_a_cases(t, 70, 544, 48, 0.05F);
  lora_a_cases(t, 33, 576, 64, 0.05F, false);
  lora_a_cases(t, 65, 1536, 128, 0.1F);
  lora_a_cases(t, 300, 672, 256, 0.05F);
  lora_a_cases(t, 133, 96, 200, 0.1F);
  lora_a_cases(t, 3, 160, 72, 0.1F);
  lora_a_cases(t, 140, 160, 280, 0.05F, false);
  lora_a_cases(t, 21, 64, 16, 0);
  lora_a_cases(t, 256, 4096, 16, 0.05F);
  dora_cases(t, 5, 17, 13, 3);
  dora_cases(t, 6, 40, 72, 8);
  dora_cases(t, 128, 576, 1536, 16);
  dora_cases(t, 33, 1024, 4096, 80);
  dora_cases(t, 130, 136, 160, 128);
  dora_cases(t, 7, 72, 64, 48);
}

}  // namespace mixlora::cases
