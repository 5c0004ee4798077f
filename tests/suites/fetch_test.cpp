// Fetching a suite: from the Hub played here, from a folder, and what is refused.
#include "suites/fetch.h"

#include <nlohmann/json.hpp>

#include "engine/sha256.h"
#include "suites/dataset.h"
#include "suites/validate.h"
#include "tests/suites/hub_server.h"
#include "tests/suites/temporary.h"
#include "tests/support/catch.h"

using namespace mixlora;
using Catch::Matchers::ContainsSubstring;

namespace {

const char* const kTask = R"({
  "name": "stones",
  "folder": "stones",
  "splits": [{"name": "train", "file": "train", "rows": 300},
             {"name": "test", "file": "dev", "official": "validation", "config": "other"}],
  "label_token": {"prompt": "{question}\n{choices}\nAnswer:"},
  "source": {"repository": "owner/stones", "config": "main", "id": "id", "question": "question",
             "choices": ["choices.text"], "answer": "answerKey", "answer_among": "choices.label"}
})";
const char* const kOfficial =
    R"({"id":"7","question":"Which?","choices":{"text":["moss","slate"],"label":["1","2"]},"answerKey":"2"})";

std::string golden_table() {
  return read_text(std::filesystem::path(MIXLORA_GOLDEN_DIR) / "parquet/hub.parquet");
}
Task stones() { return parse_task(kTask, "stones.json", ""); }

/// A Hub with one file, whose stated hash is `hash`.
HubServer::Handler hub_with(const std::string& body, const std::string& hash) {
  return [=](const HubRequest& r) -> HubReply {
    if (r.path == "/api/datasets/owner/stones/tree/refs%2Fconvert%2Fparquet/main/train")
      return {200,
              R"([{"type":"file","path":"main/train/0000.parquet","size":)" +
                  std::to_string(body.size()) + R"(,"lfs":{"oid":")" + hash + R"("}}])",
              {}};
    if (r.path == "/datasets/owner/stones/resolve/refs%2Fconvert%2Fparquet/main/train/0000.parquet")
      return {200, body, {}};
    return {404, "", {{"X-Error-Message", "Entry not found"}}};
  };
}

const Hub& no_hub() {
  static const Hub kHub("http://127.0.0.1:9", "", 0.001);
  return kHub;
}

}  // namespace

TEST_CASE("a split comes from the Hub as our rows", "[suites][fetch]") {
  const Temporary folder("fetch-hub");
  const std::string table = golden_table();
  const HubServer server(hub_with(table, sha256(table)));
  const Hub hub(server.url(), "", 0.001);
  const Task task = stones();
  FetchOptions options;
  options.data = folder.path;
  const auto file = folder.path / "stones/train.jsonl";
  CHECK(fetch_split(task, task.split("train"), options, hub) ==
        file.string() + ": 300 rows, hash not on record");
  const Dataset data = read_dataset(file);
  REQUIRE(data.rows.size() == 300);
  CHECK(data.rows[5].id == "row-5");
  CHECK(data.rows[5].labels[0] == "A");
  const auto only = std::distance(std::filesystem::directory_iterator(file.parent_path()), {});
  CHECK(only == 1);  // what was downloaded is gone

  const auto before = server.requests().size();
  CHECK_THAT(fetch_split(task, task.split("train"), options, hub), ContainsSubstring("is there"));
  CHECK(server.requests().size() == before);
  options.again = true;
  fetch_split(task, task.split("train"), options, hub);
  CHECK(server.requests().size() == before + 2);
  CHECK_THAT(message_of([&] { fetch_split(task, task.split("test"), options, hub); }),
             ContainsSubstring("other/validation: not there"));
}

TEST_CASE("rows that are not those on record are refused", "[suites][fetch]") {
  const Temporary folder("fetch-refuse");
  const std::string table = golden_table();
  const HubServer server(hub_with(table, sha256(table)));
  const Hub hub(server.url(), "", 0.001);
  const Task task = stones();
  FetchOptions options;
  options.data = folder.path;
  Split split = task.split("train");
  split.rows = 301;
  CHECK_THAT(message_of([&] { fetch_split(task, split, options, hub); }),
             ContainsSubstring("300 rows, 301 on record; nothing was written"));
  split.rows = 300;
  split.sha256 = std::string(64, '0');
  CHECK_THAT(message_of([&] { fetch_split(task, split, options, hub); }),
             ContainsSubstring("the rows' hash is") && ContainsSubstring("nothing was written"));
  CHECK_FALSE(std::filesystem::exists(folder.path / "stones/train.jsonl"));
  options.any_edition = true;
  CHECK_THAT(fetch_split(task, split, options, hub), ContainsSubstring("hash differs"));
  split.sha256 = content_hash(read_dataset(folder.path / "stones/train.jsonl"));
  options.any_edition = false;
  options.again = true;
  CHECK_THAT(fetch_split(task, split, options, hub), ContainsSubstring("hash same"));
}

TEST_CASE("a file whose hash is not the Hub's is not read", "[suites][fetch]") {
  const Temporary folder("fetch-hash");
  const HubServer server(hub_with(golden_table(), sha256("another")));
  FetchOptions options;
  options.data = folder.path;
  CHECK_THAT(message_of([&] {
               fetch_split(stones(), stones().split("train"), options,
                           Hub(server.url(), "", 0.001));
             }),
             ContainsSubstring("the Hub says " + sha256("another")));
  CHECK(std::filesystem::is_empty(folder.path / "stones"));
}

TEST_CASE("a folder of official files serves too", "[suites][fetch]") {
  const Temporary folder("fetch-folder");
  const Task task = stones();
  FetchOptions options;
  options.data = folder.path / "data";
  options.from = folder.path / "official";
  std::filesystem::create_directories(options.from);
  CHECK_THAT(
      message_of([&] { fetch_split(task, task.split("train"), options, no_hub()); }),
      ContainsSubstring("split \"train\": no train/*.parquet, train-*.parquet or train.jsonl"));
  SECTION("as the Hub's converter lays them out") {
    folder.write("official/owner/stones/main/train/0000.parquet", golden_table());
    CHECK_THAT(fetch_split(task, task.split("train"), options, no_hub()),
               ContainsSubstring("300 rows"));
  }
  SECTION("as repositories lay them out") {
    folder.write("official/stones/main/train-00000-of-00001.parquet", golden_table());
    CHECK_THAT(fetch_split(task, task.split("train"), options, no_hub()),
               ContainsSubstring("300 rows"));
  }
  SECTION("as JSON lines with the official fields") {
    folder.write("official/stones/dev.jsonl", kOfficial);
    fetch_split(task, task.split("test"), options, no_hub());
    const Row row = read_dataset(options.data / "stones/dev.jsonl").rows.at(0);
    CHECK(row.id == "7");
    CHECK(row.choices == std::vector<std::string>{"moss", "slate"});
    CHECK(row.labels == std::vector<std::string>{"A", "B"});  // lettered anew
    CHECK(row.answer == 1);
  }
  SECTION("as rows of ours") {
    folder.write("official/dev.jsonl",
                 R"({"id":"1","context":"","question":"q","choices":["x","y"],)"
                 R"("labels":["A","B"],"answer":1})");
    CHECK_THAT(fetch_split(task, task.split("test"), options, no_hub()),
               ContainsSubstring("1 rows"));
  }
  SECTION("and what is wrong in them is said with its row") {
    std::string wrong = kOfficial;
    wrong.replace(wrong.find("\"2\"}"), 3, "\"9\"");
    folder.write("official/dev.jsonl", std::string(kOfficial) + "\n" + wrong);
    CHECK_THAT(message_of([&] { fetch_split(task, task.split("test"), options, no_hub()); }),
               ContainsSubstring("dev.jsonl: row 2: the answer \"9\" is not among its labels"));
  }
}

TEST_CASE("every published suite says where it is from", "[suites][fetch]") {
  for (const Task& t : tasks()) {
    CAPTURE(t.name);
    CHECK(t.source.repository.empty() == t.starter);
  }
}

TEST_CASE("records become rows by their source's columns", "[suites][fetch]") {
  const auto row = [](const char* task, const char* record) {
    return row_of(find_task(task).source, Json::parse(record), "id-0", "here");
  };
  CHECK(row("piqa", R"({"goal":"g","sol1":"a","sol2":"b","label":1})") ==
        Json::parse(R"({"id":"id-0","context":"","question":"g","choices":["a","b"],)"
                    R"("labels":["A","B"],"answer":1})"));
  CHECK(row("siqa", R"({"context":"c","question":"q","answerA":"a","answerB":"b","answerC":"d",)"
                    R"("label":"3"})")["answer"] == 2);
  CHECK(row("boolq", R"({"question":"q","passage":"p","idx":0,"label":0})") ==
        Json::parse(R"({"id":"id-0","context":"p","question":"q","choices":["no","yes"],)"
                    R"("labels":["false","true"],"answer":0})"));
  CHECK(row("winogrande", R"({"sentence":"a _ b","option1":"x","option2":"y","answer":"2"})") ==
        Json::parse(R"({"id":"id-0","context":"","question":"a _ b","choices":["x","y"],)"
                    R"("labels":["A","B"],"answer":1})"));
  CHECK(row("hellaswag", R"({"activity_label":"l","ctx":"c","endings":["1","2","3","4"],)"
                         R"("label":"2"})")["answer"] == 2);
  CHECK_THAT(message_of([&] {
               row("hellaswag",
                   R"({"activity_label":"l","ctx":"c","endings":["1","2","3","4"],"label":""})");
             }),
             ContainsSubstring("here: \"label\" is \"\"; expected the number of a choice"));
  CHECK_THAT(message_of([&] { row("piqa", R"({"goal":"g","sol1":"a","sol2":"b"})"); }),
             ContainsSubstring("here: no \"label\""));
}
