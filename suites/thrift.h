// Thrift: values of the compact protocol, in which Parquet keeps what it says about itself.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace mixlora {

/// A struct's fields by their numbers, a list, a text or a whole number.
struct ThriftValue {
  std::int64_t number = 0;
  std::string_view text;  // into the bytes read
  std::vector<ThriftValue> list;
  std::map<int, ThriftValue> fields;

  /// A field that must be there; throws InputError with `name`.
  const ThriftValue& at(int field, const std::string& name) const;
  bool has(int field) const { return fields.count(field) != 0; }
};

/// One struct from the front of `bytes`; `used` becomes its length. Throws InputError.
ThriftValue read_thrift(std::string_view bytes, std::size_t& used, const std::string& name);

}  // namespace mixlora
