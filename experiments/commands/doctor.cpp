#include <fstream>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <unistd.h>

#include "engine/model.h"
#include "experiments/commands/commands.h"
#include "experiments/environment.h"
#include "suites/task.h"

namespace mixlora {
namespace {

constexpr double kGib = 1073741824.0;
constexpr const char* kModel = "models/smollm2-135m";

class Findings {
 public:
  void good(const char* what, const std::string& found) { line(" ok ", what, found); }
  /// Something that works with less, and how to get it.
  void hint(const char* what, const std::string& found) { line(" -- ", what, found); }
  void bad(const char* what, const std::string& found) {
    line("MISS", what, found);
    ++missing;
  }
  int missing = 0;

 private:
  static void line(const char* mark, const char* what, const std::string& found) {
    fmt::print("[{}] {:<10} {}\n", mark, what, found);
  }
};

/// Those of the CPU's flags that the products use.
std::string cpu_features() {
  std::ifstream in("/proc/cpuinfo");
  std::string flags;
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("flags")) {
      flags = line + " ";
      break;
    }
  std::string found;
  for (const char* f : {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    if (flags.find(fmt::format(" {} ", f)) != std::string::npos)
      found += (found.empty() ? "" : " ") + std::string(f);
  return found.empty() ? "no AVX2" : found;
}

void check_machine(Findings& f) {
  const auto ops = make_cpu_backend();
  f.good("cpu", fmt::format("{}, {}", cpu_name(), cpu_features()));
  f.good("products", ops->description());
  if (ops->description().find("oneDNN") == std::string::npos)
    f.hint("oneDNN", "not in this build: products are slower; install libdnnl-dev and build again");
  const std::string cuda = cuda_unavailable_reason();
  if (cuda.empty())
    f.good("cuda", make_cuda_backend()->description());
  else
    f.hint("cuda", cuda);
  const double free_gib = static_cast<double>(available_memory()) / kGib;
  const std::string memory = fmt::format("{:.1f} GiB, {:.1f} free",
                                         static_cast<double>(sysconf(_SC_PHYS_PAGES)) *
                                             static_cast<double>(sysconf(_SC_PAGE_SIZE)) / kGib,
                                         free_gib);
  if (free_gib >= 3)
    f.good("memory", memory);
  else
    f.hint("memory", memory +
                         ": the quickstart takes 1.5 GiB; end something, or set "
                         "run.memory_limit_gib and recompute");
  std::error_code error;
  const auto disk = std::filesystem::space(".", error);
  if (error || disk.available < (1U << 30U))
    f.hint("disk", "less than 1 GiB free here: stores and adapters may not fit");
  else
    f.good("disk", fmt::format("{:.0f} GiB free here", static_cast<double>(disk.available) / kGib));
}

void check_model(Findings& f) {
  if (!std::filesystem::exists(std::filesystem::path(kModel) / "config.json")) {
    f.bad("model", fmt::format("{} is not there: bash scripts/fetch_model.sh makes it; or point a "
                               "sweep's \"model\" at any Llama-family Hugging Face directory",
                               kModel));
    return;
  }
  try {
    const ModelConfig c = config_of(kModel);
    f.good("model", fmt::format("{}, {:.1f} million parameters", kModel,
                                static_cast<double>(c.parameters()) / 1e6));
  } catch (const std::exception& e) {
    f.bad("model", e.what());
  }
}

void check_data(Findings& f) {
  std::string there, absent;
  std::size_t starters = 0;
  for (const Task& t : tasks()) {
    if (t.starter) {
      ++starters;
      continue;
    }
    std::string& list = std::filesystem::exists(data_directory() / t.folder) ? there : absent;
    list += (list.empty() ? "" : " ") + t.name;
  }
  f.good("starters", fmt::format("{} small suites are in the program", starters));
  const std::string folder = std::filesystem::absolute(data_directory()).string();
  if (!there.empty()) f.good("data", fmt::format("{}: {}", folder, there));
  if (!absent.empty())
    f.hint("data",
           fmt::format("not in {}: {}; set MIXLORA_DATA to the folder of suites", folder, absent));
}

int doctor() {
  fmt::print("mixlora-bench {}\n", version_text());
  Findings f;
  check_machine(f);
  check_model(f);
  check_data(f);
  return f.missing > 0 ? kFailed : kDone;
}

}  // namespace

void add_doctor_command(CLI::App& app, int& exit_code) {
  app.add_subcommand("doctor", "what this machine can do, what is missing, and what to do about it")
      ->callback([&] { exit_code = doctor(); });
}

}  // namespace mixlora
