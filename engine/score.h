// Scoring: what a model with or without an adapter answers, by log-probability.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace mixlora {

/// The label-token protocol: which of `labels` is likeliest right after `prompt`?
struct LabelRequest {
  std::vector<std::int32_t> prompt;  // not empty; BOS included where the protocol has one
  std::vector<std::int32_t> labels;  // one token each
};
/// A text whose tokens from `scored_from` on are scored after those before them.
struct ScoredText {
  std::vector<std::int32_t> tokens;  // context, then continuation; BOS included where there is one
  std::int32_t scored_from = 1;      // 1 <= scored_from < tokens.size()
};
/// The loglikelihood protocol: how likely is each choice? What the texts begin with in common is
/// computed once.
struct ChoiceRequest {
  std::vector<ScoredText> texts;
};
struct ChoiceScore {
  double log_prob = 0;  // sum over the scored tokens, nats
  bool greedy = false;  // every token was the argmax
};

/// Ways to ask; the engine's Scorer fills it, tests may fill it with a table. Results do not depend
/// on the order or on what is asked together.
struct Scoring {
  /// For each request, log-softmax over its offered labels only (f32), in their order.
  std::function<std::vector<std::vector<float>>(std::span<const LabelRequest>)> labels;
  std::function<std::vector<std::vector<ChoiceScore>>(std::span<const ChoiceRequest>)> choices;
};

}  // namespace mixlora
