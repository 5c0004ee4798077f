// Runner: carries a plan out, pack by pack; what fails becomes a row and the sweep goes on.
#pragma once
#include <functional>
#include <string>

#include "experiments/run_trial.h"

namespace mixlora {

struct RunObserver {
  TrialObserver trial;
  /// A pack begins, `first` of the trials that run.
  std::function<void(const std::vector<const Trial*>& pack)> on_pack;
  /// A trial ended; status as in the store: done, failed, out_of_memory, interrupted.
  std::function<void(const Trial&, const std::string& status, const std::string& reason)> on_end;
};

struct RunOutcome {
  std::int64_t done = 0, failed = 0;
  bool stopped = false;
};

/// Runs the plan's packs. `bench` is asked for when there is something to train or ask: it loads
/// the model. A pack that fails is tried again trial by trial. Throws StoreError when rows cannot
/// be written; everything else is a trial's outcome.
RunOutcome run_plan(const Sweep& sweep, const Plan& plan, Texts& texts, Store& store,
                    const std::string& device, const Json& environment,
                    const std::function<const Workbench&()>& bench, const RunObserver& observer);

}  // namespace mixlora
