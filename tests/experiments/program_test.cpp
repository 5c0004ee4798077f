// The program as a user meets it: exit codes, messages, what a second run does.
#include "tests/experiments/program.h"

#include <cmath>
#include <map>

#include "tests/support/catch.h"

using namespace mixlora;

TEST_CASE("a second run of a finished sweep runs nothing", "[experiments][program]") {
  const Program p;
  p.write_sweep("s.json", {"base", "lora"});
  const Output first = p.run({"run", "s.json"});
  INFO(first.err);
  REQUIRE(first.code == 0);
  CHECK(first.out.find("Accuracy") != std::string::npos);
  CHECK(std::filesystem::exists(p.folder() / "runs/s-tables/accuracy.csv"));
  const Output second = p.run({"run", "s.json"});
  CHECK(second.code == 0);
  CHECK(second.out == first.out);
  CHECK(second.err.find("nothing was left to run") != std::string::npos);
  CHECK(count_of(p.folder() / "runs/s.db", "SELECT count(*) FROM attempt") == 2);
  CHECK(p.run({"report", "runs/s.db"}).code == 0);
  CHECK(p.run({"status", "s.json"}).out.find("done") != std::string::npos);
}

TEST_CASE("a sweep that grows runs only what is new", "[experiments][program]") {
  const Program p;
  p.write_sweep("s.json", {"lora"});
  REQUIRE(p.run({"run", "s.json"}).code == 0);
  p.write_sweep("s.json", {"lora", "dora"});
  const Output plan = p.run({"plan", "s.json", "--quick"});
  CHECK(plan.out.find("keep      lora: done before, with the same spec, model and data") !=
        std::string::npos);
  CHECK(plan.out.find("run       dora: not run before") != std::string::npos);
  REQUIRE(p.run({"run", "s.json"}).code == 0);
  CHECK(count_of(p.folder() / "runs/s.db", "SELECT count(*) FROM attempt") == 2);
}

TEST_CASE("a failing trial is a row and the others go on", "[experiments][program]") {
  const Program p;
  p.write_sweep("s.json", {"lora"},
                R"({"include": [{"label": "too long", "train": {"tasks": ["starter-truth"],
                    "cutoff_len": 512}, "evaluate": {"cutoff_len": 512}},
                   {"label": "r2", "adapter": {"r": 2}}]})");
  // Texts of more than 128 bytes do not fit the model's positions.
  const Output o = p.run({"run", "s.json"});
  INFO(o.err);
  const auto store = p.folder() / "runs/s.db";
  const auto failed = count_of(store, "SELECT count(*) FROM trial WHERE status = 'failed'");
  CHECK(o.code == 1);
  CHECK(failed == 1);
  CHECK(count_of(store, "SELECT count(*) FROM trial WHERE status = 'done'") == 2);
  CHECK(count_of(store, "SELECT length(reason) > 10 FROM trial WHERE status = 'failed'") == 1);
  const Output again = p.run({"run", "s.json"});
  CHECK(again.code == 1);
  CHECK(again.err.find("--retry-failed tries again") != std::string::npos);
  CHECK(count_of(store, "SELECT count(*) FROM attempt") == 3);
  p.run({"run", "s.json", "--retry-failed"});
  CHECK(count_of(store, "SELECT count(*) FROM attempt") == 4);
}

TEST_CASE("what does not fit the memory limit is refused by plan and is a row of run",
          "[experiments][program]") {
  const Program p;
  p.write_sweep("s.json", {"base", "lora"}, R"({"run": {"memory_limit_gib": 0.0005}})");
  const Output plan = p.run({"plan", "s.json", "--quick"});
  INFO(plan.out);
  CHECK(plan.code == 1);
  CHECK(plan.out.find("refuse    lora: needs") != std::string::npos);
  const Output run = p.run({"run", "s.json"});
  CHECK(run.code == 1);
  const auto store = p.folder() / "runs/s.db";
  CHECK(count_of(store, "SELECT count(*) FROM trial WHERE status = 'out_of_memory'") == 1);
  CHECK(count_of(store, "SELECT count(*) FROM trial WHERE status = 'done'") == 1);
  CHECK(count_of(store, "SELECT count(*) FROM step") == 0);
}

TEST_CASE("trials in one step learn what each learns alone", "[experiments][program][pack]") {
  const Program p;
  const std::vector<std::string> methods{"base", "lora", "dora", "mixlora", "mixdora"};
  p.write_sweep("alone.json", methods, R"({"run": {"pack": "off"}})");
  p.write_sweep("packed.json", methods, R"({"run": {"pack": 4}})");
  REQUIRE(p.run({"run", "alone.json"}).code == 0);
  const Output o = p.run({"run", "packed.json"});
  INFO(o.err);
  REQUIRE(o.code == 0);
  const auto losses = [&](const char* store) {
    Database db = open_store(p.folder() / store);
    std::map<std::pair<std::string, std::int64_t>, double> out;
    Statement(db,
              "SELECT r.label, s.step, s.loss FROM result r JOIN step s ON s.attempt = r.attempt")
        .rows<std::string, std::int64_t, double>(
            [&](std::string label, std::int64_t step, double loss) {
              out[{std::move(label), step}] = loss;
            });
    return out;
  };
  const auto alone = losses("runs/alone.db"), packed = losses("runs/packed.db");
  REQUIRE(alone.size() == 4 * 8);
  REQUIRE(packed.size() == alone.size());
  constexpr double kRounding = 1e-5;  // relative: sums in another order, in fp32
  for (const auto& [at, loss] : alone) {
    INFO(at.first << " step " << at.second);
    CHECK(std::abs(packed.at(at) - loss) <= kRounding * std::abs(loss));
  }
  CHECK(count_of(p.folder() / "runs/packed.db",
                 "SELECT count(*) FROM measurement WHERE name = 'trials_in_step' AND value = 4") ==
        4);
}

TEST_CASE("wrong input is one message and exit code 2", "[experiments][program]") {
  const Program p;
  p.write_sweep("s.json", {"lora"});
  p.write("twice.json", R"({"name": "a", "name": "b"})");
  p.write_sweep("nomodel.json", {"lora"}, R"({"model": "nowhere"})");
  p.write_sweep("nodata.json", {"lora"}, R"({"base": {"train": {"tasks": ["arc-e"]}}})");
  p.write("foreign.db", "this is no database, and long enough to be told from an empty file");
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases{
      {{"run", "none.json"}, "none.json: no such file"},
      {{"run", "twice.json"}, "the key \"name\" stands twice"},
      {{"run", "nomodel.json"}, "nowhere"},
      {{"run", "s.json", "--db", "foreign.db"}, "foreign.db: not a store of this program"},
      {{"run", "s.json", "--db", "no/such/folder.db"}, "the folder no/such is not there"},
      {{"plan", "s.json", "--db", "foreign.db"}, "foreign.db: not a store of this program"},
      {{"status", "foreign.db"}, "foreign.db: not a store of this program"},
      {{"report", "none.db"}, "none.db: no such file"},
      {{"run"}, "sweep is required"},
      {{"run", "s.json", "--frob"}, "--frob"},
      {{"rum"}, "no command \"rum\"; did you mean \"run\"?"},
      {{}, "subcommand is required"}};
  for (const auto& [arguments, expected] : cases) {
    const Output o = p.run(arguments);
    INFO(expected << " in:\n" << o.err);
    CHECK(o.code == 2);
    CHECK(o.err.find(expected) != std::string::npos);
    CHECK(o.out.empty());
  }
  CHECK(!std::filesystem::exists(p.folder() / "runs"));  // nothing half
  const Output data = p.run({"run", "nodata.json"});
  if (std::getenv("MIXLORA_DATA") == nullptr) {
    CHECK(data.code == 2);
    CHECK(data.err.find("set MIXLORA_DATA to the folder") != std::string::npos);
  }
}

TEST_CASE("plan, status and schema speak JSON to programs", "[experiments][program]") {
  const Program p;
  p.write_sweep("s.json", {"base", "lora"});
  const Json plan = parse_json(p.run({"plan", "s.json", "--quick", "--json"}).out, "plan");
  CHECK(plan["trials"].size() == 2);
  CHECK(plan["trials"][1]["steps"] == 8);
  REQUIRE(p.run({"run", "s.json"}).code == 0);
  const Json status = parse_json(p.run({"status", "runs/s.db", "--json"}).out, "status");
  CHECK(status["running"] == false);
  CHECK(status["trials"][1]["status"] == "done");
  CHECK(parse_json(p.run({"schema"}).out, "schema")["type"] == "object");
  CHECK(p.run({"--version"}).code == 0);
}
