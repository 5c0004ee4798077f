// Import: configuration files of m-LoRA and MoE-PEFT as sweeps.
#pragma once
#include <string>
#include <vector>

#include "experiments/sweep_file.h"

namespace mixlora {

struct Imported {
  Json sweep;                      // for parse_sweep
  std::vector<std::string> notes;  // keys that were renamed, changed or have no meaning here
};

/// `config` is a training file ({"cutoff_len": ..., "lora": [{...}, ...]}), one entry of it, or an
/// adapter_config.json. `name` and `model` become the sweep's. Throws InputError naming `file` and
/// the place; a key of neither program is an error, one that has no meaning here a note.
Imported import_config(const Json& config, const std::string& file, const std::string& name,
                       const std::string& model);

}  // namespace mixlora
