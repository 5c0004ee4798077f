// Store: what a killed writer leaves, who may write, and what a wrong file says.
#include "experiments/store/store.h"

#include <csignal>
#include <filesystem>
#include <fstream>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/experiments/folder.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const StoreError& e) {
    return e.what();
  }
  return "no error";
}

Sweep one_trial() {
  Sweep s = parse_sweep(parse_json(R"({"name": "s", "model": "shape:smollm2-135m", "base":
    {"train": {"tasks": "starter-blank"}, "evaluate": {"suites": "starter-blank"}}})",
                                   "s"),
                        "s");
  s.trials[0].key = "key";
  return s;
}

std::int64_t count(Database& db, const char* sql) {
  std::int64_t n = -1;
  Statement(db, sql).rows<std::int64_t>([&](std::int64_t v) { n = v; });
  return n;
}

}  // namespace

TEST_CASE("an attempt that never ended is closed by the next writer", "[experiments][store]") {
  const Folder folder;
  const auto file = folder.path / "a.db";
  {
    Store store(file);
    store.put_sweep(one_trial(), "model");
    const auto attempt = store.begin_attempt("key", "cpu", "{}");
    StepRecord step;
    step.step = 1;
    store.step(attempt, step);
    CHECK(store.state("key").status == "running");
  }
  Store store(file);
  CHECK(store.state("key").status == "interrupted");
  CHECK(count(store.database(), "SELECT count(*) FROM step") == 1);
  CHECK(count(store.database(), "SELECT count(*) FROM attempt WHERE outcome = 'interrupted'") == 1);
}

TEST_CASE("a store has one writer, and readers beside it", "[experiments][store]") {
  const Folder folder;
  const auto file = folder.path / "a.db";
  Store store(file);
  store.put_sweep(one_trial(), "model");
  const std::string message = error_of([&] { Store second(file); });
  CHECK(message.find("another run (process " + std::to_string(getpid()) + ")") !=
        std::string::npos);
  Database reader = open_store(file);
  CHECK(count(reader, "SELECT count(*) FROM trial") == 1);
  CHECK_THROWS_AS(reader.exec("DELETE FROM trial"), StoreError);
}

TEST_CASE("wrong files are named and left as they are", "[experiments][store]") {
  const Folder folder;
  const auto file = folder.path / "a.db";
  const auto both = [&](const std::string& expected) {
    for (const auto& message :
         {error_of([&] { Store s(file); }), error_of([&] { open_store(file); })}) {
      INFO(message);
      CHECK(message.find("a.db: " + expected) != std::string::npos);
    }
  };
  SECTION("text") {
    const std::string text(5000, 'x');
    std::ofstream(file) << text;
    both("not a store of this program");
    CHECK(std::filesystem::file_size(file) == text.size());
  }
  SECTION("another program's database") {
    Database(file.string()).exec("CREATE TABLE t (a)");
    const auto size = std::filesystem::file_size(file);
    both("not a store of this program but another SQLite database");
    CHECK(std::filesystem::file_size(file) == size);
  }
  SECTION("a newer version") {
    { Store s(file); }
    Database(file.string()).exec("PRAGMA user_version = 1000");
    both("written by a newer version of this program");
  }
  SECTION("a folder") {
    std::filesystem::create_directory(file);
    both("is a folder");
  }
  SECTION("cut short") {
    { Store s(file); }
    std::filesystem::resize_file(file, std::filesystem::file_size(file) / 2);
    const std::string message = error_of([&] {
      Store s(file);
      s.put_sweep(one_trial(), "model");
    });
    INFO(message);
    CHECK(message.find("a.db: ") != std::string::npos);
  }
}

TEST_CASE("a folder that is not there is named", "[experiments][store]") {
  const Folder folder;
  const std::string message = error_of([&] { Store s(folder.path / "no" / "a.db"); });
  CHECK(message.find("the folder " + (folder.path / "no").string() + " is not there") !=
        std::string::npos);
  CHECK(error_of([&] { open_store(folder.path / "a.db"); }).find("no such file") !=
        std::string::npos);
}

TEST_CASE("a read-only store can be read and not written", "[experiments][store]") {
  const Folder folder;
  const auto file = folder.path / "a.db";
  { Store(file).put_sweep(one_trial(), "model"); }
  std::filesystem::remove(file.string() + ".lock");
  std::filesystem::permissions(folder.path, std::filesystem::perms(0555));
  // In a process without root's powers, which a test on a container has.
  const pid_t child = fork();
  if (child == 0) {
    if (geteuid() == 0 && setuid(65534) != 0) _exit(9);
    if (error_of([&] { Store s(file); }).find("a.db: cannot be written") == std::string::npos)
      _exit(1);
    try {
      Database db = open_store(file);
      _exit(count(db, "SELECT count(*) FROM trial") == 1 ? 0 : 2);
    } catch (const std::exception&) {
      _exit(3);
    }
  }
  int status = 0;
  waitpid(child, &status, 0);
  std::filesystem::permissions(folder.path, std::filesystem::perms(0755));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("a full disk is one message, and what was committed stays", "[experiments][store]") {
  const Folder folder;
  const auto file = folder.path / "a.db";
  std::int64_t attempt = 0;
  {
    Store store(file);
    store.put_sweep(one_trial(), "model");
    attempt = store.begin_attempt("key", "cpu", "{}");
  }
  const pid_t child = fork();
  if (child == 0) {  // a file size limit ends writes as a full disk does
    std::signal(SIGXFSZ, SIG_IGN);
    Store store(file);
    const rlimit limit{256 << 10, 256 << 10};
    setrlimit(RLIMIT_FSIZE, &limit);
    const std::string message = error_of([&] {
      Evaluation e;
      e.suite = "starter-blank";
      for (int i = 0; i < 10000; ++i) e.answers.push_back({std::to_string(i), 0, 0, {0.5F, 0.5F}});
      store.evaluation(attempt, e);
    });
    const bool good = message.find("a.db: the disk ") != std::string::npos;
    if (!good) fprintf(stderr, "%s\n", message.c_str());
    _exit(good ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WEXITSTATUS(status) == 0);
  Store store(file);
  CHECK(count(store.database(), "SELECT count(*) FROM answer") == 0);
  CHECK(count(store.database(), "SELECT count(*) FROM score") == 0);
  CHECK(count(store.database(), "SELECT count(*) FROM attempt") == 1);
  CHECK(count(store.database(), "PRAGMA integrity_check") >= 0);
}
