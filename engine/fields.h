// Fields: one list of a struct's fields gives strict reading, canonical writing and the names for
// errors.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/nearest.h"

namespace mixlora {

/// A struct opts in by listing each field once, found by argument-dependent look-up:
///     template <class V> void fields(V& v, TrainSpec& s) { v("lr", s.lr); ... }
/// An enum by `enum_names(E)`: an array of {value, name}.
template <class T> void read(const Json& j, T& out, const std::string& path);
template <class T> Json write(const T& in);

namespace detail {
template <class T> struct IsOptional : std::false_type {};
template <class T> struct IsOptional<std::optional<T>> : std::true_type {};
template <class T> struct IsVector : std::false_type {};
template <class T> struct IsVector<std::vector<T>> : std::true_type {};
}  // namespace detail

class Reader {
 public:
  Reader(const Json& j, std::string path) : json_(j), path_(std::move(path)) {
    require(j.is_object(), "{}: expected an object, found {}", path_, j.type_name());
  }
  template <class T> void operator()(const char* key, T& value) {
    known_.emplace_back(key);
    if (const auto at = json_.find(key); at != json_.end()) read(*at, value, path_ + "." + key);
  }
  void reject_unknown() const {
    for (const auto& [key, value] : json_.items())
      if (std::find(known_.begin(), known_.end(), key) == known_.end())
        fail("{}: unknown key {}; {}", path_, in_quotes(key), nearest(key, known_));
  }

 private:
  const Json& json_;
  std::string path_;
  std::vector<std::string> known_;
};

struct Writer {
  Json json = Json::object();
  template <class T> void operator()(const char* key, T& value) { json[key] = write(value); }
};

template <class T> void read(const Json& j, T& out, const std::string& path) {
  if constexpr (requires(Reader r) { fields(r, out); }) {
    Reader r(j, path);
    fields(r, out);
    r.reject_unknown();
  } else if constexpr (requires { enum_names(out); }) {
    std::vector<std::string> names;
    for (const auto& [value, name] : enum_names(out)) {
      if (j == name) {
        out = value;
        return;
      }
      names.emplace_back(name);
    }
    fail("{}: no such choice: {}; {}", path, shown(j),
         nearest(j.is_string() ? j.get<std::string>() : "", names));
  } else if constexpr (requires { read_field(j, out, path); }) {
    read_field(j, out, path);
  } else if constexpr (detail::IsOptional<T>::value) {
    if (j.is_null()) {
      out.reset();
    } else {
      typename T::value_type value{};
      read(j, value, path);
      out = value;
    }
  } else if constexpr (detail::IsVector<T>::value) {
    require(j.is_array(), "{}: expected a list, found {}", path, shown(j));
    out.clear();
    for (std::size_t i = 0; i < j.size(); ++i)
      read(j[i], out.emplace_back(), fmt::format("{}[{}]", path, i));
  } else if constexpr (std::is_same_v<T, bool>) {
    require(j.is_boolean(), "{}: expected true or false, found {}", path, shown(j));
    out = j.get<bool>();
  } else if constexpr (std::is_integral_v<T>) {
    require(j.is_number_integer(), "{}: expected a whole number, found {}", path, shown(j));
    require(!j.is_number_unsigned() || std::is_unsigned_v<T> ||
                j.get<std::uint64_t>() <= std::uint64_t{1} << 62,
            "{}: {} is too large", path, shown(j));
    require(std::is_signed_v<T> || j.is_number_unsigned(), "{}: expected a number from 0, found {}",
            path, shown(j));
    out = j.get<T>();
  } else if constexpr (std::is_floating_point_v<T>) {
    require(j.is_number(), "{}: expected a number, found {}", path, shown(j));
    out = j.get<T>();
    require(std::isfinite(out), "{}: {} is not a finite number", path, shown(j));
  } else {
    require(j.is_string(), "{}: expected a string, found {}", path, shown(j));
    out = j.get<std::string>();
  }
}

template <class T> Json write(const T& in) {
  if constexpr (requires(Writer w, T & t) { fields(w, t); }) {
    Writer w;
    fields(w, const_cast<T&>(in));  // NOLINT: a Writer only reads
    return w.json;
  } else if constexpr (requires { enum_names(in); }) {
    for (const auto& [value, name] : enum_names(in))
      if (value == in) return name;
    throw std::logic_error("enumerator without a name");
  } else if constexpr (requires { write_field(in); }) {
    return write_field(in);
  } else if constexpr (detail::IsOptional<T>::value) {
    return in ? write(*in) : Json(nullptr);
  } else if constexpr (detail::IsVector<T>::value) {
    Json list = Json::array();
    for (const auto& v : in) list.push_back(write(v));
    return list;
  } else {
    return in;
  }
}

}  // namespace mixlora
