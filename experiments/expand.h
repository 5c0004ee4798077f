// Expansion: a sweep file's axes become trials; a pure function.
#pragma once
#include <string>
#include <vector>

#include "experiments/sweep_file.h"

namespace mixlora {

/// A combination that is not run, and why: excluded by a rule, or equal to another trial.
struct LeftOut {
  std::string label, reason;
};

struct Expansion {
  std::vector<Trial> trials;  // in the order of the axes as written; keys not yet set
  std::vector<LeftOut> left_out;
};

/// Throws InputError with the place in the file or, for what only the merged trial shows, with the
/// trial's label and the place that set the value. `file` is what errors call it.
Expansion expand(const SweepFile& sweep, const std::string& file);

}  // namespace mixlora
