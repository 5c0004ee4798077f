#include "experiments/import.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "experiments/commands/commands.h"

namespace mixlora {
namespace {

struct ImportArguments {
  std::string config, model = "models/smollm2-135m", out;
};

int import_file(const ImportArguments& o) {
  const std::filesystem::path file(o.config);
  const Imported made =
      import_config(read_json(file, 16 << 20), o.config, file.stem().string(), o.model);
  const std::string text = made.sweep.dump(2) + "\n";
  for (const auto& note : made.notes) fmt::print(stderr, "note: {}\n", note);
  if (o.out.empty()) {
    fmt::print("{}", text);
  } else {
    write_text(o.out, text);
    fmt::print(stderr, "{} written\n", o.out);
  }
  try {
    parse_sweep(made.sweep, o.out.empty() ? "the sweep" : o.out);
  } catch (const InputError& e) {  // such as: no task is named in the file
    fmt::print(stderr, "note: before it runs: {}\n", e.what());
  }
  return kDone;
}

}  // namespace

void add_import_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<ImportArguments>();  // the parser and the callback share it
  CLI::App* command =
      app.add_subcommand("import", "write the sweep of an m-LoRA or MoE-PEFT configuration file");
  command->add_option("config", o->config, "training file or adapter_config.json")->required();
  command->add_option("--model", o->model, "the sweep's model");
  command->add_option("-o,--out", o->out, "sweep file to write (default: print it)");
  command->callback([=, &exit_code] { exit_code = import_file(*o); });
}

}  // namespace mixlora
