#include <csignal>
#include <cstdio>
#include <thread>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <unistd.h>

#include "engine/error.h"
#include "experiments/commands/commands.h"
#include "experiments/run_trial.h"

namespace mixlora {
namespace {

volatile std::sig_atomic_t stop_asked = 0;
void ask_stop(int /*signal*/) { stop_asked = 1; }

/// "[2/6] MixLoRA  step 40/96  loss 1.234  310 tokens/s  1:20 left", one line that is rewritten on
/// a terminal.
class Progress {
 public:
  Progress(std::size_t at, std::size_t of, std::string label)
      : head_(fmt::format("[{}/{}] {}", at, of, label)), terminal_(isatty(STDOUT_FILENO) != 0) {}
  void step(const StepRecord& r) {
    ms_ += r.ms;
    tokens_ += r.tokens;
    const bool last = r.step == r.steps;
    if (!terminal_ && !last && r.step % 20 != 0) return;
    const double left =
        ms_ / static_cast<double>(r.step) * static_cast<double>(r.steps - r.step) / 1000;
    fmt::print("{}{}  step {}/{}  loss {:.4f}  {:.0f} tokens/s  {}:{:02} left{}",
               terminal_ ? "\r\x1b[K" : "", head_, r.step, r.steps, r.loss,
               1000 * static_cast<double>(tokens_) / ms_, static_cast<int>(left) / 60,
               static_cast<int>(left) % 60, terminal_ && !last ? "" : "\n");
    std::fflush(stdout);
  }
  void score(const Evaluation& e) const {
    fmt::print("{}  {}  {:.1f} ± {:.1f} %  (majority {:.1f}, {} rows)\n", head_, e.suite,
               100 * e.value, 100 * e.standard_error, 100 * e.majority, e.n);
    std::fflush(stdout);
  }
  void say(const std::string& text) const {
    fmt::print("{}  {}\n", head_, text);
    std::fflush(stdout);
  }

 private:
  std::string head_;
  bool terminal_;
  double ms_ = 0;
  std::int64_t tokens_ = 0;
};

int run(const std::string& file, const std::string& db, const std::string& out, bool retry) {
  Sweep sweep = read_sweep(file);
  config_of(sweep.trials.front().spec.model);  // a missing model says so before anything else
  const std::unique_ptr<Backend> ops = make_backend(sweep.run);
  const std::string model_hash = set_keys(sweep, *ops);
  const auto path = store_file(sweep, db);
  if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path());
  Store store(path);
  const std::int64_t id = store.put_sweep(sweep, model_hash);
  std::unique_ptr<Model> model;
  std::unique_ptr<Tokenizer> tokenizer;
  bool failed = false;
  std::signal(SIGINT, ask_stop);
  std::signal(SIGTERM, ask_stop);
  for (std::size_t i = 0; i < sweep.trials.size(); ++i) {
    const Trial& trial = sweep.trials[i];
    Progress progress(i + 1, sweep.trials.size(), trial.label);
    const TrialState state = store.state(trial.key);
    if (state.status == "done" ||
        ((state.status == "failed" || state.status == "out_of_memory") && !retry)) {
      progress.say(state.status + (state.reason.empty() ? "" : ": " + state.reason));
      failed = failed || state.status != "done";
      continue;
    }
    if (model == nullptr) {  // only when there is something to do
      fmt::print("{}; loading {}\n", ops->description(), trial.spec.model);
      model = Model::load(*ops, trial.spec.model);
      if (!model->random) tokenizer = std::make_unique<Tokenizer>(trial.spec.model);
    }
    const Workbench bench{*ops, *model, tokenizer.get(), trial.spec.model,
                          sweep.run.keep_adapters ? path.parent_path() / (sweep.name + "-adapters")
                                                  : std::filesystem::path()};
    const Json environment = {{"device", ops->description()},
                              {"threads", std::thread::hardware_concurrency()},
                              {"compiler", __VERSION__}};
    const std::int64_t attempt =
        store.begin_attempt(trial.key, ops->description(), environment.dump());
    const TrialObserver observer{[&](const StepRecord& r) { progress.step(r); },
                                 [&](const Evaluation& e) { progress.score(e); },
                                 [] { return stop_asked != 0; }};
    try {
      run_trial(bench, trial, sweep.run, store, attempt, observer);
      store.end_attempt(attempt, trial.key, "done", "");
    } catch (const Interrupted& e) {
      store.end_attempt(attempt, trial.key, "interrupted", e.what());
      fmt::print("\nstopped; the same command goes on from here\n");
      return kStopped;
    } catch (const OutOfMemory& e) {
      store.end_attempt(attempt, trial.key, "out_of_memory", e.what());
      progress.say(fmt::format("out of memory: {}", e.what()));
      failed = true;
    } catch (const StoreError&) {
      throw;
    } catch (const std::exception& e) {
      store.end_attempt(attempt, trial.key, "failed", e.what());
      progress.say(fmt::format("failed: {}", e.what()));
      failed = true;
    }
  }
  print_tables(store.database(), id, sweep.tables,
               out.empty() ? (path.parent_path() / (sweep.name + "-tables")).string() : out);
  return failed ? kFailed : 0;
}

}  // namespace

void add_run_command(CLI::App& app, int& exit_code) {
  struct Options {
    std::string sweep, db, out;
    bool retry = false;
  };
  const auto o = std::make_shared<Options>();  // the parser and the callback share it
  CLI::App* command =
      app.add_subcommand("run", "run what of a sweep is not done yet, then print its tables");
  command->add_option("sweep", o->sweep, "sweep file (JSON)")->required();
  command->add_option("--db", o->db, "store (default runs/NAME.db)");
  command->add_option("--out", o->out, "folder for tables (default runs/NAME-tables)");
  command->add_flag("--retry-failed", o->retry, "run failed trials again");
  command->callback([=, &exit_code] { exit_code = run(o->sweep, o->db, o->out, o->retry); });
}

}  // namespace mixlora
