// Evaluation: a suite asked of a model, answer by answer.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/score.h"
#include "engine/tokenizer.h"
#include "suites/protocol.h"
#include "suites/task.h"

namespace mixlora {

struct Answer {
  std::string item;
  std::int64_t choice = 0, gold = 0;
  /// label-token: over the offered labels, normalised; loglikelihood: each choice's own sum.
  std::vector<float> log_probs;
};

struct Metric {
  std::string name;           // acc, acc_norm, acc_bytes
  double value = 0;           // share of right answers
  double standard_error = 0;  // sqrt(p (1 - p) / (n - 1))
};

struct Evaluation {
  std::string suite, protocol, metric;  // metric: the headline, whose choices `answers` holds
  double value = 0, standard_error = 0;
  std::vector<Metric> others;  // beside the headline
  double majority = 0;         // accuracy of always giving the commonest gold answer
  double chance = 0;           // mean of 1 / choices
  std::int64_t n = 0, truncated = 0, tokens = 0;
  std::vector<Answer> answers;
};

/// Asks every row of `data`. `cutoff`: most tokens of a label-token prompt; 0 for no limit.
/// `positions`: most the model takes; loglikelihood requests lose their first tokens beyond it.
/// `few_shot`: see few_shot_text. Ties go to the first choice.
Evaluation evaluate(const Task& task, const Dataset& data, const Tokenizer& tokenizer,
                    const Scoring& scoring, const ProtocolSpec& spec, std::int64_t cutoff,
                    std::int64_t positions, const std::string& few_shot = "");

/// Tokens of a row's texts, before sharing. `few_shot` as in evaluate.
std::int64_t asked_tokens(const Task& task, const Row& row, const Tokenizer& tokenizer,
                          const ProtocolSpec& spec, std::int64_t cutoff,
                          const std::string& few_shot);

/// What few_shot of evaluate must be: empty without examples, else read from the task's own split.
std::string few_shot_of(const Task& task, const ProtocolSpec& spec);

}  // namespace mixlora
