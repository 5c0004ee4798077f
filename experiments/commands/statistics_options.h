// The options of report, compare and check that say how sure they are to be, and which store.
#pragma once
#include <filesystem>
#include <string>

#include "reports/statistics.h"

namespace CLI {
class App;
}

namespace mixlora {

/// --confidence, --alpha, --margin (points), --bootstrap-seed, --resamples.
void add_certainty_options(CLI::App& command, Certainty& certainty);
/// A sweep file stands for its store, runs/NAME.db.
std::filesystem::path store_of(const std::string& file);

}  // namespace mixlora
