#include "reports/report.h"

#include <cmath>
#include <set>

#include "engine/error.h"
#include "experiments/sweep_file.h"
#include "tests/reports/study_store.h"
#include "tests/support/golden.h"

using namespace mixlora;

namespace {

std::string all_tables(const Study& study, Format format) {
  std::string out;
  for (const TableKind& k : table_kinds())
    for (const Table& t : k.build(study, {})) {
      for (const TableRow& row : t.rows) REQUIRE(row.cells.size() == t.columns.size());
      out += std::string("== ") + t.name + "\n" + render(t, format) + "\n";
    }
  return out;
}
std::string texts(const Table& t) {
  std::string out;
  for (const TableRow& row : t.rows) {
    for (const Cell& c : row.cells) out += c.text + "|";
    out += "\n";
  }
  return out;
}

}  // namespace

TEST_CASE("every table of a multi-task study looks as approved in every format",
          "[reports][approval]") {
  StudyStore store("multi", {"method", "seed"});
  fill_multi(store);
  const Study study = read_study(store.db(), 1);
  for (const Format f :
       {Format::terminal, Format::markdown, Format::csv, Format::latex, Format::json})
    require_golden(std::string("reports/multi") + ending_of(f), all_tables(study, f));
}

TEST_CASE("every table of a single-task study looks as approved", "[reports][approval]") {
  StudyStore store("single", {"task", "method"});
  fill_single(store);
  const Study study = read_study(store.db(), 1);
  require_golden("reports/single.txt", all_tables(study, Format::terminal));
}

TEST_CASE("an average over incomplete suites is marked, has no value and is never best",
          "[reports]") {
  StudyStore store("s", {"method"});
  for (const bool both : {true, false}) {
    const auto a = store.trial({{"method", both ? "both" : "one of two"}},
                               {{"train", {{"tasks", {"arc-e"}}, {"lr", both ? 1 : 2}}},
                                {"evaluate", {{"suites", {"arc-e", "boolq", "piqa"}}}}});
    store.score(a, "arc-e", 20, 4, [](std::int64_t i) { return i > 3; });
    store.score(a, "boolq", 20, 2, [](std::int64_t i) { return i > 8; });
    if (both) store.score(a, "piqa", 20, 2, [](std::int64_t i) { return i > 12; });
  }
  const auto tables = accuracy_tables(read_study(store.db(), 1), {});
  const TableRow& row = tables.at(0).rows.back();
  REQUIRE(row.cells.front().text == "one of two");
  REQUIRE(row.cells.back().text.ends_with("†"));
  REQUIRE_FALSE(row.cells.back().value.has_value());
  REQUIRE(row.cells.back().mark == Mark::none);
  REQUIRE(tables[0].caption.find("† mean over the suites scored so far") != std::string::npos);
}

TEST_CASE("published numbers stand beside a model that has them", "[reports]") {
  StudyStore store("s", {"method"});
  const auto a = store.trial({{"method", "LoRA"}}, {{"model", "models/Llama-2-7b-hf"},
                                                    {"train", {{"tasks", {"arc-e"}}}},
                                                    {"evaluate", {{"suites", {"arc-e"}}}}});
  store.score(a, "arc-e", 20, 4, [](std::int64_t i) { return i > 3; });
  const Study study = read_study(store.db(), 1);
  const Table t = accuracy_tables(study, {}).at(0);
  REQUIRE(texts(t).find("published: MixLoRA, single-task|77.7|") != std::string::npos);
  REQUIRE(t.caption.find("arXiv 2404.15159v3") != std::string::npos);
  REQUIRE(single_task_tables(study, {}).at(0).caption.find("another model") == std::string::npos);
}

TEST_CASE("collapsed and doubtful runs are warned of", "[reports]") {
  StudyStore store("s", {"method"});
  const auto trial = [&](const char* label, double lr) {
    return store.trial({{"method", label}}, {{"train", {{"tasks", {"boolq"}}, {"lr", lr}}},
                                             {"evaluate", {{"suites", {"boolq", "piqa"}}}}});
  };
  const auto fine = [](std::int64_t i) { return 2 - static_cast<double>(i) / 100; };
  const auto ms = [](std::int64_t) { return 10.0; };
  // Gold answers are 0 or i % 2: right where gold is 0 means always answering 0.
  const auto constant = trial("constant", 1);
  store.score(constant, "boolq", 100, 2,
              [](std::int64_t i) { return i * 7 % 10 < 4 || i % 2 == 0; });
  store.steps(constant, 50, fine, ms);
  const auto chance = trial("chance", 2);
  store.score(
      chance, "boolq", 100, 2, [](std::int64_t i) { return i % 2 == 0; }, 4);
  store.score(chance, "piqa", 50, 2, [](std::int64_t i) { return i < 45; });
  store.steps(
      chance, 50, [](std::int64_t i) { return i == 30 ? NAN : 1.0; }, ms);
  const auto rising = trial("rising", 3);
  store.score(rising, "boolq", 90, 2, [](std::int64_t i) { return i < 85; });
  store.score(rising, "piqa", 50, 2, [](std::int64_t i) { return i < 45; });
  store.steps(
      rising, 100,
      [](std::int64_t i) {
        return (i < 60 ? 2 - static_cast<double>(i) / 60 : static_cast<double>(i) / 50) +
               0.01 * unit(1, i);
      },
      ms);
  const auto good = trial("good", 4);
  store.score(good, "boolq", 100, 2, [](std::int64_t i) { return i < 90; });
  store.score(good, "piqa", 50, 2, [](std::int64_t i) { return i < 45; });
  store.steps(good, 50, fine, ms);
  const auto majority = trial("majority", 6);
  store.score(majority, "boolq", 100, 2, [](std::int64_t i) { return i < 71; });
  store.score(majority, "piqa", 50, 2, [](std::int64_t i) { return i < 5; });
  store.steps(
      majority, 50, [](std::int64_t i) { return 1 + static_cast<double>(i % 2) / 100; }, ms);
  store.trial({{"method", "late"}}, {{"train", {{"lr", 5}}}}, "out_of_memory", "needs 30 GiB");

  const std::string found = texts(warning_tables(read_study(store.db(), 1), {}).at(0));
  const auto has = [&](const std::string& line) {
    INFO(found);
    REQUIRE(found.find(line) != std::string::npos);
  };
  has("constant|BoolQ|constant answer: one choice for 100.0 % of 100 questions|");
  has("constant|PIQA|asked for and not scored|");
  has("chance|BoolQ|50.0 % is within 2 standard errors of chance (50.0 %)|");
  has("chance|BoolQ|4 of 100 prompts were cut at the limit|");
  has("chance|training|the loss is not a number from step 30|");
  has("rising|training|the loss rises at the end");
  has("rising|BoolQ|asked 90 questions; \"constant\" was asked 100: not comparable|");
  has("majority|BoolQ|71.0 % is within 2 standard errors of always giving the commonest answer "
      "(70.0 %)|");
  has("majority|PIQA|10.0 % is below chance (50.0 %)|");
  has("majority|training|the loss did not fall: ");
  has("late|run|out_of_memory: needs 30 GiB|");
  REQUIRE(found.find("good|") == std::string::npos);
}

TEST_CASE("seeds are one row; a trial under two labels counts once", "[reports]") {
  StudyStore store("multi", {"method", "seed"});
  fill_multi(store);
  const auto all = configurations(read_study(store.db(), 1));
  REQUIRE(all.size() == 6);
  REQUIRE(all[0].label == "base model");  // it has no seed
  REQUIRE(all[0].trials.size() == 1);
  REQUIRE(all[1].label == "LoRA");
  REQUIRE(all[1].trials.size() == 2);
}

TEST_CASE("a better and a worse method get their verdict, an equal one by its bits", "[reports]") {
  StudyStore store("s", {"method"});
  int n = 0;
  for (const auto& [label, skill] :
       {std::pair{"reference", 50}, {"again", 50}, {"better", 80}, {"worse", 20}}) {
    const auto a = store.trial({{"method", label}}, {{"train", {{"tasks", {"piqa"}}, {"lr", ++n}}},
                                                     {"evaluate", {{"suites", {"piqa"}}}}});
    store.score(a, "piqa", 100, 2, [skill = skill](std::int64_t i) { return i < skill; });
  }
  const std::string found = texts(paired_tables(read_study(store.db(), 1), {}).at(0));
  const auto line = [&](const std::string& label) {
    const auto at = found.find(label + "|");
    return found.substr(at, found.find('\n', at) - at);
  };
  INFO(found);
  REQUIRE(line("better").find("|0 / 30|<0.0001|<0.0001|McNemar|better|") != std::string::npos);
  REQUIRE(line("worse").find("|30 / 0|") != std::string::npos);
  REQUIRE(line("worse").find("|worse|") != std::string::npos);
  REQUIRE(line("again").find("same") != std::string::npos);
  ReportOptions other;
  other.reference = "nobody";
  REQUIRE_THROWS_AS(paired_tables(read_study(store.db(), 1), other), InputError);
}

TEST_CASE("a caption says protocol, metric, limits, shots and seeds", "[reports]") {
  StudyStore store("s", {"shots", "seed"});
  for (const int seed : {3, 4}) {
    const auto a =
        store.trial({{"seed", std::to_string(seed)}},
                    {{"train", {{"tasks", {"piqa"}}, {"seed", seed}, {"limit", 300}}},
                     {"evaluate", {{"suites", {"piqa"}}, {"limit", 50}, {"few_shot", 5}}}});
    store.score(a, "piqa", 50, 2, [](std::int64_t i) { return i < 30; });
  }
  const Study study = read_study(store.db(), 1);
  for (const auto& tables : {accuracy_tables(study, {}), interval_tables(study, {}),
                             seed_tables(study, {}), single_task_tables(study, {})})
    REQUIRE_THAT(tables.at(0).caption,
                 Catch::Matchers::StartsWith(
                     "Model models/tiny-7b. Protocol label-token, metric acc, 5-shot, test rows "
                     "limited to 50 (0: all), prompts to 512 tokens, training rows limited to 300 "
                     "(0: all). Seeds 3, 4."));
}

TEST_CASE("every caption but the warnings' says the setting; cheaper counts among equals alone",
          "[reports]") {
  StudyStore multi("multi", {"method", "seed"});
  fill_multi(multi);
  const Study study = read_study(multi.db(), 1);
  int tables = 0;
  for (const TableKind& k : table_kinds())
    for (const Table& t : k.build(study, {})) {
      INFO(t.name);
      ++tables;
      if (t.name != "warnings")
        REQUIRE_THAT(t.caption, Catch::Matchers::ContainsSubstring(
                                    "Protocol label-token, metric acc, zero-shot, all test rows, "
                                    "prompts to 512 tokens, all training rows. Seeds 1, 2."));
    }
  REQUIRE(tables == 17);

  StudyStore single("single", {"task", "method"});
  fill_single(single);
  const Table t = memory_tables(read_study(single.db(), 1), {}).at(0);
  std::set<std::string> marked;  // all cost the same: the best of each suite
  for (const TableRow& row : t.rows)
    if (row.cells.back().text == "●") marked.insert(row.cells.front().text);
  REQUIRE(marked == std::set<std::string>{"arc-e / r 8", "boolq / r 16"});
}

TEST_CASE("with an adapter a suite, methods meet suite by suite and Holm's correction holds all",
          "[reports]") {
  StudyStore store("s", {"suite", "method"});
  // Of 100 questions MixLoRA wins so many that LoRA misses, and loses none.
  for (const auto& [suite, won] : {std::pair{"arc-e", 7}, {"boolq", 3}, {"piqa", 10}})
    for (const char* label : {"base model", "LoRA", "MixLoRA"}) {
      const std::string method = label;
      const auto a = store.trial({{"suite", suite}, {"method", label}},
                                 {{"adapter",
                                   {{"method", method == "base model" ? "base" : "lora"},
                                    {"r", method == "MixLoRA" ? 8 : 16}}},
                                  {"train", {{"tasks", {suite}}}},
                                  {"evaluate", {{"suites", {suite}}}}});
      const int right = method == "base model" ? 20 : method == "LoRA" ? 50 : 50 + won;
      store.score(a, suite, 100, 2, [right](std::int64_t i) { return i < right; });
    }
  const Study study = read_study(store.db(), 1);
  const Table t = paired_tables(study, {}).at(0);
  const std::string found = texts(t);
  INFO(found);
  REQUIRE(t.title == "Against LoRA, suite by suite");
  REQUIRE(t.rows.size() == 8);  // two methods, three suites and their average
  const auto has = [&](const std::string& line) { REQUIRE(found.find(line) != std::string::npos); };
  // Exact p: 2 / 2^7, 2 / 2^3, 2 / 2^10; Holm: x 2, x 1, x 3.
  has("MixLoRA|ARC-e|100|50.0|57.0|+7.0|");
  has("0 / 7|0.0156|0.0312|McNemar|better|");
  has("0 / 3|0.2500|0.2500|McNemar|not enough data|");
  has("0 / 10|0.0020|0.0059|McNemar|better|");
  has("MixLoRA|AVG|300|50.0|56.7|+6.7|");
  has("base model|PIQA|100|50.0|20.0|-30.0|");
  // One trial as the reference: its suite alone. A method by its name: as unasked.
  ReportOptions one;
  one.reference = "boolq / LoRA";
  REQUIRE(paired_tables(study, one).at(0).rows.size() == 2);
  one.reference = "MixLoRA";
  REQUIRE(paired_tables(study, one).at(0).title == "Against MixLoRA, suite by suite");
}

TEST_CASE("a sweep may ask for every table there is, and no other", "[reports]") {
  std::vector<std::string> names;
  for (const TableKind& k : table_kinds()) names.emplace_back(k.name);
  REQUIRE(table_names() == names);
  REQUIRE_THROWS_WITH(find_table_kind("acuracy"),
                      Catch::Matchers::ContainsSubstring("\"accuracy\""));
}

TEST_CASE("a store of another kind, an absent sweep: said with what is there", "[reports]") {
  StudyStore store("s", {"method"});
  REQUIRE_THROWS_WITH(last_sweep(store.db(), "other"),
                      Catch::Matchers::ContainsSubstring("it holds s"));
  REQUIRE_THROWS_AS(open_store("nowhere.db"), InputError);
}
