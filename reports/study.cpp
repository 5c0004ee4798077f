#include "reports/study.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/sha256.h"
#include "experiments/store/store.h"
#include "reports/distributions.h"
#include "suites/task.h"

namespace mixlora {
namespace {

void read_answers(Database& db, std::int64_t attempt, StudyScore& s) {
  std::string bits;
  std::map<std::int64_t, std::int64_t> choices;
  double right = 0;
  Statement(db,
            "SELECT item, choice, gold, log_probs FROM answer WHERE attempt = ? AND suite = ? AND "
            "protocol = ? ORDER BY item")
      .rows<std::string, std::int64_t, std::int64_t, std::string>(
          [&](std::string item, std::int64_t choice, std::int64_t gold,
              const std::string& log_probs) {
            bits += item + " " + std::to_string(choice) + " " + log_probs + "\n";
            s.items.push_back(std::move(item));
            s.right.push_back(choice == gold ? 1 : 0);
            right += s.right.back();
            ++choices[choice];
          },
          attempt, s.suite, s.protocol);
  const auto n = static_cast<std::int64_t>(s.items.size());
  if (n != s.n || std::abs(right - s.value * static_cast<double>(n)) > 0.5) {
    s.items.clear();  // another metric's choices
    s.right.clear();
    return;
  }
  for (const auto& [choice, count] : choices)
    s.commonest_choice = std::max(s.commonest_choice, count);
  s.bits = sha256(bits);
}

void read_attempt(Database& db, std::int64_t attempt, StudyTrial& t) {
  Statement(db, "SELECT device, environment FROM attempt WHERE id = ?")
      .rows<std::string, std::string>(
          [&](std::string device, const std::string& environment) {
            t.device = std::move(device);
            t.processor = parse_json(environment, "environment of " + t.label).value("cpu", "");
          },
          attempt);
  Statement(db,
            "SELECT suite, protocol, metric, value, n, majority, chance, truncated FROM score "
            "WHERE attempt = ?")
      .rows<std::string, std::string, std::string, double, std::int64_t, double, double,
            std::int64_t>(
          [&](std::string suite, std::string protocol, std::string metric, double value,
              std::int64_t n, double majority, double chance, std::int64_t truncated) {
            StudyScore& s = t.scores.emplace_back();
            s.suite = std::move(suite);
            s.protocol = std::move(protocol);
            s.metric = std::move(metric);
            s.value = value;
            s.n = n;
            s.majority = majority;
            s.chance = chance;
            s.truncated = truncated;
          },
          attempt);
  for (StudyScore& s : t.scores) read_answers(db, attempt, s);
  Statement(db, "SELECT name, value FROM measurement WHERE attempt = ?")
      .rows<std::string, double>(
          [&](const std::string& name, double value) { t.measurements[name] = value; }, attempt);
  // A loss that is no number is NULL in the store; ifnull cannot stand for it.
  Statement(db,
            "SELECT step, tokens, loss IS NULL, loss, aux_loss, entropy, ms FROM step WHERE "
            "attempt = ? ORDER BY step")
      .rows<std::int64_t, std::int64_t, bool, double, double, double, double>(
          [&](std::int64_t step, std::int64_t tokens, bool absent, double loss, double aux,
              double entropy, double ms) {
            t.steps.push_back(
                {step, tokens, absent ? std::nullopt : std::optional(loss), aux, entropy, ms});
          },
          attempt);
  Statement(db,
            "SELECT layer, expert, share FROM expert_load WHERE attempt = ? AND phase = 'train' "
            "ORDER BY layer, expert")
      .rows<std::int64_t, std::int64_t, double>(
          [&](std::int64_t layer, std::int64_t expert, double share) {
            t.loads.push_back({layer, expert, share});
          },
          attempt);
}

/// Axes along which some group's trials differ: the seeds'.
std::set<std::string> free_axes(
    const std::map<std::string, std::vector<const StudyTrial*>>& groups) {
  std::set<std::string> out;
  for (const auto& [id, trials] : groups)
    for (const StudyTrial* t : trials)
      for (const auto& [axis, label] : t->labels)
        if (const auto at = trials.front()->labels.find(axis);
            at == trials.front()->labels.end() || at->second != label)
          out.insert(axis);
  return out;
}

/// The labels that all trials share, in the axes' order. An untrained model stands in a sweep once,
/// with the first seed's label, which says nothing of it.
std::string shared_label(const Study& study, const std::vector<const StudyTrial*>& trials,
                         const std::set<std::string>& free) {
  std::vector<std::string> axes = study.axes;
  for (const auto& [axis, label] : trials.front()->labels)
    if (std::find(axes.begin(), axes.end(), axis) == axes.end()) axes.push_back(axis);
  std::string out;
  for (const auto& axis : axes) {
    const auto own = trials.front()->labels.find(axis);
    if (own == trials.front()->labels.end() || (trials.front()->is_base() && free.count(axis) > 0))
      continue;
    const bool shared = std::all_of(trials.begin(), trials.end(), [&](const StudyTrial* t) {
      const auto at = t->labels.find(axis);
      return at != t->labels.end() && at->second == own->second;
    });
    if (shared) out += (out.empty() ? "" : " / ") + own->second;
  }
  return out.empty() ? trials.front()->label : out;
}

}  // namespace

std::string StudyTrial::text(const char* pointer) const {
  const Json::json_pointer at(pointer);
  if (!spec.contains(at)) return "";
  const Json& v = spec[at];
  return v.is_string() ? v.get<std::string>() : v.dump();
}
std::string StudyTrial::method() const { return text("/adapter/method"); }

std::optional<double> StudyTrial::measured(const std::string& name) const {
  const auto at = measurements.find(name);
  return at == measurements.end() ? std::nullopt : std::optional(at->second);
}

const StudyScore* StudyTrial::score(const std::string& suite, const std::string& protocol,
                                    const std::string& metric) const {
  for (const StudyScore& s : scores)
    if (s.suite == suite && s.protocol == protocol && s.metric == metric) return &s;
  return nullptr;
}

std::int64_t last_sweep(Database& db, const std::string& name) {
  std::int64_t id = 0;
  std::string names;
  Statement(db, "SELECT id, name FROM sweep ORDER BY id")
      .rows<std::int64_t, std::string>([&](std::int64_t v, const std::string& own) {
        if (name.empty() || own == name) id = v;
        names += (names.empty() ? "" : ", ") + own;
      });
  const std::string file = sqlite3_db_filename(db.raw(), "main");
  require(!names.empty(), "{}: holds no sweep yet; mixlora-bench run SWEEP fills it", file);
  require(id > 0, "{}: holds no sweep \"{}\"; it holds {}", file, name, names);
  return id;
}

Study read_study(const std::string& file, const std::string& sweep) {
  Database db = open_store(file);
  Study s = read_study(db, last_sweep(db, sweep));
  s.file = file;
  return s;
}

Study read_study(Database& db, std::int64_t sweep) {
  Study study;
  Statement(db, "SELECT name, created, json FROM sweep WHERE id = ?")
      .rows<std::string, std::string, std::string>(
          [&](std::string name, std::string created, const std::string& json) {
            study.name = std::move(name);
            study.created = std::move(created);
            const Json axes = parse_json(json, "sweep " + study.name).value("axes", Json::array());
            for (const Json& a : axes) study.axes.push_back(a.value("name", ""));
          },
          sweep);
  std::vector<std::int64_t> attempts;
  Statement(db,
            "SELECT label, labels, trial, status, reason, spec, coalesce(attempt, 0) FROM result "
            "WHERE sweep = ? ORDER BY position")
      .rows<std::string, std::string, std::string, std::string, std::string, std::string,
            std::int64_t>(
          [&](std::string label, const std::string& labels, std::string key, std::string status,
              std::string reason, const std::string& spec, std::int64_t attempt) {
            StudyTrial& t = study.trials.emplace_back();
            t.label = std::move(label);
            t.labels = parse_json(labels, "labels of " + t.label)
                           .get<std::map<std::string, std::string>>();
            t.key = std::move(key);
            t.status = std::move(status);
            t.reason = std::move(reason);
            t.spec = parse_json(spec, "spec of " + t.label);
            attempts.push_back(attempt);
          },
          sweep);
  for (std::size_t i = 0; i < attempts.size(); ++i)
    if (attempts[i] > 0) read_attempt(db, attempts[i], study.trials[i]);
  return study;
}

std::vector<Configuration> group_by_spec(const Study& study,
                                         const std::vector<std::string>& without) {
  std::vector<std::string> order;
  std::map<std::string, std::vector<const StudyTrial*>> groups;
  for (const StudyTrial& t : study.trials) {
    Json spec = t.spec;
    if (t.is_base()) spec.erase("train");  // nothing of it matters to an untrained model
    for (const auto& field : without) {
      const Json::json_pointer at(field);
      if (spec.contains(at)) spec[at.parent_pointer()].erase(at.back());
    }
    const std::string id = spec.dump();
    if (groups.count(id) == 0) order.push_back(id);
    groups[id].push_back(&t);
  }
  std::vector<Configuration> out;
  const auto free = free_axes(groups);
  for (const auto& id : order) {
    Configuration& c = out.emplace_back();
    c.label = shared_label(study, groups[id], free);
    std::set<std::string> seen;
    for (const StudyTrial* t : groups[id])
      if (seen.insert(t->key).second) c.trials.push_back(t);
  }
  return out;
}

std::vector<Configuration> configurations(const Study& study) {
  return group_by_spec(study, {"/train/seed"});
}

std::vector<Kin> kin_of(const Study& study, const std::vector<Configuration>& all) {
  std::vector<Kin> out;
  for (const Configuration& whole :
       group_by_spec(study, {"/train/seed", "/train/tasks", "/evaluate/suites"})) {
    Kin& m = out.emplace_back(Kin{whole.label, {}});
    for (const Configuration& c : all)
      if (std::find(whole.trials.begin(), whole.trials.end(), &c.first()) != whole.trials.end())
        m.members.push_back(&c);
    if (m.members.size() == 1) m.label = m.members.front()->label;
  }
  return out;
}

std::vector<Variant> variants(const Study& study) {
  std::vector<Variant> out;
  for (const StudyTrial& t : study.trials)
    for (const StudyScore& s : t.scores)
      if (const Variant v{s.protocol, s.metric}; std::find(out.begin(), out.end(), v) == out.end())
        out.push_back(v);
  return out;
}

std::vector<std::string> suites_of(const Study& study) {
  std::set<std::string> seen;
  for (const StudyTrial& t : study.trials) {
    for (const StudyScore& s : t.scores) seen.insert(s.suite);
    if (const Json::json_pointer at("/evaluate/suites"); t.spec.contains(at))
      for (const Json& s : t.spec[at]) seen.insert(s.get<std::string>());
  }
  return in_order(std::move(seen));
}

std::vector<std::string> in_order(std::set<std::string> suites) {
  std::vector<std::string> out;
  for (const Task& t : tasks()) {
    if (suites.erase(t.folder) > 0) suites.insert(t.name);
    if (suites.erase(t.name) > 0) out.push_back(t.name);
  }
  out.insert(out.end(), suites.begin(), suites.end());
  return out;
}

std::string column_of(const std::string& suite) {
  for (const Task& t : tasks())
    if (t.name == suite) return t.column;
  return suite;
}

std::optional<Summary> summarise(const Configuration& c, const std::string& suite, const Variant& v,
                                 double confidence) {
  Summary out;
  out.suite = suite;
  for (const StudyTrial* t : c.trials)
    if (const StudyScore* s = t->score(suite, v.protocol, v.metric)) {
      out.by_seed.push_back(s->value);
      out.scores.push_back(s);
      out.n = s->n;
    }
  if (out.scores.empty()) return std::nullopt;
  out.level = average_of({out}, confidence);
  Interval& within = out.level.interval;  // a share stays one, whatever t says of few seeds
  within = {std::max(0.0, within.low), std::min(1.0, within.high)};
  out.interval = within;
  if (out.scores.size() == 1)
    out.interval = wilson_interval(std::llround(out.by_seed[0] * static_cast<double>(out.n)), out.n,
                                   confidence);
  return out;
}

Grid grid_of(const Summary& s) {
  Grid g;
  for (const StudyScore* score : s.scores) {
    if (score->right.empty() || score->items != s.scores.front()->items) return {};
    g.push_back(score->right);
  }
  return g;
}

TwoLevel average_of(const std::vector<Summary>& suites, double confidence) {
  std::vector<Grid> grids;
  std::size_t seeds = suites.front().by_seed.size();
  for (const Summary& s : suites) {
    if (s.by_seed.size() != seeds) seeds = 0;
    if (Grid g = grid_of(s); !g.empty()) grids.push_back(std::move(g));
  }
  if (seeds > 0 && grids.size() == suites.size()) return two_level(grids, confidence);
  // Without the answers: the shares' own errors, and between seeds their spread.
  TwoLevel out;
  double variance = 0;
  const auto m = static_cast<double>(suites.size());
  for (const Summary& s : suites) {
    const SeedSummary k = summarise_seeds(s.by_seed, confidence);
    out.mean += k.mean / m;
    const double e = share_error(k.mean, s.n);
    variance += (e * e + k.sd * k.sd / static_cast<double>(k.seeds)) / (m * m);
  }
  out.standard_error = std::sqrt(variance);
  const double half = normal_quantile(0.5 + confidence / 2) * out.standard_error;
  out.interval = {out.mean - half, out.mean + half};
  return out;
}

}  // namespace mixlora
