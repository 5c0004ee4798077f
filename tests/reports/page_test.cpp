#include "reports/page.h"

#include "tests/reports/study_store.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

std::size_t count(const std::string& text, const std::string& what) {
  std::size_t n = 0;
  for (std::size_t at = 0; (at = text.find(what, at)) != std::string::npos; ++at) ++n;
  return n;
}

}  // namespace

TEST_CASE("the page holds every table and chart and asks nothing of the network", "[reports]") {
  StudyStore store("multi", {"method", "seed"});
  fill_multi(store);
  const Study study = read_study(store.db(), 1);
  const std::string page = render_page(study, {});
  for (const TableKind& k : table_kinds())
    for (const Table& t : k.build(study, {}))
      REQUIRE(page.find("<article id=\"" + t.name + "\"") != std::string::npos);
  REQUIRE(count(page, "<svg ") == build_charts(study, {}).size());
  for (const char* outside : {"http:", "https:", "//cdn", "@import", "url(", "<link rel=\"style"})
    REQUIRE(count(page, outside) == 0);
  REQUIRE(count(page, "src=") == 0);
  for (const char* element : {"table", "svg", "article", "figure", "tr", "th", "button"})
    REQUIRE(count(page, std::string("<") + element + " ") +
                count(page, std::string("<") + element + ">") ==
            count(page, std::string("</") + element + ">"));
  REQUIRE(count(page, "aria-sort=\"none\"><button") + count(page, "class=\"number\"><button") > 50);
  // One entry of the contents for all the maps of expert load, however many there are.
  REQUIRE(count(page, "<li><a href=\"#figure-") == 5);
  REQUIRE(count(page, "Expert load by layer (4 figures)</a>") == 1);
  REQUIRE(page.find("NaN") == std::string::npos);
  REQUIRE(page.find("{{") == std::string::npos);
}

TEST_CASE("labels with markup stay text in the page", "[reports]") {
  StudyStore store("<b>study", {"method"});
  const auto a =
      store.trial({{"method", "<script>alert(1)</script>"}},
                  {{"train", {{"tasks", {"piqa"}}}}, {"evaluate", {{"suites", {"piqa"}}}}});
  store.score(a, "piqa", 10, 2, [](std::int64_t i) { return i < 6; });
  const std::string page = render_page(read_study(store.db(), 1), {});
  REQUIRE(page.find("<script>alert") == std::string::npos);
  REQUIRE(page.find("&lt;script&gt;alert") != std::string::npos);
  REQUIRE(page.find("<b>study") == std::string::npos);
  REQUIRE(page.find("&lt;b&gt;study") != std::string::npos);
}

TEST_CASE("a study with nothing done still makes a page", "[reports]") {
  StudyStore store("s", {"method"});
  store.trial({{"method", "LoRA"}}, {{"evaluate", {{"suites", {"piqa"}}}}}, "planned");
  const std::string page = render_page(read_study(store.db(), 1), {});
  REQUIRE(page.find("not finished: planned") != std::string::npos);
}
