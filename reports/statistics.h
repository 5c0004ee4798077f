// Statistics: how sure a score is, whether two differ, and the words for it.
#pragma once
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace mixlora {

struct Interval {
  double low = 0, high = 0;
};

/// What every test and interval here needs to be told; the report prints it in its captions.
struct Certainty {
  double confidence = 0.95;  // of intervals
  double alpha = 0.05;       // of tests, after Holm's correction
  double margin = 0.01;      // differences of accuracy below this do not matter
  std::uint64_t seed = 42;   // of the bootstrap's Philox stream
  std::int64_t resamples = 2000;
};

// --- one share of right answers ---

/// sqrt(p (1 - p) / (n - 1)): the sample's standard deviation over sqrt(n), as lm-eval prints it. 0
/// for n < 2.
double share_error(double p, std::int64_t n);
/// p -+ z share_error(p, n), cut to [0, 1]. Too narrow near 0 and 1 and for small n.
Interval normal_interval(std::int64_t right, std::int64_t n, double confidence);
/// Inverts the score test; right at any share and for small n           [Wilson 1927]
Interval wilson_interval(std::int64_t right, std::int64_t n, double confidence);

// --- seeds ---

struct SeedSummary {
  std::int64_t seeds = 0;
  double mean = 0, sd = 0;  // sd of one seed's score, n - 1 below; 0 for one seed
  Interval interval;        // of the mean, Student's t; [-inf, inf] for one seed
};
SeedSummary summarise_seeds(std::span<const double> scores, double confidence);

/// Right (1) or wrong (0) by seed and question; every seed answers the same questions.
using Grid = std::vector<std::vector<double>>;

struct TwoLevel {
  double mean = 0, standard_error = 0;
  double df = std::numeric_limits<double>::infinity();
  Interval interval;
  double p = 1;  // two-sided, of mean = 0
};
/// The mean over suites (each a Grid, same seeds), its error over questions and seeds:
///   y_ks = mean + question + seed + rest (crossed, random);  per suite, from the two-way mean
///   squares:  var = (MS_question + MS_seed - MS_rest) / (n K)
/// where the seeds' part is taken from the averages over suites, since one training serves them
/// all. Degrees of freedom by Satterthwaite. With one seed only the questions' part is there.
TwoLevel two_level(std::span<const Grid> suites, double confidence);
/// As two_level for a - b on the same questions; the seeds of a and b are independent.
TwoLevel two_level_difference(std::span<const Grid> a, std::span<const Grid> b, double confidence);

// --- two answerers, the same questions ---

/// Of n questions, both right, only a right, only b right, both wrong.
struct Pairs {
  std::int64_t both = 0, only_a = 0, only_b = 0, neither = 0;
  std::int64_t n() const { return both + only_a + only_b + neither; }
};
Pairs count_pairs(std::span<const double> a, std::span<const double> b);
/// Two-sided exact p: only_a ~ Binomial(only_a + only_b, 1/2) when nothing differs [McNemar 1947]
double mcnemar(const Pairs& pairs);
/// Interval of share(a) - share(b): adjusted Wald on (only + 1) / (n + 2) [Bonett and Price 2012]
Interval paired_interval(const Pairs& pairs, double confidence);
/// Percentile interval of the mean over suites of the mean difference; questions are drawn with
/// replacement inside each suite. Philox(seed, bootstrap, resample, suite, draw): the same on any
/// machine.
Interval bootstrap_difference(const std::vector<std::vector<double>>& differences,
                              const Certainty& certainty);
/// Questions for McNemar's test to see the observed difference with 80 % power; 0 when there is no
/// difference to see.                                                     [Connor 1987]
std::int64_t questions_needed(const Pairs& pairs, double alpha);

/// Holm's step-down adjusted p values, in the order given                 [Holm 1979]
std::vector<double> holm(std::span<const double> p);

// --- latencies ---

double median(std::span<const double> values);
struct MedianSummary {
  double median = 0;
  Interval interval;  // of order statistics: exact for any distribution; infinite when n is too few
  std::int64_t n = 0;
};
MedianSummary summarise_median(std::span<const double> values, double confidence);
/// Percentile interval of median(b) / median(a), both resampled.
Interval bootstrap_ratio(std::span<const double> a, std::span<const double> b,
                         const Certainty& certainty);
struct MannWhitney {
  double u = 0, p = 1;  // u of the first sample; p two-sided
  bool exact = false;
};
/// Exact without ties when the smaller sample has at most 8 values, else normal with tie and
/// continuity correction                                                  [Mann and Whitney 1947]
MannWhitney mann_whitney(std::span<const double> a, std::span<const double> b);

// --- the words ---

enum class Verdict : std::uint8_t { better, worse, same, not_enough_data };
const char* name_of(Verdict v);
/// same: the (1 - 2 alpha) interval of the difference lies within -+ margin (two one-sided tests);
/// better, worse: the adjusted p is below alpha; else not enough data.
Verdict judge(double difference, double adjusted_p, Interval equivalence, const Certainty& c);

}  // namespace mixlora
