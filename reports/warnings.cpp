// Warnings: what makes a run's numbers not worth reading, or not comparable.
#include <algorithm>
#include <cmath>
#include <map>

#include "reports/report.h"

namespace mixlora {
namespace {

constexpr double kConstant = 0.99;  // this share of one choice is a constant answer
constexpr double kErrors = 2;       // standard errors that a score must stay off a guess

std::string percent(double share) { return fmt::format("{:.1f} %", 100 * share); }

class Collector {
 public:
  explicit Collector(Table& t) : table_(t) {}
  void operator()(const StudyTrial& t, const std::string& where, const std::string& what) {
    table_.rows.push_back(TableRow({t.label, where, what}));
  }

 private:
  Table& table_;
};

void about_state(const StudyTrial& t, Collector& warn) {
  if (!t.done())
    warn(t, "run", t.reason.empty() ? "not finished: " + t.status : t.status + ": " + t.reason);
  const Json::json_pointer at("/evaluate/suites");
  if (!t.done() || !t.spec.contains(at)) return;
  for (const Json& suite : t.spec[at]) {
    const bool there = std::any_of(t.scores.begin(), t.scores.end(),
                                   [&](const StudyScore& s) { return suite == s.suite; });
    if (!there) warn(t, column_of(suite.get<std::string>()), "asked for and not scored");
  }
}

void about_score(const StudyTrial& t, const StudyScore& s, Collector& warn) {
  const std::string where = column_of(s.suite);
  const auto n = static_cast<double>(s.n);
  const double error = share_error(s.value, s.n);
  if (s.truncated > 0)
    warn(t, where, fmt::format("{} of {} prompts were cut at the limit", s.truncated, s.n));
  const double constant = static_cast<double>(s.commonest_choice) / n;
  if (constant > kConstant) {
    warn(t, where,
         fmt::format("constant answer: one choice for {} of {} questions", percent(constant), s.n));
    return;  // the majority rate is then no news
  }
  if (t.is_base()) return;  // an untrained model may well guess
  if (std::abs(s.value - s.majority) <= kErrors * error)
    warn(t, where,
         fmt::format("{} is within {} standard errors of always giving the commonest answer ({})",
                     percent(s.value), kErrors, percent(s.majority)));
  else if (std::abs(s.value - s.chance) <= kErrors * error)
    warn(t, where,
         fmt::format("{} is within {} standard errors of chance ({})", percent(s.value), kErrors,
                     percent(s.chance)));
  else if (s.value < s.chance)
    warn(t, where, fmt::format("{} is below chance ({})", percent(s.value), percent(s.chance)));
}

void about_loss(const StudyTrial& t, Collector& warn) {
  std::vector<double> loss;
  for (const StudyStep& s : t.steps) {
    if (!s.loss) {
      warn(t, "training", fmt::format("the loss is not a number from step {}", s.step));
      return;
    }
    loss.push_back(*s.loss);
  }
  constexpr std::size_t kFew = 20, kParts = 5;
  if (loss.size() < kFew) return;
  const std::size_t part = loss.size() / kParts;
  const std::vector<double> first(loss.begin(), loss.begin() + static_cast<std::ptrdiff_t>(part)),
      middle(loss.begin() + static_cast<std::ptrdiff_t>(2 * part),
             loss.begin() + static_cast<std::ptrdiff_t>(3 * part)),
      last(loss.end() - static_cast<std::ptrdiff_t>(part), loss.end());
  // A fifth of the run each; 0.1 % and 5 % keep the noise of single batches quiet.
  constexpr double kAlpha = 0.001, kRise = 1.05;
  const auto higher = [&](const std::vector<double>& than, double by) {
    return median(last) > by * median(than) && mann_whitney(last, than).p < kAlpha;
  };
  const bool rises = part >= 7 ? higher(middle, kRise) : median(last) > 1.5 * median(middle);
  if (rises)
    warn(t, "training",
         fmt::format("the loss rises at the end: {:.3f} in the middle fifth, {:.3f} in the last",
                     median(middle), median(last)));
  else if (median(last) >= median(first))
    warn(t, "training",
         fmt::format("the loss did not fall: {:.3f} in the first fifth, {:.3f} in the last",
                     median(first), median(last)));
}

}  // namespace

Tables warning_tables(const Study& study, const ReportOptions& /*options*/) {
  Table t{"warnings", "Warnings", "", {"trial", "where", "what"}, {}, {1, 2}};
  Collector warn(t);
  std::map<std::string, std::pair<std::string, std::int64_t>> asked;
  for (const StudyTrial& trial : study.trials) {
    about_state(trial, warn);
    for (const StudyScore& s : trial.scores) {
      about_score(trial, s, warn);
      const auto [at, fresh] = asked.try_emplace(s.suite, trial.label, s.n);
      if (!fresh && at->second.second != s.n)
        warn(trial, column_of(s.suite),
             fmt::format("asked {} questions; \"{}\" was asked {}: not comparable", s.n,
                         at->second.first, at->second.second));
    }
    about_loss(trial, warn);
  }
  t.caption = fmt::format("{} warning{} on {} trials.", t.rows.size(),
                          t.rows.size() == 1 ? "" : "s", study.trials.size());
  return t.rows.empty() ? Tables{} : Tables{t};
}

}  // namespace mixlora
