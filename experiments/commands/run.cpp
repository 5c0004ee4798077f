#include <csignal>
#include <cstdio>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <unistd.h>

#include "experiments/commands/commands.h"
#include "experiments/commands/progress.h"
#include "experiments/environment.h"
#include "experiments/runner.h"
#include "experiments/timing.h"

namespace mixlora {
namespace {

volatile std::sig_atomic_t stop_asked = 0;

/// The first signal asks for a clean stop, the second one ends the process as ever.
void ask_stop(int signal) {
  stop_asked = 1;
  std::signal(signal, SIG_DFL);
  constexpr std::string_view kText = "\nstopping after this step; once more: at once\n";
  if (::write(STDERR_FILENO, kText.data(), kText.size()) < 0) return;
}

struct RunArguments {
  std::string sweep, db, out;
  bool retry = false;
};

/// The model, loaded when the first trial wants it.
class LazyBench {
 public:
  LazyBench(Backend& ops, const Tokenizer* tokenizer, std::string source,
            std::filesystem::path adapters, std::filesystem::path states, Progress& progress)
      : ops_(ops),
        tokenizer_(tokenizer),
        source_(std::move(source)),
        adapters_(std::move(adapters)),
        states_(std::move(states)),
        progress_(progress) {}
  const Workbench& operator()() {
    if (bench_) return *bench_;
    progress_.say("loading " + source_);
    model_ = Model::load(ops_, source_);
    bench_.emplace(Workbench{ops_, *model_, tokenizer_, source_, adapters_, states_});
    return *bench_;
  }

 private:
  Backend& ops_;
  const Tokenizer* tokenizer_;
  std::string source_;
  std::filesystem::path adapters_, states_;
  Progress& progress_;
  std::unique_ptr<Model> model_;
  std::optional<Workbench> bench_;
};

std::size_t widest_label(const Sweep& sweep) {
  std::size_t n = 0;
  for (const Trial& t : sweep.trials) n = std::max(n, t.label.size());
  return std::min<std::size_t>(n, 40);
}

RunObserver observer_of(Progress& p) {
  RunObserver o;
  o.on_pack = [&](const std::vector<const Trial*>& pack) { p.begin(pack); };
  o.on_end = [&](const Trial& t, const std::string& status, const std::string& reason) {
    p.end(t, status, reason);
  };
  o.trial.on_step = [&](const StepRecord& r) { p.step(r); };
  o.trial.on_trained = [&](const TrainSummary& s) { p.trained(s); };
  o.trial.on_asked = [&](const Trial& t, const std::string& suite, std::size_t n, std::size_t of) {
    p.asked(t, suite, n, of);
  };
  o.trial.on_score = [&](const Trial& t, const Evaluation& e) { p.score(t, e); };
  o.trial.on_note = [&](const std::string& text) { p.say(text); };
  o.trial.stop = [] { return stop_asked != 0; };
  return o;
}

int run(const RunArguments& o) {
  const auto start = Clock::now();
  Sweep sweep = read_sweep(o.sweep);
  const std::string& source = sweep.trials.front().spec.model;
  const ModelConfig config = config_of(source);
  const std::unique_ptr<Backend> ops = make_backend(sweep.run);
  const std::string model_hash = set_keys(sweep, *ops);
  const auto path = store_file(sweep, o.db);
  if (o.db.empty()) make_folder(path.parent_path());
  Store store(path);
  const std::int64_t id = store.put_sweep(sweep, model_hash);

  const auto tokenizer = tokenizer_of(source);
  Texts texts(tokenizer.get());
  PlanOptions options;
  options.state = [&](const std::string& key) { return store.state(key); };
  options.retry_failed = o.retry;
  options.size_all = false;
  const Plan plan = make_plan(sweep, config, *ops, texts, options);
  std::size_t to_run = 0, failed_before = 0;
  for (const TrialPlan& t : plan.trials) {
    to_run += t.runs ? 1 : 0;
    failed_before += !t.runs && t.state != "done" ? 1 : 0;
  }
  Progress progress(to_run, widest_label(sweep));
  progress.say(fmt::format("{}: {} trials, {} to run; {}, {}", sweep.name, sweep.trials.size(),
                           to_run, cpu_name(), ops->description()));
  for (std::size_t i = 0; i < plan.trials.size(); ++i)
    if (!plan.trials[i].runs && plan.trials[i].state != "done")
      progress.say(fmt::format("{}: {}", sweep.trials[i].label, plan.trials[i].why));

  std::signal(SIGINT, ask_stop);
  std::signal(SIGTERM, ask_stop);
  LazyBench bench(*ops, tokenizer.get(), source,
                  sweep.run.keep_adapters ? path.parent_path() / (sweep.name + "-adapters")
                                          : std::filesystem::path(),
                  std::filesystem::path(path).replace_extension("") += "-training", progress);
  const RunOutcome outcome = run_plan(
      sweep, plan, texts, store, ops->description(), environment_of(*ops),
      [&]() -> const Workbench& { return bench(); }, observer_of(progress));
  if (outcome.stopped) {
    progress.say("stopped; the same command goes on from here");
    return kStopped;
  }
  const std::string out =
      o.out.empty() ? (path.parent_path() / (sweep.name + "-tables")).string() : o.out;
  print_tables(store.database(), id, sweep.tables, out);
  std::fflush(stdout);
  const double seconds = seconds_since(start);
  const auto failed = static_cast<std::size_t>(outcome.failed) + failed_before;
  const std::string what = to_run == 0 ? "nothing was left to run"
                                       : fmt::format("{} of {} trials run in {}", outcome.done,
                                                     to_run, clock_text(seconds));
  progress.say(fmt::format("\n{}{}; store {}, tables in {}", what,
                           failed > 0 ? fmt::format(", {} failed (see status)", failed) : "",
                           path.string(), out));
  return failed > 0 ? kFailed : kDone;
}

}  // namespace

void add_run_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<RunArguments>();  // the parser and the callback share it
  CLI::App* command =
      app.add_subcommand("run", "run what of a sweep is not done yet, then print its tables");
  command->add_option("sweep", o->sweep, "sweep file (JSON)")->required();
  command->add_option("--db", o->db, "store (default runs/NAME.db)");
  command->add_option("--out", o->out, "folder for tables (default runs/NAME-tables)");
  command->add_flag("--retry-failed", o->retry, "run failed trials again");
  command->callback([=, &exit_code] { exit_code = run(*o); });
}

}  // namespace mixlora
