// Rotary embedding and attention: packed sequences, shared prefixes, grouped heads.
#include <algorithm>
#include <cmath>

#include "kernels/cases/op_cases.h"
#include "kernels/reference/attention.h"
#include "kernels/reference/dora.h"

namespace mixlora::cases {
namespace {

using reference::Index;

struct Layout {
  std::string name;
  std::vector<std::int32_t> table;  // (S, 4)
  Heads heads;
  Index sequences() const { return static_cast<Index>(table.size()) / 4; }
  Index column(std::size_t c) const {
    Index top = 0;
    for (std::size_t i = c; i < table.size(); i += 4) top = std::max<Index>(top, table[i]);
    return top;
  }
  Index rows() const {
    Index end = 0;
    for (std::size_t i = 0; i < table.size(); i += 4)
      end = std::max<Index>(end, table[i] + table[i + 1]);
    return end;
  }
  Index width() const { return (heads.heads + 2 * heads.kv_heads) * heads.head_dim; }
  Sequences on(const Array& a) const { return {a.device, sequences(), column(1), column(3)}; }
  double pairs() const {  // (query, key) pairs a head
    double sum = 0;
    for (std::size_t i = 0; i < table.size(); i += 4)
      sum += table[i + 1] * (table[i + 3] + 0.5 * (table[i + 1] + 1));
    return sum * static_cast<double>(heads.heads);
  }
};

/// cos and sin of D/2 angles for n positions.
std::vector<double> angles_of(Index n, Index d) {
  std::vector<double> angles;
  for (Index p = 0; p < n; ++p)
    for (Index j = 0; j < d; ++j) {
      const double a =
          static_cast<double>(p) *
          std::pow(1e4, -2.0 * static_cast<double>(j % (d / 2)) / static_cast<double>(d));
      angles.push_back(j < d / 2 ? std::cos(a) : std::sin(a));
    }
  return angles;
}

void attention_cases(std::vector<OpCase>& t, const Layout& l) {
  const Index n = l.rows(), h = l.heads.heads, d = l.heads.head_dim;
  const double work = l.pairs() * static_cast<double>(d);
  t.push_back(
      {"attention " + l.name, kChained, 4 * work, [=](Workbench& w) {
         Array &qkv = w.input({n, l.width()}, w.act()),
               &table = w.integers({l.sequences(), 4}, l.table);
         Array &o = w.output("o", {n, h * d}, w.act()), &lse = w.output("lse", {n, h}, DType::f32);
         // A score is a sum of d terms of spread 1 / sqrt(d), which may cancel.
         lse.least = std::sqrt(static_cast<double>(n * h));
         w.run = [=, &w, &qkv, &table, &o, &lse] {
           w.ops.attention(o.device, lse.device, qkv.device, l.on(table), l.heads);
         };
         w.reference = [=, &qkv, &o, &lse] {
           reference::attention(o.data(), lse.data(), qkv.data(), l.table.data(), l.sequences(),
                                l.heads);
         };
       }});
  for (const bool turned : {false, true})
    for (const bool scaled : {false, true}) {
      if (scaled && !turned) continue;
      t.push_back(
          {(turned ? "attention_rope_backward " : "attention_backward ") + l.name +
               (scaled ? " scaled" : ""),
           kChained, 10 * work, [=](Workbench& w) {
             Array &qkv = w.input({n, l.width()}, w.act()),
                   &table = w.integers({l.sequences(), 4}, l.table);
             Array& g = w.input({n, h * d}, w.act());
             std::vector<double> o_true(static_cast<std::size_t>(n * h * d)),
                 lse_true(static_cast<std::size_t>(n * h));
             reference::attention(o_true.data(), lse_true.data(), qkv.data(), l.table.data(),
                                  l.sequences(), l.heads);
             Array &o = w.numbers({n, h * d}, w.act(), o_true),
                   &lse = w.numbers({n, h}, DType::f32, lse_true);
             Array &angles = w.numbers({n, d}, DType::f32, angles_of(n, d)), &ids = w.row_ids(n);
             Array& d_qkv = w.output("d_qkv", {n, l.width()}, w.act());
             Array& dots = w.output("row_dots", {n}, DType::f32);
             dots.compared = false;  // unless they are left
             Array *scale = nullptr, *d_scale = nullptr;
             if (scaled) {
               scale = &w.input({l.width()}, DType::f32, 0.1, 1);
               d_scale = &w.updated("d_scale", {l.width()}, DType::f32);
             }
             w.run = [=, &w, &qkv, &table, &g, &o, &lse, &angles, &ids, &d_qkv, &dots] {
               QkvScale by;
               if (scaled) by = {scale->device, d_scale->device};
               if (turned)
                 dots.compared = w.ops.attention_rope_backward(
                     d_qkv.device, dots.device, g.device, qkv.device, o.device, lse.device,
                     l.on(table), angles.device, ids.device, l.heads, by);
               else
                 w.ops.attention_backward(d_qkv.device, g.device, qkv.device, o.device, lse.device,
                                          l.on(table), l.heads);
             };
             w.reference = [=, &qkv, &g, &o, &lse, &angles, &ids, &d_qkv, &dots] {
               reference::attention_backward(d_qkv.data(), g.data(), qkv.data(), o.data(),
                                             lse.data(), l.table.data(), l.sequences(), l.heads, n);
               reference::row_dots(dots.data(), qkv.data(), d_qkv.data(), l.heads, n);
               if (turned)
                 reference::rope(d_qkv.data(), d_qkv.data(), angles.data(), ids.index(), l.heads,
                                 true, n);
               if (scaled)
                 reference::scale_rope_backward(d_qkv.data(), d_scale->data(), d_qkv.data(),
                                                qkv.data(), scale->data(), angles.data(),
                                                ids.index(), l.heads, n);
             };
           }});
    }
}

OpCase rope(const Layout& l, bool inverse) {
  const Index n = l.rows(), d = l.heads.head_dim;
  return {"rope " + l.name + (inverse ? " inverse" : ""), kRounded,
          6.0 * static_cast<double>(n * l.width()) / 2, [=](Workbench& w) {
            Array &x = w.input({n, l.width()}, w.act()),
                  &table = w.numbers({n, d}, DType::f32, angles_of(n, d));
            Array &ids = w.row_ids(n), &y = w.output("y", {n, l.width()}, w.act());
            w.run = [=, &w, &x, &table, &ids, &y] {
              w.ops.rope(y.device, x.device, table.device, ids.device, l.heads, inverse);
            };
            w.reference = [=, &x, &table, &ids, &y] {
              reference::rope(y.data(), x.data(), table.data(), ids.index(), l.heads, inverse, n);
            };
          }};
}

OpCase scale_rope_backward(const Layout& l) {
  const Index n = l.rows(), d = l.heads.head_dim;
  return {"scale_rope_backward " + l.name, kSummed, 9.0 * static_cast<double>(n * l.width()) / 2,
          [=](Workbench& w) {
            Array &y = w.input({n, l.width()}, w.act()), &g = w.input({n, l.width()}, w.act()),
                  &scale = w.input({l.width()}, DType::f32, 0.1, 1),
                  &table = w.numbers({n, d}, DType::f32, angles_of(n, d)), &ids = w.row_ids(n);
            Array &d_core = w.output("d_core", {n, l.width()}, w.act()),
                  &d_scale = w.updated("d_scale", {l.width()}, DType::f32);
            w.run = [=, &w, &y, &g, &scale, &table, &ids, &d_core, &d_scale] {
              w.ops.scale_rope_backward(d_core.device, d_scale.device, g.device, y.device,
                                        scale.device, table.device, ids.device, l.heads);
            };
            w.reference = [=, &y, &g, &scale, &table, &ids, &d_core, &d_scale] {
              reference::scale_rope_backward(d_core.data(), d_scale.data(), g.data(), y.data(),
                                             scale.data(), table.data(), ids.index(), l.heads, n);
            };
          }};
}

}  // namespace

void add_attention_cases(std::vector<OpCase>& t) {
  const std::vector<Layout> layouts = {
      {"one row", {0, 1, 0, 0}, {1, 1, 64}},
      {"few rows 2:1x128", {0, 11, 0, 0, 11, 4, 0, 5, 15, 1, 0, 0}, {2, 1, 128}},
      {"2 of 16 3:3x64", {0, 16, 0, 0, 16, 9, 0, 0}, {3, 3, 64}},
      {"up to 32 2:2x128", {0, 32, 0, 0, 32, 31, 0, 0}, {2, 2, 128}},
      {"3 sequences 9:3x64", {0, 37, 0, 0, 37, 1, 0, 0, 38, 65, 0, 0}, {9, 3, 64}},
      {"4 choices of a prefix 9:3x64",
       {0, 70, 0, 0, 70, 3, 0, 70, 73, 17, 0, 70, 90, 1, 0, 33},
       {9, 3, 64}},
      {"2x128 9:3x64 (SmolLM2)", {0, 128, 0, 0, 128, 128, 0, 0}, {9, 3, 64}},
      // Two and three tiles of 128 and one, the last half or hardly full, none a prefix.
      {"300, 170, 1, 128 and 257 4:2x128",
       {0, 300, 0, 0, 300, 170, 0, 0, 470, 1, 0, 0, 471, 128, 0, 0, 599, 257, 0, 0},
       {4, 2, 128}},
      {"2x96 4:4x128 (Llama)", {0, 96, 0, 0, 96, 96, 0, 0}, {4, 4, 128}},
      // More than two tiles of 128 queries or of a prefix's keys, none whole at its end.
      {"300 and a choice of 150 of them 4:2x128", {0, 300, 0, 0, 300, 40, 0, 150}, {4, 2, 128}}};
  for (const Layout& l : layouts) {
    t.push_back(rope(l, false));
    t.push_back(rope(l, true));
    t.push_back(scale_rope_backward(l));
    attention_cases(t, l);
  }
}

}  // namespace mixlora::cases
