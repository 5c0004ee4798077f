// Refusals: bad input gives one clear message, never anything else.
#pragma once
#include <exception>
#include <string>

#include "engine/error.h"
#include "engine/utf8.h"
#include "tests/support/catch.h"

/// `read()` must throw InputError; the message must begin with `where`, say `what`, be one line of
/// at most 1,000 bytes and be UTF-8.
template <class Read>
void require_refusal(Read&& read, const std::string& where, const std::string& what) {
  std::string message;
  try {
    read();
  } catch (const mixlora::InputError& e) {
    message = e.what();
  }
  INFO("expected: " << what);
  REQUIRE_THAT(message, Catch::Matchers::StartsWith(where));
  CHECK_THAT(message, Catch::Matchers::ContainsSubstring(what));
  CHECK(message.size() <= 1000);
  CHECK(message.find('\n') == std::string::npos);
  CHECK_FALSE(mixlora::invalid_utf8(message).has_value());
}
