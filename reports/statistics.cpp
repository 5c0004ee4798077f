#include "reports/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "kernels/random.h"
#include "reports/distributions.h"

namespace mixlora {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double mean_of(std::span<const double> v) {
  return std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
}
/// Sum of squares about the mean.
double squares(std::span<const double> v) {
  const double m = mean_of(v);
  return std::accumulate(v.begin(), v.end(), 0.0,
                         [m](double s, double x) { return s + (x - m) * (x - m); });
}
double two_sided(double z) { return 2 * normal_cdf(-std::abs(z)); }
double z_of(double confidence) { return normal_quantile(0.5 + confidence / 2); }

/// The value below which a share q of sorted values lies, between neighbours linearly.
double sorted_quantile(std::span<const double> sorted, double q) {
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (at - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}
Interval percentiles(std::vector<double> values, double confidence) {
  std::sort(values.begin(), values.end());
  return {sorted_quantile(values, 0.5 - confidence / 2),
          sorted_quantile(values, 0.5 + confidence / 2)};
}

/// Calls use(index) n times with indices uniform on [0, n), from the stream of one resample and
/// stratum.
template <class Use>
void draw(RandomKey key, std::int64_t resample, std::size_t stratum, std::size_t n, Use&& use) {
  for (std::size_t i = 0; i < n; i += 4) {
    const Philox4 bits =
        philox(static_cast<std::uint32_t>(i / 4), static_cast<std::uint32_t>(resample),
               static_cast<std::uint32_t>(stratum), 0, key.k0, key.k1);
    for (std::size_t j = 0; j < std::min<std::size_t>(4, n - i); ++j)
      use(static_cast<std::size_t>((std::uint64_t{bits.v[j]} * n) >> 32U));
  }
}

/// Means over seeds, one a question.
std::vector<double> question_means(const Grid& g) {
  std::vector<double> out(g.front().size());
  for (const auto& seed : g)
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += seed[i] / static_cast<double>(g.size());
  return out;
}

/// One term of a sum of mean squares, with its degrees of freedom.
struct Component {
  double value = 0, df = 1;
};

/// The seeds' share of the variance of a mean over suites: their averages' variance less what
/// chance in the single answers explains. Empty when there is one seed or nothing is left.
std::vector<Component> seed_part(std::span<const Grid> suites) {
  const std::size_t seeds = suites.front().size();
  if (seeds < 2) return {};
  const auto k = static_cast<double>(seeds), m = static_cast<double>(suites.size());
  std::vector<double> averages(seeds);
  std::vector<Component> rest;
  double total_rest = 0;
  for (const Grid& g : suites) {
    const auto n = static_cast<double>(g.front().size());
    const auto questions = question_means(g);
    const double grand = mean_of(questions);
    double squares_rest = 0;
    for (std::size_t s = 0; s < seeds; ++s) {
      const double own = mean_of(g[s]);
      averages[s] += own / m;
      for (std::size_t i = 0; i < questions.size(); ++i) {
        const double r = g[s][i] - own - questions[i] + grand;
        squares_rest += r * r;
      }
    }
    const double df = (n - 1) * (k - 1);
    if (df > 0) rest.push_back({-squares_rest / df / (n * k * m * m), df});
    if (df > 0) total_rest -= rest.back().value;
  }
  const double between = squares(averages) / (k - 1) / k;
  if (between <= total_rest) return {};
  rest.push_back({between, k - 1});
  return rest;
}

TwoLevel summarise(double mean, const std::vector<Component>& parts, double confidence) {
  TwoLevel out;
  out.mean = mean;
  double variance = 0, spread = 0;
  for (const Component& c : parts) {
    variance += c.value;
    spread += c.value * c.value / c.df;
  }
  out.standard_error = std::sqrt(std::max(variance, 0.0));
  if (spread > 0) out.df = variance * variance / spread;
  const double t = out.standard_error > 0 ? student_quantile(0.5 + confidence / 2, out.df) : 0;
  out.interval = {mean - t * out.standard_error, mean + t * out.standard_error};
  if (out.standard_error > 0)
    out.p = 2 * student_cdf(-std::abs(mean) / out.standard_error, out.df);
  else
    out.p = mean == 0 ? 1 : 0;
  return out;
}

/// P(U = u) for u = 0 ... n1 n2 when no two values are equal.
std::vector<double> mann_whitney_law(std::size_t n1, std::size_t n2) {
  // P(i, j, u) = i / (i + j) P(i - 1, j, u - j) + j / (i + j) P(i, j - 1, u): the largest value
  // comes from the one sample or the other.
  std::vector<std::vector<double>> law(n1 + 1, std::vector<double>{1.0});
  for (std::size_t j = 1; j <= n2; ++j)
    for (std::size_t i = 1; i <= n1; ++i) {
      std::vector<double> next(i * j + 1);
      const double total = static_cast<double>(i + j);
      for (std::size_t u = 0; u < law[i - 1].size(); ++u)
        next[u + j] += static_cast<double>(i) / total * law[i - 1][u];
      for (std::size_t u = 0; u < law[i].size(); ++u)
        next[u] += static_cast<double>(j) / total * law[i][u];
      law[i] = std::move(next);
    }
  return law[n1];
}

}  // namespace

double share_error(double p, std::int64_t n) {
  return n < 2 ? 0 : std::sqrt(p * (1 - p) / static_cast<double>(n - 1));
}

Interval normal_interval(std::int64_t right, std::int64_t n, double confidence) {
  const double p = static_cast<double>(right) / static_cast<double>(n);
  const double half = z_of(confidence) * share_error(p, n);
  return {std::max(0.0, p - half), std::min(1.0, p + half)};
}

Interval wilson_interval(std::int64_t right, std::int64_t n, double confidence) {
  const double count = static_cast<double>(n), p = static_cast<double>(right) / count,
               z = z_of(confidence), z2 = z * z;
  const double centre = (p + z2 / (2 * count)) / (1 + z2 / count);
  const double half =
      z / (1 + z2 / count) * std::sqrt(p * (1 - p) / count + z2 / (4 * count * count));
  return {std::max(0.0, centre - half), std::min(1.0, centre + half)};
}

SeedSummary summarise_seeds(std::span<const double> scores, double confidence) {
  SeedSummary out;
  out.seeds = static_cast<std::int64_t>(scores.size());
  out.mean = mean_of(scores);
  out.interval = {-kInfinity, kInfinity};
  if (out.seeds < 2) return out;
  const double k = static_cast<double>(out.seeds);
  out.sd = std::sqrt(squares(scores) / (k - 1));
  const double half = student_quantile(0.5 + confidence / 2, k - 1) * out.sd / std::sqrt(k);
  out.interval = {out.mean - half, out.mean + half};
  return out;
}

TwoLevel two_level(std::span<const Grid> suites, double confidence) {
  const auto m = static_cast<double>(suites.size());
  double mean = 0;
  std::vector<Component> parts = seed_part(suites);
  for (const Grid& g : suites) {
    const auto questions = question_means(g);
    const auto n = static_cast<double>(questions.size());
    mean += mean_of(questions) / m;
    if (n > 1) parts.push_back({squares(questions) / (n - 1) / n / (m * m), n - 1});
  }
  return summarise(mean, parts, confidence);
}

TwoLevel two_level_difference(std::span<const Grid> a, std::span<const Grid> b, double confidence) {
  if (a.size() != b.size()) throw std::logic_error("two_level_difference: other suites");
  const auto m = static_cast<double>(a.size());
  double mean = 0;
  std::vector<Component> parts = seed_part(a);
  for (const Component& c : seed_part(b)) parts.push_back(c);
  for (std::size_t s = 0; s < a.size(); ++s) {
    auto questions = question_means(a[s]);
    const auto other = question_means(b[s]);
    if (questions.size() != other.size())
      throw std::logic_error("two_level_difference: other questions");
    for (std::size_t i = 0; i < questions.size(); ++i) questions[i] -= other[i];
    const auto n = static_cast<double>(questions.size());
    mean += mean_of(questions) / m;
    if (n > 1) parts.push_back({squares(questions) / (n - 1) / n / (m * m), n - 1});
  }
  return summarise(mean, parts, confidence);
}

Pairs count_pairs(std::span<const double> a, std::span<const double> b) {
  Pairs out;
  for (std::size_t i = 0; i < a.size(); ++i)
    ++(a[i] > 0.5 ? (b[i] > 0.5 ? out.both : out.only_a) : (b[i] > 0.5 ? out.only_b : out.neither));
  return out;
}

double mcnemar(const Pairs& pairs) {
  const std::int64_t n = pairs.only_a + pairs.only_b;
  return std::min(1.0, 2 * binomial_cdf(std::min(pairs.only_a, pairs.only_b), n, 0.5));
}

Interval paired_interval(const Pairs& pairs, double confidence) {
  const double n = static_cast<double>(pairs.n()) + 2;
  const double a = static_cast<double>(pairs.only_a + 1) / n,
               b = static_cast<double>(pairs.only_b + 1) / n;
  const double half = z_of(confidence) * std::sqrt((a + b - (a - b) * (a - b)) / n);
  return {std::max(-1.0, a - b - half), std::min(1.0, a - b + half)};
}

Interval bootstrap_difference(const std::vector<std::vector<double>>& differences,
                              const Certainty& certainty) {
  const RandomKey key = random_key(certainty.seed, Purpose::bootstrap);
  std::vector<double> means(static_cast<std::size_t>(certainty.resamples));
  for (std::size_t r = 0; r < means.size(); ++r)
    for (std::size_t s = 0; s < differences.size(); ++s) {
      const auto& d = differences[s];
      double sum = 0;
      draw(key, static_cast<std::int64_t>(r), s, d.size(), [&](std::size_t i) { sum += d[i]; });
      means[r] += sum / static_cast<double>(d.size()) / static_cast<double>(differences.size());
    }
  return percentiles(std::move(means), certainty.confidence);
}

std::int64_t questions_needed(const Pairs& pairs, double alpha) {
  constexpr double kPower = 0.8;
  const double n = static_cast<double>(pairs.n());
  const double differing = static_cast<double>(pairs.only_a + pairs.only_b) / n,
               difference = static_cast<double>(pairs.only_a - pairs.only_b) / n;
  if (pairs.only_a == pairs.only_b) return 0;
  const double root =
      normal_quantile(1 - alpha / 2) * std::sqrt(differing) +
      normal_quantile(kPower) * std::sqrt(std::max(0.0, differing - difference * difference));
  return static_cast<std::int64_t>(std::ceil(root * root / (difference * difference)));
}

std::vector<double> holm(std::span<const double> p) {
  std::vector<std::size_t> order(p.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return p[a] < p[b]; });
  std::vector<double> out(p.size());
  double most = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    most = std::max(most, std::min(1.0, static_cast<double>(p.size() - i) * p[order[i]]));
    out[order[i]] = most;
  }
  return out;
}

double median(std::span<const double> values) {
  if (values.empty()) throw std::logic_error("median: no values");
  std::vector<double> v(values.begin(), values.end());
  const std::size_t half = v.size() / 2;
  std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(half), v.end());
  if (v.size() % 2 == 1) return v[half];
  return (v[half] + *std::max_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(half))) /
         2;
}

MedianSummary summarise_median(std::span<const double> values, double confidence) {
  MedianSummary out;
  out.n = static_cast<std::int64_t>(values.size());
  out.median = median(values);
  std::vector<double> v(values.begin(), values.end());
  std::sort(v.begin(), v.end());
  // The number of values below the median is Binomial(n, 1/2).
  const double tail = 0.5 - confidence / 2;
  const std::int64_t below = binomial_quantile(tail, out.n, 0.5);
  out.interval.low = below > 0 ? v[static_cast<std::size_t>(below - 1)] : -kInfinity;
  out.interval.high = below > 0 ? v[static_cast<std::size_t>(out.n - below)] : kInfinity;
  return out;
}

Interval bootstrap_ratio(std::span<const double> a, std::span<const double> b,
                         const Certainty& certainty) {
  const RandomKey key = random_key(certainty.seed, Purpose::bootstrap);
  std::vector<double> ratios, drawn;
  for (std::int64_t r = 0; r < certainty.resamples; ++r) {
    const auto one = [&](std::span<const double> from, std::size_t stratum) {
      drawn.clear();
      draw(key, r, stratum, from.size(), [&](std::size_t i) { drawn.push_back(from[i]); });
      return median(drawn);
    };
    const double below = one(a, 0), above = one(b, 1);
    ratios.push_back(above / below);
  }
  return percentiles(std::move(ratios), certainty.confidence);
}

MannWhitney mann_whitney(std::span<const double> a, std::span<const double> b) {
  const auto n1 = a.size(), n2 = b.size();
  if (n1 == 0 || n2 == 0) throw std::logic_error("mann_whitney: an empty sample");
  std::vector<std::pair<double, bool>> all;
  for (const double x : a) all.emplace_back(x, true);
  for (const double x : b) all.emplace_back(x, false);
  std::sort(all.begin(), all.end());
  double ranks = 0, ties = 0;  // of a; sum of t^3 - t over groups of t equal values
  for (std::size_t i = 0; i < all.size();) {
    std::size_t end = i;
    while (end < all.size() && all[end].first == all[i].first) ++end;
    const auto t = static_cast<double>(end - i);
    ties += t * t * t - t;
    for (std::size_t j = i; j < end; ++j)
      if (all[j].second) ranks += (static_cast<double>(i + end) + 1) / 2;
    i = end;
  }
  const auto m = static_cast<double>(n1), k = static_cast<double>(n2), n = m + k;
  MannWhitney out;
  out.u = ranks - m * (m + 1) / 2;
  const double most = std::max(out.u, m * k - out.u);
  constexpr std::size_t kSmall = 8, kLarge = 2000;
  if (ties == 0 && std::min(n1, n2) <= kSmall && std::max(n1, n2) <= kLarge) {
    const auto law = mann_whitney_law(std::min(n1, n2), std::max(n1, n2));
    out.exact = true;
    out.p = std::min(
        1.0, 2 * std::accumulate(law.begin() + static_cast<std::ptrdiff_t>(most), law.end(), 0.0));
    return out;
  }
  const double sd = std::sqrt(m * k / 12 * (n + 1 - ties / (n * (n - 1))));
  if (sd > 0) out.p = std::min(1.0, two_sided(std::max(0.0, most - m * k / 2 - 0.5) / sd));
  return out;
}

const char* name_of(Verdict v) {
  switch (v) {
    case Verdict::better:
      return "better";
    case Verdict::worse:
      return "worse";
    case Verdict::same:
      return "same";
    case Verdict::not_enough_data:
      return "not enough data";
  }
  return "";
}

Verdict judge(double difference, double adjusted_p, Interval equivalence, const Certainty& c) {
  if (equivalence.low > -c.margin && equivalence.high < c.margin) return Verdict::same;
  if (adjusted_p < c.alpha) return difference > 0 ? Verdict::better : Verdict::worse;
  return Verdict::not_enough_data;
}

}  // namespace mixlora
