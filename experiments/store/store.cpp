#include "experiments/store/store.h"

#include <array>
#include <cmath>
#include <cstring>
#include <ctime>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include "experiments/store/schema.h"

namespace mixlora {
namespace {

constexpr int kSchemaVersion = 1;
constexpr int kApplication = 0x4D4C4231;  // "MLB1": whose file this is

std::string now() {
  const std::time_t t = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&t, &utc);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text.data();
}
std::string host() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}
std::int64_t whole(Database& db, const char* sql) {
  std::int64_t out = 0;
  Statement(db, sql).rows<std::int64_t>([&](std::int64_t v) { out = v; });
  return out;
}
/// A store of this program and of this version of its tables, or a StoreError.
void check_version(Database& db, const std::string& file) {
  const std::int64_t version = whole(db, "PRAGMA user_version"),
                     application = whole(db, "PRAGMA application_id");
  if (application != kApplication)
    throw StoreError(
        fmt::format("{}: not a store of this program but another SQLite database", file));
  if (version > kSchemaVersion)
    throw StoreError(fmt::format(
        "{}: written by a newer version of this program (tables {}, this one knows {}); update it",
        file, version, kSchemaVersion));
  if (version < kSchemaVersion)
    throw StoreError(fmt::format(
        "{}: written by an older version of this program (tables {}, this one writes {}); read it "
        "with that one, or run into a new file",
        file, version, kSchemaVersion));
}
/// SQLite has no NaN: a loss that is not a number is an absent one.
std::optional<double> finite(double v) {
  return std::isfinite(v) ? std::optional(v) : std::nullopt;
}

}  // namespace

Store::Lock::~Lock() {
  if (fd >= 0) ::close(fd);  // releases the lock
}

void Store::take_lock(const std::filesystem::path& file) {
  std::error_code error;
  const auto folder = file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
  if (!std::filesystem::is_directory(folder, error))
    throw StoreError(fmt::format("{}: the folder {} is not there", file.string(), folder.string()));
  if (std::filesystem::is_directory(file, error))
    throw StoreError(fmt::format("{}: is a folder, expected a file", file.string()));
  const std::string lock = file.string() + ".lock";
  lock_.fd = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_.fd < 0)
    throw StoreError(fmt::format("{}: cannot be written beside: {}: {}", file.string(), lock,
                                 std::strerror(errno)));
  if (::flock(lock_.fd, LOCK_EX | LOCK_NB) != 0) {
    std::array<char, 32> pid{};
    const ssize_t n = ::pread(lock_.fd, pid.data(), pid.size() - 1, 0);
    throw StoreError(fmt::format(
        "{}: another run{} is writing to it; wait for it, or give this one its own file with --db",
        file.string(),
        n > 0 ? fmt::format(" (process {})", std::strtol(pid.data(), nullptr, 10)) : ""));
  }
  const std::string own = fmt::format("{}\n", ::getpid());
  // Only the other run's message reads it; on a full disk the store itself will say so.
  if (::ftruncate(lock_.fd, 0) == 0 && ::pwrite(lock_.fd, own.data(), own.size(), 0) < 0) return;
}

Database open_store(const std::filesystem::path& file) {
  std::error_code error;
  if (!std::filesystem::exists(file, error))
    throw StoreError(
        fmt::format("{}: no such file; mixlora-bench run SWEEP makes one", file.string()));
  if (std::filesystem::is_directory(file, error))
    throw StoreError(fmt::format("{}: is a folder, expected a store", file.string()));
  Database db(file.string(), Access::read);
  if (whole(db, "SELECT count(*) FROM sqlite_master") == 0)
    throw StoreError(fmt::format(
        "{}: empty: a run ended before it wrote anything; give its command again", file.string()));
  check_version(db, file.string());
  return db;
}

Store::Store(const std::filesystem::path& file) : db_((take_lock(file), file.string())) {
  if (whole(db_, "PRAGMA user_version") == 0 &&
      whole(db_, "SELECT count(*) FROM sqlite_master") == 0) {
    db_.exec("PRAGMA journal_mode = WAL");
    Transaction t(db_);
    db_.exec(kSchema);
    db_.exec(fmt::format("PRAGMA user_version = {}; PRAGMA application_id = {}", kSchemaVersion,
                         kApplication)
                 .c_str());
    t.commit();
  }
  check_version(db_, file.string());
  // A killed process loses nothing with this; a machine that loses power may lose the last rows,
  // never the file.
  db_.exec("PRAGMA synchronous = NORMAL");
  Transaction t(db_);  // the lock is ours, so whoever was running is gone
  db_.exec(
      "UPDATE attempt SET outcome = 'interrupted', message = 'the process ended' WHERE outcome = "
      "'running';"
      "UPDATE trial SET status = 'interrupted', reason = 'the process ended' WHERE status = "
      "'running'");
  t.commit();
}

std::int64_t Store::put_sweep(const Sweep& sweep, const std::string& model_hash) {
  Transaction t(db_);
  const std::string json = sweep.json.dump();
  Statement(db_, "INSERT INTO sweep (name, json, created) VALUES (?, ?, ?) ON CONFLICT DO NOTHING")
      .run(sweep.name, json, now());
  std::int64_t id = 0;
  Statement(db_, "SELECT id FROM sweep WHERE name = ? AND json = ?")
      .rows<std::int64_t>([&](std::int64_t v) { id = v; }, sweep.name, json);
  Statement(db_, "DELETE FROM sweep_trial WHERE sweep = ?").run(id);
  Statement trial(db_,
                  "INSERT INTO trial (key, spec, model_hash, data_hash, status) VALUES (?, ?, ?, "
                  "?, 'planned') ON CONFLICT DO NOTHING");
  Statement place(
      db_,
      "INSERT INTO sweep_trial (sweep, position, trial, label, labels) VALUES (?, ?, ?, ?, ?)");
  for (std::size_t i = 0; i < sweep.trials.size(); ++i) {
    const Trial& one = sweep.trials[i];
    trial.run(one.key, write(one.spec).dump(), model_hash, data_fingerprint(one.spec));
    place.run(id, static_cast<std::int64_t>(i), one.key, one.label, Json(one.labels).dump());
  }
  t.commit();
  return id;
}

TrialState trial_state(Database& db, const std::string& key) {
  TrialState s;
  Statement(db, "SELECT status, reason FROM trial WHERE key = ?")
      .rows<std::string, std::string>(
          [&](std::string status, std::string reason) {
            s = {std::move(status), std::move(reason)};
          },
          key);
  return s;
}

bool is_being_written(const std::filesystem::path& file) {
  const std::string lock = file.string() + ".lock";
  const int fd = ::open(lock.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool free = ::flock(fd, LOCK_SH | LOCK_NB) == 0;
  ::close(fd);
  return !free;
}

std::int64_t Store::begin_attempt(const std::string& key, const std::string& device,
                                  const std::string& environment) {
  Transaction t(db_);
  Statement(db_,
            "INSERT INTO attempt (trial, started, host, pid, device, environment) VALUES (?, ?, ?, "
            "?, ?, ?)")
      .run(key, now(), host(), static_cast<std::int64_t>(::getpid()), device, environment);
  const std::int64_t id = sqlite3_last_insert_rowid(db_.raw());
  Statement(db_, "UPDATE trial SET status = 'running', reason = '' WHERE key = ?").run(key);
  t.commit();
  return id;
}

void Store::step(std::int64_t attempt, const StepRecord& r) {
  Statement(db_, "INSERT INTO step VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
      .run(attempt, r.step, r.epoch, finite(r.loss), r.aux_loss, r.lr, finite(r.grad_norm),
           r.entropy, r.tokens, r.ms);
}

void Store::evaluation(std::int64_t attempt, const Evaluation& e) {
  Transaction t(db_);
  Statement score(db_, "INSERT INTO score VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)");
  const auto put = [&](const Metric& m) {
    score.run(attempt, e.suite, e.protocol, m.name, m.value, m.standard_error, e.n, e.majority,
              e.chance, e.truncated);
  };
  put({e.metric, e.value, e.standard_error});
  for (const Metric& m : e.others) put(m);
  Statement answer(db_, "INSERT INTO answer VALUES (?, ?, ?, ?, ?, ?, ?)");
  for (const Answer& a : e.answers)
    answer.run(attempt, e.suite, e.protocol, a.item, a.choice, a.gold, Json(a.log_probs).dump());
  t.commit();
}

void Store::expert_load(std::int64_t attempt, const std::string& phase,
                        const std::vector<ExpertLoad>& loads) {
  Transaction t(db_);
  Statement row(db_, "INSERT INTO expert_load VALUES (?, ?, ?, ?, ?)");
  for (const ExpertLoad& l : loads) row.run(attempt, phase, l.layer, l.expert, l.share);
  t.commit();
}

void Store::measurement(std::int64_t attempt, const std::string& name, double value,
                        const std::string& unit) {
  Statement(db_,
            "INSERT INTO measurement VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET value = "
            "excluded.value")
      .run(attempt, name, value, unit);
}

void Store::end_attempt(std::int64_t attempt, const std::string& key, const std::string& outcome,
                        const std::string& message) {
  Transaction t(db_);
  Statement(db_, "UPDATE attempt SET ended = ?, outcome = ?, message = ? WHERE id = ?")
      .run(now(), outcome, message, attempt);
  Statement(db_, "UPDATE trial SET status = ?, reason = ? WHERE key = ?")
      .run(outcome, message, key);
  t.commit();
}

}  // namespace mixlora
