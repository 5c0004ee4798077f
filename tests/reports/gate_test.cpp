#include "reports/gate.h"

#include <cmath>
#include <fstream>

#include "engine/error.h"
#include "engine/json_file.h"
#include "tests/reports/study_store.h"
#include "tests/support/golden.h"

using namespace mixlora;

namespace {

/// What a rerun may differ in.
struct World {
  double skill = 0.75;        // of the adapter on 200 questions
  double slowdown = 1;        // of every step
  std::uint32_t weather = 1;  // noise of the machine: a factor a run and one a step
  double bytes_mib = 100;
  double lr = 2e-4;
  bool missing = false;
  std::int64_t questions = 200;
  std::string status = "done";
};

/// Two trials; step times are lognormal about 1 ms a token, with 4 % a step and 3 % a run.
Study study_of(const World& w) {
  StudyStore store("gate", {"method"});
  for (const std::string label : {"LoRA", "MixLoRA"}) {
    if (w.missing && label == "MixLoRA") continue;
    const std::string status = label == "LoRA" ? "done" : w.status;
    const auto a = store.trial({{"method", label}},
                               {{"adapter", {{"r", label == "LoRA" ? 16 : 8}}},
                                {"train", {{"tasks", {"piqa"}}, {"lr", w.lr}}},
                                {"evaluate", {{"suites", {"piqa"}}}}},
                               status, status == "done" ? "" : "it broke");
    if (a == 0) continue;
    store.score(a, "piqa", w.questions, 2, [&](std::int64_t i) { return unit(7, i) < w.skill; });
    store.costs(a, 100, w.bytes_mib, 1000);
    const double run = std::exp(0.06 * (unit(w.weather, 1) - 0.5));
    store.steps(
        a, 60, [](std::int64_t i) { return 1 / static_cast<double>(i); },
        [&](std::int64_t i) {
          return 100 * w.slowdown * run * std::exp(0.14 * (unit(w.weather, 100 + i) - 0.5));
        });
  }
  return read_study(store.db(), 1);
}
const Check* failure(const GateResult& r, const std::string& what) {
  for (const Check& c : r.checks)
    if (c.outcome == Outcome::failed && c.what == what) return &c;
  return nullptr;
}
std::string found(const GateResult& r) { return render(gate_table(r, false), Format::terminal); }

}  // namespace

TEST_CASE("ten reruns without a change pass the gate", "[reports][gate]") {
  const Baseline baseline = baseline_of(study_of({}));
  for (std::uint32_t weather = 2; weather < 12; ++weather) {
    World w;
    w.weather = weather;
    const GateResult r = run_gate(baseline, study_of(w), {});
    INFO(found(r));
    REQUIRE(r.passed());
    REQUIRE(r.checks.size() == 8);
  }
}

TEST_CASE("a planted regression is caught and named", "[reports][gate]") {
  const Baseline baseline = baseline_of(study_of({}));
  const auto gate = [&](auto change) {
    World w;
    w.weather = 5;
    change(w);
    return run_gate(baseline, study_of(w), {});
  };
  SECTION("accuracy") {
    const GateResult r = gate([](World& w) {
      w.skill = 0.6;
      w.lr = 0.5;
    });
    INFO(found(r));
    REQUIRE(failure(r, "accuracy PIQA") != nullptr);
    REQUIRE(found(r).find("changed: /train/lr 0.0002 -> 0.5") != std::string::npos);
  }
  SECTION("a drop below the margin is let through") {
    REQUIRE(gate([](World& w) { w.skill = 0.745; }).passed());
  }
  SECTION("latency") {
    const GateResult r = gate([](World& w) { w.slowdown = 1.4; });
    REQUIRE(failure(r, "latency") != nullptr);
    REQUIRE(r.count(Outcome::failed) == 2);                      // of both trials, and nothing else
    REQUIRE(gate([](World& w) { w.slowdown = 1.1; }).passed());  // below the ratio
    REQUIRE(gate([](World& w) { w.slowdown = 0.5; }).passed());  // faster
  }
  SECTION("memory") {
    REQUIRE(failure(gate([](World& w) { w.bytes_mib = 103; }), "memory") != nullptr);
    REQUIRE(gate([](World& w) { w.bytes_mib = 101; }).passed());
  }
  SECTION("a missing trial") {
    const GateResult r = gate([](World& w) { w.missing = true; });
    REQUIRE(failure(r, "finished") != nullptr);
    REQUIRE(failure(r, "finished")->trial == "MixLoRA");
  }
  SECTION("a failed trial") {
    const GateResult r = gate([](World& w) { w.status = "failed"; });
    REQUIRE(failure(r, "finished")->message == "the trial is failed: it broke");
  }
  SECTION("other questions") {
    const GateResult r = gate([](World& w) { w.questions = 150; });
    REQUIRE(failure(r, "accuracy PIQA")->message.find("not comparable") != std::string::npos);
  }
}

TEST_CASE("a baseline survives its file; a broken one is refused with its place",
          "[reports][gate]") {
  Folder folder;
  const auto file = folder.path / "baseline.json";
  const Study study = study_of({});
  write_baseline(baseline_of(study), file);
  const GateResult r = run_gate(read_baseline(file), study, {});
  INFO(found(r));
  REQUIRE(r.passed());
  REQUIRE(found(r).find("same bits") != std::string::npos);
  REQUIRE(std::filesystem::file_size(file) < 20000);

  std::ofstream(folder.path / "other.json") << "{}";
  REQUIRE_THROWS_WITH(read_baseline(folder.path / "other.json"),
                      Catch::Matchers::ContainsSubstring("not a baseline"));
  Json json = read_json(file);
  json["trials"][1]["scores"][0]["right"] = "012";
  std::ofstream(file) << json.dump();
  REQUIRE_THROWS_WITH(read_baseline(file), Catch::Matchers::ContainsSubstring("trials[1]"));
  json["trials"][1].erase("scores");
  std::ofstream(file) << json.dump();
  REQUIRE_THROWS_WITH(read_baseline(file), Catch::Matchers::ContainsSubstring("no \"scores\""));
  World broken;
  broken.status = "failed";
  REQUIRE_THROWS_WITH(baseline_of(study_of(broken)),
                      Catch::Matchers::ContainsSubstring("\"MixLoRA\" is failed"));
}

TEST_CASE("another device's times and bytes are not held against ours", "[reports][gate]") {
  Baseline baseline = baseline_of(study_of({}));
  for (BaselineTrial& t : baseline.trials) t.device = "another";
  World slow;
  slow.slowdown = 3;
  const GateResult r = run_gate(baseline, study_of(slow), {});
  REQUIRE(r.passed());
  REQUIRE(r.count(Outcome::skipped) == 2);
}

TEST_CASE("another processor's times are not held against ours, its bytes are", "[reports][gate]") {
  Baseline baseline = baseline_of(study_of({}));
  for (BaselineTrial& t : baseline.trials) t.processor = "another";
  World slow;
  slow.slowdown = 3;
  const GateResult r = run_gate(baseline, study_of(slow), {});
  REQUIRE(r.passed());
  REQUIRE(found(r).find("measured on an unnamed processor; the baseline on another") !=
          std::string::npos);
  slow.bytes_mib = 110;
  REQUIRE(failure(run_gate(baseline, study_of(slow), {}), "memory") != nullptr);
}

TEST_CASE("answers that other rounding changes here and there pass the gate", "[reports][gate]") {
  Baseline baseline = baseline_of(study_of({}));
  for (BaselineTrial& t : baseline.trials)
    for (BaselineScore& s : t.scores) {
      s.bits = "of another processor";
      for (const std::size_t i : {3, 57, 120}) s.right[i] = 1 - s.right[i];  // of 200
    }
  const GateResult r = run_gate(baseline, study_of({}), {});
  INFO(found(r));
  REQUIRE(r.passed());
  REQUIRE(found(r).find("same bits") == std::string::npos);
}

TEST_CASE("JUnit and Markdown say what the gate found", "[reports][gate][approval]") {
  const Baseline baseline = baseline_of(study_of({}));
  World w;
  w.skill = 0.55;
  w.slowdown = 2;
  w.status = "failed";
  const GateResult r = run_gate(baseline, study_of(w), {});
  require_golden("reports/gate.xml", gate_junit(r));
  require_golden("reports/gate.md", gate_summary(r));
}
