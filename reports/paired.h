// Paired: two configurations on the same questions, suite by suite, with tests and verdicts.
#pragma once
#include <string>
#include <vector>

#include "reports/study.h"
#include "reports/table.h"

namespace mixlora {

/// One suite (or the average over suites) asked of a and b; differences are b - a.
struct PairedScore {
  std::string suite;  // "" for the average
  std::int64_t n = 0;
  double a = 0, b = 0, difference = 0;
  Interval interval;     // of the difference, at the confidence asked for
  Interval equivalence;  // at 1 - 2 alpha, for the verdict same
  std::int64_t only_a = 0, only_b = 0;
  const char* test = "";  // "McNemar", "two-level t", "paired t"
  double p = 1, adjusted = 1;
  bool same_bits = false;   // every log-probability equal
  std::int64_t needed = 0;  // questions for 80 % power at this difference
  Verdict verdict = Verdict::not_enough_data;
};
struct Comparison {
  std::vector<PairedScore> suites;    // scored by both on the same questions
  std::vector<PairedScore> average;   // one, when there are two suites or more
  std::vector<std::string> unpaired;  // suites of both whose questions differ or were not kept
};

/// A suite that both have scored.
struct Match {
  std::string suite;
  const Configuration* a;
  const Configuration* b;
};
/// One comparison: Holm's correction and the average are over all its suites, whichever trainings
/// they come from. (Seeds that serve one suite each count as if they served all: the averages of
/// seed 1, seed 2, ... are independent draws in both cases.)
Comparison compare(const std::vector<Match>& matches, const Variant& v, const Certainty& certainty);
Comparison compare(const Configuration& a, const Configuration& b, const Variant& v,
                   const Certainty& certainty);

/// The columns of a table of paired rows, after the trial's.
std::vector<std::string> paired_columns();
/// Which of them, counted with the trial's, hold words.
std::vector<std::size_t> paired_words();
std::vector<TableRow> paired_rows(const Comparison& comparison);
/// What the columns mean, with the confidence, margin and seed that were used.
std::string paired_caption(const Certainty& certainty);

}  // namespace mixlora
