#include "reports/paired.h"

#include <algorithm>
#include <cmath>
#include <set>

#include <fmt/format.h>

namespace mixlora {
namespace {

std::vector<double> difference_of(const Grid& a, const Grid& b) {
  std::vector<double> out(a.front().size());
  for (const auto& seed : b)
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += seed[i] / static_cast<double>(b.size());
  for (const auto& seed : a)
    for (std::size_t i = 0; i < out.size(); ++i) out[i] -= seed[i] / static_cast<double>(a.size());
  return out;
}

bool same_bits(const Summary& a, const Summary& b) {
  if (a.scores.size() != b.scores.size()) return false;
  for (std::size_t i = 0; i < a.scores.size(); ++i)
    if (a.scores[i]->bits.empty() || a.scores[i]->bits != b.scores[i]->bits) return false;
  return true;
}

/// One seed each: exact test and bootstrap. More: question and seed components.
PairedScore compare_suite(const Summary& a, const Summary& b, const Grid& ga, const Grid& gb,
                          const Certainty& c) {
  PairedScore out;
  out.suite = a.suite;
  out.n = a.n;
  out.a = a.level.mean;
  out.b = b.level.mean;
  out.difference = out.b - out.a;
  out.same_bits = same_bits(a, b);
  if (ga.size() == 1 && gb.size() == 1) {
    const Pairs pairs = count_pairs(gb.front(), ga.front());  // a question won is b's
    out.only_a = pairs.only_b;
    out.only_b = pairs.only_a;
    out.test = "McNemar";
    out.p = mcnemar(pairs);
    out.interval = bootstrap_difference({difference_of(ga, gb)}, c);
    out.equivalence = paired_interval(pairs, 1 - 2 * c.alpha);
    out.needed = questions_needed(pairs, c.alpha);
    return out;
  }
  const std::vector<Grid> one{gb}, other{ga};
  const TwoLevel t = two_level_difference(one, other, c.confidence);
  out.test = "two-level t";
  out.p = t.p;
  out.interval = t.interval;
  out.equivalence = two_level_difference(one, other, 1 - 2 * c.alpha).interval;
  return out;
}

PairedScore compare_average(const std::vector<PairedScore>& suites, const std::vector<Grid>& a,
                            const std::vector<Grid>& b, const Certainty& c) {
  PairedScore out;
  const auto m = static_cast<double>(suites.size());
  out.same_bits = true;
  bool seeds = false;
  std::vector<std::vector<double>> differences;
  for (std::size_t s = 0; s < suites.size(); ++s) {
    out.n += suites[s].n;
    out.a += suites[s].a / m;
    out.b += suites[s].b / m;
    out.only_a += suites[s].only_a;
    out.only_b += suites[s].only_b;
    out.same_bits = out.same_bits && suites[s].same_bits;
    seeds = seeds || a[s].size() > 1 || b[s].size() > 1;
    differences.push_back(difference_of(a[s], b[s]));
  }
  out.difference = out.b - out.a;
  const TwoLevel t = two_level_difference(b, a, c.confidence);
  out.test = seeds ? "two-level t" : "paired t";
  out.p = t.p;
  out.interval = seeds ? t.interval : bootstrap_difference(differences, c);
  out.equivalence = two_level_difference(b, a, 1 - 2 * c.alpha).interval;
  return out;
}

void decide(PairedScore& s, const Certainty& c) {
  s.verdict = s.same_bits ? Verdict::same : judge(s.difference, s.adjusted, s.equivalence, c);
}

}  // namespace

Comparison compare(const Configuration& a, const Configuration& b, const Variant& v,
                   const Certainty& certainty) {
  std::set<std::string> suites;
  for (const StudyScore& s : a.first().scores)
    if (s.protocol == v.protocol && s.metric == v.metric) suites.insert(s.suite);
  std::vector<Match> matches;
  for (const auto& suite : in_order(suites)) matches.push_back({suite, &a, &b});
  return compare(matches, v, certainty);
}

Comparison compare(const std::vector<Match>& matches, const Variant& v,
                   const Certainty& certainty) {
  Comparison out;
  std::vector<Grid> grids_a, grids_b;
  for (const auto& [suite, a, b] : matches) {
    const auto one = summarise(*a, suite, v, certainty.confidence),
               other = summarise(*b, suite, v, certainty.confidence);
    if (!one || !other) continue;
    Grid ga = grid_of(*one), gb = grid_of(*other);
    if (ga.empty() || gb.empty() || one->scores.front()->items != other->scores.front()->items) {
      out.unpaired.push_back(suite);
      continue;
    }
    out.suites.push_back(compare_suite(*one, *other, ga, gb, certainty));
    grids_a.push_back(std::move(ga));
    grids_b.push_back(std::move(gb));
  }
  std::vector<double> p;
  for (const PairedScore& s : out.suites) p.push_back(s.p);
  const auto adjusted = holm(p);
  for (std::size_t i = 0; i < out.suites.size(); ++i) {
    out.suites[i].adjusted = adjusted[i];
    decide(out.suites[i], certainty);
  }
  const auto same_seeds = [](const std::vector<Grid>& g) {
    return std::all_of(g.begin(), g.end(),
                       [&](const Grid& one) { return one.size() == g.front().size(); });
  };
  if (out.suites.size() > 1 && same_seeds(grids_a) && same_seeds(grids_b)) {
    out.average.push_back(compare_average(out.suites, grids_a, grids_b, certainty));
    out.average[0].adjusted = out.average[0].p;
    decide(out.average[0], certainty);
  }
  return out;
}

std::vector<std::string> paired_columns() {
  return {"suite",      "n", "first",    "second", "Δ",       "interval",
          "lost / won", "p", "p (Holm)", "test",   "verdict", "questions needed"};
}

std::vector<std::size_t> paired_words() { return {1, 10, 11}; }

std::vector<TableRow> paired_rows(const Comparison& comparison) {
  std::vector<TableRow> out;
  const auto add = [&](const PairedScore& s) {
    Cell difference(fmt::format("{:+.1f}", 100 * s.difference), 100 * s.difference);
    difference.low = 100 * s.interval.low;
    difference.high = 100 * s.interval.high;
    const auto p = [](double x) {
      return Cell(x < 0.0001 ? "<0.0001" : fmt::format("{:.4f}", x), x);
    };
    const bool counted = std::string(s.test) == "McNemar";
    out.push_back(TableRow(
        {s.suite.empty() ? "AVG" : column_of(s.suite), number_cell(static_cast<double>(s.n), 0),
         number_cell(100 * s.a, 1), number_cell(100 * s.b, 1), difference,
         fmt::format("[{:+.1f}, {:+.1f}]", 100 * s.interval.low, 100 * s.interval.high),
         counted ? fmt::format("{} / {}", s.only_a, s.only_b) : std::string("-"), p(s.p),
         s.suite.empty() ? Cell("-") : p(s.adjusted), s.test,
         std::string(name_of(s.verdict)) + (s.same_bits ? " (same bits)" : ""),
         counted && s.needed > 0 && s.verdict == Verdict::not_enough_data
             ? number_cell(static_cast<double>(s.needed), 0)
             : Cell("-")}));
  };
  for (const PairedScore& s : comparison.suites) add(s);
  for (const PairedScore& s : comparison.average) add(s);
  return out;
}

std::string paired_caption(const Certainty& c) {
  return fmt::format(
      " Δ is second less first in points, on the same questions. One seed each: McNemar's exact "
      "test and the {:.0f} % paired bootstrap ({} resamples, seed {}); several: t over questions "
      "and seeds. p (Holm): corrected over the suites of one comparison; AVG is tested by itself. "
      "same: the {:.0f} % interval lies within ±{:.1f} points, or every log-probability is equal; "
      "better, worse: corrected p below {}. Questions needed: for 80 % power at this difference.",
      100 * c.confidence, c.resamples, c.seed, 100 * (1 - 2 * c.alpha), 100 * c.margin, c.alpha);
}

}  // namespace mixlora
