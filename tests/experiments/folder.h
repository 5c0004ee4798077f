// Folder: an empty folder of a test's own, gone after it.
#pragma once
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace mixlora {

struct Folder {
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "mixlora-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error(name + ": cannot be made");
    path = name;
    std::filesystem::permissions(path, std::filesystem::perms(0755));
  }
  ~Folder() {
    std::error_code error;
    std::filesystem::remove_all(path, error);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::filesystem::path path;
};

}  // namespace mixlora
