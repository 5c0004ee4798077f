// The real model and the real suites, where this machine has them.
#pragma once
#include <cstdlib>
#include <filesystem>
#include <string>

#include "suites/task.h"
#include "tests/support/catch.h"

inline std::string real_model() {
  const char* named = std::getenv("MIXLORA_MODEL");
  return named != nullptr ? named : MIXLORA_SOURCE_DIR "/models/smollm2-135m";
}
/// False, with a printed reason, where the model is absent.
inline bool has_model() {
  if (std::filesystem::exists(real_model() + "/tokenizer.json")) return true;
  WARN("skipped: " << real_model() << " is not there (MIXLORA_MODEL, scripts/fetch_model.sh)");
  return false;
}
/// False, with a printed reason, where the suites are absent.
inline bool has_data() {
  if (std::filesystem::exists(mixlora::data_directory() / "arc_easy")) return true;
  WARN("skipped: the suites are not in " << mixlora::data_directory() << " (MIXLORA_DATA)");
  return false;
}
