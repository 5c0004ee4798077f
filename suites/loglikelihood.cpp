#include "suites/loglikelihood.h"

#include "engine/error.h"
#include "suites/hellaswag_text.h"
#include "suites/text_template.h"
#include "suites/white_space.h"

namespace mixlora {
namespace {

std::string cleaned(const Task& task, std::string text) {
  return task.loglikelihood.cleaning == Cleaning::hellaswag ? clean_hellaswag(text) : text;
}

std::vector<std::int32_t> encode(const Tokenizer& tokenizer, std::string_view text, Bos bos) {
  return bos == Bos::automatic ? tokenizer.encode_with_special(text) : tokenizer.encode(text);
}

}  // namespace

std::vector<TextPair> choice_texts(const Task& task, const Row& row) {
  const LoglikelihoodTexts& t = task.loglikelihood;
  require(!t.context.empty() || !t.continuation.empty(),
          "task {} has no texts for the loglikelihood protocol", task.name);
  const std::string question = t.cleaning == Cleaning::hellaswag
                                   ? capitalise_hellaswag(row.context, row.question)
                                   : row.question;
  std::string_view before, after;
  if ((t.context + t.continuation).find("_blank}") != std::string::npos) {
    const std::size_t blank = question.find('_');
    require(blank != std::string::npos, "row {}: the sentence has no blank \"_\"", row.id);
    before = std::string_view(question).substr(0, blank);
    after = stripped(std::string_view(question).substr(blank + 1));
  }
  std::vector<TextPair> out;
  for (const std::string& choice : row.choices) {
    const std::string shown = cleaned(task, choice);
    const TemplateValues values{{"context", row.context},
                                {"question", question},
                                {"choice", shown},
                                {"before_blank", before},
                                {"after_blank", after}};
    out.push_back({cleaned(task, fill_template(t.context, values)),
                   t.delimiter + fill_template(t.continuation, values)});
  }
  return out;
}

std::string few_shot_text(const Task& task, const Dataset& shots, std::int64_t n) {
  require(n <= static_cast<std::int64_t>(shots.rows.size()),
          "task {}: few_shot {}, but {} has {} rows", task.name, n, shots.file, shots.rows.size());
  std::string text;
  for (std::int64_t i = 0; i < n; ++i) {
    const Row& row = shots.rows[static_cast<std::size_t>(i)];
    const TextPair gold = choice_texts(task, row)[static_cast<std::size_t>(row.answer)];
    text += gold.context + gold.continuation + "\n\n";
  }
  return text;
}

ScoredText encode_pair(const TextPair& pair, const Tokenizer& tokenizer, Bos bos,
                       std::int64_t limit, bool& truncated) {
  const std::size_t moved = trailing_space(pair.context);
  const std::string context = pair.context.substr(0, pair.context.size() - moved);
  const std::string whole = pair.context + pair.continuation;
  ScoredText t;
  t.tokens = encode(tokenizer, whole, bos);
  std::vector<std::int32_t> head = encode(tokenizer, context, bos);
  if (head.empty()) {
    head = tokenizer.prefix();
    require(!head.empty(),
            "the context of \"{}\" is empty and the tokenizer has no BOS to stand for it",
            pair.continuation);
    t.tokens.insert(t.tokens.begin(), head.begin(), head.end());
  }
  t.scored_from = static_cast<std::int32_t>(head.size());
  require(t.tokens.size() > head.size(), "\"{}\" adds no token to its context", pair.continuation);
  const auto size = static_cast<std::int64_t>(t.tokens.size());
  if (limit > 0 && size - 1 > limit) {  // the last id is only a target
    const std::int64_t cut = size - 1 - limit;
    require(cut < t.scored_from, "\"{}\": the continuation alone has more than {} tokens",
            pair.continuation, limit);
    t.tokens.erase(t.tokens.begin(), t.tokens.begin() + cut);
    t.scored_from -= static_cast<std::int32_t>(cut);
    truncated = true;
  }
  return t;
}

double choice_length(const Task& task, const Row& row, std::size_t choice,
                     const std::string& metric) {
  if (metric == "acc") return 1;
  const std::string text = cleaned(task, row.choices.at(choice));
  return static_cast<double>(metric == "acc_norm" ? code_points(text) : text.size());
}

}  // namespace mixlora
