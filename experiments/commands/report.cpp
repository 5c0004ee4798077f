#include "reports/report.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "experiments/commands/commands.h"
#include "experiments/store/store.h"

namespace mixlora {
namespace {

int report(const std::string& file, const std::string& out) {
  Database db = open_store(file);
  print_tables(db, last_sweep(db), {"accuracy", "params", "efficiency", "expert-load"}, out);
  return 0;
}

}  // namespace

void add_report_command(CLI::App& app, int& exit_code) {
  struct Options {
    std::string file, out;
  };
  const auto o = std::make_shared<Options>();  // the parser and the callback share it
  CLI::App* command = app.add_subcommand("report", "print the tables of a store's last sweep");
  command->add_option("db", o->file, "store")->required();
  command->add_option("--out", o->out, "also write .md, .csv and .tex into this folder");
  command->callback([=, &exit_code] { exit_code = report(o->file, o->out); });
}

}  // namespace mixlora
