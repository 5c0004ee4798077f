// Study: one sweep of a store, read whole: trials, scores, answers, steps, loads; what tables are
// made from.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "experiments/store/database.h"
#include "reports/statistics.h"

namespace mixlora {

using Json = nlohmann::json;

struct StudyScore {
  std::string suite, protocol, metric;
  double value = 0, majority = 0, chance = 0;  // shares of n
  std::int64_t n = 0, truncated = 0;
  // One an answer, in the order of items; empty when the answers kept do not make up this metric.
  std::vector<std::string> items;
  std::vector<double> right;          // 1 or 0
  std::int64_t commonest_choice = 0;  // how many answers gave the choice given most often
  std::string bits;                   // hash of every choice and log-probability
};

struct StudyStep {
  std::int64_t step = 0, tokens = 0;
  std::optional<double> loss;  // absent: it was not a number
  double aux_loss = 0, entropy = 0, ms = 0;
};

struct StudyLoad {
  std::int64_t layer = 0, expert = 0;
  double share = 0;
};

struct StudyTrial {
  std::string label, key, status, reason, device;
  std::string processor;                      // the CPU's name
  std::map<std::string, std::string> labels;  // by axis
  Json spec;
  std::vector<StudyScore> scores;
  std::map<std::string, double> measurements;
  std::vector<StudyStep> steps;
  std::vector<StudyLoad> loads;  // while training

  bool done() const { return status == "done"; }
  bool is_base() const { return method() == "base"; }
  std::string method() const;                   // "lora"
  std::string text(const char* pointer) const;  // a value of the spec as text; "" when absent
  std::optional<double> measured(const std::string& name) const;
  /// Null when this suite was not scored.
  const StudyScore* score(const std::string& suite, const std::string& protocol,
                          const std::string& metric) const;
};

struct Study {
  std::string file, name, created;
  std::vector<std::string> axes;   // in the sweep's order
  std::vector<StudyTrial> trials;  // in the sweep's order
};

/// The last sweep of a store, or the last with this name. Throws InputError.
Study read_study(const std::string& file, const std::string& sweep = "");
Study read_study(Database& db, std::int64_t sweep);
std::int64_t last_sweep(Database& db, const std::string& name = "");

/// Trials that differ in their seed alone: one row of a table.
struct Configuration {
  std::string label;  // the axes' labels that all its trials share, "MixLoRA / top-2"
  std::vector<const StudyTrial*> trials;  // each key once

  const StudyTrial& first() const { return *trials.front(); }
};
/// Groups by spec without the seed, in the order of first appearance.
std::vector<Configuration> configurations(const Study& study);
/// Groups by spec without the given fields ("/train/seed", "/train/tasks").
std::vector<Configuration> group_by_spec(const Study& study,
                                         const std::vector<std::string>& without);

/// Configurations that differ in what they were trained on and asked alone: "LoRA".
struct Kin {
  std::string label;
  std::vector<const Configuration*> members;
};
/// The methods of a study's configurations, which must outlive them.
std::vector<Kin> kin_of(const Study& study, const std::vector<Configuration>& all);

/// A way of scoring that a study used: its tables do not mix two.
struct Variant {
  std::string protocol, metric;
  bool operator==(const Variant&) const = default;
};
std::vector<Variant> variants(const Study& study);
/// Suites scored or asked for, in the paper's order, then by name.
std::vector<std::string> suites_of(const Study& study);
/// The paper's order, then by name.
std::vector<std::string> in_order(std::set<std::string> suites);
std::string column_of(const std::string& suite);  // "ARC-e"

/// A configuration's score on a suite: the mean over its seeds, with error over questions and
/// seeds.
struct Summary {
  std::string suite;
  std::int64_t n = 0;
  std::vector<double> by_seed;
  std::vector<const StudyScore*> scores;  // as by_seed
  TwoLevel level;                         // of the mean; without answers from the shares alone
  Interval interval;                      // Wilson's with one seed, two-level with more
};
std::optional<Summary> summarise(const Configuration& c, const std::string& suite, const Variant& v,
                                 double confidence);
/// Right answers by seed, for tests; empty when some seed's answers are not kept.
Grid grid_of(const Summary& s);
/// The mean over suites with its error: seeds are shared by the suites of a training.
TwoLevel average_of(const std::vector<Summary>& suites, double confidence);

}  // namespace mixlora
