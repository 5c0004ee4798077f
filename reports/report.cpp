#include "reports/report.h"

#include <algorithm>
#include <map>
#include <optional>

#include "engine/error.h"
#include "suites/task.h"

namespace mixlora {
namespace {

struct Result {
  std::string label, status;
  std::int64_t attempt = 0;
};

std::vector<Result> results(Database& db, std::int64_t sweep) {
  std::vector<Result> out;
  Statement(
      db,
      "SELECT label, status, coalesce(attempt, 0) FROM result WHERE sweep = ? ORDER BY position")
      .rows<std::string, std::string, std::int64_t>(
          [&](std::string label, std::string status, std::int64_t attempt) {
            out.push_back({std::move(label), std::move(status), attempt});
          },
          sweep);
  return out;
}
std::optional<double> measured(Database& db, std::int64_t attempt, const char* name) {
  std::optional<double> out;
  Statement(db, "SELECT value FROM measurement WHERE attempt = ? AND name = ?")
      .rows<double>([&](double v) { out = v; }, attempt, std::string_view(name));
  return out;
}
std::string cell(const std::optional<double>& v, int decimals, double divide = 1) {
  return v ? fmt::format("{:.{}f}", *v / divide, decimals) : "-";
}

struct Score {
  double value = 0, standard_error = 0, majority = 0;
  std::int64_t n = 0;
};

Table accuracy(Database& db, std::int64_t sweep) {
  Table t{"accuracy", "Accuracy (%)", "", {"trial"}, {}};
  std::vector<std::map<std::string, Score>> scores;
  std::map<std::string, Score> any;
  const auto trials = results(db, sweep);
  for (const Result& r : trials) {
    auto& own = scores.emplace_back();
    Statement(db,
              "SELECT suite, value, coalesce(stderr, 0), majority, n FROM score WHERE attempt = ?")
        .rows<std::string, double, double, double, std::int64_t>(
            [&](std::string suite, double v, double se, double majority, std::int64_t n) {
              any[suite] = own[suite] = {v, se, majority, n};
            },
            r.attempt);
  }
  std::vector<std::string> suites;
  for (const Task& task : tasks())
    if (any.count(task.name) != 0) {
      suites.push_back(task.name);
      t.columns.push_back(task.column);
    }
  t.columns.emplace_back("AVG");
  std::vector<std::string> majority{"majority answer"};
  double majority_sum = 0;
  for (const auto& s : suites) {
    majority.push_back(fmt::format("{:.1f}", 100 * any[s].majority));
    majority_sum += 100 * any[s].majority;
  }
  majority.push_back(
      suites.empty() ? "-"
                     : fmt::format("{:.1f}", majority_sum / static_cast<double>(suites.size())));
  t.rows.push_back(majority);
  for (std::size_t i = 0; i < trials.size(); ++i) {
    std::vector<std::string> row{trials[i].label};
    double sum = 0;
    for (const auto& s : suites) {
      const auto at = scores[i].find(s);
      row.push_back(at == scores[i].end() ? trials[i].status
                                          : fmt::format("{:.1f} ± {:.1f}", 100 * at->second.value,
                                                        100 * at->second.standard_error));
      sum += at == scores[i].end() ? 0 : 100 * at->second.value;
    }
    row.push_back(scores[i].size() == suites.size() && !suites.empty()
                      ? fmt::format("{:.1f}", sum / static_cast<double>(suites.size()))
                      : "-");
    t.rows.push_back(row);
  }
  std::string sizes;
  for (const auto& s : suites)
    sizes += fmt::format("{}{} {}", sizes.empty() ? "" : ", ", find_task(s).column, any[s].n);
  t.caption = fmt::format(
      "Label-token protocol, zero-shot; ± is one standard error of the share; rows asked: {}. AVG "
      "only where every suite was asked.",
      sizes);
  return t;
}

Table parameters(Database& db, std::int64_t sweep) {
  Table t{"params",
          "Trainable parameters",
          "Share of the base model's parameters.",
          {"trial", "trainable", "base", "%"},
          {}};
  for (const Result& r : results(db, sweep)) {
    const auto trainable = measured(db, r.attempt, "trainable_parameters"),
               base = measured(db, r.attempt, "base_parameters");
    std::optional<double> share;
    if (trainable && base) share = 100 * *trainable / *base;
    t.rows.push_back({r.label, cell(trainable, 0), cell(base, 0), cell(share, 2)});
  }
  return t;
}

Table efficiency(Database& db, std::int64_t sweep) {
  Table t{"efficiency",
          "Efficiency",
          "Training: median over steps of wall time a token, all tokens over all seconds, peak "
          "bytes as planned before loading and as allocated. "
          "Scoring: tokens through the model over seconds.",
          {"trial", "train ms/token", "train tokens/s", "score tokens/s", "planned MiB",
           "measured MiB"},
          {}};
  constexpr double kMib = 1024.0 * 1024.0;
  for (const Result& r : results(db, sweep))
    t.rows.push_back({r.label, cell(measured(db, r.attempt, "train_ms_per_token"), 3),
                      cell(measured(db, r.attempt, "train_tokens_per_s"), 0),
                      cell(measured(db, r.attempt, "eval_tokens_per_s"), 0),
                      cell(measured(db, r.attempt, "planned_peak_bytes"), 1, kMib),
                      cell(measured(db, r.attempt, "measured_peak_bytes"), 1, kMib)});
  return t;
}

Table expert_load(Database& db, std::int64_t sweep) {
  Table t{"expert-load",
          "Expert load (%)",
          "Share of router choices in training, mean over layers; lowest and highest share of any "
          "expert in any layer.",
          {"trial"},
          {}};
  std::vector<std::vector<std::string>> rows;
  std::int64_t most = 0;
  for (const Result& r : results(db, sweep)) {
    std::vector<std::string> row{r.label};
    Statement(db,
              "SELECT avg(share) FROM expert_load WHERE attempt = ? AND phase = 'train' GROUP BY "
              "expert ORDER BY expert")
        .rows<double>([&](double v) { row.push_back(fmt::format("{:.1f}", 100 * v)); }, r.attempt);
    if (row.size() == 1) continue;
    most = std::max(most, static_cast<std::int64_t>(row.size()) - 1);
    Statement(
        db, "SELECT min(share), max(share) FROM expert_load WHERE attempt = ? AND phase = 'train'")
        .rows<double, double>(
            [&](double low, double high) {
              row.push_back(fmt::format("{:.1f}..{:.1f}", 100 * low, 100 * high));
            },
            r.attempt);
    rows.push_back(row);
  }
  for (std::int64_t e = 0; e < most; ++e) t.columns.push_back(fmt::format("e{}", e));
  t.columns.emplace_back("low..high");
  for (auto& row : rows) {
    row.insert(row.end() - 1, t.columns.size() - row.size(), "");
    t.rows.push_back(row);
  }
  return t;
}

}  // namespace

std::int64_t last_sweep(Database& db) {
  std::int64_t id = 0;
  Statement(db, "SELECT coalesce(max(id), 0) FROM sweep").rows<std::int64_t>([&](std::int64_t v) {
    id = v;
  });
  require(id > 0, "the store holds no sweep yet; mixlora-bench run SWEEP fills it");
  return id;
}

Table build_table(Database& db, std::int64_t sweep, const std::string& name) {
  if (name == "accuracy") return accuracy(db, sweep);
  if (name == "params") return parameters(db, sweep);
  if (name == "efficiency") return efficiency(db, sweep);
  if (name == "expert-load") return expert_load(db, sweep);
  fail("no table \"{}\"; expected accuracy, params, efficiency or expert-load", name);
}

}  // namespace mixlora
