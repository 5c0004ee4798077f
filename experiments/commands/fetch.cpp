#include "suites/fetch.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "experiments/commands/commands.h"
#include "suites/dataset.h"

namespace mixlora {
namespace {

struct FetchArguments {
  std::vector<std::string> names, splits;
  FetchOptions fetch;
};

/// Every split named, or every one of the task's.
std::vector<Split> wanted_splits(const Task& task, const std::vector<std::string>& names) {
  if (names.empty()) return task.splits;
  std::vector<Split> out;
  for (const auto& name : names) out.push_back(task.split(name));
  return out;
}

int fetch_suites(const FetchArguments& o) {
  std::vector<Task> wanted;
  for (const auto& name : mix_names(o.names)) wanted.push_back(find_task(name));
  if (wanted.empty())
    for (const Task& t : tasks())
      if (!t.source.repository.empty()) wanted.push_back(t);
  FetchOptions options = o.fetch;
  if (options.data.empty()) options.data = data_directory();
  const Hub hub = Hub::from_environment();
  int code = kDone;
  for (const Task& task : wanted)
    for (const Split& split : wanted_splits(task, o.splits)) {
      try {
        fmt::print("{} {}: {}\n", task.name, split.name, fetch_split(task, split, options, hub));
      } catch (const InputError& e) {  // the others may be had all the same
        fmt::print(stderr, "{} {}: {}\n", task.name, split.name, e.what());
        code = kBadInput;
      }
      std::fflush(stdout);
    }
  return code;
}

}  // namespace

void add_fetch_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<FetchArguments>();  // the parser and the callback share it
  CLI::App* fetch = app.add_subcommand("fetch", "bring official data here");
  fetch->require_subcommand(1);
  CLI::App* command = fetch->add_subcommand(
      "suites", "the published suites' rows, from the Hugging Face Hub (HF_ENDPOINT, HF_TOKEN)");
  command->add_option("suite", o->names, "tasks (\"arc-e;boolq\" too); all with a source");
  command->add_option("--split", o->splits, "only these splits");
  command->add_option("--data", o->fetch.data, "where to; $MIXLORA_DATA, else data");
  command->add_option("--from", o->fetch.from, "a folder of official files, not the Hub");
  command->add_flag("--again", o->fetch.again, "also what is there");
  command->add_flag("--any-edition", o->fetch.any_edition,
                    "also rows whose count or hash is not the one on record");
  command->callback([=, &exit_code] { exit_code = fetch_suites(*o); });
}

}  // namespace mixlora
