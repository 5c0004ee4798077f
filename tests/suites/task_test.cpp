// Tasks as data: the shipped ones, own ones, what is wrong with a task file.
#include "suites/task.h"

#include <cstdlib>
#include <set>

#include <nlohmann/json.hpp>

#include "suites/shipped.h"
#include "tests/suites/temporary.h"
#include "tests/support/catch.h"

using namespace mixlora;
using Catch::Matchers::ContainsSubstring;

namespace {

const char* const kOwnTask = R"({
  "name": "capitals",
  "folder": "rows",
  "choices": [2, 2],
  "splits": [{"name": "train", "file": "a"}, {"name": "test", "file": "b", "rows": 1}],
  "label_token": {"prompt": "{question}\n{choices}\nAnswer:", "separator": " or "},
  "loglikelihood": {"context": "{question}", "metrics": ["acc", "acc_norm"]}
})";
const char* const kOwnRow =
    R"({"id": "1", "context": "", "question": "Capital of France?", "choices": ["Paris", "Nice"], "labels": ["A", "B"], "answer": 0})";

/// What parse_task says of the own task after one change.
std::string complaint(const std::string& from, const std::string& to) {
  std::string text = kOwnTask;
  const auto at = text.find(from);
  REQUIRE(at != std::string::npos);
  text.replace(at, from.size(), to);
  return message_of([&] { parse_task(text, "own.json", "."); });
}

}  // namespace

TEST_CASE("twelve tasks ship with the program, the eight published ones first", "[suites][task]") {
  const std::vector<std::string> published{"arc-e", "arc-c", "boolq",     "obqa",
                                           "piqa",  "siqa",  "hellaswag", "winogrande"};
  REQUIRE(tasks().size() == 12);
  std::set<std::string> names;
  for (std::size_t i = 0; i < tasks().size(); ++i) {
    const Task& t = tasks()[i];
    CAPTURE(t.name);
    if (i < published.size()) CHECK(t.name == published[i]);
    CHECK(t.starter == (i >= published.size()));
    CHECK(names.insert(t.name).second);
    for (const auto& alias : t.aliases) CHECK(names.insert(alias).second);
    for (const Split& s : t.splits) CHECK(s.rows > 0);
    CHECK(t.column != "");
  }
}

TEST_CASE("a task is found by its name and by its other names", "[suites][task]") {
  CHECK(find_task("arc-e").folder == "arc_easy");
  CHECK(find_task("arc_easy").name == "arc-e");
  CHECK(find_task("social-iqa").name == "siqa");
  CHECK_THAT(message_of([] { find_task("helaswag"); }),
             ContainsSubstring("did you mean \"hellaswag\"?"));
}

TEST_CASE("starter suites are read from the program", "[suites][task]") {
  for (const Task& t : tasks()) {
    if (!t.starter) continue;
    CAPTURE(t.name);
    CHECK(load_split(t, true, 0).rows.size() == 96);
    CHECK(load_split(t, false, 0).rows.size() == 64);
    CHECK(load_split(t, false, 5).rows.size() == 5);
  }
}

TEST_CASE("a mix is its tasks in order", "[suites][task]") {
  CHECK(mix_names({"arc-e; boolq", "piqa"}) == std::vector<std::string>{"arc-e", "boolq", "piqa"});
  CHECK_THAT(message_of([] { mix_names({"arc-e;;piqa"}); }), ContainsSubstring("empty name"));
}

TEST_CASE("an own task is its JSON file with the rows beside it", "[suites][task]") {
  const Temporary folder("own-task");
  const auto file = folder.write("capitals.json", kOwnTask);
  folder.write("rows/b.jsonl", kOwnRow);
  const Task t = find_task(file.string());
  CHECK(t.name == "capitals");
  CHECK(t.column == "capitals");
  CHECK(load_split(t, false, 0).rows.at(0).choices.at(0) == "Paris");
  CHECK_THAT(message_of([&] { load_split(t, true, 0); }),
             ContainsSubstring("split \"train\"") && ContainsSubstring("rows/a.jsonl"));
}

TEST_CASE("a file of rows is a task of its own", "[suites][task]") {
  const Temporary folder("own-rows");
  const auto file = folder.write("trivia.jsonl", kOwnRow);
  const Task t = find_task(file.string());
  CHECK(t.name == "trivia");
  CHECK(load_split(t, true, 0).rows.size() == 1);
  CHECK(load_split(t, false, 0).rows.at(0).id == "1");
  CHECK_THAT(message_of([&] { find_task((folder.path / "absent.jsonl").string()); }),
             ContainsSubstring("no such file of rows"));
}

TEST_CASE("absent data names the file that was looked for and how to get it", "[suites][task]") {
  const Temporary folder("no-data");
  const char* set = std::getenv("MIXLORA_DATA");
  const std::string before = set == nullptr ? "" : set;
  ::setenv("MIXLORA_DATA", folder.path.c_str(), 1);
  const std::string said = message_of([] { load_split(find_task("arc-e"), false, 0); });
  if (before.empty())
    ::unsetenv("MIXLORA_DATA");
  else
    ::setenv("MIXLORA_DATA", before.c_str(), 1);
  CHECK_THAT(said, ContainsSubstring((folder.path / "arc_easy/test.jsonl").string()) &&
                       ContainsSubstring("MIXLORA_DATA"));
}

TEST_CASE("what a row may not have is said with its file", "[suites][task]") {
  const Temporary folder("bad-rows");
  const auto file = folder.write("capitals.json", kOwnTask);
  folder.write("rows/b.jsonl",
               R"({"id": "1", "context": "", "question": "q", "choices": ["x", "y", "z"], )"
               R"("labels": ["A", "B", "C"], "answer": 0})");
  CHECK_THAT(message_of([&] { load_split(find_task(file.string()), false, 0); }),
             ContainsSubstring("row 1: 3 choices; task capitals has 2 to 2"));
}

TEST_CASE("a wrong task file says what and where", "[suites][task]") {
  CHECK(complaint("capitals", "capitals").empty());
  CHECK_THAT(complaint("\"folder\"", "\"foldr\""),
             ContainsSubstring("own.json") && ContainsSubstring("did you mean \"folder\"?"));
  CHECK_THAT(complaint("{question}\\n", "{qestion}\\n"),
             ContainsSubstring("own.json.label_token.prompt: no field \"{qestion}\"; did you mean "
                               "\"question\"?"));
  CHECK_THAT(complaint("{choices}", "{choices"), ContainsSubstring("stands alone"));
  CHECK_THAT(complaint("acc_norm", "acc_nrm"), ContainsSubstring("did you mean \"acc_norm\"?"));
  CHECK_THAT(complaint("\"acc\", ", ""),
             ContainsSubstring("headline: \"acc\" is not among its metrics"));
  CHECK_THAT(complaint("\"train\"", "\"test\""),
             ContainsSubstring("splits[1]: the split \"test\" stands"));
  CHECK_THAT(complaint("\"train\"", "\"trian\""), ContainsSubstring("train: no split \"train\""));
  CHECK_THAT(complaint("[2, 2]", "[3, 2]"), ContainsSubstring("choices: expected [fewest, most]"));
  CHECK_THAT(complaint("\"capitals\"", "\"a;b\""), ContainsSubstring("a name has no space"));
  CHECK_THAT(complaint("\"rows\": 1", "\"rows\": -1"), ContainsSubstring("splits[1].rows: -1"));
  CHECK_THAT(complaint("\"rows\": 1", "\"sha256\": \"12\""),
             ContainsSubstring("64 hexadecimal digits"));
}
