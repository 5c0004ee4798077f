// Rows' dots: what attention and the mixture leave for the norms before them is what these would
// make of their own rows, over a whole model.
#include <algorithm>
#include <cmath>
#include <iostream>

#include "engine/model.h"
#include "engine/train.h"
#include "kernels/timed_backend.h"
#include "tests/support/catch.h"
#include "tests/support/device.h"
#include "tests/support/random_items.h"

using namespace mixlora;

namespace {

/// Passes all on; of each norm's call that is given dots it makes them anew.
class Witness final : public TimedBackend {
 public:
  using TimedBackend::TimedBackend;
  int given = 0, missing = 0, routed = 0;
  double difference = 0, terms = 0;  // squares

  void lora_a_rmsnorm_backward(Tensor d_weight, Tensor d_x, Tensor d_y, ConstTensor d_a,
                               ConstTensor weight, ConstTensor a, float s, const Dropout& d,
                               RowIds ids, ConstTensor x, ConstTensor w, ConstTensor r,
                               ConstTensor row_dots, Tensor y, Tensor room) override {
    if (row_dots) {
      rmsnorm_again(y, x, w, r);
      const Own all = copy_of(d_y), unused = zeros(weight.shape);
      lora_a_backward(unused.view, all.view, d_a, y, weight, d, ids, room);
      compare(numbers(row_dots), y, all.view);
    }
    ++(row_dots ? given : missing);
    TimedBackend::lora_a_rmsnorm_backward(d_weight, d_x, d_y, d_a, weight, a, s, d, ids, x, w, r,
                                          row_dots, y, room);
  }
  void lora_a_router_rmsnorm_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, Tensor d_y,
                                      ConstTensor d_a, ConstTensor d_logits, ConstTensor weight,
                                      ConstTensor wg, const Dropout& d, RowIds ids, ConstTensor x,
                                      ConstTensor w, ConstTensor r, ConstTensor row_dots,
                                      ConstTensor logits, Tensor y, Tensor room) override {
    if (row_dots) {
      rmsnorm_again(y, x, w, r);
      const Own all = copy_of(d_y), unused = zeros(weight.shape), unused_router = zeros(wg.shape);
      lora_a_router_backward(unused.view, unused_router.view, all.view, d_a, d_logits, y, weight,
                             wg, d, ids, room);
      auto dots = numbers(row_dots);
      const auto scores = numbers(logits), slopes = numbers(d_logits);
      for (std::size_t i = 0; i < scores.size(); ++i)
        dots[i * dots.size() / scores.size()] += scores[i] * slopes[i];
      compare(dots, y, all.view);
    }
    routed += row_dots ? 1 : 0;
    ++(row_dots ? given : missing);
    TimedBackend::lora_a_router_rmsnorm_backward(d_weight, d_wg, d_x, d_y, d_a, d_logits, weight,
                                                 wg, d, ids, x, w, r, row_dots, logits, y, room);
  }

 private:
  struct Own {
    std::unique_ptr<Memory> memory;
    Tensor view;
  };
  Own take(const Shape& shape, DType type) {
    Own own{allocate(static_cast<std::size_t>(shape.numel()) * size_of(type)), {}};
    own.view = Tensor{own.memory->data(), shape, type, device()};
    return own;
  }
  Own zeros(const Shape& shape) { return take(shape, DType::f32); }
  Own copy_of(ConstTensor t) {
    Own own = take({t.rows(), t.cols()}, t.dtype);
    copy(own.view, t);
    return own;
  }
  std::vector<double> numbers(ConstTensor t) {
    const Own wide = take({t.rows(), t.cols()}, DType::f32);
    copy(wide.view, t);
    std::vector<float> got(static_cast<std::size_t>(t.numel()));
    download(got.data(), wide.view);
    return {got.begin(), got.end()};
  }
  void compare(const std::vector<double>& dots, ConstTensor y, ConstTensor d_y) {
    const auto from = numbers(y), slope = numbers(d_y);
    const std::size_t cols = from.size() / dots.size();
    for (std::size_t row = 0; row < dots.size(); ++row) {
      double sum = 0;
      for (std::size_t i = row * cols; i < (row + 1) * cols; ++i) {
        const double term = from[i] * slope[i];
        sum += term;
        terms += term * term;
      }
      difference += (dots[row] - sum) * (dots[row] - sum);
    }
  }
};

/// Heads of 128, widths by 256: what the kernels that leave dots take.
ModelConfig shape() {
  ModelConfig c;
  c.hidden = 256;
  c.layers = 2;
  c.ffn = 512;
  c.vocab = 96;
  c.heads = 2;
  c.kv_heads = 1;
  c.head_dim = 128;
  c.max_positions = 128;
  c.tied_embeddings = false;
  return c;
}

TrainJob dots_job(Method method) {
  TrainJob j;
  j.adapter.method = method;
  j.adapter.r = 16;
  j.adapter.num_experts = 4;
  j.train.lr = 2e-2;        // so that B, 0 at first, has its part
  j.train.batch_size = 24;  // some 1,200 rows: mixtures leave dots from 1,024 on
  j.train.max_steps = 4;
  j.train.num_epochs = 4;
  j.items = random_items(24, shape().vocab);
  return j;
}

}  // namespace

TEST_CASE("a norm is given the dots of its own rows", "[engine][cuda]") {
  if (no_cuda()) return;
  const std::vector<std::pair<const char*, std::vector<Method>>> trainings{
      {"lora", {Method::lora}},
      {"dora", {Method::dora}},
      {"mixlora", {Method::mixlora}},
      {"mixdora", {Method::mixdora}},
      {"dora and mixlora in one step", {Method::dora, Method::mixlora}}};
  for (const auto& [name, methods] : trainings) {
    Witness ops(make_cuda_backend(Precision::bf16));
    const auto model = Model::random_weights(ops, shape());
    std::vector<TrainJob> jobs;
    for (const Method m : methods) jobs.push_back(dots_job(m));
    TrainOptions options;
    std::vector<double> losses[2];
    for (auto& own : losses) {
      TrainObserver observer;
      observer.on_step = [&](const StepRecord& r) { own.push_back(r.loss + r.aux_loss); };
      (void)train(ops, *model, jobs, options, observer);
    }
    CHECK(losses[0].size() == 4 * methods.size());
    CHECK(losses[0] == losses[1]);  // the same bits twice
    const double error = std::sqrt(ops.difference / ops.terms);
    std::cout << name << ": dots of " << ops.given << " norms within " << error << " of "
              << "their terms, " << ops.missing << " made by the norm\n";
    INFO(name);
    CHECK(ops.given > 0);
    // Of cards with the kernel that leaves a mixture's (mixture_pairs.cu).
    if (name[0] == 'm' && ops.description().find("sm_90") != std::string::npos)
      CHECK(ops.routed > 0);
    // Either side sums numbers rounded to bf16, 2^-9 each, some of them behind one another.
    CHECK(error < 1.2e-2);
  }
}
