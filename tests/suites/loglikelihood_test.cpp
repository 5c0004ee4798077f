// The loglikelihood protocol's texts and ids.
#include "suites/loglikelihood.h"

#include "suites/hellaswag_text.h"
#include "suites/white_space.h"
#include "tests/suites/real_things.h"
#include "tests/suites/temporary.h"

using namespace mixlora;
using Catch::Matchers::ContainsSubstring;

namespace {

Row row(std::string context, std::string question, std::vector<std::string> choices) {
  Row r{"r", std::move(context), std::move(question), std::move(choices), {}, 1};
  r.labels.resize(r.choices.size());
  return r;
}

}  // namespace

TEST_CASE("HellaSwag's texts are cleaned as lm-eval cleans them", "[suites][loglikelihood]") {
  CHECK(clean_hellaswag("[title] Use a remover. [step] lumpy finish [not recommended].") ==
        " Use a remover. lumpy finish .");
  CHECK(clean_hellaswag("[title] [title] In order") == ". In order");
  CHECK(clean_hellaswag("Put cocoa in. [title] Stir.") == "Put cocoa in.. Stir.");
  CHECK(clean_hellaswag("an [open bracket\nstays]") == "an [open bracket\nstays]");
  CHECK(clean_hellaswag("a   b    c") == "a  b  c");
  CHECK(capitalise_hellaswag("Diving", "A man dives. the water SPLASHES") ==
        "A man dives. The water splashes");
  CHECK(capitalise_hellaswag("Diving", "He said \"no.\" she") == "He said \"no.\" She");
  CHECK(capitalise_hellaswag("Travel", "How to pack. take little") == "How to pack. take little");
}

TEST_CASE("white space is Python's", "[suites][loglikelihood]") {
  CHECK(stripped(" \t\xc2\xa0 a b \xe3\x80\x80\n") == "a b");
  CHECK(trailing_space("a \xe2\x80\x89") == 4);
  CHECK(trailing_space("a") == 0);
  CHECK(code_points("na\xc3\xafve \xe2\x82\xac") == 7);
}

TEST_CASE("requests have lm-eval's texts", "[suites][loglikelihood]") {
  const auto arc = choice_texts(find_task("arc-e"), row("", "Why?", {"p", "q"}));
  CHECK(arc[1].context == "Question: Why?\nAnswer:");
  CHECK(arc[1].continuation == " q");
  const auto boolq = choice_texts(find_task("boolq"), row("T -- passage", "is it", {"no", "yes"}));
  CHECK(boolq[0].context == "T -- passage\nQuestion: is it?\nAnswer:");
  CHECK(boolq[0].continuation == " no");
  CHECK(choice_texts(find_task("obqa"), row("", "The sun", {"p", "q"}))[0].context == "The sun");
  CHECK(choice_texts(find_task("siqa"), row("Ann fell.", "Why?", {"p", "q", "r"}))[2].context ==
        "Q: Ann fell. Why?\nA:");
  const auto blank =
      choice_texts(find_task("winogrande"), row("", "The _ beat the _ . ", {"cat", "dog"}));
  CHECK(blank[1].context == "The dog");
  CHECK(blank[0].continuation == " beat the _ .");
  const auto ending = choice_texts(find_task("hellaswag"),
                                   row("Diving", "He waits. he", {"[step] jumps", "swims"}));
  CHECK(ending[0].context == "Diving: He waits. He");
  CHECK(ending[0].continuation == "  jumps");
  CHECK_THAT(message_of([] {
               choice_texts(find_task("winogrande"), row("", "No gap.", {"a", "b"}));
             }),
             ContainsSubstring("no blank"));
}

TEST_CASE("examples are the first ones of the split, solved", "[suites][loglikelihood]") {
  Dataset shots;
  shots.rows = {row("", "One?", {"a", "b"}), row("", "Two?", {"c", "d"})};
  const Task arc = find_task("arc-e");
  CHECK(few_shot_text(arc, shots, 2) ==
        "Question: One?\nAnswer: b\n\nQuestion: Two?\nAnswer: d\n\n");
  CHECK(few_shot_text(arc, shots, 0).empty());
  CHECK_THAT(message_of([&] { few_shot_text(arc, shots, 3); }), ContainsSubstring("few_shot 3"));
}

TEST_CASE("a pair is encoded whole, then split at the context's ids", "[suites][loglikelihood]") {
  if (!has_model()) return;
  const Tokenizer tokenizer(real_model());
  bool cut = false;
  const TextPair pair{"The answer is:  \n", "forty two"};
  const ScoredText t = encode_pair(pair, tokenizer, Bos::automatic, 0, cut);
  CHECK(tokenizer.decode(t.tokens) == pair.context + pair.continuation);
  const std::vector<std::int32_t> head(t.tokens.begin(), t.tokens.begin() + t.scored_from);
  CHECK(tokenizer.decode(head) == "The answer is:");  // white space went to the continuation
  CHECK_FALSE(cut);
  const ScoredText shorter = encode_pair(pair, tokenizer, Bos::automatic,
                                         static_cast<std::int64_t>(t.tokens.size()) - 3, cut);
  CHECK(cut);
  CHECK(shorter.tokens.size() == t.tokens.size() - 2);
  CHECK(shorter.scored_from == t.scored_from - 2);
  CHECK(shorter.tokens.back() == t.tokens.back());
}

TEST_CASE("choices are measured in characters and in bytes", "[suites][loglikelihood]") {
  const Task task = find_task("arc-e");
  const Row r = row("", "q", {"na\xc3\xafve", "b"});
  CHECK(choice_length(task, r, 0, "acc") == 1);
  CHECK(choice_length(task, r, 0, "acc_norm") == 5);
  CHECK(choice_length(task, r, 0, "acc_bytes") == 6);
}
