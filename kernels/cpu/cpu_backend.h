// CpuBackend: the operations on the host; oneDNN multiplies where it was found, rows run in
// parallel.
#pragma once
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace mixlora {

/// Deterministic for any number of threads except inside oneDNN's products, which are deterministic
/// for a given one. Working memory is taken once, at the start, and counted in workspace_bytes.
class CpuBackend final : public Backend {
 public:
  CpuBackend(Precision precision, int threads);
  ~CpuBackend() override;
  Device device() const override { return Device::cpu; }
  DType activation_type() const override { return DType::f32; }
  std::string description() const override;

  std::unique_ptr<Memory> allocate(std::size_t bytes) override;
  void upload(Tensor dst, const void* src) override;
  void download(void* dst, ConstTensor src) override;
  void synchronize() override {}
  std::size_t allocated_bytes() const override { return allocated_; }
  std::size_t peak_bytes() const override { return peak_; }
  std::size_t workspace_bytes() const override;
  void zero(Tensor x) override;
  void copy(Tensor dst, ConstTensor src) override;

  std::size_t matrix_bytes(std::int64_t out, std::int64_t in) const override;
  DType matrix_type() const override { return bf16_ ? DType::bf16 : DType::f32; }
  Tensor matrix_rows(const FrozenMatrix& w) const override;
  void pack_matrix(FrozenMatrix& w) override;
  void linear(Tensor y, ConstTensor x, const FrozenMatrix& w) override;
  void linear_backward(Tensor d_x, ConstTensor d_y, const FrozenMatrix& w,
                       bool accumulate) override;
  void row_norms_squared(Tensor norms, const FrozenMatrix& w) override;
  void gemm(Tensor c, ConstTensor a, bool transpose_a, ConstTensor b, bool transpose_b, float alpha,
            float beta) override;

  void embedding(Tensor y, ConstTensor table, ConstTensor tokens) override;
  void gather_rows(Tensor y, ConstTensor x, ConstTensor index) override;
  void scatter_add_rows(Tensor x, ConstTensor y, ConstTensor index) override;
  void add(Tensor y, ConstTensor x) override;
  void rmsnorm(Tensor y, Tensor r, ConstTensor x, ConstTensor w, float eps) override;
  void rmsnorm_again(Tensor y, ConstTensor x, ConstTensor w, ConstTensor r) override;
  void rmsnorm_backward(Tensor d_x, ConstTensor d_y, ConstTensor x, ConstTensor w,
                        ConstTensor r) override;
  void add_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, ConstTensor delta, ConstTensor w,
                   float eps) override;
  void dropout(Tensor y, ConstTensor x, const Dropout& d, RowIds ids) override;
  void dropout_backward_add(Tensor d_x, ConstTensor d_y, const Dropout& d, RowIds ids) override;
  void jitter(Tensor y, ConstTensor x, float amount, std::uint64_t seed, std::int32_t layer,
              RowIds ids) override;
  void dora_scale(Tensor scale, Tensor inverse_norm, ConstTensor m, ConstTensor w_squared,
                  ConstTensor a, ConstTensor wa, ConstTensor b, float s) override;
  void dora_magnitudes_backward(std::span<const DoraMagnitude> all) override;
  void scale_columns(Tensor y, ConstTensor core, ConstTensor scale) override;
  void scale_columns_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y, ConstTensor core,
                              ConstTensor scale) override;
  void rope(Tensor y, ConstTensor x, ConstTensor table, RowIds ids, Heads heads,
            bool inverse) override;
  void scale_rope_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y, ConstTensor y,
                           ConstTensor scale, ConstTensor table, RowIds ids, Heads heads) override;
  void attention(Tensor o, Tensor lse, ConstTensor qkv, const Sequences& s, Heads heads) override;
  void attention_backward(Tensor d_qkv, ConstTensor d_o, ConstTensor qkv, ConstTensor o,
                          ConstTensor lse, const Sequences& s, Heads heads) override;
  void router_logits(Tensor logits, ConstTensor x, ConstTensor wg) override;
  void route(Slots& slots, Tensor probabilities, Tensor stats, ConstTensor logits,
             const Router& router, const Sequences& s) override;
  void balance_loss(Tensor loss, Tensor fraction, ConstTensor stats, std::int64_t rows, float coef,
                    float z_coef, bool per_layer) override;
  void route_backward(Tensor d_logits, ConstTensor d_weight, const Slots& slots,
                      ConstTensor probabilities, ConstTensor logits, ConstTensor fraction,
                      const Router& router, float coef, float z_coef, std::int64_t layers,
                      float factor) override;
  void router_backward(Tensor d_wg, Tensor d_x, ConstTensor d_logits, ConstTensor x,
                       ConstTensor wg) override;
  void mixture(Tensor out, Tensor z, const Mixture& m) override;
  bool mixture_backward(Tensor d_gate_up, Tensor d_weight, Tensor p, Tensor row_dots,
                        const MixtureGrads& grads, ConstTensor d_out, ConstTensor q, ConstTensor z,
                        const Mixture& m) override;
  void slots_to_columns(Tensor columns, ConstTensor z, const Slots& slots, bool per_slot) override;
  void slot_combine(Tensor y, ConstTensor core, ConstTensor scale, const Slots& slots) override;
  void slot_combine_backward(Tensor d_core, Tensor d_weight, Tensor d_scale, ConstTensor d_y,
                             ConstTensor core, ConstTensor scale, const Slots& slots) override;
  void overflow_input(Tensor y, ConstTensor x, const Slots& slots) override;
  void overflow_input_backward(Tensor d_x, Tensor d_weight, Tensor d_y, ConstTensor x,
                               const Slots& slots) override;
  void cross_entropy(Tensor loss, Tensor logits, ConstTensor target, ConstTensor weight) override;
  void log_prob(Tensor log_prob, Tensor greedy, ConstTensor logits, ConstTensor target) override;
  void sum_squares(Tensor out, ConstTensor x, bool accumulate) override;
  void sum(Tensor out, ConstTensor x) override;
  void adamw(Tensor w, Tensor compute, ConstTensor g, Tensor m, Tensor v, StepNumbers numbers,
             ConstTensor norm_squared) override;
  void sgd(Tensor w, Tensor compute, ConstTensor g, Tensor v, StepNumbers numbers,
           ConstTensor norm_squared) override;

 private:
  friend class CpuMemory;
  struct Products;  // oneDNN's primitives, in product.cpp
  /// bf16 numbers of the rows that one frozen product reads at a time: 170 rows of logits.
  static constexpr std::int64_t kBf16Room = std::int64_t{1} << 23;
  void multiply_frozen(Tensor y, ConstTensor x, const FrozenMatrix& w, bool forward,
                       bool accumulate);
  float* gemm_room();  // kGemmRoom numbers, for one operation at a time
  void* bf16_room();
  bool bf16_ = false;
  int threads_ = 0;
  std::size_t allocated_ = 0, peak_ = 0;
  std::unique_ptr<Products> products_;
  std::unique_ptr<Memory> room_;  // workspace_bytes, taken at once
};

}  // namespace mixlora
