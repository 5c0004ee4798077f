// Prompts: rows as the label-token protocol asks them, and as training texts.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine/score.h"
#include "engine/tokenizer.h"
#include "engine/train.h"
#include "suites/protocol.h"
#include "suites/task.h"

namespace mixlora {

/// The prompt's text [MoE-PEFT qa_tasks.py, with methods.md section 4's corrections: labels A..E,
/// only the offered ones].
std::string prompt_text(const Task& task, const Row& row, const ProtocolSpec& spec = {});
/// The label strings that compete for a row: letters by position, or the row's own words; under the
/// official rule the task's whole list.
std::vector<std::string> label_texts(const Task& task, const Row& row,
                                     const ProtocolSpec& spec = {});
/// The place of the row's right answer in label_texts.
std::int64_t gold_label(const Task& task, const Row& row, const ProtocolSpec& spec = {});

/// Counts of what did not fit and was cut.
struct Truncation {
  std::int64_t rows = 0;
};
/// Prompt + " " + gold label, cut to `cutoff` tokens: the prompt's end and the answer stay, its
/// middle goes.
TrainItem train_item(const Task& task, const Row& row, const Tokenizer& tokenizer,
                     std::int64_t cutoff, Truncation& cut);

/// Makes label requests; remembers the labels' ids.
class LabelRequests {
 public:
  LabelRequests(const Task& task, const Tokenizer& tokenizer, const ProtocolSpec& spec,
                std::int64_t cutoff)
      : task_(task), tokenizer_(tokenizer), spec_(spec), cutoff_(cutoff) {}
  /// The prompt's ids, and of each label the last id of " " + label. Corrected: a prompt that is
  /// too long loses its middle. Official: it loses its end.
  LabelRequest request(const Row& row);
  std::int64_t truncated() const { return cut_.rows; }

 private:
  std::int32_t label_id(const std::string& label);
  std::vector<std::int32_t> encode(const std::string& text) const;

  const Task& task_;
  const Tokenizer& tokenizer_;
  ProtocolSpec spec_;
  std::int64_t cutoff_;
  Truncation cut_;
  std::map<std::string, std::int32_t> ids_;  // by label
};

}  // namespace mixlora
