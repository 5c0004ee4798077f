// A fuzz target: one function from bytes to nothing. Input that is wrong may throw InputError and
// nothing else.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "engine/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace mixlora {

inline std::string_view text_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};  // NOLINT: bytes as text
}

/// What must hold for input that was accepted; aborts, as fuzzers expect.
inline void must(bool condition) {
  if (!condition) __builtin_trap();
}

/// How many inputs were accepted so far: that a corpus is not refused as a whole shows here.
inline long accepted = 0;  // NOLINT: a target has no state of its own to keep it in

template <class Read> int accept_or_refuse(Read&& read) {
  try {
    read();
    ++accepted;
  } catch (const InputError& e) {
    must(*e.what() != '\0');
  }
  return 0;
}

}  // namespace mixlora
