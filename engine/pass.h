// Pass: the memory of one pass over the model, and the way from a host batch to hidden rows, loss
// and gradients.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/batch.h"
#include "engine/transformer.h"

namespace mixlora {

/// The largest batch a pass must take.
struct Capacity {
  std::int64_t rows = 0, sequences = 0, labels = 0;
};

/// Owns inputs, kept and scratch memory. Not movable.
class Pass {
 public:
  /// Measures one pass at `capacity` on a PlanBackend and takes that much from `ops`. `shape` is a
  /// batch of the largest size (its numbers do not matter); `adapters` by job, null for the base
  /// model.
  Pass(Backend& ops, const Model& model, std::vector<DeviceAdapter*> adapters,
       const HostBatch& largest, bool training, Recompute recompute);
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;

  /// Bytes that a pass of `largest` takes beside model and adapters; nothing is allocated.
  static std::size_t planned_bytes(Backend& ops, const Model& model,
                                   const std::vector<DeviceAdapter*>& adapters,
                                   const HostBatch& largest, bool training, Recompute recompute);
  std::size_t bytes() const { return inputs_.bytes() + kept_.capacity() + scratch_.capacity(); }

  /// Forward, loss, router losses, backward, enqueued. Gradients are added. `aux_factor` by part:
  /// see Group.
  void train(const HostBatch& batch, const std::vector<float>& aux_factors);
  /// What the last `train` of this batch came to, by part; waits for it.
  struct Losses {
    double loss = 0;  // sum of weighted losses
    double aux = 0, entropy = 0;
    std::vector<float> stats;  // (L, 2E + 2) of this pass; empty without a router
  };
  std::vector<Losses> losses(const HostBatch& batch) const;
  /// log softmax over the whole vocabulary at the labels (row, target) of the batch.
  void log_probs(const HostBatch& batch, std::vector<float>& log_prob, std::vector<float>& greedy);
  /// Logits of `columns` at the batch's label rows: (M, columns) f32.
  std::vector<float> label_logits(const HostBatch& batch, const std::vector<std::int32_t>& columns);
  /// Logits of every row, (N, V) f32: for tests and small models.
  std::vector<float> logits(const HostBatch& batch);

 private:
  Pass(Backend& ops, const Model& model, std::vector<DeviceAdapter*> adapters,
       const Capacity& capacity, bool training, Recompute recompute);
  void run_largest(const HostBatch& largest);
  void run(const HostBatch& batch);
  Step upload(const HostBatch& batch);
  void loss(const HostBatch& batch, ConstTensor hidden, Tensor d_hidden);
  std::int64_t chunk() const;

  Backend& ops_;
  const Model& model_;
  std::vector<DeviceAdapter*> adapters_;
  bool training_;
  bool narrow_;  // whether a batch may hand on the rows of its labels alone
  Arena inputs_;
  Scratch kept_, scratch_;
  Transformer transformer_;
  Tensor tokens_, ids_, sequences_, own_sequences_, label_rows_, selected_, selected_ids_, targets_,
      weights_, losses_, greedy_, columns_, sums_;
};

}  // namespace mixlora
