// TimedBackend: another backend's operations, each in its family's range, and timed when asked:
// where a step's time goes.
#pragma once
#include <array>
#include <chrono>
#include <memory>
#include <vector>

#include "kernels/backend.h"

namespace mixlora {

/// Kinds of operations that one thinks of together. `loss` is also every call inside the range
/// "loss": the rows' gathering, the products with lm_head, the cross-entropy.
enum class Family : std::uint8_t {
  products,  // with frozen matrices
  factors,   // with the adapters' small ones
  attention,
  norms,
  mixture,
  router,
  dora,
  dropout,
  loss,
  optimizer,
  copies
};
/// The part of a step: its innermost range of these names.
enum class Phase : std::uint8_t { forward, loss, backward, recompute, optimizer, other };
constexpr std::size_t kFamilies = 11, kPhases = 6;
const char* name_of(Family f);
const char* name_of(Phase p);

/// One call of a step.
struct TimedCall {
  const char* op;
  Family family;
  Phase phase;
  std::int64_t layer;  // -1 outside the layers
  double seconds;      // of the device, from the mark before the call to the one behind it
  double host;         // of the host inside the call: seconds until it may go on
};
struct TimedStep {
  std::vector<TimedCall> calls;
  double seconds = 0;  // of the device, first mark to last; what no call has is time between calls
  double wall = 0;     // of the host
};

/// Passes every call on to `inner`. While it measures, a mark stands before and behind each call of
/// a step (range "step"); nothing waits before the step ends. Marks cost a device a microsecond or
/// so each: compare with the wall time of steps without them.
class TimedBackend : public Backend {
 public:
  explicit TimedBackend(std::unique_ptr<Backend> inner)
      : inner_owner_(std::move(inner)), inner_(*inner_owner_), marks_(inner_.time_marks()) {}
  /// Whether steps that begin from now on are timed.
  void measure(bool on) { measuring_ = on; }
  const std::vector<TimedStep>& steps() const { return steps_; }

  void enter(const char* range, std::int64_t index) override;
  void leave() override;
  std::unique_ptr<TimeMarks> time_marks() override { return inner_.time_marks(); }
  void profiler_window(bool open) override { inner_.profiler_window(open); }

  Device device() const override { return inner_.device(); }
  DType activation_type() const override { return inner_.activation_type(); }
  std::string description() const override { return inner_.description(); }
  std::unique_ptr<Memory> allocate(std::size_t bytes) override { return inner_.allocate(bytes); }
  void synchronize() override { inner_.synchronize(); }
  std::size_t allocated_bytes() const override { return inner_.allocated_bytes(); }
  std::size_t peak_bytes() const override { return inner_.peak_bytes(); }
  std::size_t device_bytes() const override { return inner_.device_bytes(); }
  std::size_t workspace_bytes() const override { return inner_.workspace_bytes(); }
  std::size_t matrix_bytes(std::int64_t out, std::int64_t in) const override {
    return inner_.matrix_bytes(out, in);
  }
  DType matrix_type() const override { return inner_.matrix_type(); }
  Tensor matrix_rows(const FrozenMatrix& w) const override { return inner_.matrix_rows(w); }

  void upload(Tensor dst, const void* src) override {
    timed(Family::copies, "upload", [&] { inner_.upload(dst, src); });
  }
  void download(void* dst, ConstTensor src) override {
    timed(Family::copies, "download", [&] { inner_.download(dst, src); });
  }
  void zero(Tensor x) override {
    timed(Family::copies, "zero", [&] { inner_.zero(x); });
  }
  void copy(Tensor dst, ConstTensor src) override {
    timed(Family::copies, "copy", [&] { inner_.copy(dst, src); });
  }
  void pack_matrix(FrozenMatrix& w) override {
    timed(Family::copies, "pack_matrix", [&] { inner_.pack_matrix(w); });
  }
  void linear(Tensor y, ConstTensor x, const FrozenMatrix& w) override {
    timed(Family::products, "linear", [&] { inner_.linear(y, x, w); });
  }
  void linear_backward(Tensor d_x, ConstTensor d_y, const FrozenMatrix& w,
                       bool accumulate) override {
    timed(Family::products, "linear_backward",
          [&] { inner_.linear_backward(d_x, d_y, w, accumulate); });
  }
  void row_norms_squared(Tensor norms, const FrozenMatrix& w) override {
    timed(Family::products, "row_norms_squared", [&] { inner_.row_norms_squared(norms, w); });
  }
  void gemm(Tensor c, ConstTensor a, bool transpose_a, ConstTensor b, bool transpose_b, float alpha,
            float beta) override {
    timed(Family::factors, "gemm",
          [&] { inner_.gemm(c, a, transpose_a, b, transpose_b, alpha, beta); });
  }
  void embedding(Tensor y, ConstTensor table, ConstTensor tokens) override {
    timed(Family::copies, "embedding", [&] { inner_.embedding(y, table, tokens); });
  }
  void gather_rows(Tensor y, ConstTensor x, ConstTensor index) override {
    timed(Family::copies, "gather_rows", [&] { inner_.gather_rows(y, x, index); });
  }
  void scatter_add_rows(Tensor x, ConstTensor y, ConstTensor index) override {
    timed(Family::copies, "scatter_add_rows", [&] { inner_.scatter_add_rows(x, y, index); });
  }
  void add(Tensor y, ConstTensor x) override {
    timed(Family::copies, "add", [&] { inner_.add(y, x); });
  }
  void rmsnorm(Tensor y, Tensor r, ConstTensor x, ConstTensor w, float eps) override {
    timed(Family::norms, "rmsnorm", [&] { inner_.rmsnorm(y, r, x, w, eps); });
  }
  void rmsnorm_backward(Tensor d_x, ConstTensor d_y, ConstTensor x, ConstTensor w,
                        ConstTensor r) override {
    timed(Family::norms, "rmsnorm_backward", [&] { inner_.rmsnorm_backward(d_x, d_y, x, w, r); });
  }
  void rmsnorm_again(Tensor y, ConstTensor x, ConstTensor w, ConstTensor r) override {
    timed(Family::norms, "rmsnorm_again", [&] { inner_.rmsnorm_again(y, x, w, r); });
  }
  void lora_a_rmsnorm_backward(Tensor d_weight, Tensor d_x, Tensor d_y, ConstTensor d_a,
                               ConstTensor weight, ConstTensor a, float s, const Dropout& d,
                               RowIds ids, ConstTensor x, ConstTensor w, ConstTensor r,
                               ConstTensor row_dots, Tensor y, Tensor room) override {
    timed(Family::factors, "lora_a_rmsnorm_backward", [&] {
      inner_.lora_a_rmsnorm_backward(d_weight, d_x, d_y, d_a, weight, a, s, d, ids, x, w, r,
                                     row_dots, y, room);
    });
  }
  void add_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, ConstTensor delta, ConstTensor w,
                   float eps) override {
    timed(Family::norms, "add_rmsnorm", [&] { inner_.add_rmsnorm(sum, y, r, x, delta, w, eps); });
  }
  void dropout(Tensor y, ConstTensor x, const Dropout& d, RowIds ids) override {
    timed(Family::dropout, "dropout", [&] { inner_.dropout(y, x, d, ids); });
  }
  void dropout_backward_add(Tensor d_x, ConstTensor d_y, const Dropout& d, RowIds ids) override {
    timed(Family::dropout, "dropout_backward_add",
          [&] { inner_.dropout_backward_add(d_x, d_y, d, ids); });
  }
  void lora_a(Tensor a, ConstTensor x, ConstTensor weight, float s, const Dropout& d, RowIds ids,
              Tensor room) override {
    timed(Family::factors, "lora_a", [&] { inner_.lora_a(a, x, weight, s, d, ids, room); });
  }
  void lora_a_backward(Tensor d_weight, Tensor d_x, ConstTensor d_a, ConstTensor x,
                       ConstTensor weight, const Dropout& d, RowIds ids, Tensor room) override {
    timed(Family::factors, "lora_a_backward",
          [&] { inner_.lora_a_backward(d_weight, d_x, d_a, x, weight, d, ids, room); });
  }
  void lora_a_router_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, ConstTensor d_a,
                              ConstTensor d_logits, ConstTensor x, ConstTensor weight,
                              ConstTensor wg, const Dropout& d, RowIds ids, Tensor room) override {
    timed(Family::factors, "lora_a_router_backward", [&] {
      inner_.lora_a_router_backward(d_weight, d_wg, d_x, d_a, d_logits, x, weight, wg, d, ids,
                                    room);
    });
  }
  void lora_a_router(Tensor a, Tensor logits, ConstTensor x, ConstTensor weight, ConstTensor wg,
                     float s, const Dropout& d, RowIds ids, Tensor room) override {
    timed(Family::factors, "lora_a_router",
          [&] { inner_.lora_a_router(a, logits, x, weight, wg, s, d, ids, room); });
  }
  void lora_a_router_rmsnorm_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, Tensor d_y,
                                      ConstTensor d_a, ConstTensor d_logits, ConstTensor weight,
                                      ConstTensor wg, const Dropout& d, RowIds ids, ConstTensor x,
                                      ConstTensor w, ConstTensor r, ConstTensor row_dots,
                                      ConstTensor logits, Tensor y, Tensor room) override {
    timed(Family::factors, "lora_a_router_rmsnorm_backward", [&] {
      inner_.lora_a_router_rmsnorm_backward(d_weight, d_wg, d_x, d_y, d_a, d_logits, weight, wg, d,
                                            ids, x, w, r, row_dots, logits, y, room);
    });
  }
  void lora_b_backward(std::span<const LowRankBackward> all, float s) override {
    timed(Family::factors, "lora_b_backward", [&] { inner_.lora_b_backward(all, s); });
  }
  void add_lora_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                        const LowRank& update, ConstTensor w, float eps) override {
    timed(Family::norms, "add_lora_rmsnorm",
          [&] { inner_.add_lora_rmsnorm(sum, y, r, x, delta, update, w, eps); });
  }
  void lora_rope(Tensor y, const std::array<LowRank, 3>& updates, ConstTensor table, RowIds ids,
                 Heads heads) override {
    timed(Family::attention, "lora_rope", [&] { inner_.lora_rope(y, updates, table, ids, heads); });
  }
  void jitter(Tensor y, ConstTensor x, float amount, std::uint64_t seed, std::int32_t layer,
              RowIds ids) override {
    timed(Family::router, "jitter", [&] { inner_.jitter(y, x, amount, seed, layer, ids); });
  }
  void dora_scale(Tensor scale, Tensor inverse_norm, ConstTensor m, ConstTensor w_squared,
                  ConstTensor a, ConstTensor wa, ConstTensor b, float s) override {
    timed(Family::dora, "dora_scale",
          [&] { inner_.dora_scale(scale, inverse_norm, m, w_squared, a, wa, b, s); });
  }
  void dora_scales(std::span<const DoraScale> all) override {
    timed(Family::dora, "dora_scales", [&] { inner_.dora_scales(all); });
  }
  void dora_magnitudes_backward(std::span<const DoraMagnitude> all) override {
    timed(Family::dora, "dora_magnitudes_backward", [&] { inner_.dora_magnitudes_backward(all); });
  }
  void scale_columns(Tensor y, ConstTensor core, ConstTensor scale) override {
    timed(Family::dora, "scale_columns", [&] { inner_.scale_columns(y, core, scale); });
  }
  void scale_columns_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y, ConstTensor core,
                              ConstTensor scale) override {
    timed(Family::dora, "scale_columns_backward",
          [&] { inner_.scale_columns_backward(d_core, d_scale, d_y, core, scale); });
  }
  void rope(Tensor y, ConstTensor x, ConstTensor table, RowIds ids, Heads heads,
            bool inverse) override {
    timed(Family::attention, "rope", [&] { inner_.rope(y, x, table, ids, heads, inverse); });
  }
  void scale_rope_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y, ConstTensor y,
                           ConstTensor scale, ConstTensor table, RowIds ids, Heads heads) override {
    timed(Family::dora, "scale_rope_backward",
          [&] { inner_.scale_rope_backward(d_core, d_scale, d_y, y, scale, table, ids, heads); });
  }
  void attention(Tensor o, Tensor lse, ConstTensor qkv, const Sequences& s, Heads heads) override {
    timed(Family::attention, "attention", [&] { inner_.attention(o, lse, qkv, s, heads); });
  }
  void attention_backward(Tensor d_qkv, ConstTensor d_o, ConstTensor qkv, ConstTensor o,
                          ConstTensor lse, const Sequences& s, Heads heads) override {
    timed(Family::attention, "attention_backward",
          [&] { inner_.attention_backward(d_qkv, d_o, qkv, o, lse, s, heads); });
  }
  bool attention_rope_backward(Tensor d_qkv, Tensor row_dots, ConstTensor d_o, ConstTensor qkv,
                               ConstTensor o, ConstTensor lse, const Sequences& s,
                               ConstTensor table, RowIds ids, Heads heads,
                               const QkvScale& scale) override {
    bool left = false;
    timed(Family::attention, "attention_rope_backward", [&] {
      left = inner_.attention_rope_backward(d_qkv, row_dots, d_o, qkv, o, lse, s, table, ids, heads,
                                            scale);
    });
    return left;
  }
  void router_logits(Tensor logits, ConstTensor x, ConstTensor wg) override {
    timed(Family::router, "router_logits", [&] { inner_.router_logits(logits, x, wg); });
  }
  void route(Slots& slots, Tensor probabilities, Tensor stats, ConstTensor logits,
             const Router& router, const Sequences& s) override {
    timed(Family::router, "route",
          [&] { inner_.route(slots, probabilities, stats, logits, router, s); });
  }
  void balance_loss(Tensor loss, Tensor fraction, ConstTensor stats, std::int64_t rows, float coef,
                    float z_coef, bool per_layer) override {
    timed(Family::router, "balance_loss",
          [&] { inner_.balance_loss(loss, fraction, stats, rows, coef, z_coef, per_layer); });
  }
  void route_backward(Tensor d_logits, ConstTensor d_weight, const Slots& slots,
                      ConstTensor probabilities, ConstTensor logits, ConstTensor fraction,
                      const Router& router, float coef, float z_coef, std::int64_t layers,
                      float factor) override {
    timed(Family::router, "route_backward", [&] {
      inner_.route_backward(d_logits, d_weight, slots, probabilities, logits, fraction, router,
                            coef, z_coef, layers, factor);
    });
  }
  void router_backward(Tensor d_wg, Tensor d_x, ConstTensor d_logits, ConstTensor x,
                       ConstTensor wg) override {
    timed(Family::router, "router_backward",
          [&] { inner_.router_backward(d_wg, d_x, d_logits, x, wg); });
  }
  void mixture(Tensor out, Tensor z, const Mixture& m) override {
    timed(Family::mixture, "mixture", [&] { inner_.mixture(out, z, m); });
  }
  bool mixture_backward(Tensor d_gate_up, Tensor d_weight, Tensor p, Tensor row_dots,
                        const MixtureGrads& grads, ConstTensor d_out, ConstTensor q, ConstTensor z,
                        const Mixture& m) override {
    bool left = false;
    timed(Family::mixture, "mixture_backward", [&] {
      left = inner_.mixture_backward(d_gate_up, d_weight, p, row_dots, grads, d_out, q, z, m);
    });
    return left;
  }
  void slots_to_columns(Tensor columns, ConstTensor z, const Slots& slots, bool per_slot) override {
    timed(Family::mixture, "slots_to_columns",
          [&] { inner_.slots_to_columns(columns, z, slots, per_slot); });
  }
  void add_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta, ConstTensor z,
                         ConstTensor b, const Slots& slots, ConstTensor w, float eps,
                         Tensor room) override {
    timed(Family::norms, "add_slots_rmsnorm",
          [&] { inner_.add_slots_rmsnorm(sum, y, r, x, delta, z, b, slots, w, eps, room); });
  }
  void combine_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                             Tensor core, ConstTensor z, ConstTensor b, ConstTensor scale,
                             const Slots& slots, ConstTensor w, float eps, Tensor room) override {
    timed(Family::norms, "combine_slots_rmsnorm", [&] {
      inner_.combine_slots_rmsnorm(sum, y, r, x, delta, core, z, b, scale, slots, w, eps, room);
    });
  }
  void slot_combine(Tensor y, ConstTensor core, ConstTensor scale, const Slots& slots) override {
    timed(Family::dora, "slot_combine", [&] { inner_.slot_combine(y, core, scale, slots); });
  }
  void slot_combine_backward(Tensor d_core, Tensor d_weight, Tensor d_scale, ConstTensor d_y,
                             ConstTensor core, ConstTensor scale, const Slots& slots) override {
    timed(Family::dora, "slot_combine_backward", [&] {
      inner_.slot_combine_backward(d_core, d_weight, d_scale, d_y, core, scale, slots);
    });
  }
  void slots_b_backward(Tensor d_b, Tensor q, ConstTensor d_y, ConstTensor z, ConstTensor b,
                        const Slots& slots, const ScaledSlots& scaled, Tensor room) override {
    timed(Family::dora, "slots_b_backward",
          [&] { inner_.slots_b_backward(d_b, q, d_y, z, b, slots, scaled, room); });
  }
  void overflow_input(Tensor y, ConstTensor x, const Slots& slots) override {
    timed(Family::router, "overflow_input", [&] { inner_.overflow_input(y, x, slots); });
  }
  void overflow_input_backward(Tensor d_x, Tensor d_weight, Tensor d_y, ConstTensor x,
                               const Slots& slots) override {
    timed(Family::router, "overflow_input_backward",
          [&] { inner_.overflow_input_backward(d_x, d_weight, d_y, x, slots); });
  }
  void cross_entropy(Tensor loss, Tensor logits, ConstTensor target, ConstTensor weight) override {
    timed(Family::loss, "cross_entropy",
          [&] { inner_.cross_entropy(loss, logits, target, weight); });
  }
  void log_prob(Tensor log_prob, Tensor greedy, ConstTensor logits, ConstTensor target) override {
    timed(Family::loss, "log_prob", [&] { inner_.log_prob(log_prob, greedy, logits, target); });
  }
  void sum_squares(Tensor out, ConstTensor x, bool accumulate) override {
    timed(Family::optimizer, "sum_squares", [&] { inner_.sum_squares(out, x, accumulate); });
  }
  void sum(Tensor out, ConstTensor x) override {
    timed(Family::loss, "sum", [&] { inner_.sum(out, x); });
  }
  void adamw(Tensor w, Tensor compute, ConstTensor g, Tensor m, Tensor v, StepNumbers numbers,
             ConstTensor norm_squared) override {
    timed(Family::optimizer, "adamw",
          [&] { inner_.adamw(w, compute, g, m, v, numbers, norm_squared); });
  }
  void sgd(Tensor w, Tensor compute, ConstTensor g, Tensor v, StepNumbers numbers,
           ConstTensor norm_squared) override {
    timed(Family::optimizer, "sgd", [&] { inner_.sgd(w, compute, g, v, numbers, norm_squared); });
  }

 private:
  struct Place {
    Phase phase = Phase::other;
    std::int64_t layer = -1;
    bool step = false;  // the range "step" itself
  };
  template <class F> void timed(Family family, const char* op, F&& call) {
    if (!in_step_) {
      // Under Nsight the families are ranges, inside whatever is open.
      inner_.enter(name_of(family), -1);
      call();
      inner_.leave();
      return;
    }
    begin(family, op);
    call();
    end();
  }
  void begin(Family family, const char* op);
  void end();
  void finish_step();

  std::unique_ptr<Backend> inner_owner_;
  Backend& inner_;
  std::unique_ptr<TimeMarks> marks_;
  std::vector<Place> around_;  // places to return to
  Place here_;
  bool measuring_ = false, in_step_ = false;
  TimedStep step_;  // its calls have no device times before it ends: marks 2 i + 1 and 2 i + 2
  std::chrono::steady_clock::time_point step_began_, call_began_;
  std::vector<TimedStep> steps_;
};

}  // namespace mixlora
