// Batch: which samples a step takes, and their tokens as the device reads them.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "engine/train.h"

namespace mixlora {

/// One job's samples, step by step: every epoch is shuffled anew by Philox of the job's seed.
class SampleOrder {
 public:
  SampleOrder(const TrainSpec& spec, const std::vector<TrainItem>& items);
  std::int64_t steps() const { return static_cast<std::int64_t>(steps_.size()); }
  /// Sample indices of step `i` (from 0), cut into micro-batches.
  const std::vector<std::vector<std::int64_t>>& micro_batches(std::int64_t i) const {
    return steps_[static_cast<std::size_t>(i)];
  }
  std::int64_t steps_per_epoch() const { return per_epoch_; }

 private:
  std::vector<std::vector<std::vector<std::int64_t>>> steps_;
  std::int64_t per_epoch_ = 1;
};

/// Rows of one job inside a batch; sequences and labels of a job lie together, in job order.
struct BatchPart {
  std::size_t job = 0;
  std::int64_t row_begin = 0, row_end = 0;
  std::int64_t sequence_begin = 0, sequence_end = 0;
  std::int64_t label_begin = 0, label_end = 0;
};

/// Host form of one pass over the model.
struct HostBatch {
  std::vector<std::int32_t> tokens;         // (N)
  std::vector<std::int32_t> ids;            // (N, 4): sample, position, step, adapter
  std::vector<std::int32_t> sequences;      // (S, 4): begin, length, prefix begin, prefix length
  std::vector<std::int32_t> own_sequences;  // (S, 4): begins counted from the part's first row
  std::vector<std::int32_t> label_rows, targets;  // (M)
  std::vector<float> weights;                     // (M)
  std::vector<BatchPart> parts;
  std::int64_t max_length = 0, max_prefix = 0;
  std::int64_t rows() const { return static_cast<std::int64_t>(tokens.size()); }

  void begin_part(std::size_t job);
  void end_part();
  /// Appends a sequence; positions count from `position`. Returns its first row.
  std::int32_t add_sequence(const std::vector<std::int32_t>& text, std::int32_t sample,
                            std::int32_t step, std::int32_t position = 0,
                            std::int32_t prefix_begin = 0, std::int32_t prefix_length = 0);
  void add_label(std::int32_t row, std::int32_t target, float weight);
};

/// The rows that a batch's labels ask for, each once, in row order: what the model's last rows are.
struct SelectedRows {
  std::vector<std::int32_t> rows;        // (S), counted from the part's first
  std::vector<std::int32_t> ids;         // (S, 4)
  std::vector<std::int64_t> begin;       // of each part in `rows`, and the end
  std::vector<std::int32_t> label_rows;  // (M): the labels' places in `rows`
};
/// Of so many rows, the most that are worth being selected.
constexpr std::int64_t most_selected(std::int64_t rows) { return 3 * rows / 4; }
/// Nothing when it is not worth it: most rows have a label, or some part has none.
std::optional<SelectedRows> selected_rows(const HostBatch& batch);

/// Tokens of an item that are learned: positions >= 1, and in the answer when `train_on` says so.
std::int64_t label_count(const TrainItem& item, TrainOn train_on);
/// Adds one item as a sequence with its labels.
void add_item(HostBatch& batch, const TrainItem& item, std::int64_t sample, std::int64_t step,
              TrainOn train_on, float weight);

}  // namespace mixlora
