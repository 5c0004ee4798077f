// Hub: files of data set repositories on the Hugging Face Hub.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace mixlora {

struct HubFile {
  std::string path;       // in the repository
  std::int64_t size = 0;  // bytes; 0: not stated
  std::string sha256;     // empty: not stated
};

/// Answers by HTTP, with redirects. What a server says again later (429, 5xx) and what the network
/// drops is tried again, a download from the byte it had come to. Throws InputError: 401, 403, 404
/// and hashes that differ say what to do.
class Hub {
 public:
  /// `token` may be empty. `pause`: seconds before the second attempt; later ones wait twice as
  /// long each time.
  Hub(std::string endpoint, std::string token, double pause = 1);
  /// $HF_ENDPOINT, else https://huggingface.co; $HF_TOKEN, else the file that `huggingface-cli
  /// login` wrote.
  static Hub from_environment();

  /// The Parquet files of a split, as the Hub converts every data set.
  std::vector<HubFile> parquet_files(const std::string& repository, const std::string& config,
                                     const std::string& split) const;
  /// Downloads a file to `to`, by way of `to`.part, which a later call goes on with.
  void download(const std::string& repository, const HubFile& file,
                const std::filesystem::path& to) const;
  const std::string& endpoint() const { return endpoint_; }

 private:
  std::string endpoint_, token_;
  double pause_;
};

}  // namespace mixlora
