#include "experiments/runner.h"

#include <new>

namespace mixlora {
namespace {

class PlanRun {
 public:
  PlanRun(const Sweep& sweep, const Plan& plan, Texts& texts, Store& store,
          const std::string& device, const Json& environment,
          const std::function<const Workbench&()>& bench, const RunObserver& observer)
      : sweep_(sweep),
        plan_(plan),
        texts_(texts),
        store_(store),
        device_(device),
        environment_(environment.dump()),
        bench_(bench),
        observer_(observer) {}

  RunOutcome all() {
    for (const PackPlan& pack : plan_.packs) {
      if (observer_.trial.stop && observer_.trial.stop()) outcome_.stopped = true;
      if (outcome_.stopped) break;
      if (!run(pack.trials) && !outcome_.stopped)
        for (const std::size_t i : pack.trials)
          if (!outcome_.stopped) run({i});
    }
    return outcome_;
  }

 private:
  bool run(const std::vector<std::size_t>& pack);
  void end(const RunningTrial& r, const char* status, const std::string& reason);
  /// Calls `work`; what it throws becomes the outcome of `trials`. True when it threw nothing.
  template <class F> bool guarded(std::span<const RunningTrial> trials, bool again_alone, F&& work);

  const Sweep& sweep_;
  const Plan& plan_;
  Texts& texts_;
  Store& store_;
  std::string device_, environment_;
  const std::function<const Workbench&()>& bench_;
  const RunObserver& observer_;
  RunOutcome outcome_;
};

void PlanRun::end(const RunningTrial& r, const char* status, const std::string& reason) {
  store_.end_attempt(r.attempt, r.trial->key, status, reason);
  if (observer_.on_end) observer_.on_end(*r.trial, status, reason);
}

template <class F>
bool PlanRun::guarded(std::span<const RunningTrial> trials, bool again_alone, F&& work) {
  const auto ended = [&](const char* status, const std::string& reason) {
    for (const RunningTrial& r : trials)
      if (again_alone)
        end(r, "interrupted", fmt::format("together with others: {}; now alone", reason));
      else
        end(r, status, reason);
    if (!again_alone) outcome_.failed += static_cast<std::int64_t>(trials.size());
    return false;
  };
  try {
    work();
    return true;
  } catch (const Interrupted& e) {
    outcome_.stopped = true;
    for (const RunningTrial& r : trials) end(r, "interrupted", e.what());
    return false;
  } catch (const OutOfMemory& e) {
    return ended("out_of_memory", e.what());
  } catch (const std::bad_alloc&) {
    return ended("out_of_memory", "the device has no more memory");
  } catch (const StoreError&) {
    throw;
  } catch (const std::exception& e) {
    return ended("failed", e.what());
  }
}

bool PlanRun::run(const std::vector<std::size_t>& pack) {
  std::vector<RunningTrial> running;
  std::vector<const Trial*> trials;
  for (const std::size_t i : pack) trials.push_back(&sweep_.trials[i]);
  if (observer_.on_pack) observer_.on_pack(trials);
  for (const Trial* t : trials)
    running.push_back({t, store_.begin_attempt(t->key, device_, environment_)});
  std::filesystem::path saved;
  const auto forget_saved = [&] {  // what ended, well or not, has nothing to go on from
    std::error_code ignored;
    if (!saved.empty() && !outcome_.stopped) std::filesystem::remove(saved, ignored);
  };
  std::vector<std::unique_ptr<Adapter>> adapters(pack.size());
  const bool trained = guarded(running, pack.size() > 1, [&] {
    const TrialPlan& first = plan_.trials[pack.front()];
    if (!first.fits) throw OutOfMemory(first.why);
    if (trials.front()->spec.adapter.method == Method::base) return;
    saved = state_file(bench_(), running);
    adapters = train_pack(bench_(), running, sweep_.run, texts_, store_, observer_.trial);
  });
  if (!trained) {
    forget_saved();
    return false;
  }
  for (std::size_t j = 0; j < running.size(); ++j) {
    const std::span one(&running[j], 1);
    if (outcome_.stopped) {
      end(running[j], "interrupted", "stopped before its questions");
    } else if (guarded(one, false, [&] {
                 score_trial(bench_(), running[j], adapters[j].get(), store_, observer_.trial);
               })) {
      end(running[j], "done", "");
      ++outcome_.done;
    }
    adapters[j].reset();
  }
  forget_saved();
  return true;
}

}  // namespace

RunOutcome run_plan(const Sweep& sweep, const Plan& plan, Texts& texts, Store& store,
                    const std::string& device, const Json& environment,
                    const std::function<const Workbench&()>& bench, const RunObserver& observer) {
  return PlanRun(sweep, plan, texts, store, device, environment, bench, observer).all();
}

}  // namespace mixlora
