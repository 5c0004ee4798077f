#include <algorithm>
#include <filesystem>
#include <optional>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "engine/error.h"
#include "engine/nearest.h"
#include "experiments/commands/commands.h"
#include "experiments/commands/statistics_options.h"
#include "experiments/store/store.h"
#include "reports/costs.h"
#include "reports/latency.h"
#include "reports/paired.h"
#include "reports/report.h"

namespace mixlora {
namespace {

struct CompareArguments {
  std::string first, second, db, format = "terminal";
  bool only_changed = false, fail = false;
  Certainty certainty;
};

/// One side of a comparison: a whole sweep, or one configuration of it.
struct Side {
  std::string name;
  Study study;
  std::string configuration;  // label; empty: all
};

/// A name within a store: a sweep, or a configuration, label or key prefix of the last sweep.
Side named(const std::string& file, const std::string& name) {
  Database db = open_store(file);
  bool is_sweep = false;
  Statement(db, "SELECT count(*) > 0 FROM sweep WHERE name = ?")
      .rows<bool>([&](bool v) { is_sweep = v; }, name);
  if (is_sweep) return {name, read_study(db, last_sweep(db, name)), ""};
  Side out{name, read_study(db, last_sweep(db)), ""};
  std::vector<std::string> labels;
  for (const Configuration& c : configurations(out.study)) {
    if (c.label == name) {
      out.configuration = name;
      return out;
    }
    labels.push_back(c.label);
  }
  constexpr std::size_t kPrefix = 6;  // of a key: shorter ones are taken for labels
  std::erase_if(out.study.trials, [&](const StudyTrial& t) {
    return t.label != name && !(name.size() >= kPrefix && t.key.starts_with(name));
  });
  if (out.study.trials.empty())
    fail("{}: no sweep, trial or key \"{}\"; {}", file, name, nearest(name, labels));
  out.configuration = configurations(out.study).front().label;
  return out;
}

/// FILE, FILE:NAME, or with --db a name in that store.
Side side(const std::string& text, const std::string& db) {
  if (!db.empty()) return named(store_of(db).string(), text);
  if (std::filesystem::exists(text)) {
    const std::string file = store_of(text).string();
    Database store = open_store(file);
    return {text, read_study(store, last_sweep(store)), ""};
  }
  for (std::size_t at = text.find(':'); at != std::string::npos; at = text.find(':', at + 1))
    if (std::filesystem::exists(text.substr(0, at)))
      return named(store_of(text.substr(0, at)).string(), text.substr(at + 1));
  fail("{}: no such store; expected FILE, FILE:SWEEP or FILE:TRIAL, or --db FILE with two names",
       text);
}

struct Pairing {
  std::string label;
  Configuration first, second;
};

std::vector<Pairing> pairings(const Side& a, const Side& b, std::string& left_over) {
  std::vector<Pairing> out;
  const auto of_a = configurations(a.study), of_b = configurations(b.study);
  const auto find = [](const std::vector<Configuration>& all, const std::string& label) {
    return std::find_if(all.begin(), all.end(), [&](const auto& c) { return c.label == label; });
  };
  if (!a.configuration.empty() && !b.configuration.empty()) {
    const auto x = find(of_a, a.configuration), y = find(of_b, b.configuration);
    out.push_back({x->label == y->label ? x->label : x->label + " → " + y->label, *x, *y});
    return out;
  }
  require(a.configuration.empty() == b.configuration.empty(),
          "compare: \"{}\" is {} and \"{}\" is {}; expected two of one kind", a.name,
          a.configuration.empty() ? "a whole sweep" : "one trial", b.name,
          b.configuration.empty() ? "a whole sweep" : "one trial");
  for (const Configuration& c : of_a) {
    if (const auto other = find(of_b, c.label); other != of_b.end())
      out.push_back({c.label, c, *other});
    else
      left_over += fmt::format(" Only in the first: {}.", c.label);
  }
  for (const Configuration& c : of_b)
    if (find(of_a, c.label) == of_a.end())
      left_over += fmt::format(" Only in the second: {}.", c.label);
  require(!out.empty(), "compare: no trial of {} has a label of {};{}", a.name, b.name, left_over);
  return out;
}

int compare(const CompareArguments& o) {
  const Format format = format_named(o.format);
  const Side a = side(o.first, o.db), b = side(o.second, o.db);
  std::string left_over;
  const auto pairs = pairings(a, b, left_over);
  Json all = Json::array();
  bool worse = false;
  const auto show = [&](const Table& t) {
    if (format == Format::json)
      all.push_back(to_json(t));
    else if (!t.rows.empty())
      fmt::print("{}\n", render(t, format));
  };
  for (const Variant& v : variants(a.study)) {
    Table t{"compare", fmt::format("Accuracy: {} → {}", a.name, b.name),
            "",        paired_columns(),
            {},        paired_words()};
    t.columns.insert(t.columns.begin(), "trial");
    std::string unpaired;
    for (const Pairing& p : pairs) {
      const Comparison c = mixlora::compare(p.first, p.second, v, o.certainty);
      const auto rows = paired_rows(c);
      std::vector<PairedScore> scores = c.suites;
      scores.insert(scores.end(), c.average.begin(), c.average.end());
      for (std::size_t i = 0; i < rows.size(); ++i) {
        worse = worse || scores[i].verdict == Verdict::worse;
        if (o.only_changed && scores[i].verdict != Verdict::worse &&
            scores[i].verdict != Verdict::better)
          continue;
        t.rows.push_back(rows[i]);
        t.rows.back().cells.insert(t.rows.back().cells.begin(), Cell(p.label));
      }
      for (const auto& suite : c.unpaired)
        unpaired += fmt::format(" {}, {}: other questions on the two sides, not compared.", p.label,
                                column_of(suite));
    }
    std::vector<Configuration> used;
    for (const Pairing& p : pairs) used.insert(used.end(), {p.first, p.second});
    t.caption = protocol_text(used, v) + paired_caption(o.certainty) + unpaired + left_over;
    if (t.rows.empty())
      t.rows.push_back(TableRow({o.only_changed ? "nothing changed" : "nothing to compare"}));
    t.rows.back().cells.resize(t.columns.size());
    show(t);
  }
  Table t{"compare-latency",
          fmt::format("Step time: {} → {}", a.name, b.name),
          latency_caption(o.certainty, kLatencyMargin),
          latency_columns(),
          {}};
  for (const Pairing& p : pairs) {
    const auto first = step_times(p.first), second = step_times(p.second);
    if (first.empty() || second.empty()) continue;
    const LatencyComparison c = compare_latency(first, second, o.certainty, kLatencyMargin);
    worse = worse || c.verdict == Verdict::worse;
    if (!o.only_changed || c.verdict == Verdict::worse || c.verdict == Verdict::better)
      t.rows.push_back(latency_row(p.label, c));
    if (p.first.first().device != p.second.first().device)
      t.caption += fmt::format(" {}: other devices, {} and {}.", p.label, p.first.first().device,
                               p.second.first().device);
  }
  show(t);
  if (format == Format::json) fmt::print("{}\n", all.dump(1));
  return worse && o.fail ? kFailed : kDone;
}

}  // namespace

void add_compare_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<CompareArguments>();  // the parser and the callback share it
  CLI::App* command = app.add_subcommand(
      "compare", "two trials, sweeps or stores question by question, with verdicts");
  command->add_option("first", o->first, "FILE, FILE:SWEEP, FILE:TRIAL, or a name with --db")
      ->required();
  command->add_option("second", o->second, "as first; differences are second less first")
      ->required();
  command->add_option("--db", o->db, "the store that both names are in");
  command->add_option("--format", o->format, "terminal, markdown, csv, latex or json");
  command->add_flag("--only-changed", o->only_changed, "rows that are better or worse alone");
  command->add_flag("--fail-on-regression", o->fail, "exit 1 when any verdict is worse");
  add_certainty_options(*command, o->certainty);
  command->callback([=, &exit_code] { exit_code = compare(*o); });
}

}  // namespace mixlora
