// The loglikelihood protocol: rows as lm-evaluation-harness asks them, text by text, id by id.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/score.h"
#include "engine/tokenizer.h"
#include "suites/protocol.h"
#include "suites/task.h"

namespace mixlora {

/// One request: how likely is the continuation after the context?
struct TextPair {
  std::string context, continuation;
};

/// A row's requests, one a choice, without few-shot examples [lm_eval/api/task.py,
/// construct_requests].
std::vector<TextPair> choice_texts(const Task& task, const Row& row);
/// What stands before each question: the first `n` of `shots` solved, as lm-eval's first_n sampler
/// takes them. Throws InputError when there are fewer.
std::string few_shot_text(const Task& task, const Dataset& shots, std::int64_t n);

/// Ids of context and continuation: white space at the context's end moves to the continuation,
/// both are encoded whole, and what follows the context's own ids is scored [lm_eval/api/model.py,
/// _encode_pair]. An empty context is BOS. More than `limit` ids lose their first ones, counted in
/// `truncated` by row. `limit` 0: no limit.
ScoredText encode_pair(const TextPair& pair, const Tokenizer& tokenizer, Bos bos,
                       std::int64_t limit, bool& truncated);

/// Lengths that metrics divide a choice's log-probability by: 1, code points, bytes.
double choice_length(const Task& task, const Row& row, std::size_t choice,
                     const std::string& metric);

}  // namespace mixlora
