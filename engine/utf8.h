// UTF-8: code points of a text, checked; and the letters and numbers that pre-tokenizers split by.
#pragma once
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace mixlora {

struct CodePoint {
  char32_t value = 0;
  std::size_t bytes = 0;
};
/// The code point at byte `at`; nothing when the bytes are not well-formed UTF-8.
std::optional<CodePoint> code_point(std::string_view text, std::size_t at);
/// First byte that is not well-formed; nothing when all is.
std::optional<std::size_t> invalid_utf8(std::string_view text);
/// The text with U+FFFD for every part that is not well-formed [Unicode 3.9, maximal subparts].
std::string with_replacements(std::string_view text);
void append_utf8(std::string& text, char32_t value);
bool is_letter(char32_t c);
bool is_number(char32_t c);
bool is_space(char32_t c);

}  // namespace mixlora
