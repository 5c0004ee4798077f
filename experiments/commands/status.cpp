#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "experiments/commands/commands.h"
#include "experiments/store/store.h"
#include "reports/report.h"

namespace mixlora {
namespace {

int status(const std::string& file) {
  Database db = open_store(file);
  Statement(db, "SELECT label, status, reason FROM result WHERE sweep = ? ORDER BY position")
      .rows<std::string, std::string, std::string>(
          [](const std::string& label, const std::string& state, const std::string& reason) {
            fmt::print("{:<40} {}{}\n", label, state, reason.empty() ? "" : ": " + reason);
          },
          last_sweep(db));
  return 0;
}

}  // namespace

void add_status_command(CLI::App& app, int& exit_code) {
  const auto file = std::make_shared<std::string>();  // the parser and the callback share it
  CLI::App* command = app.add_subcommand("status", "the trials of a store's last sweep");
  command->add_option("db", *file, "store")->required();
  command->callback([=, &exit_code] { exit_code = status(*file); });
}

}  // namespace mixlora
