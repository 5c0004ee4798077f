#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "experiments/commands/commands.h"
#include "experiments/sweep_schema.h"

namespace mixlora {

void add_schema_command(CLI::App& app, int& exit_code) {
  app.add_subcommand("schema", "print the sweep file's JSON schema, for editors")->callback([&] {
    fmt::print("{}\n", sweep_schema().dump(2));
    exit_code = kDone;
  });
}

}  // namespace mixlora
