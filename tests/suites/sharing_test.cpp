// What sharing the start of a row's texts saves. Hidden: run it alone on a quiet machine,
//   test_suites "[timing]"
// MIXLORA_TIMED_ROWS: rows of each suite, 40 without it.
#include <chrono>

#include "engine/model.h"
#include "engine/scorer.h"
#include "suites/evaluate.h"
#include "tests/suites/real_things.h"

using namespace mixlora;

TEST_CASE("shared starts are faster and answer the same", "[.][timing]") {
  REQUIRE(has_model());
  REQUIRE(has_data());
  const char* set = std::getenv("MIXLORA_TIMED_ROWS");
  const std::int64_t rows = set == nullptr ? 40 : std::stoll(set);
  const Tokenizer tokenizer(real_model());
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::load(*ops, real_model());
  ProtocolSpec spec;
  spec.protocol = Protocol::loglikelihood;
  for (const char* name : {"arc-e", "arc-c", "hellaswag"}) {
    const Task task = find_task(name);
    const Dataset data = load_split(task, false, rows);
    double seconds[2] = {0, 0};
    std::int64_t tokens[2] = {0, 0};
    std::vector<Answer> answers[2];
    for (const bool shared : {false, true}) {
      Scorer scorer(*ops, *model, nullptr, 1024, shared);
      scorer.choices({});
      const auto start = std::chrono::steady_clock::now();
      answers[shared] = evaluate(task, data, tokenizer, scorer.scoring(), spec, 0, 8192).answers;
      seconds[shared] =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      tokens[shared] = scorer.tokens();
    }
    std::size_t same = 0;
    for (std::size_t i = 0; i < data.rows.size(); ++i)
      same += answers[0][i].choice == answers[1][i].choice ? 1 : 0;
    WARN(name << ": " << data.rows.size() << " rows, " << same << " same answers; apart "
              << tokens[0] << " tokens, " << seconds[0] << " s; shared " << tokens[1] << " tokens, "
              << seconds[1] << " s; " << seconds[0] / seconds[1] << " x");
    CHECK(same == data.rows.size());
  }
}
