#include "reports/statistics.h"

#include <limits>

#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "reports/distributions.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

/// Closed forms in double precision: nothing but rounding, and the iterations' last bits.
constexpr double kClosed = 1e-9;

const Json& golden() {
  static const Json kJson = read_json(std::string(MIXLORA_GOLDEN_DIR) + "/statistics.json");
  return kJson;
}
void require_near(double found, double expected, double relative = kClosed) {
  REQUIRE(found == Approx(expected).epsilon(relative).margin(1e-14));
}
void require_near(Interval found, const Json& expected, double relative = kClosed) {
  require_near(found.low, expected[0], relative);
  require_near(found.high, expected[1], relative);
}
using Values = std::vector<double>;

}  // namespace

TEST_CASE("distributions agree with scipy", "[reports][golden]") {
  const Json& d = golden()["distributions"];
  for (const Json& c : d["normal_quantile"]) require_near(normal_quantile(c[0]), c[1]);
  for (const Json& c : d["normal_cdf"]) require_near(normal_cdf(c[0]), c[1]);
  for (const Json& c : d["student_quantile"]) require_near(student_quantile(c[0], c[1]), c[2]);
  for (const Json& c : d["student_cdf"]) require_near(student_cdf(c[0], c[1]), c[2]);
  for (const Json& c : d["binomial_cdf"]) require_near(binomial_cdf(c[0], c[1], c[2]), c[3]);
  for (const Json& c : d["binomial_quantile"])
    REQUIRE(binomial_quantile(c[0], c[1], c[2]) == c[3].get<std::int64_t>());
}

TEST_CASE("a share's error and intervals agree with scipy and statsmodels", "[reports][golden]") {
  for (const Json& c : golden()["shares"]) {
    const std::int64_t right = c["right"], n = c["n"];
    require_near(share_error(static_cast<double>(right) / static_cast<double>(n), n), c["se"]);
    require_near(wilson_interval(right, n, 0.95), c["wilson"]);
    require_near(wilson_interval(right, n, 0.99), c["wilson99"]);
    require_near(normal_interval(right, n, 0.95), c["normal"]);
  }
}

TEST_CASE("seeds are summarised as by scipy's t interval", "[reports][golden]") {
  for (const Json& c : golden()["seeds"]) {
    const SeedSummary s = summarise_seeds(c["scores"].get<Values>(), 0.95);
    require_near(s.mean, c["mean"]);
    require_near(s.sd, c["sd"]);
    require_near(s.interval, c["interval"]);
  }
  const SeedSummary one = summarise_seeds(Values{0.7}, 0.95);
  REQUIRE(one.sd == 0);
  REQUIRE(one.interval.high == std::numeric_limits<double>::infinity());
}

TEST_CASE("seeds and questions together agree with a two-way analysis of variance",
          "[reports][golden]") {
  for (const Json& c : golden()["two_level"]) {
    const TwoLevel t = two_level(std::vector<Grid>{c["grid"].get<Grid>()}, 0.95);
    require_near(t.mean, c["mean"]);
    require_near(t.standard_error, c["se"]);
    require_near(t.df, c["df"]);
    require_near(t.interval, c["interval"]);
    require_near(t.p, c["p"], 1e-8);  // a far tail
  }
}

TEST_CASE("with one seed the two-level error is the share's own", "[reports]") {
  const std::vector<Grid> one{{{1, 0, 1, 1, 0, 1, 1, 1}}};
  REQUIRE(two_level(one, 0.95).standard_error == Approx(share_error(0.75, 8)));
  const std::vector<Grid> two{one[0], one[0]};
  REQUIRE(two_level(two, 0.95).standard_error == Approx(share_error(0.75, 8) / std::sqrt(2.0)));
}

TEST_CASE("a two-level difference of a grid with itself is nothing", "[reports]") {
  const std::vector<Grid> g{{{1, 0, 1, 1}, {1, 1, 0, 1}}};
  const TwoLevel t = two_level_difference(g, g, 0.95);
  REQUIRE(t.mean == 0);
  REQUIRE(t.p == 1);
}

TEST_CASE("McNemar's exact test and the paired interval agree with statsmodels",
          "[reports][golden]") {
  for (const Json& c : golden()["pairs"]) {
    const Pairs p{c["pairs"][0], c["pairs"][1], c["pairs"][2], c["pairs"][3]};
    require_near(mcnemar(p), c["p"]);
    require_near(paired_interval(p, 0.95), c["interval"]);
  }
}

TEST_CASE("pairs are counted by who was right", "[reports]") {
  const Pairs p = count_pairs(Values{1, 1, 0, 0, 1}, Values{1, 0, 1, 0, 0});
  REQUIRE(p.both == 1);
  REQUIRE(p.only_a == 2);
  REQUIRE(p.only_b == 1);
  REQUIRE(p.neither == 1);
}

TEST_CASE("the bootstrap draws what an own Philox draws and agrees with scipy's",
          "[reports][golden]") {
  const Json& c = golden()["bootstrap"];
  const auto suites = c["suites"].get<std::vector<Values>>();
  Certainty how;
  how.resamples = c["resamples"];
  require_near(bootstrap_difference(suites, how), c["interval"]);
  how.resamples = 20000;
  const Interval many = bootstrap_difference({suites[0]}, how);
  // Fifty differences of -1, 0, 1: means are multiples of 0.02, and so are the percentiles.
  REQUIRE(std::abs(many.low - c["scipy"][0].get<double>()) < 0.0201);
  REQUIRE(std::abs(many.high - c["scipy"][1].get<double>()) < 0.0201);
  how.resamples = c["ratio_resamples"];
  require_near(bootstrap_ratio(c["a"].get<Values>(), c["b"].get<Values>(), how), c["ratio"]);
}

TEST_CASE("Holm's correction agrees with statsmodels", "[reports][golden]") {
  for (const Json& c : golden()["holm"]) {
    const auto adjusted = holm(c["p"].get<Values>());
    for (std::size_t i = 0; i < adjusted.size(); ++i) require_near(adjusted[i], c["holm"][i]);
  }
  REQUIRE(holm(Values{}).empty());
}

TEST_CASE("Mann-Whitney agrees with scipy, exact and with ties", "[reports][golden]") {
  for (const Json& c : golden()["latencies"]["mann_whitney"]) {
    const MannWhitney m = mann_whitney(c["x"].get<Values>(), c["y"].get<Values>());
    REQUIRE(m.exact == c["exact"].get<bool>());
    require_near(m.u, c["u"]);
    require_near(m.p, c["p"], 1e-8);
  }
  REQUIRE(mann_whitney(Values{1, 1, 1}, Values{1, 1}).p == 1);
}

TEST_CASE("a median's interval agrees with scipy's quantile test", "[reports][golden]") {
  for (const Json& c : golden()["latencies"]["median"]) {
    const MedianSummary m = summarise_median(c["x"].get<Values>(), 0.95);
    require_near(m.median, c["median"]);
    require_near(m.interval, c["interval"]);
  }
  REQUIRE(summarise_median(Values{1, 2, 3, 4, 5}, 0.95).interval.low ==
          -std::numeric_limits<double>::infinity());
}

TEST_CASE("verdicts need the margin, the test, or more data", "[reports]") {
  const Certainty c;
  REQUIRE(judge(0.03, 0.01, {0.01, 0.05}, c) == Verdict::better);
  REQUIRE(judge(-0.03, 0.01, {-0.05, -0.01}, c) == Verdict::worse);
  REQUIRE(judge(0.001, 0.8, {-0.004, 0.006}, c) == Verdict::same);
  REQUIRE(judge(0.004, 0.001, {0.002, 0.006}, c) == Verdict::same);  // real, and of no matter
  REQUIRE(judge(0.02, 0.2, {-0.01, 0.05}, c) == Verdict::not_enough_data);
}

TEST_CASE("the questions needed shrink as the difference grows", "[reports]") {
  REQUIRE(questions_needed({50, 10, 10, 30}, 0.05) == 0);
  const auto some = questions_needed({50, 15, 10, 25}, 0.05),
             fewer = questions_needed({50, 30, 5, 15}, 0.05);
  REQUIRE(some > fewer);
  REQUIRE(fewer > 0);
}
