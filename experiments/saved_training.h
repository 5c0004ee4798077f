// SavedTraining: a training between two steps, in a file that a killed run goes on from.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "engine/train.h"

namespace mixlora {

struct SavedTraining {
  std::string identity;  // what is trained, by which program, on what: another one starts anew
  TrainState state;
  std::vector<StepRecord> records;  // of the steps done, in their order
};

/// Whole or not at all, synced, with a hash. Throws InputError.
void write_training(const std::filesystem::path& file, const std::string& identity,
                    const TrainState& state, const std::vector<StepRecord>& records);
/// Nothing when there is no such file. Throws InputError naming the file and what is wrong: it is
/// not whole, not of this kind, or of another identity.
std::optional<SavedTraining> read_training(const std::filesystem::path& file,
                                           const std::string& identity);

}  // namespace mixlora
