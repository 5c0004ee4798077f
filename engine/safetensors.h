// Safetensors: tensors by name from one file or several shards, memory-mapped; and a writer.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace mixlora {

enum class FileType : std::uint8_t { f32, f16, bf16 };

/// One tensor's place in a mapped file.
struct FileTensorView {
  FileType type = FileType::f32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;
};

class TensorFiles {
 public:
  /// model.safetensors, or the shards of model.safetensors.index.json. Throws InputError.
  static TensorFiles open(const std::filesystem::path& directory);
  /// One file.
  static TensorFiles open_file(const std::filesystem::path& file);
  ~TensorFiles();
  TensorFiles(TensorFiles&&) noexcept;

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  /// Throws InputError naming the files and the tensor when it is missing.
  const FileTensorView& find(const std::string& name) const;
  /// Converts to f32; throws InputError when the tensor is missing or not of `shape`.
  void read_f32(const std::string& name, std::span<float> out,
                const std::vector<std::int64_t>& shape) const;
  const std::map<std::string, FileTensorView>& tensors() const { return tensors_; }

 private:
  class Mapping;
  TensorFiles();
  void add(const std::filesystem::path& file);
  std::string source_;
  std::vector<std::unique_ptr<Mapping>> mappings_;
  std::map<std::string, FileTensorView> tensors_;
};

/// One f32 tensor to write.
struct WriteTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> numbers;
};
/// Writes f32 tensors with metadata {"format": "pt"}; atomic. Throws InputError.
void write_safetensors(const std::filesystem::path& file, const std::vector<WriteTensor>& tensors);

}  // namespace mixlora
