// Snappy's block format: literals and copies of what came out before.
#include "engine/error.h"
#include "suites/parquet.h"

namespace mixlora {
namespace {

class Block {
 public:
  Block(std::string_view bytes, const std::string& name) : bytes_(bytes), name_(name) {}
  bool done() const { return at_ == bytes_.size(); }
  /// `count` bytes as a little-endian number.
  std::size_t number(std::size_t count) {
    std::size_t n = 0;
    const std::string_view raw = take(count);
    for (std::size_t i = 0; i < count; ++i)
      n |= static_cast<std::size_t>(static_cast<unsigned char>(raw[i])) << (8 * i);
    return n;
  }
  std::size_t varint() {
    std::size_t n = 0;
    for (unsigned shift = 0; shift < 35; shift += 7) {
      const std::size_t b = number(1);
      n |= (b & 127) << shift;
      if (b < 128) return n;
    }
    fail("{}: Snappy: a length that does not end", name_);
  }
  std::string_view take(std::size_t count) {
    require(count <= bytes_.size() - at_, "{}: Snappy: the block ends early", name_);
    at_ += count;
    return bytes_.substr(at_ - count, count);
  }

 private:
  std::string_view bytes_;
  const std::string& name_;
  std::size_t at_ = 0;
};

}  // namespace

std::string decompress_snappy(std::string_view bytes, std::size_t size, const std::string& name) {
  Block in(bytes, name);
  const std::size_t stated = in.varint();
  require(stated == size, "{}: Snappy: {} bytes stated, expected {}", name, stated, size);
  std::string out;
  out.reserve(size);
  while (!in.done()) {
    const std::size_t tag = in.number(1), kind = tag & 3;
    std::size_t length = 0, offset = 0;
    if (kind == 0) {
      length = (tag >> 2) + 1;
      if (length > 60) length = in.number(length - 60) + 1;
    } else if (kind == 1) {
      length = ((tag >> 2) & 7) + 4;
      offset = (tag >> 5) << 8 | in.number(1);
    } else {
      length = (tag >> 2) + 1;
      offset = in.number(kind == 2 ? 2 : 4);
    }
    require(length <= size - out.size(), "{}: Snappy: more than {} bytes come out", name, size);
    if (kind == 0) {
      out.append(in.take(length));
      continue;
    }
    require(offset > 0 && offset <= out.size(), "{}: Snappy: a copy from before the start", name);
    for (std::size_t i = 0; i < length; ++i) out.push_back(out[out.size() - offset]);
  }
  require(out.size() == size, "{}: Snappy: {} bytes came out, expected {}", name, out.size(), size);
  return out;
}

}  // namespace mixlora
