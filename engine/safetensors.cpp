#include "engine/safetensors.h"

#include <algorithm>
#include <array>
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

#include "engine/atomic_file.h"
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

struct KnownType {
  const char* name;
  FileType type;
  std::uint64_t bytes;
};
constexpr std::array<KnownType, 14> kTypes{{{"F32", FileType::f32, 4},
                                            {"F16", FileType::f16, 2},
                                            {"BF16", FileType::bf16, 2},
                                            {"F64", FileType::other, 8},
                                            {"I64", FileType::other, 8},
                                            {"U64", FileType::other, 8},
                                            {"I32", FileType::other, 4},
                                            {"U32", FileType::other, 4},
                                            {"I16", FileType::other, 2},
                                            {"U16", FileType::other, 2},
                                            {"I8", FileType::other, 1},
                                            {"U8", FileType::other, 1},
                                            {"F8_E4M3", FileType::other, 1},
                                            {"BOOL", FileType::other, 1}}};

const KnownType& type_of(const std::string& name, const std::string& where) {
  const auto* at = std::find_if(kTypes.begin(), kTypes.end(),
                                [&](const KnownType& t) { return t.name == name; });
  require(at != kTypes.end(), "{}: unknown type {}; expected F32, F16 or BF16", where,
          in_quotes(name));
  return *at;
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

/// Product of the extents times the element size, without overflow.
std::uint64_t bytes_of(const std::vector<std::int64_t>& shape, std::uint64_t element,
                       const std::string& where) {
  std::uint64_t n = element;
  for (const auto extent : shape) {
    const auto e = static_cast<std::uint64_t>(extent);
    require(e == 0 || n <= std::numeric_limits<std::uint64_t>::max() / e, "{}: shape {} overflows",
            where, text_of(shape));
    n *= e;
  }
  return n;
}

std::uint64_t whole(const Json& j, const std::string& where) {
  require(j.is_number_unsigned() && j.get<std::uint64_t>() <= static_cast<std::uint64_t>(INT64_MAX),
          "{}: expected a whole number from 0, found {}", where, shown(j));
  return j.get<std::uint64_t>();
}

FileTensorView read_entry(const Json& entry, std::span<const std::byte> data,
                          const std::string& where) {
  require(
      entry.is_object() && entry.contains("dtype") && entry["dtype"].is_string() &&
          entry.contains("shape") && entry["shape"].is_array() && entry.contains("data_offsets") &&
          entry["data_offsets"].is_array() && entry["data_offsets"].size() == 2,
      "{}: expected {{dtype, shape, data_offsets: [begin, end]}}, found {}", where, shown(entry));
  FileTensorView view;
  view.type_name = entry["dtype"].get<std::string>();
  const KnownType& type = type_of(view.type_name, where);
  view.type = type.type;
  require(entry["shape"].size() <= 8, "{}: {} dimensions; at most 8", where, entry["shape"].size());
  for (const auto& extent : entry["shape"])
    view.shape.push_back(static_cast<std::int64_t>(whole(extent, where + ": shape")));
  const auto begin = whole(entry["data_offsets"][0], where + ": data_offsets"),
             end = whole(entry["data_offsets"][1], where + ": data_offsets");
  require(begin <= end && end <= data.size(),
          "{}: bytes {} to {} of the data, but the file has {} bytes of it; truncated?", where,
          begin, end, data.size());
  const std::uint64_t expected = bytes_of(view.shape, type.bytes, where);
  require(end - begin == expected, "{}: {} bytes; expected {} for {} of shape {}", where,
          end - begin, expected, view.type_name, text_of(view.shape));
  view.bytes = data.subspan(begin, end - begin);
  return view;
}

}  // namespace

FileTensors parse_safetensors(std::span<const std::byte> file, const std::string& name) {
  require(file.size() >= 8, "{}: {} bytes; a safetensors file has at least 8", name, file.size());
  std::uint64_t header = 0;
  std::memcpy(&header, file.data(), 8);
  require(header <= kMaxHeader && header <= file.size() - 8,
          "{}: its header says {} bytes, the file has {}; truncated, or not safetensors", name,
          header, file.size());
  // NOLINTNEXTLINE(cppcoreguidelines-pro-type-reinterpret-cast): bytes as text
  const std::string_view text(reinterpret_cast<const char*>(file.data() + 8), header);
  const Json json = parse_json(text, name + ": header");
  require(json.is_object(), "{}: header: expected an object of tensors, found {}", name,
          shown(json));
  const auto data = file.subspan(8 + header);
  FileTensors tensors;
  std::vector<std::pair<const std::byte*, std::string>> starts;
  for (const auto& [key, entry] : json.items()) {
    if (key == "__metadata__") continue;
    auto view = read_entry(entry, data, fmt::format("{}: tensor {}", name, in_quotes(key)));
    starts.emplace_back(view.bytes.data(), key);
    tensors.emplace(key, std::move(view));
  }
  // Of two that start together the empty one comes first.
  std::sort(starts.begin(), starts.end(), [&](const auto& a, const auto& b) {
    return std::pair(a.first, tensors[a.second].bytes.size()) <
           std::pair(b.first, tensors[b.second].bytes.size());
  });
  const std::byte* end = data.data();
  for (const auto& [start, key] : starts) {
    if (start != end)
      fail("{}: tensor {} begins at byte {} of the data; expected {}, the end of the one before",
           name, in_quotes(key), start - data.data(), end - data.data());
    end = start + tensors[key].bytes.size();
  }
  require(end == data.data() + data.size(), "{}: {} bytes after the last tensor; expected none",
          name, data.data() + data.size() - end);
  return tensors;
}

void convert_to_f32(std::span<float> out, std::span<const std::byte> bytes, FileType type) {
  const std::size_t n = out.size();
  const auto half = [&](std::size_t i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, bytes.data() + 2 * i, 2);
    return bits;
  };
  if (type == FileType::other || bytes.size() != n * (type == FileType::f32 ? 4 : 2))
    throw std::logic_error("convert_to_f32: room of another size");
  if (n == 0) return;
  if (type == FileType::f32) {
    std::memcpy(out.data(), bytes.data(), bytes.size());
  } else if (type == FileType::f16) {
    for (std::size_t i = 0; i < n; ++i) out[i] = from_half(half(i));
  } else {
    for (std::size_t i = 0; i < n; ++i)
      out[i] = std::bit_cast<float>(static_cast<std::uint32_t>(half(i)) << 16);
  }
}

class TensorFiles::Mapping {
 public:
  explicit Mapping(const std::filesystem::path& file) {
    const int fd =
        ::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not block
    require(fd >= 0, "{}: cannot be opened: {}", file.string(), std::strerror(errno));
    struct stat info {};
    const bool known = ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    size_ = known ? static_cast<std::size_t>(info.st_size) : 0;
    if (size_ > 0) data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    ::close(fd);
    require(known, "{}: not a regular file", file.string());
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
  for (auto& [name, view] : parse_safetensors(mappings_.back()->bytes(), file.string()))
    if (!tensors_.emplace(name, std::move(view)).second)
      fail("{}: the tensor {} stands in another shard too", file.string(), in_quotes(name));
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
          "{}: expected an object \"weight_map\" of tensor: file", index.string());
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : json["weight_map"].items()) {
    const std::string where = fmt::format("{}: weight_map.{}", index.string(), in_quotes(tensor));
    require(shard.is_string(), "{}: expected a file name, found {}", where, shown(shard));
    const auto name = shard.get<std::string>();
    require(!name.empty() && name.find_first_of(std::string("/\\\0", 3)) == std::string::npos &&
                !name.starts_with('.'),
            "{}: {} is not a plain file name beside the index", where, in_quotes(name));
    shards.insert(name);
  }
  require(!shards.empty(), "{}: \"weight_map\" names no file", index.string());
  for (const auto& shard : shards) {
    require(std::filesystem::exists(directory / shard), "{}: the shard {} is missing",
            directory.string(), shard);
    files.add(directory / shard);
  }
  return files;
}

const FileTensorView& TensorFiles::find(const std::string& name,
                                        const std::vector<std::int64_t>& shape) const {
  const auto at = tensors_.find(name);
  require(at != tensors_.end(), "{}: the tensor \"{}\" is missing", source_, name);
  const FileTensorView& t = at->second;
  require(t.type != FileType::other,
          "{}: the tensor \"{}\" is of type {}; expected F32, F16 or BF16", source_, name,
          t.type_name);
  require(t.shape == shape, "{}: the tensor \"{}\" has shape {}; expected {}", source_, name,
          text_of(t.shape), text_of(shape));
  return t;
}

void TensorFiles::read_f32(const std::string& name, std::span<float> out,
                           const std::vector<std::int64_t>& shape) const {
  const FileTensorView& t = find(name, shape);
  convert_to_f32(out, t.bytes, t.type);
}

void write_safetensors(AtomicFile& out, const std::vector<WriteTensor>& tensors) {
  Json header = Json::object();
  header["__metadata__"] = {{"format", "pt"}};
  std::uint64_t at = 0;
  for (const WriteTensor& t : tensors) {
    const std::uint64_t end = at + 4 * static_cast<std::uint64_t>(t.view.numel());
    header[t.name] = {{"dtype", "F32"}, {"shape", t.shape}, {"data_offsets", {at, end}}};
    at = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t size = text.size();
  std::array<char, 8> length{};
  std::memcpy(length.data(), &size, 8);
  out.write({length.data(), length.size()});
  out.write(text);
  for (const WriteTensor& t : tensors)
    for (std::int64_t i = 0; i < t.view.rows(); ++i)
      // NOLINTNEXTLINE(cppcoreguidelines-pro-type-reinterpret-cast): numbers as bytes
      out.write({reinterpret_cast<const char*>(t.view.row<float>(i)),
                 4 * static_cast<std::size_t>(t.view.cols())});
}

void write_safetensors(const std::filesystem::path& file, const std::vector<WriteTensor>& tensors) {
  AtomicFile out(file);
  write_safetensors(out, tensors);
  out.commit();
}

}  // namespace mixlora
