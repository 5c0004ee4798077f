// A store as a run leaves it, made by hand: every number is the test's own.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "experiments/store/store.h"
#include "kernels/random.h"
#include "tests/experiments/folder.h"

namespace mixlora {

/// Writes trials of one sweep into a store of a folder of its own.
class StudyStore {
 public:
  explicit StudyStore(const std::string& name, const std::vector<std::string>& axes)
      : file_(folder_.path / (name + ".db")), store_(file_), name_(name) {
    Json list = Json::array();
    for (const auto& a : axes) list.push_back({{"name", a}});
    Statement(db(), "INSERT INTO sweep (name, json, created) VALUES (?, ?, ?)")
        .run(name, Json{{"name", name}, {"axes", list}}.dump(), "2030-01-01T00:00:00Z");
  }
  std::string file() const { return file_.string(); }

  /// Adds a trial and a finished attempt (none when `status` is not done); returns the attempt.
  std::int64_t trial(const std::vector<std::pair<std::string, std::string>>& labels,
                     const Json& spec, const std::string& status = "done",
                     const std::string& reason = "") {
    Json full = Json::parse(R"({"model": "models/tiny-7b", "adapter": {"method": "lora", "r": 16},
      "train": {"tasks": [], "seed": 42, "limit": 0},
      "evaluate": {"suites": [], "protocol": "label-token", "limit": 0, "cutoff_len": 512}})");
    full.merge_patch(spec);
    std::string label;
    Json by_axis = Json::object();
    for (const auto& [axis, value] : labels) {
      label += (label.empty() ? "" : " / ") + value;
      by_axis[axis] = value;
    }
    ++trials_;
    const std::string key = full["adapter"]["method"] == "base"
                                ? fmt::format("base {}", full["evaluate"]["suites"].dump())
                                : fmt::format("key{}", trials_);
    Statement(db(), "INSERT INTO trial VALUES (?, ?, 'm', 'd', ?, ?) ON CONFLICT DO NOTHING")
        .run(key, full.dump(), status, reason);
    Statement(db(), "INSERT INTO sweep_trial VALUES (1, ?, ?, ?, ?)")
        .run(trials_, key, label, by_axis.dump());
    if (status != "done") return 0;
    Statement(db(),
              "INSERT INTO attempt (trial, started, outcome, host, pid, device, environment) "
              "VALUES (?, '2030-01-01T00:00:00Z', 'done', 'host', 1, 'a test device', '{}')")
        .run(key);
    return sqlite3_last_insert_rowid(db().raw());
  }

  /// Answers of a suite with `choices` choices: question i is right when right(i).
  void score(std::int64_t attempt, const std::string& suite, std::int64_t n, std::int64_t choices,
             const std::function<bool(std::int64_t)>& right, std::int64_t truncated = 0) {
    Evaluation e;
    e.suite = suite;
    e.protocol = "label-token";
    e.metric = "acc";
    e.n = n;
    e.truncated = truncated;
    e.chance = 1.0 / static_cast<double>(choices);
    std::map<std::int64_t, double> golds;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t gold = i * 7 % 10 < 4 ? 0 : i % choices;
      const bool yes = right(i);
      e.answers.push_back({fmt::format("q{}", 1000 + i), yes ? gold : (gold + 1) % choices, gold,
                           std::vector<float>(static_cast<std::size_t>(choices), -1.0F)});
      e.value += yes ? 1.0 / static_cast<double>(n) : 0;
      golds[gold] += 1.0 / static_cast<double>(n);
    }
    for (const auto& [gold, share] : golds) e.majority = std::max(e.majority, share);
    store_.evaluation(attempt, e);
  }

  void steps(std::int64_t attempt, std::int64_t n, const std::function<double(std::int64_t)>& loss,
             const std::function<double(std::int64_t)>& ms) {
    Transaction t(db());
    for (std::int64_t i = 1; i <= n; ++i) {
      StepRecord r;
      r.step = i;
      r.steps = n;
      r.loss = loss(i);
      r.tokens = 100;
      r.ms = ms(i);
      r.entropy = 1.5;
      store_.step(attempt, r);
    }
    t.commit();
  }
  void loads(std::int64_t attempt, std::int64_t layers, std::int64_t experts, double tilt) {
    std::vector<ExpertLoad> out;
    for (std::int64_t l = 0; l < layers; ++l) {
      double sum = 0;
      for (std::int64_t e = 0; e < experts; ++e) sum += 1 + tilt * static_cast<double>(e + l);
      for (std::int64_t e = 0; e < experts; ++e)
        out.push_back({l, e, (1 + tilt * static_cast<double>(e + l)) / sum});
    }
    store_.expert_load(attempt, "train", out);
  }
  void costs(std::int64_t attempt, double trainable, double peak_mib, double tokens_per_s) {
    const auto put = [&](const char* name, double v) { store_.measurement(attempt, name, v, "1"); };
    put("base_parameters", 1e6);
    put("eval_tokens_per_s", 2 * tokens_per_s);
    if (trainable == 0) return;
    put("trainable_parameters", trainable);
    put("planned_peak_bytes", peak_mib * 1048576);
    put("measured_peak_bytes", peak_mib * 1048576);
    put("train_tokens_per_s", tokens_per_s);
    put("train_ms_per_token", 1000 / tokens_per_s);
  }
  Database& db() { return store_.database(); }

 private:
  Folder folder_;
  std::filesystem::path file_;
  Store store_;
  std::string name_;
  std::int64_t trials_ = 0;
};

/// A number of [0, 1) for question i of stream s: the same everywhere.
inline double unit(std::uint32_t s, std::int64_t i) {
  const RandomKey key = random_key(s, Purpose::test);
  return unit_open(philox(static_cast<std::uint32_t>(i), 0, 0, 0, key.k0, key.k1).v[0]);
}

/// Methods over two suites and two seeds; one seed missing, one trial failed, one constant.
inline void fill_multi(StudyStore& s) {
  struct Kind {
    const char* label;
    Json adapter;
    double skill;
    std::int64_t experts;
  };
  const std::vector<Kind> methods{
      {"base model", {{"method", "base"}}, 0.35, 0},
      {"LoRA", {{"method", "lora"}}, 0.6, 0},
      {"MixLoRA top-1 of 4",
       {{"method", "mixlora"}, {"num_experts", 4}, {"top_k", 1}, {"routing_strategy", "mixlora"}},
       0.62,
       4},
      {"MixLoRA top-2 of 4",
       {{"method", "mixlora"}, {"num_experts", 4}, {"top_k", 2}, {"routing_strategy", "mixlora"}},
       0.7,
       4},
      {"MixLoRA top-1 of 8",
       {{"method", "mixlora"}, {"num_experts", 8}, {"top_k", 1}, {"routing_strategy", "mixlora"}},
       0.66,
       8},
      {"MixLoRA top-2 of 8",
       {{"method", "mixlora"}, {"num_experts", 8}, {"top_k", 2}, {"routing_strategy", "mixlora"}},
       0.85,
       8},
  };
  std::uint32_t stream = 0;
  for (const Kind& m : methods)
    for (const int seed : {1, 2}) {
      ++stream;
      const bool base = m.experts == 0 && std::string(m.label) != "LoRA";
      Json spec = {{"adapter", m.adapter},
                   {"train", {{"tasks", {"arc-e", "boolq"}}, {"seed", seed}}},
                   {"evaluate", {{"suites", {"arc-e", "boolq"}}}}};
      if (base) spec["train"] = {{"tasks", {"arc-e", "boolq"}}, {"seed", 1}};
      const std::vector<std::pair<std::string, std::string>> labels{{"method", m.label},
                                                                    {"seed", std::to_string(seed)}};
      if (std::string(m.label) == "MixLoRA top-1 of 8" && seed == 2) {
        s.trial(labels, spec, "failed", "out of patience");
        continue;
      }
      if (base && seed == 2) {
        s.trial(labels, spec, "planned");  // the same key again: nothing new
        continue;
      }
      const auto attempt = s.trial(labels, spec);
      const auto right = [&](std::int64_t i) {
        return 0.6 * unit(99, i) + 0.4 * unit(stream, i) < m.skill;
      };
      s.score(attempt, "arc-e", 80, 4, right, m.experts == 4 ? 3 : 0);
      s.score(attempt, "boolq", 60, 2, [&](std::int64_t i) { return right(i + 1000); });
      s.costs(attempt, base ? 0 : 20000.0 + 5000.0 * static_cast<double>(m.experts),
              100 + 10 * static_cast<double>(m.experts),
              1000 - 20 * static_cast<double>(m.experts));
      if (base) continue;
      s.steps(
          attempt, 40, [&](std::int64_t i) { return 2.0 / std::sqrt(static_cast<double>(i)); },
          [&](std::int64_t i) {
            return 100 + 2 * static_cast<double>(m.experts) + 3 * unit(stream, 5000 + i);
          });
      if (m.experts > 0) s.loads(attempt, 3, m.experts, 0.1);
    }
}

/// One adapter a suite: ranks and router loss coefficients of MixLoRA, LoRA, the base model; the
/// last setting has one suite only.
inline void fill_single(StudyStore& s) {
  struct Setting {
    const char* label;
    Json adapter;
    double skill;
  };
  const std::vector<Setting> settings{
      {"base model", {{"method", "base"}}, 0.3},
      {"LoRA", {{"method", "lora"}}, 0.6},
      {"r 8", {{"method", "mixlora"}, {"r", 8}, {"router_aux_loss_coef", 0.001}}, 0.65},
      {"r 16", {{"method", "mixlora"}, {"router_aux_loss_coef", 0.001}}, 0.7},
      {"coef 0.01", {{"method", "mixlora"}, {"router_aux_loss_coef", 0.01}}, 0.68},
  };
  std::uint32_t stream = 100;
  for (const std::string suite : {"arc-e", "boolq"})
    for (const Setting& m : settings) {
      ++stream;
      const bool base = std::string(m.label) == "base model";
      if (suite == "boolq" && std::string(m.label) == "coef 0.01") continue;
      Json adapter = m.adapter;
      if (adapter["method"] == "mixlora")
        adapter.update({{"num_experts", 8}, {"top_k", 2}, {"routing_strategy", "mixlora"}});
      const auto attempt = s.trial({{"task", suite}, {"method", m.label}},
                                   {{"adapter", adapter},
                                    {"train", {{"tasks", {suite}}}},
                                    {"evaluate", {{"suites", {suite}}, {"limit", 50}}}});
      s.score(attempt, suite, 50, suite == "arc-e" ? 4 : 2,
              [&](std::int64_t i) { return unit(stream, i) < m.skill; });
      s.costs(attempt, base ? 0 : 20000, 100, 1000);
    }
}

}  // namespace mixlora
