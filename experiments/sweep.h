// Sweep: a declarative file of trials: a base, axes of labelled merge patches, single trials added
// and removed.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "experiments/expand.h"

namespace mixlora {

struct Sweep {
  std::string name;
  std::string file;
  Json json;  // as read
  RunSpec run;
  std::vector<std::string> tables;
  std::vector<Trial> trials;  // expanded, equal ones once, keys not yet set
  std::vector<LeftOut> left_out;
};

/// Reads and expands; throws InputError with the file, the path in the JSON and the trial's label.
Sweep read_sweep(const std::filesystem::path& file);
/// As read_sweep, from JSON; `file` is what errors call it.
Sweep parse_sweep(const Json& json, const std::string& file);

}  // namespace mixlora
