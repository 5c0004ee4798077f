#include "suites/validate.h"

#include <algorithm>
#include <set>

#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/sha256.h"
#include "suites/dataset.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

/// What a row asks; without its answer.
std::string asked(const Row& r) { return Json{r.context, r.question, r.choices}.dump(); }

}  // namespace

std::string content_hash(const Dataset& data) {
  std::string lines;
  for (const Row& r : data.rows)
    lines += Json{r.context, r.question, r.choices, r.answer}.dump() + "\n";
  return sha256(lines);
}

double SplitReport::majority() const {
  return gold.empty() ? 0 : *std::max_element(gold.begin(), gold.end());
}

HashState compare_hash(const Split& split, const std::string& hash) {
  if (split.sha256.empty()) return HashState::not_on_record;
  if (split.sha256 == hash) return HashState::same;
  return split.edition.empty() ? HashState::differs : HashState::other_edition;
}

SplitReport validate_split(const Task& task, const Split& split, const Tokenizer* tokenizer,
                           std::int64_t limit) {
  const Dataset data = load_split(task, split, 0);
  SplitReport out;
  out.rows = static_cast<std::int64_t>(data.rows.size());
  out.expected = split.rows;
  out.hash = content_hash(data);
  out.hash_state = compare_hash(split, out.hash);
  std::set<std::string> seen;
  for (const Row& r : data.rows) {
    const auto place = static_cast<std::size_t>(r.answer);
    if (out.gold.size() <= place) out.gold.resize(place + 1);
    out.gold[place] += 1 / static_cast<double>(out.rows);
    if (!seen.insert(asked(r)).second) ++out.repeated;
    if (tokenizer == nullptr || task.label_token.prompt.empty()) continue;
    const auto tokens = static_cast<std::int64_t>(tokenizer->encode(prompt_text(task, r)).size());
    out.longest = std::max(out.longest, tokens);
    if (tokens > limit) ++out.over_limit;
  }
  return out;
}

std::int64_t overlap(const Dataset& train, const Dataset& test) {
  std::set<std::string> seen;
  for (const Row& r : train.rows) seen.insert(asked(r));
  return std::count_if(test.rows.begin(), test.rows.end(),
                       [&](const Row& r) { return seen.count(asked(r)) != 0; });
}

}  // namespace mixlora
