// Prompts of the label-token protocol: the texts, the labels, what is cut.
#include "suites/prompt.h"

#include "tests/suites/real_things.h"
#include "tests/suites/temporary.h"

using namespace mixlora;
using Catch::Matchers::ContainsSubstring;

namespace {

Row lettered_row(std::string context, std::string question, std::vector<std::string> choices,
                 std::int64_t answer = 1) {
  Row r{"r", std::move(context), std::move(question), std::move(choices), {}, answer};
  for (std::size_t i = 0; i < r.choices.size(); ++i)
    r.labels.emplace_back(1, static_cast<char>('A' + i));
  return r;
}
ProtocolSpec official() {
  ProtocolSpec s;
  s.label_rule = LabelRule::official;
  return s;
}

}  // namespace

TEST_CASE("prompts are those of the label-token protocol, letter by letter", "[suites][prompt]") {
  CHECK(prompt_text(find_task("arc-e"), lettered_row("", "Why?", {"p", "q", "r"})) ==
        "Please choose the correct answer to the question: Why? (A) p (B) q (C) r\nAnswer:");
  CHECK(prompt_text(find_task("boolq"), lettered_row("Pass -- age", "is it", {"no", "yes"})) ==
        "Please answer the following question with true or false: is it?\nAnswer:");
  CHECK(prompt_text(find_task("piqa"), lettered_row("", "Goal", {"one", "two"})) ==
        "Below is a common task along with two possible solutions labeled (A) and (B). Please "
        "select the appropriate solution to achieve the task:\nGoal\n\n(A) one\n(B) "
        "two\n\nCorrect solution:");
  CHECK(prompt_text(find_task("siqa"), lettered_row("Ann fell.", "Why?", {"a", "b", "c"})) ==
        "Please choose the correct answer to the question.\nQuestion: Ann fell. Why?\n(A) a\n(B) "
        "b\n(C) c\nAnswer:");
  CHECK(
      prompt_text(find_task("hellaswag"), lettered_row("Diving", "A man", {"a", "b", "c", "d"})) ==
      "Please choose the correct ending to complete the given sentence.\nSentence: Diving. A "
      "man\n(A) a\n(B) b\n(C) c\n(D) d\nAnswer:");
  CHECK(prompt_text(find_task("winogrande"), lettered_row("", "The _ is.", {"x", "y"})) ==
        "Please choose the correct answer to fill in the blank to complete the given "
        "sentence.\nSentence: The _ is.\n(A) x\n(B) y\nAnswer:");
}

TEST_CASE("BoolQ's passage is an option", "[suites][prompt]") {
  ProtocolSpec with;
  with.boolq_passage = true;
  CHECK(
      prompt_text(find_task("boolq"), lettered_row("Pass -- age", "is it", {"no", "yes"}), with) ==
      "Pass -- age\nPlease answer the following question with true or false: is "
      "it?\nAnswer:");
  CHECK(prompt_text(find_task("arc-e"), lettered_row("", "Why?", {"p", "q"}), with) ==
        prompt_text(find_task("arc-e"), lettered_row("", "Why?", {"p", "q"})));
}

TEST_CASE("only the offered labels compete, the official rule offers all", "[suites][prompt]") {
  const Task arc = find_task("arc-e");
  const Row r = lettered_row("", "Why?", {"p", "q", "r"});
  CHECK(label_texts(arc, r) == std::vector<std::string>{"A", "B", "C"});
  CHECK(gold_label(arc, r) == 1);
  CHECK(label_texts(arc, r, official()).size() == 9);
  CHECK(label_texts(arc, r, official())[5] == "B");
  CHECK(gold_label(arc, r, official()) == 5);
  const Task truth = find_task("starter-truth");
  Row t = lettered_row("", "is it", {"no", "yes"});
  t.labels = {"false", "true"};
  CHECK(label_texts(truth, t) == t.labels);
  CHECK_THAT(message_of([&] { label_texts(truth, t, official()); }),
             ContainsSubstring("no official label rule"));
}

TEST_CASE("a long prompt keeps its end; the official rule keeps its start", "[suites][prompt]") {
  if (!has_model()) return;
  const Tokenizer tokenizer(real_model());
  std::string much;
  for (int i = 0; i < 200; ++i) much += "word ";
  const Task task = find_task("piqa");
  const Row r = lettered_row("", much, {"one", "two"});
  const auto whole = tokenizer.encode_with_special(prompt_text(task, r));
  LabelRequests corrected(task, tokenizer, {}, 64), as_official(task, tokenizer, official(), 64);
  const LabelRequest a = corrected.request(r), b = as_official.request(r);
  REQUIRE(a.prompt.size() == 64);
  CHECK(std::equal(a.prompt.end() - 48, a.prompt.end(), whole.end() - 48));
  CHECK(std::equal(a.prompt.begin(), a.prompt.begin() + 16, whole.begin()));
  REQUIRE(b.prompt.size() == 64);
  CHECK(std::equal(b.prompt.begin(), b.prompt.end(), whole.begin()));
  CHECK(corrected.truncated() == 1);
  CHECK(as_official.truncated() == 1);
  CHECK(a.labels == b.labels);
  CHECK(tokenizer.decode({a.labels[0]}) == " A");
}

TEST_CASE("a training text is the prompt and the answer, the answer never cut",
          "[suites][prompt]") {
  if (!has_model()) return;
  const Tokenizer tokenizer(real_model());
  const Task task = find_task("arc-e");
  const Row r = lettered_row("", "Why is the sky blue in the day?", {"paint", "scattering"});
  Truncation cut;
  const TrainItem whole = train_item(task, r, tokenizer, 512, cut);
  CHECK(tokenizer.decode(whole.tokens) == prompt_text(task, r) + " B");
  CHECK(whole.answer_begin == static_cast<std::int32_t>(whole.tokens.size()) - 1);
  CHECK(cut.rows == 0);
  const TrainItem shorter = train_item(task, r, tokenizer, 12, cut);
  CHECK(cut.rows == 1);
  CHECK(shorter.tokens.size() == 12);
  CHECK(shorter.answer_begin == 11);
  CHECK(shorter.tokens.back() == whole.tokens.back());
}
