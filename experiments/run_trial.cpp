#include "experiments/run_trial.h"

#include <algorithm>
#include <optional>

#include "engine/scorer.h"
#include "experiments/environment.h"
#include "experiments/saved_training.h"
#include "experiments/timing.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

/// Wall time and tokens of each step, all jobs of a pack together.
struct StepTimes {
  std::vector<double> ms, tokens;
  void add(const StepRecord& r) {
    const auto at = static_cast<std::size_t>(r.step - 1);
    ms.resize(std::max(ms.size(), at + 1));
    tokens.resize(ms.size());
    ms[at] = r.ms;
    tokens[at] += static_cast<double>(r.tokens);
  }
  double ms_per_token(std::int64_t first_steps) const {
    std::vector<double> each;
    for (std::size_t i = 0; i < std::min(ms.size(), static_cast<std::size_t>(first_steps)); ++i)
      each.push_back(ms[i] / tokens[i]);
    return median(std::move(each));
  }
};

constexpr std::int64_t kCpuTokens = 1024, kDeviceTokens = 16384;  // of one scoring pass
constexpr std::int64_t kPassesBetweenLooks = 8;  // how often scoring looks at stop and shows itself

/// Asks in portions of several passes; answers do not depend on what is asked together.
Scoring in_portions(const Scoring& inner, std::int64_t tokens_a_pass,
                    const std::function<void(std::size_t asked, std::size_t of)>& look) {
  const std::int64_t most = kPassesBetweenLooks * tokens_a_pass;
  const auto ask = [=](const auto& requests, const auto& answer, const auto& size_of) {
    std::decay_t<decltype(answer(requests))> out;
    for (std::size_t begin = 0; begin < requests.size();) {
      look(begin, requests.size());
      std::size_t end = begin;
      for (std::int64_t tokens = 0; end < requests.size() && (end == begin || tokens < most); ++end)
        tokens += size_of(requests[end]);
      for (auto& one : answer(requests.subspan(begin, end - begin))) out.push_back(std::move(one));
      begin = end;
    }
    look(requests.size(), requests.size());
    return out;
  };
  return {[=](std::span<const LabelRequest> requests) {
            return ask(requests, inner.labels, [](const LabelRequest& r) {
              return static_cast<std::int64_t>(r.prompt.size());
            });
          },
          [=](std::span<const ChoiceRequest> requests) {
            return ask(requests, inner.choices, [](const ChoiceRequest& r) {
              std::size_t n = 0;
              for (const ScoredText& t : r.texts) n += t.tokens.size();
              return static_cast<std::int64_t>(n);
            });
          }};
}

void record_training(const Workbench& bench, std::span<const RunningTrial> pack,
                     const TrainResult& result, const StepTimes& times,
                     const std::vector<std::int64_t>& steps, const TrainSummary& sum,
                     Store& store) {
  for (std::size_t j = 0; j < pack.size(); ++j) {
    const auto number = [&](const char* name, double value, const char* unit) {
      store.measurement(pack[j].attempt, name, value, unit);
    };
    const Adapter& adapter = *result.adapters[j];
    store.expert_load(pack[j].attempt, "train", result.expert_load[j]);
    number("trainable_parameters", static_cast<double>(adapter.trainable()), "1");
    number("planned_peak_bytes", static_cast<double>(result.planned_bytes), "B");
    number("measured_peak_bytes", static_cast<double>(result.measured_bytes), "B");
    number("trials_in_step", static_cast<double>(pack.size()), "1");
    number("train_seconds", sum.seconds, "s");
    number("train_tokens", static_cast<double>(sum.tokens), "1");
    number("train_tokens_per_s", static_cast<double>(sum.tokens) / sum.seconds, "tokens/s");
    number("train_ms_per_token", times.ms_per_token(steps[j]), "ms/token");
    if (!bench.adapters.empty())
      adapter.save(bench.adapters / pack[j].trial->key, bench.model_source);
  }
}

/// What must be the same for a saved training to end with the bits of one that was left alone.
std::string identity_of(const Workbench& bench, std::span<const RunningTrial> pack) {
  std::string out = version_text() + "; " + bench.ops.description();
  for (const RunningTrial& r : pack) out += "; " + r.trial->key;
  return out;
}

/// The saved state of a pack, kept up to date while it trains.
class Saving {
 public:
  Saving(const Workbench& bench, std::span<const RunningTrial> pack, double every,
         const TrialObserver& observer)
      : identity_(identity_of(bench, pack)), every_(every), observer_(observer) {
    if (every > 0) file_ = state_file(bench, pack);
  }
  /// What an earlier run saved of this pack, if it can go on from it.
  void read() {
    if (file_.empty()) return;
    try {
      if (auto saved = read_training(file_, identity_)) {
        resumed_ = std::move(saved->state);
        records_ = std::move(saved->records);
        note(fmt::format("going on behind step {}", resumed_->step));
      }
    } catch (const InputError& e) {
      note(fmt::format("training starts anew: {}", e.what()));
    }
  }
  const TrainState* resumed() const { return resumed_ ? &*resumed_ : nullptr; }
  const std::vector<StepRecord>& records() const { return records_; }
  void add(const StepRecord& r) {
    if (!file_.empty()) records_.push_back(r);
  }
  bool due() const { return !file_.empty() && seconds_since(last_) >= every_; }
  /// A state that cannot be written costs a later run time and this one nothing.
  void write(const TrainState& state) {
    if (file_.empty()) return;
    try {
      std::filesystem::create_directories(file_.parent_path());
      write_training(file_, identity_, state, records_);
    } catch (const std::exception& e) {
      note(fmt::format("the training's state is not saved: {}", e.what()));
      file_.clear();
    }
    last_ = Clock::now();
  }

 private:
  void note(const std::string& text) const {
    if (observer_.on_note) observer_.on_note(text);
  }

  std::string identity_;
  double every_;
  const TrialObserver& observer_;
  std::filesystem::path file_;
  std::optional<TrainState> resumed_;
  std::vector<StepRecord> records_;
  Clock::time_point last_ = Clock::now();
};

}  // namespace

std::filesystem::path state_file(const Workbench& bench, std::span<const RunningTrial> pack) {
  return bench.states.empty() ? bench.states : bench.states / pack.front().trial->key;
}

std::vector<std::unique_ptr<Adapter>> train_pack(const Workbench& bench,
                                                 std::span<const RunningTrial> pack,
                                                 const RunSpec& run, Texts& texts, Store& store,
                                                 const TrialObserver& observer) {
  require(bench.tokenizer != nullptr,
          "model \"{}\" is a shape without a tokenizer; it can be measured, not trained on tasks",
          bench.model_source);
  TrainOptions options;
  options.recompute = run.recompute;
  options.memory_limit = run.memory_limit_bytes();
  std::vector<TrainJob> jobs;
  for (const RunningTrial& r : pack)
    jobs.push_back({r.trial->spec.adapter, r.trial->spec.train, texts.training(r.trial->spec)});
  TrainSummary sum;
  StepTimes times;
  std::vector<std::int64_t> steps(pack.size());
  Saving saving(bench, pack, run.save_every_seconds, observer);
  const auto write_step = [&](const StepRecord& r) {
    const auto job = static_cast<std::size_t>(r.job);
    store.step(pack[job].attempt, r);
    times.add(r);
    steps[job] = r.step;
    sum.steps = std::max(sum.steps, r.step);
    sum.tokens += r.tokens;
    if (observer.on_step) observer.on_step(r);
  };
  const TrainObserver each_step{.on_step =
                                    [&](const StepRecord& r) {
                                      write_step(r);
                                      saving.add(r);
                                    },
                                .stop = observer.stop,
                                .wants_state = [&] { return saving.due(); },
                                .on_state = [&](const TrainState& state) { saving.write(state); }};
  saving.read();
  options.resume = saving.resumed();
  for (const StepRecord& r : saving.records()) write_step(r);
  double before = 0;  // seconds that earlier attempts took for the steps done
  for (const double ms : times.ms) before += ms / 1000;
  const auto start = Clock::now();
  TrainResult result = train(bench.ops, bench.model, jobs, options, each_step);
  sum.seconds = before + seconds_since(start);
  sum.peak_bytes = result.measured_bytes;
  sum.recompute = result.recompute;
  record_training(bench, pack, result, times, steps, sum, store);
  if (observer.on_trained) observer.on_trained(sum);
  return std::move(result.adapters);
}

std::int64_t scoring_pass_tokens(const Backend& ops) {
  return ops.device() == Device::cpu ? kCpuTokens : kDeviceTokens;
}

void score_trial(const Workbench& bench, const RunningTrial& running, const Adapter* adapter,
                 Store& store, const TrialObserver& observer) {
  const TrialSpec& spec = running.trial->spec;
  store.measurement(running.attempt, "base_parameters",
                    static_cast<double>(bench.model.config.parameters()), "1");
  if (spec.evaluate.suites.empty()) return;
  require(bench.tokenizer != nullptr,
          "model \"{}\" is a shape without a tokenizer; it can be measured, not asked questions",
          bench.model_source);
  const std::int64_t tokens_a_pass = scoring_pass_tokens(bench.ops);
  Scorer scorer(bench.ops, bench.model, adapter, tokens_a_pass);
  const auto start = Clock::now();
  for (const auto& name : mix_names(spec.evaluate.suites)) {
    const Task task = find_task(name);
    const Scoring scoring =
        in_portions(scorer.scoring(), tokens_a_pass, [&](std::size_t asked, std::size_t of) {
          if (observer.stop && observer.stop()) throw Interrupted("stopped between two questions");
          if (observer.on_asked) observer.on_asked(*running.trial, name, asked, of);
        });
    const Evaluation e =
        evaluate(task, load_split(task, false, spec.evaluate.limit), *bench.tokenizer, scoring,
                 spec.evaluate, spec.evaluate.cutoff_len, bench.model.config.max_positions,
                 few_shot_of(task, spec.evaluate));
    store.evaluation(running.attempt, e);
    if (observer.on_score) observer.on_score(*running.trial, e);
  }
  const double seconds = seconds_since(start);
  store.measurement(running.attempt, "eval_seconds", seconds, "s");
  store.measurement(running.attempt, "eval_tokens_per_s",
                    static_cast<double>(scorer.tokens()) / seconds, "tokens/s");
}

}  // namespace mixlora
