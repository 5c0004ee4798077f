// Validation: counts, hashes, balance, repetitions.
#include "suites/validate.h"

#include "suites/dataset.h"
#include "tests/suites/real_things.h"
#include "tests/suites/temporary.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

std::string row(const std::string& id, const std::string& question, int answer) {
  return R"({"id":")" + id + R"(","context":"","question":")" + question +
         R"(","choices":["x","y"],"labels":["A","B"],"answer":)" + std::to_string(answer) + "}\n";
}

}  // namespace

TEST_CASE("shipped and present splits are what is on record", "[suites][validate]") {
  for (const Task& task : tasks()) {
    if (!task.starter) continue;
    for (const Split& split : task.splits) {
      CAPTURE(task.name, split.name);
      const SplitReport r = validate_split(task, split, nullptr, 512);
      CHECK(r.good());
      CHECK(r.hash_state == HashState::same);
    }
    CHECK(overlap(load_split(task, true, 0), load_split(task, false, 0)) == 0);
  }
  if (!has_data()) return;
  for (const char* name : {"arc-c", "obqa", "winogrande"}) {
    const Task task = find_task(name);
    CAPTURE(name);
    CHECK(validate_split(task, task.split(task.test_split), nullptr, 512).hash_state ==
          HashState::same);
  }
}

TEST_CASE("a changed row, a missing row and a repeated row are seen", "[suites][validate]") {
  const Temporary folder("validate");
  const auto file =
      folder.write("own.jsonl", row("1", "p", 0) + row("2", "q", 1) + row("3", "p", 0));
  const Task task = find_task(file.string());
  Split split = task.split("test");
  const SplitReport r = validate_split(task, split, nullptr, 512);
  CHECK(r.rows == 3);
  CHECK(r.repeated == 1);
  REQUIRE(r.gold.size() == 2);
  CHECK(r.majority() == Approx(2.0 / 3));
  CHECK(r.hash_state == HashState::not_on_record);
  CHECK(r.good());

  split.sha256 = r.hash;
  split.rows = 4;
  CHECK_FALSE(validate_split(task, split, nullptr, 512).good());
  split.rows = 3;
  CHECK(validate_split(task, split, nullptr, 512).good());
  folder.write("own.jsonl", row("9", "p", 0) + row("8", "q", 1) + row("7", "p", 0));
  CHECK(validate_split(task, split, nullptr, 512).hash_state == HashState::same);  // ids are free
  folder.write("own.jsonl", row("1", "p", 0) + row("2", "q", 0) + row("3", "p", 0));
  CHECK(validate_split(task, split, nullptr, 512).hash_state == HashState::differs);
  CHECK_FALSE(validate_split(task, split, nullptr, 512).good());
  split.edition = "another text";
  CHECK(validate_split(task, split, nullptr, 512).hash_state == HashState::other_edition);
}

TEST_CASE("rows of test that train asks too are counted", "[suites][validate]") {
  const Dataset train = parse_dataset(row("1", "p", 0) + row("2", "q", 1), "train");
  const Dataset test = parse_dataset(row("1", "q", 0) + row("2", "r", 1), "test");
  CHECK(overlap(train, test) == 1);
}
