// Evaluation: a suite asked of a model, answer by answer.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/score.h"
#include "engine/tokenizer.h"
#include "suites/task.h"

namespace mixlora {

struct Answer {
  std::string item;
  std::int64_t choice = 0, gold = 0;
  std::vector<float> log_probs;  // over the offered labels
};

struct Evaluation {
  std::string suite, protocol, metric;
  double value = 0;           // share of right answers
  double standard_error = 0;  // sqrt(p (1 - p) / (n - 1))
  double majority = 0;        // accuracy of always giving the commonest gold answer
  double chance = 0;          // mean of 1 / choices
  std::int64_t n = 0, truncated = 0, tokens = 0;
  std::vector<Answer> answers;
};

/// The label-token protocol (suites.md section 2): argmax over the offered labels, ties to the
/// first.
Evaluation evaluate_labels(const Task& task, const Dataset& data, const Tokenizer& tokenizer,
                           const Scoring& scoring, std::int64_t cutoff);

}  // namespace mixlora
