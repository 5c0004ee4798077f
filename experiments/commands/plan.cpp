#include "experiments/plan.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "experiments/commands/commands.h"
#include "experiments/commands/progress.h"
#include "experiments/predict.h"
#include "reports/table.h"

namespace mixlora {
namespace {

struct PlanArguments {
  std::string sweep, db;
  bool retry = false, json = false, quick = false;
};

const char* word(const TrialPlan& t) { return !t.runs ? "keep" : !t.fits ? "refuse" : "run"; }

double mib(std::size_t bytes) { return static_cast<double>(bytes) / 1048576.0; }

Table table_of(const Sweep& sweep, const Plan& plan, const Rates& rates,
               const std::string& device) {
  Table t{"plan",
          fmt::format("Plan of {} on {}", sweep.name, device),
          "",
          {"trial", "key", "does", "samples", "steps", "train tokens", "asked tokens", "peak MiB",
           "recompute", "time"},
          {}};
  for (std::size_t i = 0; i < sweep.trials.size(); ++i) {
    const TrialPlan& p = plan.trials[i];
    const bool trains = p.peak_bytes > 0;
    const auto seconds = predicted_seconds(rates, sweep.trials[i].spec, p);
    const auto number = [&](std::int64_t n) { return trains ? std::to_string(n) : "-"; };
    t.rows.push_back({sweep.trials[i].label, sweep.trials[i].key, word(p), number(p.samples),
                      number(p.steps), number(p.train_tokens), std::to_string(p.scored_tokens),
                      trains ? fmt::format("{:.1f}", mib(p.peak_bytes)) : "-",
                      trains ? write(p.recompute).get<std::string>() : "-",
                      p.runs && p.fits && seconds ? clock_text(*seconds) : "-"});
  }
  return t;
}

struct Total {
  std::size_t run = 0, refused = 0;
  double seconds = 0;
  bool known = true;  // every trial that runs has a predicted time
};

Total total_of(const Sweep& sweep, const Plan& plan, const Rates& rates) {
  Total t;
  for (std::size_t i = 0; i < sweep.trials.size(); ++i) {
    const TrialPlan& p = plan.trials[i];
    if (!p.runs) continue;
    if (!p.fits) {
      ++t.refused;
      continue;
    }
    ++t.run;
    const auto seconds = predicted_seconds(rates, sweep.trials[i].spec, p);
    t.known = t.known && seconds;
    t.seconds += seconds.value_or(0);
  }
  return t;
}

Json json_of(const Sweep& sweep, const Plan& plan, const Rates& rates) {
  Json trials = Json::array(), left_out = Json::array(), packs = Json::array();
  for (std::size_t i = 0; i < sweep.trials.size(); ++i) {
    const TrialPlan& p = plan.trials[i];
    const auto seconds = predicted_seconds(rates, sweep.trials[i].spec, p);
    trials.push_back({{"label", sweep.trials[i].label},
                      {"key", sweep.trials[i].key},
                      {"does", word(p)},
                      {"state", p.state},
                      {"why", p.why},
                      {"samples", p.samples},
                      {"steps", p.steps},
                      {"train_tokens", p.train_tokens},
                      {"asked_tokens", p.scored_tokens},
                      {"peak_bytes", p.peak_bytes},
                      {"recompute", write(p.recompute)},
                      {"seconds", write(seconds)}});
  }
  for (const LeftOut& l : sweep.left_out)
    left_out.push_back({{"label", l.label}, {"why", l.reason}});
  for (const PackPlan& p : plan.packs)
    packs.push_back({{"trials", p.trials}, {"peak_bytes", p.peak_bytes}});
  return {{"sweep", sweep.name},   {"trials", trials},
          {"left_out", left_out},  {"packs", packs},
          {"rates", rates.source}, {"memory_limit_bytes", plan.memory_limit}};
}

void print_text(const Sweep& sweep, const Plan& plan, const Rates& rates, const std::string& device,
                const std::string& note) {
  Table t = table_of(sweep, plan, rates, device);
  const Total total = total_of(sweep, plan, rates);
  t.caption = fmt::format(
      "Peak MiB: every byte that training takes, frozen model included, in the recompute level "
      "that "
      "fits{}. Time: {}.{}",
      plan.memory_limit > 0
          ? fmt::format(" {} ({:.0f} MiB)", plan.memory_source, mib(plan.memory_limit))
          : "",
      rates.source.empty() ? "not predicted" : "tokens over the rates " + rates.source, note);
  fmt::print("{}\n", render(t, Format::terminal));
  for (std::size_t i = 0; i < sweep.trials.size(); ++i)
    fmt::print("{:<9} {}: {}\n", word(plan.trials[i]), sweep.trials[i].label, plan.trials[i].why);
  for (const LeftOut& l : sweep.left_out)
    fmt::print("{:<9} {}: {}\n", "left out", l.label, l.reason);
  fmt::print("{} trials: {} to run{}{}", sweep.trials.size(), total.run,
             total.refused > 0 ? fmt::format(", {} refused for memory", total.refused) : "",
             plan.packs.size() < total.run + total.refused
                 ? fmt::format(", in {} steps over one base", plan.packs.size())
                 : "");
  if (total.run > 0 && total.known && !rates.source.empty())
    fmt::print("; about {}", clock_text(total.seconds));
  fmt::print("\n");
}

int plan(const PlanArguments& o) {
  Sweep sweep = read_sweep(o.sweep);
  const std::string& source = sweep.trials.front().spec.model;
  const ModelConfig config = config_of(source);
  const auto ops = make_backend(sweep.run);
  const std::string model_hash = set_keys(sweep, *ops);
  const auto path = store_file(sweep, o.db);
  std::optional<Database> db;
  if (std::filesystem::exists(path)) db = open_store(path);
  const auto tokenizer = tokenizer_of(source);
  Texts texts(tokenizer.get());
  PlanOptions options;
  options.state = [&](const std::string& key) { return db ? trial_state(*db, key) : TrialState{}; };
  options.retry_failed = o.retry;
  const Plan made = make_plan(sweep, config, *ops, texts, options);
  Rates rates;
  if (db) rates = measured_rates(*db, model_hash, ops->description());
  if (!o.quick) calibrate(rates, sweep, made, config, *ops, texts);
  if (o.json)
    fmt::print("{}\n", json_of(sweep, made, rates).dump(2));
  else
    print_text(sweep, made, rates, ops->description(),
               tokenizer ? "" : " Tokens: a shape has no tokenizer; four bytes count as one.");
  return total_of(sweep, made, rates).refused > 0 ? kFailed : kDone;
}

}  // namespace

void add_plan_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<PlanArguments>();  // the parser and the callback share it
  CLI::App* command = app.add_subcommand(
      "plan", "say what run would do and why, with tokens, peak memory and time");
  command->add_option("sweep", o->sweep, "sweep file (JSON)")->required();
  command->add_option("--db", o->db, "store (default runs/NAME.db)");
  command->add_flag("--retry-failed", o->retry, "as run with this flag would");
  command->add_flag("--quick", o->quick, "time nothing: predict from the store's rates alone");
  command->add_flag("--json", o->json, "for another program to read");
  command->callback([=, &exit_code] { exit_code = plan(*o); });
}

}  // namespace mixlora
