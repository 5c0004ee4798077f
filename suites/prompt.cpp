#include "suites/prompt.h"

#include <algorithm>

#include "engine/error.h"

namespace mixlora {
namespace {

std::string letter(std::size_t i) { return std::string(1, static_cast<char>('A' + i)); }

/// "(A) first (B) second", joined by `between`.
std::string lettered(const Row& row, const std::string& between) {
  std::string text;
  for (std::size_t i = 0; i < row.choices.size(); ++i)
    text += (i == 0 ? "" : between) + "(" + letter(i) + ") " + row.choices[i];
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

}  // namespace

std::string prompt_text(const Task& task, const Row& row) {
  switch (task.prompt) {
    case PromptKind::question:
      return "Please choose the correct answer to the question: " + row.question + " " +
             lettered(row, " ") + "\nAnswer:";
    case PromptKind::boolq:
      return "Please answer the following question with true or false: " + row.question +
             "?\nAnswer:";
    case PromptKind::piqa:
      return "Below is a common task along with two possible solutions labeled (A) and (B). Please "
             "select the appropriate solution to "
             "achieve the task:\n" +
             row.question + "\n\n" + lettered(row, "\n") + "\n\nCorrect solution:";
    case PromptKind::social_iqa:
      return "Please choose the correct answer to the question.\nQuestion: " + row.context + " " +
             row.question + "\n" + lettered(row, "\n") + "\nAnswer:";
    case PromptKind::hellaswag:
      return "Please choose the correct ending to complete the given sentence.\nSentence: " +
             row.context + ". " + row.question + "\n" + lettered(row, "\n") + "\nAnswer:";
    case PromptKind::winogrande:
      return "Please choose the correct answer to fill in the blank to complete the given "
             "sentence.\nSentence: " +
             row.question + "\n" + lettered(row, "\n") + "\nAnswer:";
  }
  throw std::logic_error("prompt_text: no such kind");
}

std::vector<std::string> label_texts(const Task& task, const Row& row) {
  if (task.prompt == PromptKind::boolq) return row.labels;
  std::vector<std::string> labels;
  for (std::size_t i = 0; i < row.choices.size(); ++i) labels.push_back(letter(i));
  return labels;
}

TrainItem train_item(const Task& task, const Row& row, const Tokenizer& tokenizer,
                     std::int64_t cutoff, Truncation& cut) {
  const std::string prompt = prompt_text(task, row);
  const auto asked = tokenizer.encode_with_special(prompt);
  TrainItem item;
  item.tokens = tokenizer.encode_with_special(
      prompt + " " + label_texts(task, row)[static_cast<std::size_t>(row.answer)]);
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

LabelRequest label_request(const Task& task, const Row& row, const Tokenizer& tokenizer,
                           std::int64_t cutoff, Truncation& cut) {
  LabelRequest r;
  r.prompt = tokenizer.encode_with_special(prompt_text(task, row));
  cut_middle(r.prompt, cutoff, cut);
  for (const auto& label : label_texts(task, row))
    r.labels.push_back(tokenizer.encode(" " + label).back());
  return r;
}

}  // namespace mixlora
