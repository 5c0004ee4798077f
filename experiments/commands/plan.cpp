#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "engine/model.h"
#include "experiments/commands/commands.h"
#include "experiments/run_trial.h"
#include "reports/table.h"

namespace mixlora {
namespace {

int plan(const std::string& file, const std::string& db) {
  Sweep sweep = read_sweep(file);
  const std::string source = sweep.trials.front().spec.model;
  const ModelConfig config = config_of(source);
  const Tokenizer tokenizer(source);
  const auto ops = make_backend(sweep.run);
  set_keys(sweep, *ops);
  const auto path = store_file(sweep, db);
  std::unique_ptr<Store> store;
  if (std::filesystem::exists(path)) store = std::make_unique<Store>(path);
  Table t{
      "plan",
      fmt::format("Plan of {} on {}", sweep.name, ops->description()),
      "Peak MiB: every byte the engine takes, without recompute. Tokens: of training, all epochs.",
      {"trial", "key", "state", "samples", "steps", "tokens", "peak MiB"},
      {}};
  for (const Trial& trial : sweep.trials) {
    const TrialState s = store ? store->state(trial.key) : TrialState{};
    std::vector<std::string> row{trial.label, trial.key, s.status};
    if (trial.spec.adapter.method == Method::base) {
      row.insert(row.end(), {"-", "-", "-", "-"});
    } else {
      const TrainJob job{trial.spec.adapter, trial.spec.train,
                         training_items(trial.spec, tokenizer)};
      double tokens = 0;
      for (const auto& i : job.items) tokens += static_cast<double>(i.tokens.size());
      const auto items = static_cast<std::int64_t>(job.items.size());
      const std::size_t bytes = planned_training_bytes(
          *ops, config, {job},
          sweep.run.recompute == Recompute::automatic ? Recompute::none : sweep.run.recompute);
      row.insert(row.end(), {std::to_string(items), std::to_string(step_count(job.train, items)),
                             fmt::format("{:.0f}", tokens * job.train.num_epochs),
                             fmt::format("{:.1f}", static_cast<double>(bytes) / 1048576.0)});
    }
    t.rows.push_back(row);
  }
  fmt::print("{}", render(t, Format::terminal));
  return 0;
}

}  // namespace

void add_plan_command(CLI::App& app, int& exit_code) {
  struct Options {
    std::string sweep, db;
  };
  const auto o = std::make_shared<Options>();  // the parser and the callback share it
  CLI::App* command =
      app.add_subcommand("plan", "say what run would do, with tokens and peak memory");
  command->add_option("sweep", o->sweep, "sweep file (JSON)")->required();
  command->add_option("--db", o->db, "store (default runs/NAME.db)");
  command->callback([=, &exit_code] { exit_code = plan(o->sweep, o->db); });
}

}  // namespace mixlora
