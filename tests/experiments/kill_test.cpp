// Resuming: a run killed at random moments ends with the bits of one that was left alone.
#include <random>
#include <set>

#include "tests/experiments/program.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr int kKills = 5;  // a sanitized run takes ten times as long
#else
constexpr int kKills = 20;
#endif

const std::vector<std::string> kMethods{"base", "lora", "mixlora", "mixdora"};

/// Trials done in a store whose writer was killed; it may have been killed before the first table.
std::int64_t finished_in(const std::filesystem::path& store) {
  try {
    return count_of(store, "SELECT count(*) FROM trial WHERE status = 'done'");
  } catch (const StoreError& e) {
    CHECK(std::string(e.what()).find("empty: a run ended before it wrote") != std::string::npos);
    return 0;
  }
}

double seconds_of(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST_CASE("a run killed at random moments goes on where it was, and ends with the same bits",
          "[experiments][resume]") {
  const Program p;
  // Longer trials than steps, and states saved every few steps: most kills hit within training.
  p.write_sweep("s.json", kMethods, R"({"base": {"train": {"num_epochs": 2}},
    "run": {"save_every_seconds": 0.01}})");
  const auto store = [&](int i) { return p.folder() / fmt::format("{}.db", i); };
  REQUIRE(p.run({"run", "s.json", "--db", "whole.db"}).code == 0);
  // The second run is the one that is timed: files are in memory then.
  const double seconds = seconds_of([&] { p.run({"run", "s.json", "--db", "again.db"}); });
  const std::string expected = results_of(p.folder() / "whole.db");
  REQUIRE(expected.size() > 1000);
  CHECK(results_of(p.folder() / "again.db") == expected);

  std::mt19937 random(20240607);
  std::uniform_real_distribution<double> moment(0, seconds);
  int kills = 0, stores = 0, resumed = 0;
  std::int64_t done = 0;
  for (int tries = 0; kills < kKills && tries < 4 * kKills; ++tries) {
    const Output o = p.run_and_signal({"run", "s.json", "--db", store(stores).string()}, SIGKILL,
                                      moment(random));
    const bool there = std::filesystem::exists(store(stores));
    resumed += o.err.find("going on behind step") != std::string::npos ? 1 : 0;
    if (o.code == 128 + SIGKILL) {
      ++kills;
      const std::int64_t now = there ? finished_in(store(stores)) : 0;
      CHECK(now >= done);
      done = now;
      continue;
    }
    INFO(o.err);
    REQUIRE(o.code == 0);
    ++stores;  // finished: the next kill hits a fresh one
    done = 0;
  }
  CHECK(kills == kKills);
  CHECK(resumed > 0);
  const Output last = p.run({"run", "s.json", "--db", store(stores).string()});
  INFO(last.err);
  REQUIRE(last.code == 0);
  for (int i = 0; i <= stores; ++i) {
    CHECK(results_of(store(i)) == expected);
    CHECK(count_of(store(i), "SELECT count(*) FROM attempt WHERE outcome = 'done'") ==
          static_cast<std::int64_t>(kMethods.size()));
    CHECK(count_of(store(i), "SELECT count(*) FROM attempt WHERE outcome = 'running'") == 0);
    const auto states = std::filesystem::path(store(i)).replace_extension("") += "-training";
    CHECK((!std::filesystem::exists(states) || std::filesystem::is_empty(states)));
  }
}

TEST_CASE("training goes on from its saved state, and anew when that is spoilt or another's",
          "[experiments][resume]") {
  const Program p;
  p.write_sweep("s.json", {"mixdora"}, R"({"base": {"train": {"num_epochs": 25}},
    "run": {"save_every_seconds": 0.01}})");
  REQUIRE(p.run({"run", "s.json", "--db", "whole.db"}).code == 0);
  const std::string expected = results_of(p.folder() / "whole.db");

  // Stopped between two steps: the state is of the very last one.
  const Output stopped = p.run_and_signal({"run", "s.json", "--db", "s.db"}, SIGTERM, 0.3);
  REQUIRE(stopped.code == 130);
  const auto state = std::filesystem::directory_iterator(p.folder() / "s-training")->path();
  const std::string whole = read_text(state);
  REQUIRE(whole.size() > 10000);
  const std::int64_t steps = count_of(p.folder() / "s.db", "SELECT count(*) FROM step");
  std::filesystem::copy_file(p.folder() / "s.db", p.folder() / "other.db");
  std::filesystem::copy(p.folder() / "s-training", p.folder() / "other-training");

  const Output on = p.run({"run", "s.json", "--db", "s.db"});
  INFO(on.err);
  REQUIRE(on.code == 0);
  CHECK(on.err.find(fmt::format("going on behind step {}", steps)) != std::string::npos);
  CHECK(results_of(p.folder() / "s.db") == expected);
  CHECK(!std::filesystem::exists(state));

  const auto other = p.folder() / "other-training" / state.filename();
  const std::string saved_by = "mixlora-bench training state 1";
  const auto spoilt = [&](std::string text, const std::string& message) {
    std::ofstream(other, std::ios::binary | std::ios::trunc) << text;
    std::filesystem::copy_file(p.folder() / "other.db", p.folder() / "again.db",
                               std::filesystem::copy_options::overwrite_existing);
    std::filesystem::remove_all(p.folder() / "again-training");
    std::filesystem::copy(p.folder() / "other-training", p.folder() / "again-training");
    const Output again = p.run({"run", "s.json", "--db", "again.db"});
    INFO(again.err);
    CHECK(again.code == 0);
    CHECK(again.err.find("training starts anew: ") != std::string::npos);
    CHECK(again.err.find(message) != std::string::npos);
    CHECK(results_of(p.folder() / "again.db") == expected);
  };
  const auto with = [&](const std::string& part, const std::string& replacement) {
    std::string text = whole;
    return text.replace(text.find(part), part.size(), replacement);
  };
  std::string flipped = whole;
  flipped[whole.size() / 2] = static_cast<char>(flipped[whole.size() / 2] ^ 1);
  spoilt(flipped, "wrong SHA-256");
  spoilt(whole.substr(0, whole.size() / 2), "wrong SHA-256");
  spoilt(with(saved_by, "another program's file"), "not a training state of this version");
  spoilt(with("commit", "Commit"), "saved by another build");
  spoilt("", "no header line");
  spoilt("{}\n", "not a training state");
}

TEST_CASE("Ctrl-C ends a run cleanly with 130, and the same command goes on",
          "[experiments][resume]") {
  const Program p;
  // Long enough to be hit while it trains.
  p.write_sweep("s.json", {"base", "mixlora"}, R"({"base": {"train": {"max_steps": 100000,
    "num_epochs": 10000}, "evaluate": {"limit": 4}}})");
  const Output o = p.run_and_signal({"run", "s.json", "--db", "s.db"}, SIGINT, 1.0);
  INFO(o.err);
  REQUIRE(o.code == 130);
  CHECK(o.err.find("stopped; the same command goes on from here") != std::string::npos);
  CHECK(o.out.empty());
  const auto store = p.folder() / "s.db";
  CHECK(count_of(store, "SELECT count(*) FROM trial WHERE status = 'running'") == 0);
  CHECK(count_of(store, "SELECT count(*) FROM attempt WHERE outcome = 'running'") == 0);
  CHECK(count_of(store, "SELECT count(*) FROM attempt WHERE outcome = 'interrupted'") == 1);
}
