#include "reports/gate.h"

#include <algorithm>

#include <fmt/format.h>

#include "reports/costs.h"
#include "reports/embedded.h"
#include "reports/latency.h"
#include "reports/paired.h"
#include "reports/template.h"

namespace mixlora {
namespace {

const char* name_of(Outcome o) {
  switch (o) {
    case Outcome::passed:
      return "passed";
    case Outcome::failed:
      return "FAILED";
    case Outcome::skipped:
      return "skipped";
  }
  return "";
}

/// "/train/lr 0.0005 -> 0.5, ...": the fields in which two specs differ.
std::string changes(const Json& before, const Json& after) {
  std::string out;
  const Json a = before.flatten(), b = after.flatten();
  const auto add = [&](const std::string& path, const std::string& from, const std::string& to) {
    out += fmt::format("{}{} {} -> {}", out.empty() ? "" : ", ", path, from, to);
  };
  for (const auto& [path, value] : a.items())
    if (!b.contains(path))
      add(path, value.dump(), "nothing");
    else if (b[path] != value)
      add(path, value.dump(), b[path].dump());
  for (const auto& [path, value] : b.items())
    if (!a.contains(path)) add(path, "nothing", value.dump());
  return out;
}

std::string named(const std::string& processor) {
  return processor.empty() ? "an unnamed processor" : processor;
}

/// An accuracy check whose verdict waits for Holm's correction over all of them.
struct Pending {
  std::size_t check = 0;
  Pairs pairs;
  double before = 0, after = 0, p = 1;
  bool same_bits = false;
};

class Gate {
 public:
  Gate(const Baseline& baseline, const GateOptions& options) : baseline_(baseline), o_(options) {}

  void trial(const BaselineTrial& before, const StudyTrial* now) {
    if (now == nullptr || !now->done()) {
      add(before.label, "finished", Outcome::failed,
          now == nullptr
              ? std::string("the trial is missing from the sweep")
              : "the trial is " + now->status + (now->reason.empty() ? "" : ": " + now->reason));
      return;
    }
    add(before.label, "finished", Outcome::passed, "done");
    if (const std::string changed = changes(before.spec, now->spec); !changed.empty())
      add(before.label, "spec", Outcome::skipped, "changed: " + changed);
    for (const BaselineScore& s : before.scores) accuracy(before, s, *now);
    if (before.device != now->device) {
      if (!before.ms_per_token.empty())
        add(before.label, "latency and memory", Outcome::skipped,
            fmt::format("measured on {}; the baseline on {}", now->device, before.device));
      return;
    }
    if (o_.latency_ratio <= 0 || before.processor == now->processor)
      latency(before, *now);
    else if (!before.ms_per_token.empty())
      add(before.label, "latency", Outcome::skipped,
          fmt::format("measured on {}; the baseline on {}", named(now->processor),
                      named(before.processor)));
    memory(before, *now);
  }

  GateResult finish(const Study& study) {
    std::vector<double> p;
    for (const Pending& a : pending_) p.push_back(a.p);
    const auto adjusted = holm(p);
    for (std::size_t i = 0; i < pending_.size(); ++i) decide(pending_[i], adjusted[i]);
    for (const StudyTrial& t : study.trials)
      if (std::none_of(baseline_.trials.begin(), baseline_.trials.end(),
                       [&](const BaselineTrial& b) { return b.label == t.label; }))
        add(t.label, "finished", Outcome::skipped, "new: not in the baseline");
    result_.sweep = baseline_.sweep;
    return std::move(result_);
  }

 private:
  void add(const std::string& trial, const std::string& what, Outcome outcome,
           std::string message) {
    result_.checks.push_back({trial, what, outcome, std::move(message)});
  }

  void accuracy(const BaselineTrial& before, const BaselineScore& s, const StudyTrial& now) {
    const std::string what =
        "accuracy " + column_of(s.suite) + (s.metric == "acc" ? "" : " " + s.metric);
    const StudyScore* score = now.score(s.suite, s.protocol, s.metric);
    if (score == nullptr) {
      add(before.label, what, Outcome::failed,
          fmt::format("was {:.1f} %, is not scored any more", 100 * s.value));
      return;
    }
    const auto items = baseline_.items.find(s.suite + "/" + s.protocol);
    const bool paired =
        !s.right.empty() && items != baseline_.items.end() && items->second == score->items;
    if (!paired) {
      add(before.label, what, Outcome::failed,
          fmt::format(
              "{} questions now, {} in the baseline, and not the same ones: not comparable; "
              "check --update when that is meant",
              score->n, s.n));
      return;
    }
    Pending p;
    p.check = result_.checks.size();
    p.pairs = count_pairs(score->right, s.right);
    p.before = s.value;
    p.after = score->value;
    p.p = mcnemar(p.pairs);
    p.same_bits = score->bits == s.bits;
    pending_.push_back(p);
    add(before.label, what, Outcome::passed, "");
  }

  void decide(const Pending& a, double adjusted) {
    const double difference = a.after - a.before;
    const Verdict verdict =
        a.same_bits ? Verdict::same
                    : judge(difference, adjusted,
                            paired_interval(a.pairs, 1 - 2 * o_.certainty.alpha), o_.certainty);
    Check& c = result_.checks[a.check];
    if (verdict == Verdict::worse && -difference > o_.certainty.margin) c.outcome = Outcome::failed;
    c.message = fmt::format("{:.1f} % -> {:.1f} % ({} lost, {} won, p {:.2g} after Holm): {}",
                            100 * a.before, 100 * a.after, a.pairs.only_b, a.pairs.only_a, adjusted,
                            a.same_bits ? "same bits" : mixlora::name_of(verdict));
  }

  void latency(const BaselineTrial& before, const StudyTrial& now) {
    const auto times = step_times({now.label, {&now}});
    if (before.ms_per_token.empty() || times.empty()) return;
    if (o_.latency_ratio <= 0) {
      add(before.label, "latency", Outcome::skipped, "not asked for");
      return;
    }
    const double was = median(before.ms_per_token), is = median(times), ratio = is / was;
    const double p = mann_whitney(before.ms_per_token, times).p;
    const bool enough = std::min(before.ms_per_token.size(), times.size()) >=
                        static_cast<std::size_t>(kLatencySteps);
    const bool slower = enough && ratio > o_.latency_ratio && p < o_.latency_alpha;
    add(before.label, "latency", slower ? Outcome::failed : Outcome::passed,
        fmt::format("{:.4f} -> {:.4f} ms/token (x {:.3f}, limit x {:.2f}; p {:.2g}){}", was, is,
                    ratio, o_.latency_ratio, p, enough ? "" : ": too few steps to tell"));
  }

  void memory(const BaselineTrial& before, const StudyTrial& now) {
    const auto peak = now.measured("measured_peak_bytes");
    if (!before.peak_bytes || !peak || o_.memory_ratio <= 0) return;
    constexpr double kMib = 1024.0 * 1024.0;
    const double ratio = *peak / *before.peak_bytes;
    add(before.label, "memory", ratio > o_.memory_ratio ? Outcome::failed : Outcome::passed,
        fmt::format("{:.1f} -> {:.1f} MiB (x {:.3f}, limit x {:.2f})", *before.peak_bytes / kMib,
                    *peak / kMib, ratio, o_.memory_ratio));
  }

  const Baseline& baseline_;
  const GateOptions& o_;
  GateResult result_;
  std::vector<Pending> pending_;
};

std::string count_text(const GateResult& r) {
  return fmt::format("{} checks: {} passed, {} failed, {} skipped", r.checks.size(),
                     r.count(Outcome::passed), r.count(Outcome::failed), r.count(Outcome::skipped));
}

}  // namespace

std::int64_t GateResult::count(Outcome o) const {
  return std::count_if(checks.begin(), checks.end(),
                       [o](const Check& c) { return c.outcome == o; });
}

GateResult run_gate(const Baseline& baseline, const Study& study, const GateOptions& options) {
  Gate gate(baseline, options);
  for (const BaselineTrial& before : baseline.trials) {
    const auto now = std::find_if(study.trials.begin(), study.trials.end(),
                                  [&](const StudyTrial& t) { return t.label == before.label; });
    gate.trial(before, now == study.trials.end() ? nullptr : &*now);
  }
  return gate.finish(study);
}

Table gate_table(const GateResult& result, bool only_notable) {
  Table t{"check",
          fmt::format("Check of {}: {}", result.sweep, result.passed() ? "passed" : "FAILED"),
          count_text(result) + ".",
          {"trial", "what", "outcome", "found"},
          {},
          {1, 2, 3}};
  for (const Check& c : result.checks)
    if (!only_notable || c.outcome != Outcome::passed)
      t.rows.push_back(TableRow({c.trial, c.what, name_of(c.outcome), c.message}));
  return t;
}

std::string gate_junit(const GateResult& result) {
  Json suites = Json::array();
  for (const Check& c : result.checks) {
    if (suites.empty() || suites.back()["name"] != c.trial) {
      // New trials are listed last; one suite a trial all the same.
      suites.push_back({{"name", c.trial},
                        {"tests", 0},
                        {"failures", 0},
                        {"skipped", 0},
                        {"cases", Json::array()}});
    }
    Json& suite = suites.back();
    suite["tests"] = suite["tests"].get<int>() + 1;
    if (c.outcome == Outcome::failed) suite["failures"] = suite["failures"].get<int>() + 1;
    if (c.outcome == Outcome::skipped) suite["skipped"] = suite["skipped"].get<int>() + 1;
    suite["cases"].push_back({{"what", c.what},
                              {"message", c.message},
                              {"failed", c.outcome == Outcome::failed},
                              {"ignored", c.outcome == Outcome::skipped}});
  }
  return fill(embedded("gate/junit.xml"),
              {{"sweep", result.sweep},
               {"total", result.checks.size()},
               {"total_failures", result.count(Outcome::failed)},
               {"suites", suites}},
              [](const std::string& name) { return embedded("gate/" + name); });
}

std::string gate_summary(const GateResult& result) {
  std::string out = render(gate_table(result, true), Format::markdown);
  if (result.count(Outcome::passed) == static_cast<std::int64_t>(result.checks.size()))
    out = fmt::format("### Check of {}: passed\n\n{}.\n", result.sweep, count_text(result));
  const Table all = gate_table(result, false);
  std::string rows = render(all, Format::markdown);
  return out + "\n<details><summary>All checks</summary>\n\n" + rows.substr(rows.find("\n\n") + 2) +
         "\n</details>\n";
}

}  // namespace mixlora
