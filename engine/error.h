// Errors for people: what was expected, what was found, where.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>

#include <fmt/format.h>

namespace mixlora {

/// The user's input (a file, a key, a value, a missing thing) is wrong; exit code 2.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// The plan does not fit the memory there is; recorded as a result of its own.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw InputError(fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void require(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) fail(format, std::forward<Args>(args)...);
}

}  // namespace mixlora
