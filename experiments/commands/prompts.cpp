#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "experiments/commands/commands.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

int prompts(const std::string& suite, std::int64_t n) {
  const Task task = find_task(suite);
  for (const Row& row : load_split(task, false, n).rows) {
    fmt::print("--- {} (gold: {})\n{}\n", row.id,
               label_texts(task, row)[static_cast<std::size_t>(row.answer)],
               prompt_text(task, row));
  }
  return 0;
}

}  // namespace

void add_prompts_command(CLI::App& app, int& exit_code) {
  struct Options {
    std::string suite;
    std::int64_t count = 3;
  };
  const auto o = std::make_shared<Options>();  // the parser and the callback share it
  CLI::App* command = app.add_subcommand("prompts", "print prompts of a suite");
  command->add_option("suite", o->suite)->required();
  command->add_option("-n", o->count, "how many");
  command->callback([=, &exit_code] { exit_code = prompts(o->suite, o->count); });
}

}  // namespace mixlora
