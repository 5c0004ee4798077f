// The gate as CI uses it: the program trains a tiny model, and check holds runs against a baseline.
#include <fstream>

#include "tests/experiments/program.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

/// A suite in the project's form whose answer is mostly (D): an adapter that learns says (D), an
/// untrained tiny model does not.
void write_suite(const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder / "openbookqa");
  for (const auto& [split, n] : {std::pair{"train", 48}, {"test", 120}}) {
    std::ofstream out(folder / "openbookqa" / (std::string(split) + ".jsonl"));
    for (int i = 0; i < n; ++i)
      out << Json{{"id", std::string(split) + "-" + std::to_string(i)},
                  {"context", ""},
                  {"question", "which " + std::to_string(i % 10)},
                  {"choices", {"w", "x", "y", "z"}},
                  {"labels", {"A", "B", "C", "D"}},
                  {"answer", i % 8 == 0 ? i % 3 : 3}}
                 .dump()
          << "\n";
  }
}

class GatedProgram : public Program {
 public:
  GatedProgram() {
    write_suite(folder() / "data");
    setenv("MIXLORA_DATA", (folder() / "data").c_str(), 1);
    sweep("s.json", 5e-3, {"lora", "mixlora"});
  }
  ~GatedProgram() { unsetenv("MIXLORA_DATA"); }
  void sweep(const std::string& file, double lr, const std::vector<std::string>& methods) const {
    const Json more = {
        {"name", "s"},
        {"base",
         {{"train", {{"tasks", {"obqa"}}, {"limit", 48}, {"lr", lr}, {"train_on", "answer"}}},
          {"evaluate", {{"suites", {"obqa"}}, {"limit", 0}}}}}};
    write_sweep(file, methods, more.dump());
  }
  /// Runs a sweep into a store and checks it; times on a shared machine are another test's matter.
  Output run_and_check(const std::string& file, const std::string& db,
                       std::vector<std::string> more = {}) const {
    const Output ran = run({"run", file, "--db", db});
    INFO(ran.err);
    REQUIRE(ran.code == 0);
    std::vector<std::string> arguments{"check", "--baseline",      "baseline.json",
                                       db,      "--latency-ratio", "0"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run(arguments);
  }
};

}  // namespace

TEST_CASE("check catches a changed learning rate and a missing trial, not ten plain reruns",
          "[reports][gate][program]") {
  GatedProgram p;
  REQUIRE(p.run({"run", "s.json", "--db", "first.db"}).code == 0);
  REQUIRE(p.run({"check", "--baseline", "baseline.json", "--update", "first.db"}).code == 0);
  for (int i = 0; i < 10; ++i) {
    const Output again = p.run_and_check("s.json", "again" + std::to_string(i) + ".db");
    INFO(again.out << again.err);
    REQUIRE(again.code == 0);
    REQUIRE(again.out.find("Check of s: passed") != std::string::npos);
  }
  p.sweep("changed.json", 1e-7, {"lora", "mixlora"});
  const Output changed =
      p.run_and_check("changed.json", "changed.db", {"--junit", "j.xml", "--summary", "s.md"});
  INFO(changed.out << changed.err);
  REQUIRE(changed.code == 1);
  REQUIRE(changed.out.find("/train/lr 0.005 -> 1e-07") != std::string::npos);
  REQUIRE(changed.out.find("accuracy OBQA") != std::string::npos);
  REQUIRE(std::filesystem::exists(p.folder() / "j.xml"));
  REQUIRE(std::filesystem::exists(p.folder() / "s.md"));
  p.sweep("fewer.json", 5e-3, {"lora"});
  const Output missing = p.run_and_check("fewer.json", "fewer.db");
  REQUIRE(missing.code == 1);
  REQUIRE(missing.out.find("the trial is missing from the sweep") != std::string::npos);
}

TEST_CASE("report, compare and check answer as their help says", "[reports][program]") {
  GatedProgram p;
  REQUIRE(p.run({"run", "s.json", "--db", "a.db"}).code == 0);
  p.sweep("t.json", 1e-7, {"lora", "mixlora"});
  REQUIRE(p.run({"run", "t.json", "--db", "b.db"}).code == 0);

  const Output only = p.run({"report", "a.db", "--only", "accuracy", "--format", "csv"});
  REQUIRE(only.code == 0);
  REQUIRE(only.out.starts_with("trial,OBQA,OBQA se\n"));
  REQUIRE(p.run({"report", "a.db", "--only", "acuracy"}).code == 2);
  REQUIRE(p.run({"report", "nowhere.db"}).code == 2);
  const Output rank = p.run({"report", "a.db", "--only", "rank"});
  REQUIRE(rank.code == 0);
  REQUIRE(rank.err.find("has nothing for it") != std::string::npos);
  REQUIRE(p.run({"report", "a.db", "--out", "tables", "--html", "page.html"}).code == 0);
  for (const char* file : {"tables/accuracy.md", "tables/accuracy.csv", "tables/accuracy.tex",
                           "tables/accuracy.json", "tables/learning-curves.csv", "page.html"})
    REQUIRE(std::filesystem::exists(p.folder() / file));
  const Output json = p.run({"report", "a.db", "--format", "json"});
  REQUIRE(parse_json(json.out, "report").is_array());

  const Output stores = p.run({"compare", "a.db", "b.db"});
  INFO(stores.out << stores.err);
  REQUIRE(stores.code == 0);
  REQUIRE(stores.out.find("worse") != std::string::npos);
  REQUIRE(p.run({"compare", "a.db", "b.db", "--fail-on-regression"}).code == 1);
  const Output trials = p.run({"compare", "--db", "a.db", "lora", "mixlora"});
  REQUIRE(trials.code == 0);
  REQUIRE(trials.out.find("lora → mixlora") != std::string::npos);
  REQUIRE(p.run({"compare", "a.db:lora", "b.db:lora"}).code == 0);
  REQUIRE(p.run({"compare", "a.db", "b.db:lora"}).code == 2);
  const Output wrong = p.run({"compare", "--db", "a.db", "lora", "mixlorra"});
  REQUIRE(wrong.code == 2);
  REQUIRE(wrong.err.find("\"mixlora\"") != std::string::npos);

  // Refused before anything is printed or written.
  const Output nobody =
      p.run({"report", "a.db", "--against", "nobody", "--out", "half", "--html", "half.html"});
  REQUIRE(nobody.code == 2);
  REQUIRE(nobody.out.empty());
  REQUIRE(nobody.err.find("no trial \"nobody\" to compare with; expected one of \"lora\"") !=
          std::string::npos);
  REQUIRE_FALSE(std::filesystem::exists(p.folder() / "half"));
  REQUIRE_FALSE(std::filesystem::exists(p.folder() / "half.html"));
  const Output other = p.run({"report", "a.db", "--sweep", "other"});
  REQUIRE(other.code == 2);
  REQUIRE(other.err.find("a.db: holds no sweep \"other\"; it holds s") != std::string::npos);

  const Output absent = p.run({"check", "--baseline", "absent.json", "a.db"});
  REQUIRE(absent.code == 2);
  REQUIRE(absent.err.find("check --baseline absent.json --update DB writes it") !=
          std::string::npos);
  p.write("broken.json", "{");
  REQUIRE(p.run({"check", "--baseline", "broken.json", "a.db"}).code == 2);
}
