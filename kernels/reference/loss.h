// Cross entropy with its gradient, and log-probabilities of given tokens.
#pragma once
#include "kernels/reference/scalar.h"

namespace mixlora::reference {

/// loss = -weight log softmax(logits)[target]; logits become weight (softmax - one_hot(target)).
/// logits (M, V)  loss, weight (M)  target (M)
template <class T>
void cross_entropy(T* loss, T* logits, const std::int32_t* target, const T* weight, Index rows,
                   Index vocabulary) {
  for (Index m = 0; m < rows; ++m, logits += vocabulary) {
    const T lse = log_sum_exp(logits, vocabulary);
    loss[m] = weight[m] * (lse - logits[target[m]]);
    for (Index v = 0; v < vocabulary; ++v)
      logits[v] = weight[m] * (std::exp(logits[v] - lse) - T(v == target[m] ? 1 : 0));
  }
}

/// log_prob = log softmax(logits)[target]; greedy = 1 when target is the argmax (first wins).
template <class T>
void log_prob(T* log_p, T* greedy, const T* logits, const std::int32_t* target, Index rows,
              Index vocabulary) {
  for (Index m = 0; m < rows; ++m, logits += vocabulary) {
    log_p[m] = logits[target[m]] - log_sum_exp(logits, vocabulary);
    greedy[m] = T(arg_max(logits, vocabulary) == target[m] ? 1 : 0);
  }
}

}  // namespace mixlora::reference
