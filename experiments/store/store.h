// Store: what was asked, what happened, every answer; one SQLite file a study, one writer.
#pragma once
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "engine/train.h"
#include "experiments/store/database.h"
#include "experiments/sweep.h"
#include "suites/evaluate.h"

namespace mixlora {

/// How a trial stands in a store.
struct TrialState {
  std::string status = "new";  // new, planned, running, done, failed, out_of_memory, interrupted
  std::string reason;
};

/// Opens a store for reading beside a run that may be writing to it; throws StoreError when it is
/// missing, foreign, or of another version of this program.
Database open_store(const std::filesystem::path& file);

/// How a trial stands; "new" when the store does not know it.
TrialState trial_state(Database& db, const std::string& key);
/// Whether a run holds the writer's lock now.
bool is_being_written(const std::filesystem::path& file);

class Store {
 public:
  /// Opens or makes the file, takes the one writer's lock, closes attempts of processes that are
  /// gone. Throws StoreError.
  explicit Store(const std::filesystem::path& file);
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  /// Records the sweep and its trials (keys set); returns the sweep's row.
  std::int64_t put_sweep(const Sweep& sweep, const std::string& model_hash);
  TrialState state(const std::string& key) { return trial_state(db_, key); }

  std::int64_t begin_attempt(const std::string& key, const std::string& device,
                             const std::string& environment);
  /// Rows as they happen; steps are written in small transactions.
  void step(std::int64_t attempt, const StepRecord& r);
  void evaluation(std::int64_t attempt, const Evaluation& e);
  void expert_load(std::int64_t attempt, const std::string& phase,
                   const std::vector<ExpertLoad>& loads);
  void measurement(std::int64_t attempt, const std::string& name, double value,
                   const std::string& unit);
  /// outcome: done, failed, out_of_memory, interrupted.
  void end_attempt(std::int64_t attempt, const std::string& key, const std::string& outcome,
                   const std::string& message);

  Database& database() { return db_; }

 private:
  void take_lock(const std::filesystem::path& file);
  struct Lock {
    int fd = -1;
    ~Lock();
  };
  Lock lock_;
  Database db_;
};

}  // namespace mixlora
