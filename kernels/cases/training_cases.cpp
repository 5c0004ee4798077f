// Losses, sums and optimizers.
#include "kernels/cases/op_cases.h"
#include "kernels/reference/loss.h"
#include "kernels/reference/optimizer.h"

namespace mixlora::cases {
namespace {

using reference::Index;

void loss_cases(std::vector<OpCase>& t, Index m, Index v) {
  const double work = static_cast<double>(m * v);
  const auto targets = [=](Workbench& w) {
    std::vector<std::int32_t> at;
    for (Index i = 0; i < m; ++i) at.push_back(w.below(v));
    return at;
  };
  t.push_back({"cross_entropy " + times({m, v}), kSummed, 5 * work, [=](Workbench& w) {
                 Array &logits = w.updated("d_logits", {m, v}, w.act(), 2),
                       &target = w.integers({m}, targets(w));
                 Array &weight = w.input({m}, DType::f32, 0.1, 1),
                       &loss = w.output("loss", {m}, DType::f32);
                 w.run = [&] {
                   w.ops.cross_entropy(loss.device, logits.device, target.device, weight.device);
                 };
                 w.reference = [=, &logits, &target, &weight, &loss] {
                   reference::cross_entropy(loss.data(), logits.data(), target.index(),
                                            weight.data(), m, v);
                 };
               }});
  t.push_back(
      {"log_prob " + times({m, v}), kSummed, 3 * work, [=](Workbench& w) {
         Array& logits = w.input({m, v}, w.act(), 2);
         std::vector<std::int32_t> at = targets(w);
         for (Index i = 0; i < m; i += 2)  // every other target is the greedy one
           at[static_cast<std::size_t>(i)] =
               static_cast<std::int32_t>(reference::arg_max(logits.data() + i * v, v));
         Array &target = w.integers({m}, at), &p = w.output("log_prob", {m}, DType::f32),
               &greedy = w.output("greedy", {m}, DType::f32);
         w.run = [&] { w.ops.log_prob(p.device, greedy.device, logits.device, target.device); };
         w.reference = [=, &logits, &target, &p, &greedy] {
           reference::log_prob(p.data(), greedy.data(), logits.data(), target.index(), m, v);
         };
       }});
}

void sum_cases(std::vector<OpCase>& t, Index n) {
  for (const bool accumulate : {false, true})
    t.push_back({"sum_squares " + times({n}) + (accumulate ? " adds" : ""), kSummed,
                 2.0 * static_cast<double>(n), [=](Workbench& w) {
                   Array& x = w.input({n}, DType::f32);
                   Array& y = accumulate ? w.updated("out", {1}, DType::f32)
                                         : w.output("out", {1}, DType::f32);
                   w.run = [=, &w, &x, &y] { w.ops.sum_squares(y.device, x.device, accumulate); };
                   w.reference = [=, &x, &y] {
                     y.host[0] = (accumulate ? y.host[0] : 0) + reference::sum_squares(x.data(), n);
                   };
                 }});
  t.push_back({"sum " + times({n}), kSummed, static_cast<double>(n), [=](Workbench& w) {
                 Array &x = w.input({n}, DType::f32, 1, 1), &y = w.output("out", {1}, DType::f32);
                 w.run = [&] { w.ops.sum(y.device, x.device); };
                 w.reference = [=, &x, &y] { y.host[0] = reference::sum(x.data(), n); };
               }});
}

OpCase adamw(Index n, double max_norm) {
  return {
      "adamw " + times({n}) + (max_norm > 0 ? " clipped" : ""), kRounded,
      14.0 * static_cast<double>(n), [=](Workbench& w) {
        Array &x = w.updated("w", {n}, DType::f32), &g = w.input({n}, DType::f32),
              &m = w.updated("m", {n}, DType::f32, 0.1);
        std::vector<double> squares(static_cast<std::size_t>(n));
        for (double& s : squares) s = 1e-6 * (1 + w.below(1000));
        Array &v = w.numbers({n}, DType::f32, squares), &norm = w.numbers({1}, DType::f32, {9});
        w.compare(v, "v");
        Array& numbers =
            w.numbers({8}, DType::f32, {1e-3, 0.01, 0.9, 0.999, 1e-8, 0.271, 0.002997, max_norm});
        const bool copies = w.act() != DType::f32;
        Array* compute = copies ? &w.output("compute", {n}, w.act()) : nullptr;
        w.run = [=, &w, &x, &g, &m, &v, &norm, &numbers] {
          w.ops.adamw(x.device, compute ? compute->device : Tensor(), g.device, m.device, v.device,
                      numbers.device, norm.device);
        };
        w.reference = [=, &x, &g, &m, &v, &norm, &numbers] {
          reference::adamw(x.data(), g.data(), m.data(), v.data(), numbers.data(), norm.host[0], n);
          if (compute) compute->host = x.host;
        };
      }};
}

OpCase sgd(Index n, bool momentum) {
  return {"sgd " + times({n}) + (momentum ? " with momentum" : ""), kRounded,
          5.0 * static_cast<double>(n), [=](Workbench& w) {
            Array &x = w.updated("w", {n}, DType::f32), &g = w.input({n}, DType::f32);
            Array* v = momentum ? &w.updated("v", {n}, DType::f32) : nullptr;
            Array &norm = w.numbers({1}, DType::f32, {4}),
                  &numbers = w.numbers({8}, DType::f32, {0.01, 0.1, 0.9, 0, 0, 0, 0, 1});
            Array* compute = w.act() != DType::f32 ? &w.output("compute", {n}, w.act()) : nullptr;
            w.run = [=, &w, &x, &g, &norm, &numbers] {
              w.ops.sgd(x.device, compute ? compute->device : Tensor(), g.device,
                        v ? v->device : Tensor(), numbers.device, norm.device);
            };
            w.reference = [=, &x, &g, &norm, &numbers] {
              reference::sgd(x.data(), g.data(), v ? v->data() : nullptr, numbers.data(),
                             norm.host[0], n);
              if (compute) compute->host = x.host;
            };
          }};
}

}  // namespace

void add_training_cases(std::vector<OpCase>& t) {
  loss_cases(t, 3, 17);
  loss_cases(t, 32, 49152);
  loss_cases(t, 17, 32000);
  for (const Index n : {1, 1000, 300001}) {
    sum_cases(t, n);
    t.push_back(adamw(n, 0));
    t.push_back(adamw(n, 1));
    t.push_back(sgd(n, false));
    t.push_back(sgd(n, true));
  }
}

}  // namespace mixlora::cases
