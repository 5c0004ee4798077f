#include "engine/safetensors.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <set>

#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/error.h"
#include "engine/json_file.h"

namespace mixlora {
namespace {

constexpr std::uint64_t kMaxHeader = 100'000'000;  // the format's own limit

float from_half(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000U) << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1fU, fraction = h & 0x3ffU;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000U | (fraction << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
  return sign != 0 ? -magnitude : magnitude;
}

FileType type_of(const std::string& name, const std::string& where) {
  if (name == "F32") return FileType::f32;
  if (name == "F16") return FileType::f16;
  if (name == "BF16") return FileType::bf16;
  fail("{}: type {} is not supported; expected F32, F16 or BF16", where, name);
}
std::uint64_t size_of(FileType t) { return t == FileType::f32 ? 4 : 2; }

std::string text_of(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

/// Product of the extents times the element size, without overflow.
std::uint64_t bytes_of(const std::vector<std::int64_t>& shape, FileType type,
                       const std::string& where) {
  std::uint64_t n = size_of(type);
  for (const auto extent : shape) {
    const auto e = static_cast<std::uint64_t>(extent);
    require(e == 0 || n <= std::numeric_limits<std::uint64_t>::max() / e, "{}: shape {} overflows",
            where, text_of(shape));
    n *= e;
  }
  return n;
}

std::uint64_t whole(const Json& j, const std::string& where) {
  require(j.is_number_unsigned(), "{}: expected a whole number from 0, found {}", where, j.dump());
  const auto v = j.get<std::uint64_t>();
  require(v <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()),
          "{}: {} is too large", where, v);
  return v;
}

}  // namespace

class TensorFiles::Mapping {
 public:
  explicit Mapping(const std::filesystem::path& file) {
    const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
    require(fd >= 0, "{}: cannot be opened: {}", file.string(), std::strerror(errno));
    struct stat info {};
    const bool known = ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    size_ = known ? static_cast<std::size_t>(info.st_size) : 0;
    if (size_ > 0) data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    ::close(fd);
    require(known, "{}: not a regular file", file.string());
    require(size_ >= 8, "{}: {} bytes; a safetensors file has at least 8", file.string(), size_);
    require(data_ != MAP_FAILED, "{}: cannot be mapped: {}", file.string(), std::strerror(errno));
  }
  ~Mapping() {
    if (data_ != nullptr && data_ != MAP_FAILED) ::munmap(data_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

TensorFiles::TensorFiles() = default;
TensorFiles::~TensorFiles() = default;
TensorFiles::TensorFiles(TensorFiles&&) noexcept = default;

void TensorFiles::add(const std::filesystem::path& file) {
  mappings_.push_back(std::make_unique<Mapping>(file));
  const auto bytes = mappings_.back()->bytes();
  std::uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  require(header <= kMaxHeader && header <= bytes.size() - 8,
          "{}: its header says {} bytes, the file has {}; truncated or not safetensors",
          file.string(), header, bytes.size());
  const std::string_view text(reinterpret_cast<const char*>(bytes.data() + 8),
                              header);  // NOLINT: bytes as text
  const Json json = parse_json(text, file.string() + " (header)");
  require(json.is_object(), "{}: its header is not an object", file.string());
  const auto data = bytes.subspan(8 + header);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> spans;
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") continue;
    const std::string where = fmt::format("{}: tensor \"{}\"", file.string(), name);
    require(entry.is_object() && entry.contains("dtype") && entry["dtype"].is_string() &&
                entry.contains("shape") && entry["shape"].is_array() &&
                entry.contains("data_offsets") && entry["data_offsets"].is_array() &&
                entry["data_offsets"].size() == 2,
            "{}: expected {{dtype, shape, data_offsets}}", where);
    FileTensorView view;
    view.type = type_of(entry["dtype"].get<std::string>(), where);
    require(entry["shape"].size() <= 8, "{}: more than 8 dimensions", where);
    for (const auto& extent : entry["shape"])
      view.shape.push_back(static_cast<std::int64_t>(whole(extent, where + " shape")));
    const auto begin = whole(entry["data_offsets"][0], where + " data_offsets"),
               end = whole(entry["data_offsets"][1], where + " data_offsets");
    require(begin <= end && end <= data.size(), "{}: bytes {} to {}; the file has {} of data",
            where, begin, end, data.size());
    require(end - begin == bytes_of(view.shape, view.type, where),
            "{}: {} bytes for shape {}; expected {}", where, end - begin, text_of(view.shape),
            bytes_of(view.shape, view.type, where));
    view.bytes = data.subspan(begin, end - begin);
    if (end > begin) spans.emplace_back(begin, end);
    require(tensors_.emplace(name, std::move(view)).second, "{}: stands in two files", where);
  }
  std::sort(spans.begin(), spans.end());
  for (std::size_t i = 1; i < spans.size(); ++i)
    require(spans[i].first >= spans[i - 1].second, "{}: two tensors overlap at byte {}",
            file.string(), spans[i].first);
}

TensorFiles TensorFiles::open_file(const std::filesystem::path& file) {
  TensorFiles files;
  files.source_ = file.string();
  require(std::filesystem::exists(file), "{}: no such file", file.string());
  files.add(file);
  return files;
}

TensorFiles TensorFiles::open(const std::filesystem::path& directory) {
  const auto index = directory / "model.safetensors.index.json",
             single = directory / "model.safetensors";
  if (!std::filesystem::exists(index)) {
    require(std::filesystem::exists(single),
            "{}: neither model.safetensors nor model.safetensors.index.json is there",
            directory.string());
    return open_file(single);
  }
  TensorFiles files;
  files.source_ = directory.string();
  const Json json = read_json(index);
  require(json.is_object() && json.contains("weight_map") && json["weight_map"].is_object(),
          "{}: expected an object \"weight_map\"", index.string());
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : json["weight_map"].items()) {
    require(shard.is_string(), "{}: weight_map.{}: expected a file name", index.string(), tensor);
    const auto name = shard.get<std::string>();
    require(name.find('/') == std::string::npos && !name.starts_with('.'),
            "{}: weight_map.{}: \"{}\" is not a plain file name", index.string(), tensor, name);
    shards.insert(name);
  }
  for (const auto& shard : shards) {
    require(std::filesystem::exists(directory / shard), "{}: the shard {} is missing",
            directory.string(), shard);
    files.add(directory / shard);
  }
  return files;
}

const FileTensorView& TensorFiles::find(const std::string& name) const {
  const auto at = tensors_.find(name);
  require(at != tensors_.end(), "{}: the tensor \"{}\" is missing", source_, name);
  return at->second;
}

void TensorFiles::read_f32(const std::string& name, std::span<float> out,
                           const std::vector<std::int64_t>& shape) const {
  const FileTensorView& t = find(name);
  require(t.shape == shape, "{}: the tensor \"{}\" has shape {}; expected {}", source_, name,
          text_of(t.shape), text_of(shape));
  if (t.bytes.size() / size_of(t.type) != out.size())
    throw std::logic_error("read_f32: room of another size");
  if (t.type == FileType::f32) {
    std::memcpy(out.data(), t.bytes.data(), t.bytes.size());
    return;
  }
  for (std::size_t i = 0; i < out.size(); ++i) {
    std::uint16_t half = 0;
    std::memcpy(&half, t.bytes.data() + 2 * i, 2);
    out[i] = t.type == FileType::f16 ? from_half(half)
                                     : std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16);
  }
}

void write_safetensors(const std::filesystem::path& file, const std::vector<WriteTensor>& tensors) {
  Json header = Json::object();
  header["__metadata__"] = {{"format", "pt"}};
  std::uint64_t at = 0;
  for (const WriteTensor& t : tensors) {
    header[t.name] = {
        {"dtype", "F32"}, {"shape", t.shape}, {"data_offsets", {at, at + 4 * t.numbers.size()}}};
    at += 4 * t.numbers.size();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t size = text.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &size, 8);
  out += text;
  for (const WriteTensor& t : tensors)
    out.append(reinterpret_cast<const char*>(t.numbers.data()),
               4 * t.numbers.size());  // NOLINT: numbers as bytes
  write_text(file, out);
}

}  // namespace mixlora
