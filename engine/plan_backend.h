// PlanBackend: does nothing, at addresses nobody reads; running a step on it measures the step's
// memory.
#pragma once
#include "kernels/backend.h"

namespace mixlora {

/// Types and sizes are those of `like`; no operation computes and no memory is taken.
class PlanBackend final : public Backend {
 public:
  explicit PlanBackend(const Backend& like) : like_(like) {}
  Device device() const override { return like_.device(); }
  DType activation_type() const override { return like_.activation_type(); }
  std::string description() const override { return "plan of " + like_.description(); }
  std::unique_ptr<Memory> allocate(std::size_t bytes) override;
  std::size_t allocated_bytes() const override { return allocated_; }
  std::size_t peak_bytes() const override { return allocated_; }
  std::size_t workspace_bytes() const override { return like_.workspace_bytes(); }
  std::size_t matrix_bytes(std::int64_t out, std::int64_t in) const override {
    return like_.matrix_bytes(out, in);
  }
  DType matrix_type() const override { return like_.matrix_type(); }
  Tensor matrix_rows(const FrozenMatrix& w) const override {
    return {w.storage.data, {w.out, w.in}, matrix_type(), device()};
  }

  void enter(const char*, std::int64_t) override {}
  void leave() override {}
  void upload(Tensor, const void*) override {}
  void download(void*, ConstTensor) override {}
  void synchronize() override {}
  void zero(Tensor) override {}
  void copy(Tensor, ConstTensor) override {}
  void pack_matrix(FrozenMatrix&) override {}
  void linear(Tensor, ConstTensor, const FrozenMatrix&) override {}
  void linear_backward(Tensor, ConstTensor, const FrozenMatrix&, bool) override {}
  void row_norms_squared(Tensor, const FrozenMatrix&) override {}
  void gemm(Tensor, ConstTensor, bool, ConstTensor, bool, float, float) override {}
  void embedding(Tensor, ConstTensor, ConstTensor) override {}
  void gather_rows(Tensor, ConstTensor, ConstTensor) override {}
  void scatter_add_rows(Tensor, ConstTensor, ConstTensor) override {}
  void add(Tensor, ConstTensor) override {}
  void rmsnorm(Tensor, Tensor, ConstTensor, ConstTensor, float) override {}
  void rmsnorm_backward(Tensor, ConstTensor, ConstTensor, ConstTensor, ConstTensor) override {}
  void add_rmsnorm(Tensor, Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor, float) override {}
  void dropout(Tensor, ConstTensor, const Dropout&, RowIds) override {}
  void dropout_backward_add(Tensor, ConstTensor, const Dropout&, RowIds) override {}
  void lora_a(Tensor, ConstTensor, ConstTensor, float, const Dropout&, RowIds, Tensor) override {}
  void lora_a_backward(Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor, const Dropout&,
                       RowIds, Tensor) override {}
  void rmsnorm_again(Tensor, ConstTensor, ConstTensor, ConstTensor) override {}
  void lora_a_rmsnorm_backward(Tensor, Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor, float,
                               const Dropout&, RowIds, ConstTensor, ConstTensor, ConstTensor,
                               ConstTensor, Tensor, Tensor) override {}
  void lora_a_router_backward(Tensor, Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor,
                              ConstTensor, ConstTensor, const Dropout&, RowIds, Tensor) override {}
  void lora_a_router(Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor, float, const Dropout&,
                     RowIds, Tensor) override {}
  void lora_a_router_rmsnorm_backward(Tensor, Tensor, Tensor, Tensor, ConstTensor, ConstTensor,
                                      ConstTensor, ConstTensor, const Dropout&, RowIds, ConstTensor,
                                      ConstTensor, ConstTensor, ConstTensor, ConstTensor, Tensor,
                                      Tensor) override {}
  void lora_b_backward(std::span<const LowRankBackward>, float) override {}
  void add_lora_rmsnorm(Tensor, Tensor, Tensor, ConstTensor, Tensor, const LowRank&, ConstTensor,
                        float) override {}
  void lora_rope(Tensor, const std::array<LowRank, 3>&, ConstTensor, RowIds, Heads) override {}
  void jitter(Tensor, ConstTensor, float, std::uint64_t, std::int32_t, RowIds) override {}
  void dora_scale(Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor, ConstTensor, ConstTensor,
                  float) override {}
  void dora_magnitudes_backward(std::span<const DoraMagnitude>) override {}
  void scale_columns(Tensor, ConstTensor, ConstTensor) override {}
  void scale_columns_backward(Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor) override {}
  void rope(Tensor, ConstTensor, ConstTensor, RowIds, Heads, bool) override {}
  void scale_rope_backward(Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor, ConstTensor,
                           RowIds, Heads) override {}
  void attention(Tensor, Tensor, ConstTensor, const Sequences&, Heads) override {}
  void attention_backward(Tensor, ConstTensor, ConstTensor, ConstTensor, ConstTensor,
                          const Sequences&, Heads) override {}
  void router_logits(Tensor, ConstTensor, ConstTensor) override {}
  void route(Slots&, Tensor, Tensor, ConstTensor, const Router&, const Sequences&) override {}
  void balance_loss(Tensor, Tensor, ConstTensor, std::int64_t, float, float, bool) override {}
  void route_backward(Tensor, ConstTensor, const Slots&, ConstTensor, ConstTensor, ConstTensor,
                      const Router&, float, float, std::int64_t, float) override {}
  void router_backward(Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor) override {}
  void mixture(Tensor, Tensor, const Mixture&) override {}
  bool mixture_backward(Tensor, Tensor, Tensor, Tensor, const MixtureGrads&, ConstTensor,
                        ConstTensor, ConstTensor, const Mixture&) override {
    return false;
  }
  void slots_to_columns(Tensor, ConstTensor, const Slots&, bool) override {}
  void slot_combine(Tensor, ConstTensor, ConstTensor, const Slots&) override {}
  void add_slots_rmsnorm(Tensor, Tensor, Tensor, ConstTensor, Tensor, ConstTensor, ConstTensor,
                         const Slots&, ConstTensor, float, Tensor) override {}
  void combine_slots_rmsnorm(Tensor, Tensor, Tensor, ConstTensor, Tensor, Tensor, ConstTensor,
                             ConstTensor, ConstTensor, const Slots&, ConstTensor, float,
                             Tensor) override {}
  void slot_combine_backward(Tensor, Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor,
                             const Slots&) override {}
  void slots_b_backward(Tensor, Tensor, ConstTensor, ConstTensor, ConstTensor, const Slots&,
                        const ScaledSlots&, Tensor) override {}
  void overflow_input(Tensor, ConstTensor, const Slots&) override {}
  void overflow_input_backward(Tensor, Tensor, Tensor, ConstTensor, const Slots&) override {}
  void cross_entropy(Tensor, Tensor, ConstTensor, ConstTensor) override {}
  void log_prob(Tensor, Tensor, ConstTensor, ConstTensor) override {}
  void sum_squares(Tensor, ConstTensor, bool) override {}
  void sum(Tensor, ConstTensor) override {}
  void adamw(Tensor, Tensor, ConstTensor, Tensor, Tensor, StepNumbers, ConstTensor) override {}
  void sgd(Tensor, Tensor, ConstTensor, Tensor, StepNumbers, ConstTensor) override {}

 private:
  const Backend& like_;
  std::size_t allocated_ = 0;
};

}  // namespace mixlora
