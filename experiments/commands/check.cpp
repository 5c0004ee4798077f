#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "engine/error.h"
#include "engine/json_file.h"
#include "experiments/commands/commands.h"
#include "experiments/commands/statistics_options.h"
#include "experiments/store/store.h"
#include "reports/gate.h"

namespace mixlora {
namespace {

struct CheckArguments {
  std::string baseline, db, sweep, junit, summary;
  bool update = false, verbose = false;
  GateOptions gate;
};

void put(const std::string& file, const std::string& text) {
  if (file == "-")
    fmt::print("{}", text);
  else if (!file.empty())
    write_text(file, text);
}

int check(const CheckArguments& o) {
  if (o.update) {
    require(!o.db.empty(), "check --update: which store? expected check --baseline {} --update DB",
            o.baseline);
    Database db = open_store(store_of(o.db));
    const Study study = read_study(db, last_sweep(db, o.sweep));
    write_baseline(baseline_of(study), o.baseline);
    fmt::print("{}: {} trials of {}\n", o.baseline, study.trials.size(), study.name);
    return kDone;
  }
  const Baseline baseline = read_baseline(o.baseline);
  const std::string file = o.db.empty() ? "runs/" + baseline.sweep + ".db" : o.db;
  Database db = open_store(store_of(file));
  const Study study = read_study(db, last_sweep(db, o.sweep.empty() ? baseline.sweep : o.sweep));
  const GateResult result = run_gate(baseline, study, o.gate);
  put(o.junit, gate_junit(result));
  put(o.summary, gate_summary(result));
  if (o.summary != "-" && o.junit != "-") {
    const Table t = gate_table(result, !o.verbose);
    fmt::print("{}",
               t.rows.empty() ? t.title + "\n" + t.caption + "\n" : render(t, Format::terminal));
  }
  return result.passed() ? kDone : kFailed;
}

}  // namespace

void add_check_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<CheckArguments>();  // the parser and the callback share it
  CLI::App* command = app.add_subcommand(
      "check", "hold a store against a baseline: exit 0 as good, 1 a regression, 2 wrong input");
  command->add_option("--baseline", o->baseline, "the file that --update writes")->required();
  command->add_option("db", o->db,
                      "store, or the sweep file whose store is runs/NAME.db (default: of the "
                      "baseline's sweep)");
  command->add_flag("--update", o->update, "write the baseline from the store instead");
  command->add_option("--sweep", o->sweep, "the store's last sweep with this name");
  command->add_option("--junit", o->junit, "write a JUnit XML file (-: print)");
  command->add_option("--summary", o->summary, "write a Markdown summary (-: print)");
  command->add_flag("--verbose", o->verbose, "print what passed too");
  command
      ->add_option("--latency-ratio", o->gate.latency_ratio,
                   "median step time over the baseline's that fails, when the test agrees too "
                   "(default 1.25; 0: no latency check)")
      ->check(CLI::Range(0.0, 1e6));
  command
      ->add_option("--memory-ratio", o->gate.memory_ratio,
                   "peak bytes over the baseline's that fail (default 1.02; 0: no memory check)")
      ->check(CLI::Range(0.0, 1e6));
  add_certainty_options(*command, o->gate.certainty);
  command->callback([=, &exit_code] { exit_code = check(*o); });
}

}  // namespace mixlora
