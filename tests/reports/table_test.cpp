#include "reports/table.h"

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "reports/chart.h"
#include "reports/template.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

Table sample() {
  Table t{"t", "Title & more", "Caption with 5 % and a_b", {"trial", "a|b", "score"}, {}};
  t.rows.push_back(TableRow({Cell("x, \"y\""), Cell("1"), Cell("70.0 ± 1.5", 70.0, 1.5)}));
  t.rows.push_back(TableRow({Cell("z"), Cell("2"), Cell("80.0 ± 1.0", 80.0, 1.0)}));
  t.rows.push_back(TableRow({Cell("guess"), Cell(""), Cell("90.0", 90.0)}, RowKind::reference));
  mark_best(t);
  return t;
}

}  // namespace

TEST_CASE("csv gives numbers and a column of errors, and quotes what needs it", "[reports]") {
  REQUIRE(render(sample(), Format::csv) ==
          "trial,a|b,score,score se\n\"x, \"\"y\"\"\",1,70,1.5\nz,2,80,1\nguess,,90,\n");
}

TEST_CASE("the best is of own rows: bold, the second underlined", "[reports]") {
  const Table t = sample();
  REQUIRE(t.rows[1].cells[2].mark == Mark::best);
  REQUIRE(t.rows[0].cells[2].mark == Mark::second);
  REQUIRE(t.rows[2].cells[2].mark == Mark::none);
  const std::string tex = render(t, Format::latex);
  REQUIRE(tex.find("\\textbf{80.0 $\\pm$ 1.0}") != std::string::npos);
  REQUIRE(tex.find("\\underline{70.0 $\\pm$ 1.5}") != std::string::npos);
  REQUIRE(tex.find("Title \\& more. Caption with 5 \\% and a\\_b") != std::string::npos);
  REQUIRE(tex.find("\\midrule\nguess") != std::string::npos);
  REQUIRE(render(t, Format::markdown).find("**80.0 ± 1.0**") != std::string::npos);
  REQUIRE(render(t, Format::markdown).find("a\\|b") != std::string::npos);
}

TEST_CASE("formats are known by name, a misspelt one is answered with the nearest", "[reports]") {
  REQUIRE(format_named("md") == Format::markdown);
  REQUIRE_THROWS_WITH(format_named("latx"), Catch::Matchers::ContainsSubstring("latex"));
}

TEST_CASE("a template fills values, lists, conditions and partials", "[reports]") {
  const nlohmann::json v = {
      {"t", "a<b"}, {"list", {{{"n", 1}}, {{"n", 2}}}}, {"no", false}, {"words", {"x", "y"}}};
  const auto files = [](const std::string& name) -> std::string_view {
    return name == "p" ? "[{{n}}]" : "";
  };
  REQUIRE(fill("{{t}} {{{t}}}", v, files) == "a&lt;b a<b");
  REQUIRE(fill("{{#list}}{{>p}}{{t}};{{/list}}", v, files) == "[1]a&lt;b;[2]a&lt;b;");
  REQUIRE(fill("{{#no}}1{{/no}}{{^no}}0{{/no}}{{#absent}}1{{/absent}}", v, files) == "0");
  REQUIRE(fill("{{#words}}{{.}} {{/words}}", v, files) == "x y ");
  REQUIRE_THROWS_AS(fill("{{nothing}}", v, files), std::logic_error);
  REQUIRE_THROWS_AS(fill("{{#list}}", v, files), std::logic_error);
}

TEST_CASE("a legend names what series share once; long labels are cut between characters",
          "[reports]") {
  Chart lines{"l", "", "", "", "", ChartForm::lines};
  lines.series = {{"arc-e / LoRA", {{0, 1, 0, 0, ""}, {1, 2, 0, 0, ""}}, 1, "LoRA"},
                  {"boolq / LoRA", {{0, 2, 0, 0, ""}, {1, 3, 0, 0, ""}}, 1, "LoRA"},
                  {"DoRA", {{0, 2, 0, 0, ""}, {1, 3, 0, 0, ""}}, 2}};
  const auto legend = geometry(lines)["legend"];
  REQUIRE(legend.size() == 2);
  REQUIRE(legend[0]["label"] == "LoRA");
  REQUIRE(legend[1]["label"] == "DoRA");
  Chart rows{"r", "", "", "", "", ChartForm::ranges};
  rows.series = {
      {"suite",
       {{50, 0, 40, 60, "αβγδεζηθικλμνξοπρστυφχ"}, {50, 0, 40, 60, "αβγδεζηθικλμνξοπρστυφχψ"}}}};
  const auto drawn = geometry(rows)["groups"][0]["rows"];
  REQUIRE(drawn[0]["label"] == "αβγδεζηθικλμνξοπρστυφχ");
  REQUIRE(drawn[1]["label"] == "αβγδεζηθικλμνξοπρστυφ…");
}

TEST_CASE("ticks are round and inside", "[reports]") {
  REQUIRE(ticks(0, 10, 5) == std::vector<double>{0, 2, 4, 6, 8, 10});
  const auto t = ticks(0.123, 0.187, 6);
  REQUIRE(t.size() >= 3);
  REQUIRE(t.size() <= 7);
  REQUIRE(t.front() >= 0.123);
  REQUIRE(t.back() <= 0.187 + 1e-9);
  REQUIRE(ticks(3, 3, 5) == std::vector<double>{3});
}
