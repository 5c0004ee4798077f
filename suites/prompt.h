// Prompts: rows as the label-token protocol asks them, and as training texts.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/score.h"
#include "engine/tokenizer.h"
#include "engine/train.h"
#include "suites/task.h"

namespace mixlora {

/// The prompt's text [MoE-PEFT qa_tasks.py, with methods.md section 4's corrections: labels A..E,
/// only the offered ones].
std::string prompt_text(const Task& task, const Row& row);
/// The label strings that compete for a row: letters by position, or the row's own words for
/// true/false.
std::vector<std::string> label_texts(const Task& task, const Row& row);

/// Counts of what did not fit and was cut in its middle.
struct Truncation {
  std::int64_t rows = 0;
};
/// Prompt + " " + gold label, cut to `cutoff` tokens: the prompt's end and the answer stay, its
/// middle goes.
TrainItem train_item(const Task& task, const Row& row, const Tokenizer& tokenizer,
                     std::int64_t cutoff, Truncation& cut);
/// The prompt's ids (with BOS where the tokenizer has one) and the last id of " " + label for each
/// offered label.
LabelRequest label_request(const Task& task, const Row& row, const Tokenizer& tokenizer,
                           std::int64_t cutoff, Truncation& cut);

}  // namespace mixlora
