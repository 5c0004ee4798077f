#include "suites/evaluate.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "engine/error.h"
#include "suites/loglikelihood.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

/// The first of the largest.
template <class Values> std::int64_t argmax(const Values& v) {
  return std::max_element(v.begin(), v.end()) - v.begin();
}

Metric share(std::string name, std::int64_t right, std::int64_t n) {
  const double p = static_cast<double>(right) / static_cast<double>(n);
  return {std::move(name), p, n > 1 ? std::sqrt(p * (1 - p) / static_cast<double>(n - 1)) : 0};
}

/// Majority, chance and the headline, once all answers are there.
void finish(Evaluation& e, const Dataset& data) {
  std::map<std::int64_t, std::int64_t> gold;
  for (const Row& row : data.rows) {
    ++gold[row.answer];
    e.chance += 1.0 / static_cast<double>(row.choices.size()) / static_cast<double>(e.n);
  }
  for (const auto& [answer, count] : gold)
    e.majority = std::max(e.majority, static_cast<double>(count) / static_cast<double>(e.n));
  e.metric = e.others.front().name;
  e.value = e.others.front().value;
  e.standard_error = e.others.front().standard_error;
  e.others.erase(e.others.begin());
}

void ask_labels(Evaluation& e, const Task& task, const Dataset& data, const Tokenizer& tokenizer,
                const Scoring& scoring, const ProtocolSpec& spec, std::int64_t cutoff) {
  LabelRequests maker(task, tokenizer, spec, cutoff);
  std::vector<LabelRequest> requests;
  for (const Row& row : data.rows) {
    requests.push_back(maker.request(row));
    e.tokens += static_cast<std::int64_t>(requests.back().prompt.size());
  }
  e.truncated = maker.truncated();
  const auto scores = scoring.labels(requests);
  std::int64_t right = 0;
  for (std::size_t i = 0; i < data.rows.size(); ++i) {
    const Row& row = data.rows[i];
    e.answers.push_back({row.id, argmax(scores.at(i)), gold_label(task, row, spec), scores[i]});
    right += e.answers.back().choice == e.answers.back().gold ? 1 : 0;
  }
  e.others.push_back(share("acc", right, e.n));
}

void ask_choices(Evaluation& e, const Task& task, const Dataset& data, const Tokenizer& tokenizer,
                 const Scoring& scoring, const ProtocolSpec& spec, std::int64_t positions,
                 const std::string& few_shot) {
  std::vector<ChoiceRequest> requests;
  for (const Row& row : data.rows) {
    ChoiceRequest& r = requests.emplace_back();
    bool truncated = false;
    for (TextPair& pair : choice_texts(task, row)) {
      pair.context.insert(0, few_shot);
      r.texts.push_back(encode_pair(pair, tokenizer, spec.bos, positions, truncated));
      e.tokens += static_cast<std::int64_t>(r.texts.back().tokens.size()) - 1;
    }
    e.truncated += truncated ? 1 : 0;
  }
  const auto scores = scoring.choices(requests);
  std::vector<std::string> metrics{task.loglikelihood.headline};
  for (const auto& m : task.loglikelihood.metrics)
    if (m != metrics.front()) metrics.push_back(m);
  std::vector<std::int64_t> right(metrics.size());
  for (std::size_t i = 0; i < data.rows.size(); ++i) {
    const Row& row = data.rows[i];
    Answer a{row.id, 0, row.answer, {}};
    for (const ChoiceScore& s : scores.at(i)) a.log_probs.push_back(static_cast<float>(s.log_prob));
    for (std::size_t m = 0; m < metrics.size(); ++m) {
      std::vector<double> normed;
      for (std::size_t c = 0; c < row.choices.size(); ++c)
        normed.push_back(scores[i][c].log_prob / choice_length(task, row, c, metrics[m]));
      const std::int64_t choice = argmax(normed);
      right[m] += choice == row.answer ? 1 : 0;
      if (m == 0) a.choice = choice;
    }
    e.answers.push_back(std::move(a));
  }
  for (std::size_t m = 0; m < metrics.size(); ++m)
    e.others.push_back(share(metrics[m], right[m], e.n));
}

}  // namespace

void check(const ProtocolSpec& s, const std::string& path) {
  const bool labels = s.protocol == Protocol::label_token;
  require(labels || s.label_rule == LabelRule::corrected,
          "{}.label_rule: belongs to protocol \"label-token\"", path);
  require(labels || !s.boolq_passage,
          "{}.boolq_passage: belongs to protocol \"label-token\"; loglikelihood always has it",
          path);
  require(s.few_shot >= 0, "{}.few_shot: {}; expected 0 or more", path, s.few_shot);
  require(!labels || s.few_shot == 0, "{}.few_shot: belongs to protocol \"loglikelihood\"", path);
}

std::string few_shot_of(const Task& task, const ProtocolSpec& spec) {
  if (spec.few_shot == 0) return "";
  require(!task.few_shot_split.empty(), "task {}: few_shot {}, but it names no split for examples",
          task.name, spec.few_shot);
  return few_shot_text(task, load_split(task, task.split(task.few_shot_split), spec.few_shot),
                       spec.few_shot);
}

std::int64_t asked_tokens(const Task& task, const Row& row, const Tokenizer& tokenizer,
                          const ProtocolSpec& spec, std::int64_t cutoff,
                          const std::string& few_shot) {
  if (spec.protocol == Protocol::label_token)
    return static_cast<std::int64_t>(
        LabelRequests(task, tokenizer, spec, cutoff).request(row).prompt.size());
  std::int64_t n = 0;
  bool truncated = false;
  for (TextPair& pair : choice_texts(task, row)) {
    pair.context.insert(0, few_shot);
    n += static_cast<std::int64_t>(
             encode_pair(pair, tokenizer, spec.bos, 0, truncated).tokens.size()) -
         1;
  }
  return n;
}

Evaluation evaluate(const Task& task, const Dataset& data, const Tokenizer& tokenizer,
                    const Scoring& scoring, const ProtocolSpec& spec, std::int64_t cutoff,
                    std::int64_t positions, const std::string& few_shot) {
  Evaluation e;
  e.suite = task.name;
  e.protocol = name_of(spec.protocol);
  e.n = static_cast<std::int64_t>(data.rows.size());
  if (spec.protocol == Protocol::label_token)
    ask_labels(e, task, data, tokenizer, scoring, spec, cutoff);
  else
    ask_choices(e, task, data, tokenizer, scoring, spec, positions, few_shot);
  finish(e, data);
  return e;
}

}  // namespace mixlora
