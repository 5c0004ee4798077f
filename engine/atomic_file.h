// AtomicFile: a file that appears whole or not at all.
#pragma once
#include <filesystem>
#include <string>
#include <string_view>

namespace mixlora {

/// Bytes go to a neighbour, FILE.part; `commit` syncs it and gives it the file's name. Without a
/// commit the neighbour is removed, so a full disk leaves what was there before. Throws InputError.
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& file);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::string_view bytes);
  /// Everything is on the disk after this; only the name is not given yet. Several files that
  /// belong together are all synced before the first is committed.
  void sync();
  void commit();

 private:
  void flush();
  [[noreturn]] void broken(int error) const;
  std::string file_, temporary_, buffer_;
  int descriptor_ = -1;
};

}  // namespace mixlora
