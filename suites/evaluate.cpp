#include "suites/evaluate.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "suites/prompt.h"

namespace mixlora {

Evaluation evaluate_labels(const Task& task, const Dataset& data, const Tokenizer& tokenizer,
                           const Scoring& scoring, std::int64_t cutoff) {
  Evaluation e;
  e.suite = task.name;
  e.protocol = "label-token";
  e.metric = "acc";
  e.n = static_cast<std::int64_t>(data.rows.size());
  Truncation cut;
  std::vector<LabelRequest> requests;
  for (const Row& row : data.rows) {
    requests.push_back(label_request(task, row, tokenizer, cutoff, cut));
    e.tokens += static_cast<std::int64_t>(requests.back().prompt.size());
  }
  e.truncated = cut.rows;
  const auto scores = scoring.labels(requests);
  std::map<std::int64_t, std::int64_t> gold;
  std::int64_t right = 0;
  for (std::size_t i = 0; i < data.rows.size(); ++i) {
    const auto& s = scores.at(i);
    const auto choice = std::max_element(s.begin(), s.end()) - s.begin();
    e.answers.push_back({data.rows[i].id, choice, data.rows[i].answer, s});
    right += choice == data.rows[i].answer ? 1 : 0;
    ++gold[data.rows[i].answer];
    e.chance += 1.0 / static_cast<double>(s.size()) / static_cast<double>(e.n);
  }
  for (const auto& [answer, count] : gold)
    e.majority = std::max(e.majority, static_cast<double>(count) / static_cast<double>(e.n));
  e.value = static_cast<double>(right) / static_cast<double>(e.n);
  e.standard_error =
      e.n > 1 ? std::sqrt(e.value * (1 - e.value) / static_cast<double>(e.n - 1)) : 0;
  return e;
}

}  // namespace mixlora
