// Safetensors: tensors by name from one file or several shards, memory-mapped; and a writer.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/tensor.h"

namespace mixlora {

/// `other`: a type that the format has and no weight of ours may be of; its tensors lie unread.
enum class FileType : std::uint8_t { f32, f16, bf16, other };

/// One tensor's place in a mapped file.
struct FileTensorView {
  FileType type = FileType::f32;
  std::string type_name;  // as the file writes it
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;  // not aligned
};
using FileTensors = std::map<std::string, FileTensorView>;

/// Reads and checks the header of a whole safetensors file: offsets inside the file, sizes that are
/// those of shape and type, tensors end to end without holes. `name` is what errors call it.
/// Throws InputError.
FileTensors parse_safetensors(std::span<const std::byte> file, const std::string& name);

/// Numbers of `type` (not `other`) to f32; bit patterns of NaN keep their upper bits.
void convert_to_f32(std::span<float> out, std::span<const std::byte> bytes, FileType type);

class TensorFiles {
 public:
  /// model.safetensors, or the shards of model.safetensors.index.json. Throws InputError.
  static TensorFiles open(const std::filesystem::path& directory);
  /// One file.
  static TensorFiles open_file(const std::filesystem::path& file);
  ~TensorFiles();
  TensorFiles(TensorFiles&&) noexcept;

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  /// Throws InputError naming the files and the tensor when it is missing, of another shape or of
  /// a type that is not F32, F16 or BF16.
  const FileTensorView& find(const std::string& name, const std::vector<std::int64_t>& shape) const;
  /// Converts to f32; throws as `find`.
  void read_f32(const std::string& name, std::span<float> out,
                const std::vector<std::int64_t>& shape) const;
  const FileTensors& tensors() const { return tensors_; }

 private:
  class Mapping;
  TensorFiles();
  void add(const std::filesystem::path& file);
  std::string source_;
  std::vector<std::unique_ptr<Mapping>> mappings_;
  FileTensors tensors_;
};

/// One f32 tensor to write; the view's rows may lie apart.
struct WriteTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  ConstTensor view;
};
class AtomicFile;
/// Writes f32 tensors with metadata {"format": "pt"}; the caller commits. Throws InputError.
void write_safetensors(AtomicFile& out, const std::vector<WriteTensor>& tensors);
/// As above, committed.
void write_safetensors(const std::filesystem::path& file, const std::vector<WriteTensor>& tensors);

}  // namespace mixlora
