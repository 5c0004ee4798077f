// mixlora-bench: the program; its subcommands are in experiments/commands.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <unistd.h>

#include "engine/error.h"
#include "engine/nearest.h"
#include "experiments/commands/commands.h"
#include "experiments/environment.h"

namespace {

/// libgomp's threads wait by spinning for milliseconds, which beside other programs takes the cores
/// from those they wait for. It reads how long as the process starts, so the process starts anew.
void spin_briefly(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  setenv("GOMP_SPINCOUNT", "3000", 1);
  execv("/proc/self/exe", argv);  // comes back only when it cannot: then it works all the same
}

}  // namespace

int main(int argc, char** argv) {
  using namespace mixlora;
  spin_briefly(argv);
  std::signal(SIGXFSZ, SIG_IGN);  // a file over its limit is an error with a message, not a signal
  CLI::App app{
      "mixlora-bench: LoRA, DoRA, MixLoRA and MixDoRA on a frozen Llama-family model, compared."};
  app.require_subcommand(1);
  app.set_version_flag("--version", version_text());
  int exit_code = kDone;
  // In the order of --help.
  add_run_command(app, exit_code);
  add_plan_command(app, exit_code);
  add_status_command(app, exit_code);
  add_report_command(app, exit_code);
  add_compare_command(app, exit_code);
  add_check_command(app, exit_code);
  add_suites_command(app, exit_code);
  add_fetch_command(app, exit_code);
  add_prompts_command(app, exit_code);
  add_bench_command(app, exit_code);
  add_profile_command(app, exit_code);
  add_import_command(app, exit_code);
  add_schema_command(app, exit_code);
  add_doctor_command(app, exit_code);
  try {
    if (argc > 1 && argv[1][0] != '-') {
      std::vector<std::string> names;
      for (const CLI::App* command : app.get_subcommands({})) names.push_back(command->get_name());
      if (std::find(names.begin(), names.end(), argv[1]) == names.end())
        fail("no command \"{}\"; {}", argv[1], nearest(argv[1], names));
    }
    app.parse(argc, argv);
    return exit_code;
  } catch (const CLI::ParseError& e) {
    const int shown = app.exit(e);
    return shown == 0 ? kDone : kBadInput;
  } catch (const InputError& e) {
    fmt::print(stderr, "mixlora-bench: {}\n", e.what());
    return kBadInput;
  } catch (const std::exception& e) {
    fmt::print(stderr, "mixlora-bench: {}\n", e.what());
    return kFailed;
  }
}
