// Sweep: a declarative file of trials: a base, axes of labelled merge patches, single trials added
// and removed.
#pragma once
#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

#include "experiments/trial.h"

namespace mixlora {

struct RunSpec {
  std::string device = "auto";     // auto | cpu | cuda
  std::string precision = "auto";  // auto | fp32 | bf16
  std::optional<double> memory_limit_gib;
  Recompute recompute = Recompute::automatic;
  bool keep_adapters = true;
};
template <class V> void fields(V& v, RunSpec& s) {
  v("device", s.device);
  v("precision", s.precision);
  v("memory_limit_gib", s.memory_limit_gib);
  v("recompute", s.recompute);
  v("keep_adapters", s.keep_adapters);
}

struct Sweep {
  std::string name;
  std::string file;
  Json json;  // as read
  RunSpec run;
  std::vector<std::string> tables;
  std::vector<Trial> trials;  // expanded, equal ones once, keys not yet set
};

/// Reads and expands; throws InputError with the file, the path in the JSON and the trial's label.
Sweep read_sweep(const std::filesystem::path& file);
/// As read_sweep, from JSON; `file` is what errors call it.
Sweep parse_sweep(const Json& json, const std::string& file);

}  // namespace mixlora
