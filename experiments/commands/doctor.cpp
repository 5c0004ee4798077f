#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <unistd.h>

#include "experiments/commands/commands.h"
#include "suites/task.h"

namespace mixlora {
namespace {

int doctor() {
  const auto ops = make_cpu_backend();
  fmt::print("cpu      {}\n", ops->description());
  const std::string cuda = cuda_unavailable_reason();
  fmt::print("cuda     {}\n", cuda.empty() ? make_cuda_backend()->description() : "no: " + cuda);
  fmt::print("memory   {:.1f} GiB\n", static_cast<double>(sysconf(_SC_PHYS_PAGES)) *
                                          static_cast<double>(sysconf(_SC_PAGE_SIZE)) /
                                          1073741824.0);
  const bool model = std::filesystem::exists("models/smollm2-135m/config.json");
  fmt::print("model    {}\n", model
                                  ? "models/smollm2-135m"
                                  : "models/smollm2-135m is not there: run scripts/fetch_model.sh");
  fmt::print("data     {}\n", data_directory().string());
  for (const Task& t : tasks()) {
    if (t.starter) continue;
    const auto folder = data_directory() / t.folder;
    fmt::print("  {:<11} {}\n", t.name,
               std::filesystem::exists(folder)
                   ? "there"
                   : fmt::format("{} is not there: set MIXLORA_DATA to the folder of suites",
                                 folder.string()));
  }
  return 0;
}

}  // namespace

void add_doctor_command(CLI::App& app, int& exit_code) {
  app.add_subcommand("doctor", "what this machine can do, and what is missing")->callback([&] {
    exit_code = doctor();
  });
}

}  // namespace mixlora
