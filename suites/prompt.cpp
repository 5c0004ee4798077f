#include "suites/prompt.h"

#include <algorithm>

#include "engine/error.h"
#include "suites/text_template.h"

namespace mixlora {
namespace {

std::string letter(std::size_t i) { return std::string(1, static_cast<char>('A' + i)); }

/// "(A) first (B) second", as the task has it.
std::string lettered(const LabelTokenTexts& t, const Row& row) {
  require(row.choices.size() <= 26, "row {}: {} choices; letters serve 26", row.id,
          row.choices.size());
  std::string text;
  for (std::size_t i = 0; i < row.choices.size(); ++i) {
    const std::string own = letter(i);
    text += i == 0 ? "" : t.separator;
    text += fill_template(t.choice,
                          {{"letter", own}, {"label", row.labels[i]}, {"choice", row.choices[i]}});
  }
  return text;
}

/// Cuts ids to `limit`: a quarter of the room keeps the head, the rest keeps the tail with question
/// and answer.
void cut_middle(std::vector<std::int32_t>& ids, std::int64_t limit, Truncation& cut) {
  const auto n = static_cast<std::int64_t>(ids.size());
  if (n <= limit) return;
  ++cut.rows;
  const std::int64_t head = limit / 4, tail = limit - head;
  ids.erase(ids.begin() + head, ids.end() - tail);
}

std::vector<std::string> own_labels(const Task& task, const Row& row) {
  if (task.label_token.labels == LabelKind::row) return row.labels;
  std::vector<std::string> labels;
  for (std::size_t i = 0; i < row.choices.size(); ++i) labels.push_back(letter(i));
  return labels;
}

}  // namespace

std::string prompt_text(const Task& task, const Row& row, const ProtocolSpec& spec) {
  const LabelTokenTexts& t = task.label_token;
  const bool passage = spec.boolq_passage && !t.passage_prompt.empty();
  require(!t.prompt.empty(), "task {} has no prompt for the label-token protocol", task.name);
  const std::string choices = lettered(t, row);
  return fill_template(
      passage ? t.passage_prompt : t.prompt,
      {{"context", row.context}, {"question", row.question}, {"choices", choices}});
}

std::vector<std::string> label_texts(const Task& task, const Row& row, const ProtocolSpec& spec) {
  if (spec.label_rule == LabelRule::corrected) return own_labels(task, row);
  require(!task.label_token.official.empty(), "task {} has no official label rule; use corrected",
          task.name);
  return task.label_token.official;
}

std::int64_t gold_label(const Task& task, const Row& row, const ProtocolSpec& spec) {
  if (spec.label_rule == LabelRule::corrected) return row.answer;
  const auto offered = label_texts(task, row, spec);
  const std::string gold = own_labels(task, row)[static_cast<std::size_t>(row.answer)];
  const auto at = std::find(offered.begin(), offered.end(), gold);
  require(at != offered.end(), "row {}: its answer \"{}\" is not among the official labels", row.id,
          gold);
  return at - offered.begin();
}

TrainItem train_item(const Task& task, const Row& row, const Tokenizer& tokenizer,
                     std::int64_t cutoff, Truncation& cut) {
  const std::string prompt = prompt_text(task, row);
  const auto asked = tokenizer.encode_with_special(prompt);
  TrainItem item;
  item.tokens = tokenizer.encode_with_special(
      prompt + " " + own_labels(task, row)[static_cast<std::size_t>(row.answer)]);
  // The answer begins where the whole text's tokens leave the prompt's.
  const auto differ =
      std::mismatch(asked.begin(), asked.end(), item.tokens.begin(), item.tokens.end());
  const auto answer = static_cast<std::int64_t>(item.tokens.end() - differ.second);
  require(answer < cutoff, "row {}: the answer alone has {} tokens; cutoff_len is {}", row.id,
          answer, cutoff);
  cut_middle(item.tokens, cutoff, cut);
  item.answer_begin =
      static_cast<std::int32_t>(static_cast<std::int64_t>(item.tokens.size()) - answer);
  return item;
}

std::vector<std::int32_t> LabelRequests::encode(const std::string& text) const {
  return spec_.bos == Bos::automatic ? tokenizer_.encode_with_special(text)
                                     : tokenizer_.encode(text);
}

std::int32_t LabelRequests::label_id(const std::string& label) {
  const auto [at, fresh] = ids_.try_emplace(label, 0);
  if (fresh) at->second = tokenizer_.encode(" " + label).back();
  return at->second;
}

LabelRequest LabelRequests::request(const Row& row) {
  LabelRequest r;
  const std::string prompt = prompt_text(task_, row, spec_);
  r.prompt = encode(prompt);
  const auto limit = static_cast<std::size_t>(cutoff_);
  if (spec_.label_rule == LabelRule::corrected) {
    cut_middle(r.prompt, cutoff_, cut_);
  } else if (r.prompt.size() > limit) {
    r.prompt.resize(limit);
    ++cut_.rows;
  }
  for (const auto& label : label_texts(task_, row, spec_)) r.labels.push_back(label_id(label));
  return r;
}

}  // namespace mixlora
