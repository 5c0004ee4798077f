// A folder of a test's own, gone when the test ends.
#pragma once
#include <filesystem>
#include <string>
#include <string_view>

#include <unistd.h>

#include "engine/json_file.h"

struct Temporary {
  std::filesystem::path path;
  explicit Temporary(const std::string& name)
      : path(std::filesystem::temp_directory_path() /
             ("mixlora-" + name + "-" + std::to_string(::getpid()))) {
    std::filesystem::remove_all(path);
    std::filesystem::create_directories(path);
  }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  ~Temporary() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  std::filesystem::path write(const std::string& name, std::string_view text) const {
    const auto file = path / name;
    std::filesystem::create_directories(file.parent_path());
    mixlora::write_text(file, text);
    return file;
  }
};

/// The message of what `f` throws; empty when it throws nothing.
template <class F> std::string message_of(F&& f) {
  try {
    f();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}
