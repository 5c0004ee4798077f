// How often the intervals hold the truth, and how often the tests cry wolf: seeded simulation.
#include <cmath>

#include "kernels/random.h"
#include "reports/distributions.h"
#include "reports/statistics.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

class Stream {
 public:
  explicit Stream(std::uint64_t seed) : key_(random_key(seed, Purpose::test)) {}
  double uniform() {
    if (at_ == 4) {
      bits_ = philox(block_++, 0, 0, 0, key_.k0, key_.k1);
      at_ = 0;
    }
    return unit_open(bits_.v[at_++]);
  }
  double normal() { return normal_quantile(uniform()); }

 private:
  RandomKey key_;
  Philox4 bits_{};
  std::uint32_t block_ = 0;
  unsigned at_ = 4;
};

/// Share of `runs` in which trial() says yes.
template <class Trial> double rate(int runs, Trial&& trial) {
  int yes = 0;
  for (int i = 0; i < runs; ++i) yes += trial() ? 1 : 0;
  return static_cast<double>(yes) / runs;
}
bool holds(Interval i, double truth) { return i.low <= truth && truth <= i.high; }
/// Four standard errors of a simulated rate: a seeded run that passes stays so; a wrong formula
/// does not pass.
double slack(double rate, int runs) { return 4 * std::sqrt(rate * (1 - rate) / runs); }
constexpr double kNominal = 0.95;

}  // namespace

TEST_CASE("Wilson's interval covers at 95 % where the normal one falls short",
          "[reports][coverage]") {
  constexpr int kRuns = 4000;
  Stream s(1);
  const auto coverage = [&](auto interval, double p, int n) {
    return rate(kRuns, [&] {
      std::int64_t right = 0;
      for (int i = 0; i < n; ++i) right += s.uniform() < p ? 1 : 0;
      return holds(interval(right, n, kNominal), p);
    });
  };
  for (const double p : {0.25, 0.5, 0.75, 0.95}) {
    INFO("p = " << p);
    // Discrete: coverage swings about the nominal by up to 2 points at n = 100.
    REQUIRE(std::abs(coverage(wilson_interval, p, 100) - kNominal) < 0.02 + slack(kNominal, kRuns));
  }
  REQUIRE(coverage(wilson_interval, 0.97, 50) > 0.93);
  REQUIRE(coverage(normal_interval, 0.97, 50) < 0.85);  // why it is not the default
  REQUIRE(std::abs(coverage(normal_interval, 0.75, 1000) - kNominal) <
          0.01 + slack(kNominal, kRuns));
}

TEST_CASE("the t interval over three seeds covers at 95 %", "[reports][coverage]") {
  constexpr int kRuns = 4000;
  Stream s(2);
  const double c = rate(kRuns, [&] {
    std::vector<double> scores(3);
    for (double& x : scores) x = 0.7 + 0.02 * s.normal();
    return holds(summarise_seeds(scores, kNominal).interval, 0.7);
  });
  REQUIRE(std::abs(c - kNominal) < slack(kNominal, kRuns));
}

TEST_CASE("the two-level interval covers where seeds and questions both vary",
          "[reports][coverage]") {
  // A question is answered when ease + seed + noise > 0; the truth is the mean over all of them:
  // P(normal(0.5, 1 + spread^2 + 0.5^2) > 0).
  constexpr int kRuns = 1500, kQuestions = 80;
  for (const double spread : {0.0, 0.1, 0.4}) {
    Stream s(3);
    const double truth = normal_cdf(0.5 / std::sqrt(1 + spread * spread + 0.25));
    int naive = 0;
    const double c = rate(kRuns, [&] {
      std::vector<double> ease(kQuestions);
      for (double& e : ease) e = 0.5 + s.normal();
      Grid g(4, std::vector<double>(kQuestions));
      for (auto& seed : g) {
        const double own = spread * s.normal();
        for (int i = 0; i < kQuestions; ++i) seed[i] = ease[i] + own + 0.5 * s.normal() > 0 ? 1 : 0;
      }
      std::vector<double> means;
      for (const auto& seed : g) {
        double m = 0;
        for (const double x : seed) m += x / kQuestions;
        means.push_back(m);
      }
      naive += holds(summarise_seeds(means, kNominal).interval, truth) ? 1 : 0;
      return holds(two_level(std::vector<Grid>{g}, kNominal).interval, truth);
    });
    INFO("spread of seeds " << spread << ": covered " << c << ", seeds alone "
                            << static_cast<double>(naive) / kRuns);
    // Satterthwaite's degrees of freedom are an approximation: at most 3 points off.
    REQUIRE(std::abs(c - kNominal) < 0.03);
    // Seeds alone miss the questions.
    if (spread == 0) REQUIRE(static_cast<double>(naive) / kRuns < 0.85);
  }
}

TEST_CASE("paired intervals cover, and McNemar's test cries wolf at most one time in twenty",
          "[reports][coverage]") {
  constexpr int kRuns = 1200, kQuestions = 150;
  Stream s(4);
  const auto answers = [&](double only_a, double only_b) {
    std::vector<double> a(kQuestions), b(kQuestions);
    for (int i = 0; i < kQuestions; ++i) {
      const double u = s.uniform();
      a[i] = u < only_a || u > 0.6 ? 1 : 0;
      b[i] = (u >= only_a && u < only_a + only_b) || u > 0.6 ? 1 : 0;
    }
    return std::pair(a, b);
  };
  Certainty how;
  how.resamples = 500;
  int closed = 0;
  const double boot = rate(kRuns, [&] {
    const auto [a, b] = answers(0.15, 0.10);
    std::vector<double> d(kQuestions);
    for (int i = 0; i < kQuestions; ++i) d[i] = a[i] - b[i];
    closed += holds(paired_interval(count_pairs(a, b), kNominal), 0.05) ? 1 : 0;
    return holds(bootstrap_difference({d}, how), 0.05);
  });
  INFO("bootstrap covered " << boot << ", closed form " << static_cast<double>(closed) / kRuns);
  REQUIRE(std::abs(boot - kNominal) < 0.01 + slack(kNominal, kRuns));
  REQUIRE(std::abs(static_cast<double>(closed) / kRuns - kNominal) < 0.01 + slack(kNominal, kRuns));
  const double wolf = rate(kRuns, [&] {
    const auto [a, b] = answers(0.12, 0.12);
    return mcnemar(count_pairs(a, b)) < 0.05;
  });
  REQUIRE(wolf <= 0.05);
  REQUIRE(wolf > 0.01);
}

TEST_CASE("the two-level difference of two methods holds its level", "[reports][coverage]") {
  constexpr int kRuns = 1000, kQuestions = 60;
  Stream s(5);
  const double wolf = rate(kRuns, [&] {
    std::vector<double> ease(kQuestions);
    for (double& e : ease) e = 0.5 + s.normal();
    const auto method = [&] {
      Grid g(3, std::vector<double>(kQuestions));
      for (auto& seed : g) {
        const double own = 0.3 * s.normal();
        for (int i = 0; i < kQuestions; ++i) seed[i] = ease[i] + own + 0.5 * s.normal() > 0 ? 1 : 0;
      }
      return g;
    };
    return two_level_difference(std::vector<Grid>{method()}, std::vector<Grid>{method()}, kNominal)
               .p < 0.05;
  });
  INFO("false alarms " << wolf);
  REQUIRE(wolf < 0.05 + slack(0.05, kRuns));
}

TEST_CASE("a median's interval covers for skewed times, and Mann-Whitney holds its level",
          "[reports][coverage]") {
  constexpr int kRuns = 3000;
  Stream s(6);
  const auto times = [&](int n) {
    std::vector<double> v(static_cast<std::size_t>(n));
    for (double& x : v) x = std::exp(0.5 * s.normal());
    return v;
  };
  const double c =
      rate(kRuns, [&] { return holds(summarise_median(times(21), 0.95).interval, 1); });
  REQUIRE(c > kNominal - slack(kNominal, kRuns));
  REQUIRE(c < 0.98);
  REQUIRE(rate(kRuns, [&] { return mann_whitney(times(7), times(9)).p < 0.05; }) <
          0.05 + slack(0.05, kRuns));
  REQUIRE(rate(kRuns, [&] { return mann_whitney(times(20), times(25)).p < 0.05; }) <
          0.05 + slack(0.05, kRuns));
}

TEST_CASE("Holm keeps the chance of any false alarm over eight suites at one in twenty",
          "[reports][coverage]") {
  constexpr int kRuns = 4000;
  Stream s(7);
  const auto any = [&](bool corrected) {
    return rate(kRuns, [&] {
      std::vector<double> p(8);
      for (double& x : p) x = s.uniform();
      if (corrected) p = holm(p);
      for (const double x : p)
        if (x < 0.05) return true;
      return false;
    });
  };
  REQUIRE(std::abs(any(true) - 0.05) < slack(0.05, kRuns));
  REQUIRE(any(false) > 0.3);
}
