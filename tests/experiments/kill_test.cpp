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
  p.write_sweep("s.json", kMethods, R"({"base": {"train": {"num_epochs": 1}}})");
  const auto store = [&](int i) { return p.folder() / fmt::format("{}.db", i); };
  REQUIRE(p.run({"run", "s.json", "--db", "whole.db"}).code == 0);
  // The second run is the one that is timed: files are in memory then.
  const double seconds = seconds_of([&] { p.run({"run", "s.json", "--db", "again.db"}); });
  const std::string expected = results_of(p.folder() / "whole.db");
  REQUIRE(expected.size() > 1000);
  CHECK(results_of(p.folder() / "again.db") == expected);

  std::mt19937 random(20240607);
  std::uniform_real_distribution<double> moment(0, seconds);
  int kills = 0, stores = 0;
  std::int64_t done = 0;
  for (int tries = 0; kills < kKills && tries < 4 * kKills; ++tries) {
    const Output o = p.run_and_signal({"run", "s.json", "--db", store(stores).string()}, SIGKILL,
                                      moment(random));
    const bool there = std::filesystem::exists(store(stores));
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
  const Output last = p.run({"run", "s.json", "--db", store(stores).string()});
  INFO(last.err);
  REQUIRE(last.code == 0);
  for (int i = 0; i <= stores; ++i) {
    CHECK(results_of(store(i)) == expected);
    CHECK(count_of(store(i), "SELECT count(*) FROM attempt WHERE outcome = 'done'") ==
          static_cast<std::int64_t>(kMethods.size()));
    CHECK(count_of(store(i), "SELECT count(*) FROM attempt WHERE outcome = 'running'") == 0);
  }
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
