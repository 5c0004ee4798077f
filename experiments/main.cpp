// mixlora-bench: the program and its subcommands.
#include <csignal>
#include <cstdio>
#include <fstream>
#include <thread>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <unistd.h>

#include "engine/scorer.h"
#include "engine/train.h"
#include "experiments/run_trial.h"
#include "reports/report.h"
#include "suites/prompt.h"

namespace {

using namespace mixlora;

// Exit codes: 0 all done, 1 a trial failed, 2 the input is wrong, 130 stopped by a signal.
constexpr int kFailed = 1, kBadInput = 2, kStopped = 130;
volatile std::sig_atomic_t stop_asked = 0;
void ask_stop(int /*signal*/) { stop_asked = 1; }

Precision precision_of(const std::string& name) {
  return name == "fp32" ? Precision::fp32 : name == "bf16" ? Precision::bf16 : Precision::automatic;
}

std::unique_ptr<Backend> make_backend(const RunSpec& run) {
  if (run.device == "cuda") {
    const std::string reason = cuda_unavailable_reason();
    require(reason.empty(), "run.device \"cuda\": {}", reason);
  }
  if (run.device == "cuda" || (run.device == "auto" && cuda_unavailable_reason().empty()))
    return make_cuda_backend(precision_of(run.precision));
  return make_cpu_backend(precision_of(run.precision));
}

std::filesystem::path store_file(const Sweep& sweep, const std::string& given) {
  return given.empty() ? std::filesystem::path("runs") / (sweep.name + ".db")
                       : std::filesystem::path(given);
}

/// Sets the trials' keys; equal trials (the base model under several labels) share one.
std::string set_keys(Sweep& sweep) {
  std::string model_hash;
  for (Trial& t : sweep.trials) {
    require(t.spec.model == sweep.trials.front().spec.model,
            "{}: one model a sweep; found \"{}\" and \"{}\"", sweep.file,
            sweep.trials.front().spec.model, t.spec.model);
    if (model_hash.empty()) model_hash = model_fingerprint(t.spec.model);
    t.key = trial_key(t.spec, model_hash, data_fingerprint(t.spec));
  }
  return model_hash;
}

int plan(const std::string& file, const std::string& db) {
  Sweep sweep = read_sweep(file);
  const std::string source = sweep.trials.front().spec.model;
  const ModelConfig config = config_of(source);
  const Tokenizer tokenizer(source);
  set_keys(sweep);
  const auto ops = make_backend(sweep.run);
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

void print_tables(Database& db, std::int64_t id, const std::vector<std::string>& names,
                  const std::string& directory) {
  for (const auto& name : names) {
    const Table t = build_table(db, id, name);
    if (t.rows.empty()) continue;
    fmt::print("\n{}", render(t, Format::terminal));
    if (directory.empty()) continue;
    std::filesystem::create_directories(directory);
    for (const auto& [format, ending] :
         {std::pair{Format::markdown, "md"}, {Format::csv, "csv"}, {Format::latex, "tex"}})
      write_text(std::filesystem::path(directory) / fmt::format("{}.{}", name, ending),
                 render(t, format));
  }
}

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
  const std::string model_hash = (config_of(sweep.trials.front().spec.model), set_keys(sweep));
  const auto path = store_file(sweep, db);
  if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path());
  Store store(path);
  const std::int64_t id = store.put_sweep(sweep, model_hash);
  std::unique_ptr<Backend> ops;
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
      ops = make_backend(sweep.run);
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

int status(const std::string& file) {
  require(std::filesystem::exists(file), "{}: no such file", file);
  Database db(file);
  Statement(db, "SELECT label, status, reason FROM result WHERE sweep = ? ORDER BY position")
      .rows<std::string, std::string, std::string>(
          [](const std::string& label, const std::string& state, const std::string& reason) {
            fmt::print("{:<40} {}{}\n", label, state, reason.empty() ? "" : ": " + reason);
          },
          last_sweep(db));
  return 0;
}

int report(const std::string& file, const std::string& out) {
  require(std::filesystem::exists(file), "{}: no such file", file);
  Database db(file);
  print_tables(db, last_sweep(db), {"accuracy", "params", "efficiency", "expert-load"}, out);
  return 0;
}

int prompts(const std::string& suite, std::int64_t n) {
  const Task& task = find_task(suite);
  for (const Row& row : load_split(task, false, n).rows) {
    fmt::print("--- {} (gold: {})\n{}\n", row.id,
               label_texts(task, row)[static_cast<std::size_t>(row.answer)],
               prompt_text(task, row));
  }
  return 0;
}

int doctor() {
  const auto ops = make_cpu_backend();
  fmt::print("cpu      {}\n", ops->description());
  const std::string cuda = cuda_unavailable_reason();
  fmt::print("cuda     {}\n", cuda.empty() ? make_cuda_backend()->description() : "no: " + cuda);
  fmt::print("memory   {:.1f} GiB\n", static_cast<double>(sysconf(_SC_PHYS_PAGES)) *
                                          static_cast<double>(sysconf(_SC_PAGE_SIZE)) /
                                          1073741824.0);
  const bool model = std::filesystem::exists("models/smollm2-135m/config.json");
  fmt::print("model    {}\n", model
                                  ? "models/smollm2-135m"
                                  : "models/smollm2-135m is not there: run scripts/fetch_model.sh");
  fmt::print("data     {}\n", data_directory().string());
  for (const Task& t : tasks()) {
    if (t.starter) continue;
    const auto folder = data_directory() / t.folder;
    fmt::print("  {:<11} {}\n", t.name,
               std::filesystem::exists(folder)
                   ? "there"
                   : fmt::format("{} is not there: set MIXLORA_DATA to the folder of suites",
                                 folder.string()));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "mixlora-bench: LoRA, DoRA, MixLoRA and MixDoRA on a frozen Llama-family model, compared."};
  app.require_subcommand(1);
  std::string file, db, out, suite;
  std::int64_t count = 3;
  bool retry = false;
  int code = 0;
  auto* run_command =
      app.add_subcommand("run", "run what of a sweep is not done yet, then print its tables");
  run_command->add_option("sweep", file, "sweep file (JSON)")->required();
  run_command->add_option("--db", db, "store (default runs/NAME.db)");
  run_command->add_option("--out", out, "folder for tables (default runs/NAME-tables)");
  run_command->add_flag("--retry-failed", retry, "run failed trials again");
  run_command->callback([&] { code = run(file, db, out, retry); });
  auto* plan_command =
      app.add_subcommand("plan", "say what run would do, with tokens and peak memory");
  plan_command->add_option("sweep", file, "sweep file (JSON)")->required();
  plan_command->add_option("--db", db, "store (default runs/NAME.db)");
  plan_command->callback([&] { code = plan(file, db); });
  auto* status_command = app.add_subcommand("status", "the trials of a store's last sweep");
  status_command->add_option("db", file, "store")->required();
  status_command->callback([&] { code = status(file); });
  auto* report_command = app.add_subcommand("report", "print the tables of a store's last sweep");
  report_command->add_option("db", file, "store")->required();
  report_command->add_option("--out", out, "also write .md, .csv and .tex into this folder");
  report_command->callback([&] { code = report(file, out); });
  auto* prompts_command = app.add_subcommand("prompts", "print prompts of a suite");
  prompts_command->add_option("suite", suite)->required();
  prompts_command->add_option("-n", count, "how many");
  prompts_command->callback([&] { code = prompts(suite, count); });
  app.add_subcommand("doctor", "what this machine can do, and what is missing")->callback([&] {
    code = doctor();
  });
  try {
    app.parse(argc, argv);
    return code;
  } catch (const CLI::ParseError& e) {
    const int shown = app.exit(e);
    return shown == 0 ? 0 : kBadInput;
  } catch (const InputError& e) {
    fmt::print(stderr, "mixlora-bench: {}\n", e.what());
    return kBadInput;
  } catch (const std::exception& e) {
    fmt::print(stderr, "mixlora-bench: {}\n", e.what());
    return kFailed;
  }
}
