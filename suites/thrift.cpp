#include "suites/thrift.h"

#include "engine/error.h"

namespace mixlora {
namespace {

constexpr int kDeepest = 16;
constexpr std::int64_t kLastField = 32767;  // field numbers are 16 bits wide

/// Types of the compact protocol.
enum class Kind : std::uint8_t {
  stop,
  yes,
  no,
  byte,
  i16,
  i32,
  i64,
  real,
  binary,
  list,
  set,
  map,
  structure
};

class ThriftReader {
 public:
  ThriftReader(std::string_view bytes, const std::string& name) : bytes_(bytes), name_(name) {}
  std::size_t used() const { return at_; }

  ThriftValue structure(int depth) {
    require(depth < kDeepest, "{}: nested too deep", name_);
    ThriftValue out;
    std::int64_t field = 0;
    for (;;) {
      const unsigned head = byte();
      const Kind kind = kind_of(head & 15);
      if (kind == Kind::stop) return out;
      const std::int64_t step = head >> 4;
      field = step != 0 ? field + step : zigzag();
      require(field >= 0 && field <= kLastField, "{}: a field {}", name_, field);
      out.fields[static_cast<int>(field)] = value(kind, depth + 1, false);
    }
  }

 private:
  unsigned byte() {
    require(at_ < bytes_.size(), "{}: ends early", name_);
    return static_cast<unsigned char>(bytes_[at_++]);
  }
  std::uint64_t varint() {
    std::uint64_t n = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const std::uint64_t b = byte();
      n |= (b & 127) << shift;
      if (b < 128) return n;
    }
    fail("{}: a number that does not end", name_);
  }
  std::int64_t zigzag() {
    const std::uint64_t n = varint();
    return static_cast<std::int64_t>(n >> 1) ^ -static_cast<std::int64_t>(n & 1);
  }
  std::string_view take(std::uint64_t count) {
    require(count <= bytes_.size() - at_, "{}: ends early", name_);
    at_ += count;
    return bytes_.substr(at_ - count, count);
  }
  Kind kind_of(unsigned n) const {
    require(n <= static_cast<unsigned>(Kind::structure), "{}: no type {}", name_, n);
    return static_cast<Kind>(n);
  }
  /// A truth value of a struct lies in its field's head, one of a list in a byte.
  ThriftValue value(Kind kind, int depth, bool in_list) {
    require(depth < kDeepest, "{}: nested too deep", name_);
    ThriftValue v;
    switch (kind) {
      case Kind::yes:
      case Kind::no:
        v.number = in_list ? byte() == 1 : kind == Kind::yes;
        break;
      case Kind::byte:
        v.number = static_cast<std::int8_t>(byte());
        break;
      case Kind::i16:
      case Kind::i32:
      case Kind::i64:
        v.number = zigzag();
        break;
      case Kind::real:
        take(8);
        break;
      case Kind::binary:
        v.text = take(varint());
        break;
      case Kind::list:
      case Kind::set: {
        const unsigned head = byte();
        const std::uint64_t count = head >> 4 == 15 ? varint() : head >> 4;
        require(count <= bytes_.size() - at_, "{}: a list longer than the file", name_);
        for (std::uint64_t i = 0; i < count; ++i)
          v.list.push_back(value(kind_of(head & 15), depth + 1, true));
        break;
      }
      case Kind::structure:
        return structure(depth);
      case Kind::map:
      case Kind::stop:
        fail("{}: a type that Parquet does not use", name_);
    }
    return v;
  }

  std::string_view bytes_;
  const std::string& name_;
  std::size_t at_ = 0;
};

}  // namespace

const ThriftValue& ThriftValue::at(int field, const std::string& name) const {
  const auto found = fields.find(field);
  require(found != fields.end(), "{}: the field {} is missing", name, field);
  return found->second;
}

ThriftValue read_thrift(std::string_view bytes, std::size_t& used, const std::string& name) {
  ThriftReader reader(bytes, name);
  ThriftValue v = reader.structure(0);
  used = reader.used();
  return v;
}

}  // namespace mixlora
