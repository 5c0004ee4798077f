// Scorer: answers label-token and loglikelihood requests with a model, with or without an adapter.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/adapter.h"
#include "engine/model.h"
#include "engine/score.h"
#include "kernels/backend.h"

namespace mixlora {

class DeviceAdapter;
class Pass;
struct HostBatch;

/// Packs requests end to end, longest first, up to `max_tokens` a pass; memory is taken once and
/// grows only for a request that is longer. Not thread-safe.
class Scorer {
 public:
  /// `share_prefix` false runs every text of a choice request whole: to measure what sharing saves.
  Scorer(Backend& ops, const Model& model, const Adapter* adapter, std::int64_t max_tokens,
         bool share_prefix = true);
  ~Scorer();

  std::vector<std::vector<float>> labels(std::span<const LabelRequest> requests);
  std::vector<std::vector<ChoiceScore>> choices(std::span<const ChoiceRequest> requests);
  /// Logits of every position of one text, (tokens, V): for tests and tools.
  std::vector<float> logits(const std::vector<std::int32_t>& tokens);
  /// The functions above, as suites ask them.
  Scoring scoring();
  /// Tokens run through the model so far (shared contexts once).
  std::int64_t tokens() const { return tokens_; }

 private:
  Pass& pass_for(const HostBatch& batch);
  void check(const std::vector<std::int32_t>& tokens) const;

  Backend& ops_;
  const Model& model_;
  std::int64_t max_tokens_, tokens_ = 0;
  bool share_prefix_;
  std::unique_ptr<DeviceAdapter> adapter_;
  std::unique_ptr<Pass> pass_;
  std::int64_t rows_ = 0, sequences_ = 0, labels_ = 0;
};

}  // namespace mixlora
