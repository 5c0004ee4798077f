// CudaBackend: the operations on one CUDA device, in bf16 or (the parity mode) in f32.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/handles.h"

namespace mixlora {

/// One stream; every operation is enqueued on it and none waits for the host. Nothing is allocated
/// after the constructor except what `allocate` is asked for. Sums have a fixed order.
class CudaBackend final : public Backend {
 public:
  CudaBackend(Precision precision, int device);
  ~CudaBackend() override;
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;
  Device device() const override { return Device::cuda; }
  DType activation_type() const override { return type_; }
  std::string description() const override;

  std::unique_ptr<Memory> allocate(std::size_t bytes) override;
  void upload(Tensor dst, const void* src) override;
  void download(void* dst, ConstTensor src) override;
  void synchronize() override;
  std::size_t allocated_bytes() const override { return allocated_; }
  std::size_t peak_bytes() const override { return peak_; }
  std::size_t device_bytes() const override;
  std::size_t workspace_bytes() const override;
  void zero(Tensor x) override;
  void copy(Tensor dst, ConstTensor src) override;
  std::unique_ptr<TimeMarks> time_marks() override;
  void profiler_window(bool open) override;

  std::size_t matrix_bytes(std::int64_t out, std::int64_t in) const override;
  DType matrix_type() const override { return type_; }
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
  void lora_a(Tensor a, ConstTensor x, ConstTensor weight, float s, const Dropout& d, RowIds ids,
              Tensor room_for_rows) override;
  void lora_a_backward(Tensor d_weight, Tensor d_x, ConstTensor d_a, ConstTensor x,
                       ConstTensor weight, const Dropout& d, RowIds ids,
                       Tensor room_for_rows) override;
  void lora_a_rmsnorm_backward(Tensor d_weight, Tensor d_x, Tensor d_y, ConstTensor d_a,
                               ConstTensor weight, ConstTensor a, float s, const Dropout& d,
                               RowIds ids, ConstTensor x, ConstTensor w, ConstTensor r,
                               ConstTensor row_dots, Tensor y, Tensor room_for_rows) override;
  void lora_a_router_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, ConstTensor d_a,
                              ConstTensor d_logits, ConstTensor x, ConstTensor weight,
                              ConstTensor wg, const Dropout& d, RowIds ids, Tensor room) override;
  void lora_a_router(Tensor a, Tensor logits, ConstTensor x, ConstTensor weight, ConstTensor wg,
                     float s, const Dropout& d, RowIds ids, Tensor room) override;
  void lora_a_router_rmsnorm_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, Tensor d_y,
                                      ConstTensor d_a, ConstTensor d_logits, ConstTensor weight,
                                      ConstTensor wg, const Dropout& d, RowIds ids, ConstTensor x,
                                      ConstTensor w, ConstTensor r, ConstTensor row_dots,
                                      ConstTensor logits, Tensor y, Tensor room) override;
  void lora_b_backward(std::span<const LowRankBackward> all, float s) override;
  void add_lora_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                        const LowRank& update, ConstTensor w, float eps) override;
  void lora_rope(Tensor y, const std::array<LowRank, 3>& updates, ConstTensor table, RowIds ids,
                 Heads heads) override;
  void jitter(Tensor y, ConstTensor x, float amount, std::uint64_t seed, std::int32_t layer,
              RowIds ids) override;
  void dora_scale(Tensor scale, Tensor inverse_norm, ConstTensor m, ConstTensor w_squared,
                  ConstTensor a, ConstTensor wa, ConstTensor b, float s) override;
  void dora_scales(std::span<const DoraScale> all) override;
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
  bool attention_rope_backward(Tensor d_qkv, Tensor row_dots, ConstTensor d_o, ConstTensor qkv,
                               ConstTensor o, ConstTensor lse, const Sequences& s,
                               ConstTensor table, RowIds ids, Heads heads,
                               const QkvScale& scale) override;
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
  void add_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta, ConstTensor z,
                         ConstTensor b, const Slots& s, ConstTensor w, float eps,
                         Tensor room) override;
  void combine_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                             Tensor core, ConstTensor z, ConstTensor b, ConstTensor scale,
                             const Slots& s, ConstTensor w, float eps, Tensor room) override;
  void slot_combine(Tensor y, ConstTensor core, ConstTensor scale, const Slots& slots) override;
  void slot_combine_backward(Tensor d_core, Tensor d_weight, Tensor d_scale, ConstTensor d_y,
                             ConstTensor core, ConstTensor scale, const Slots& slots) override;
  void slots_b_backward(Tensor d_b, Tensor q, ConstTensor d_y, ConstTensor z, ConstTensor b,
                        const Slots& s, const ScaledSlots& x, Tensor room) override;
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
  friend class CudaMemory;
  struct Products;  // cuBLASLt's plans, in product.cu

  /// Working memory of one call, cut from one block: the next call uses the same bytes.
  class Room {
   public:
    Room(std::byte* base, std::size_t bytes) : at_(base), end_(base + bytes) {}
    std::size_t left() const { return static_cast<std::size_t>(end_ - at_); }
    /// `count` numbers, not cleared. Throws std::logic_error when the block is too small.
    template <class T> T* take(std::int64_t count) {
      return static_cast<T*>(take_bytes(static_cast<std::size_t>(count) * sizeof(T)));
    }

   private:
    void* take_bytes(std::size_t bytes);
    std::byte *at_, *end_;
  };
  Room room() const;
  /// A counter for a kernel that wants to know its last block: 0 between calls.
  unsigned* arrived() const;
  /// lora_a_router_backward, x by a norm where w and r are there; the norm's backward with it where
  /// d_input, its d_x, is. False when other kernels must.
  bool with_router(Tensor d_weight, Tensor d_wg, Tensor d_x, ConstTensor d_a, ConstTensor d_logits,
                   ConstTensor x, ConstTensor weight, ConstTensor wg, const Dropout& d, RowIds ids,
                   ConstTensor w, ConstTensor r, Tensor d_input, ConstTensor row_dots,
                   ConstTensor logits);
  /// d_wg += d_logits^T x, router_backward's other half.
  void router_weight_backward(Tensor d_wg, ConstTensor d_logits, ConstTensor x);
  /// add_slots_rmsnorm where there is a delta, combine_slots_rmsnorm where there is a core.
  void slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, ConstTensor delta, Tensor core,
                     ConstTensor z, ConstTensor b, ConstTensor scale, const Slots& s, ConstTensor w,
                     float eps);
  /// c = alpha op(a) op(b) + beta onto, which is c when absent, else of its shape and stride; the
  /// one way to cuBLASLt.
  void product(Tensor c, ConstTensor a, bool transpose_a, ConstTensor b, bool transpose_b,
               float alpha, float beta, ConstTensor onto = {});
  /// mixture and mixture_backward of one expert of many ranks; false when other kernels must. Both
  /// take rows [begin, end) of c1 + B1 a1, or up's, in `sums` (rows, 2F), or where c is without B.
  ConstTensor updated_half(const Mixture& m, bool up, std::int64_t begin, std::int64_t end,
                           Tensor sums);
  bool dense_mixture(Tensor out, Tensor z, const Mixture& m);
  bool dense_mixture_backward(Tensor d_gate_up, Tensor d_weight, Tensor p,
                              const MixtureGrads& grads, ConstTensor d_out, ConstTensor q,
                              const Mixture& m);

  int device_ = 0;
  int processors_ = 0;  // streaming multiprocessors
  DType type_ = DType::bf16;
  cudaStream_t stream_ = nullptr;
  std::size_t allocated_ = 0, peak_ = 0;
  std::unique_ptr<Memory> workspace_;
  struct Staging {  // pinned host memory on its way to the device
    std::byte* data = nullptr;
    cudaEvent_t sent = nullptr;
  };
  Staging staging_[2];
  std::size_t next_staging_ = 0;
  std::unique_ptr<Products> products_;
};

}  // namespace mixlora
