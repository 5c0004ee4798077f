#include "tests/experiments/program.h"

#include <cstring>
#include <thread>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/catch.h"

namespace mixlora {

Program::Program() { write_tiny_model(folder_.path / "tiny"); }

void Program::write(const std::string& name, const std::string& text) const {
  std::ofstream(folder_.path / name) << text;
}

void Program::write_sweep(const std::string& name, const std::vector<std::string>& methods,
                          const std::string& more) const {
  Json sweep = parse_json(R"({"model": "tiny",
    "base": {"train": {"tasks": ["starter-blank"], "limit": 24, "batch_size": 6, "num_epochs": 2,
                       "lr": 1e-2, "cutoff_len": 96},
             "adapter": {"r": 4},
             "evaluate": {"suites": ["starter-blank", "starter-truth"], "limit": 24,
                          "cutoff_len": 96}},
    "axes": [{"name": "method", "values": []}],
    "run": {"device": "cpu", "precision": "fp32", "keep_adapters": false}})",
                          "sweep");
  sweep["name"] = std::filesystem::path(name).stem().string();
  for (const auto& m : methods) {
    Json value = {{"label", m}, {"adapter", {{"method", m}}}};
    if (m.starts_with("mix")) value["adapter"]["num_experts"] = 4;
    sweep["axes"][0]["values"].push_back(value);
  }
  sweep.merge_patch(parse_json(more, "more"));
  write(name, sweep.dump());
}

Output Program::run(const std::vector<std::string>& arguments) const {
  return run_and_signal(arguments, 0, 0);
}

Output Program::run_and_signal(const std::vector<std::string>& arguments, int signal,
                               double seconds) const {
  const auto out = folder_.path / "stdout.txt", err = folder_.path / "stderr.txt";
  const pid_t child = fork();
  if (child == 0) {
    std::vector<char*> list;
    std::string program = MIXLORA_PROGRAM;
    list.push_back(program.data());
    std::vector<std::string> own = arguments;
    for (auto& a : own) list.push_back(a.data());
    list.push_back(nullptr);
    const auto to = [](const std::filesystem::path& file, int fd) {
      dup2(open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644), fd);
    };
    to(out, STDOUT_FILENO);
    to(err, STDERR_FILENO);
    setenv("OMP_WAIT_POLICY", "passive", 1);  // tests run beside each other
    if (chdir(folder_.path.c_str()) == 0) execv(list[0], list.data());
    _exit(99);
  }
  REQUIRE(child > 0);
  int status = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  if (signal != 0) {
    while (waitpid(child, &status, WNOHANG) == 0) {
      if (std::chrono::steady_clock::now() >= end) {
        kill(child, signal);
        waitpid(child, &status, 0);
        break;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  } else {
    waitpid(child, &status, 0);
  }
  Output o;
  o.code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  o.out = read_text(out);
  o.err = read_text(err);
  return o;
}

std::string results_of(const std::filesystem::path& store) {
  Database db = open_store(store);
  std::string text;
  const auto bits = [](double v) {
    std::uint64_t b = 0;
    std::memcpy(&b, &v, sizeof b);
    return fmt::format("{:016x}", b);
  };
  Statement(db,
            "SELECT r.label, s.step, s.loss, s.aux_loss, s.grad_norm FROM result r JOIN step s ON "
            "s.attempt = r.attempt ORDER BY r.position, s.step")
      .rows<std::string, std::int64_t, double, double, double>(
          [&](const std::string& label, std::int64_t step, double loss, double aux, double norm) {
            text += fmt::format("{} step {}: {} {} {}\n", label, step, bits(loss), bits(aux),
                                bits(norm));
          });
  Statement(db,
            "SELECT r.label, a.suite, a.item, a.choice, a.log_probs FROM result r JOIN answer a ON "
            "a.attempt = r.attempt ORDER BY r.position, a.suite, a.item")
      .rows<std::string, std::string, std::string, std::int64_t, std::string>(
          [&](const std::string& label, const std::string& suite, const std::string& item,
              std::int64_t choice, const std::string& log_probs) {
            text += fmt::format("{} {} {}: {} {}\n", label, suite, item, choice, log_probs);
          });
  return text;
}

std::int64_t count_of(const std::filesystem::path& store, const std::string& sql) {
  Database db = open_store(store);
  std::int64_t n = -1;
  Statement(db, sql).rows<std::int64_t>([&](std::int64_t v) { n = v; });
  return n;
}

}  // namespace mixlora
