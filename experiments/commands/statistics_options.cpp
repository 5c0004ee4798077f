#include "experiments/commands/statistics_options.h"

#include <CLI/CLI.hpp>

#include "experiments/commands/commands.h"

namespace mixlora {

void add_certainty_options(CLI::App& command, Certainty& certainty) {
  const auto share = CLI::Range(0.0001, 0.9999);
  command.add_option("--confidence", certainty.confidence, "of intervals (default 0.95)")
      ->check(share);
  command.add_option("--alpha", certainty.alpha, "level of tests, after correction (default 0.05)")
      ->check(CLI::Range(0.0001, 0.4));
  command
      .add_option_function<double>(
          "--margin", [&certainty](double points) { certainty.margin = points / 100; },
          "points of accuracy below which a difference does not matter (default 1)")
      ->check(CLI::Range(0.0, 100.0));
  command.add_option("--bootstrap-seed", certainty.seed, "seed of the bootstrap (default 42)");
  command.add_option("--resamples", certainty.resamples, "of the bootstrap (default 2000)")
      ->check(CLI::Range(100, 1000000));
}

std::filesystem::path store_of(const std::string& file) {
  return file.ends_with(".json") ? store_file(read_sweep(file), "") : std::filesystem::path(file);
}

}  // namespace mixlora
