#include "suites/white_space.h"

#include <algorithm>
#include <array>

namespace mixlora {
namespace {

// Beside the ASCII ones: NEL, NBSP, OGHAM SPACE, EN QUAD..HAIR SPACE, LINE and PARAGRAPH SEPARATOR,
// NARROW NBSP, MATHEMATICAL SPACE, IDEOGRAPHIC SPACE.
constexpr std::array<std::string_view, 19> kWide{
    "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81",
    "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86",
    "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8",
    "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};

bool ascii_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r') || (c >= '\x1c' && c <= '\x1f');
}
std::size_t space_at_end(std::string_view t) {
  if (t.empty()) return 0;
  if (ascii_space(t.back())) return 1;
  for (const auto wide : kWide)
    if (t.ends_with(wide)) return wide.size();
  return 0;
}
std::size_t space_at_begin(std::string_view t) {
  if (t.empty()) return 0;
  if (ascii_space(t.front())) return 1;
  for (const auto wide : kWide)
    if (t.starts_with(wide)) return wide.size();
  return 0;
}

}  // namespace

std::size_t trailing_space(std::string_view text) {
  std::size_t n = 0;
  while (const std::size_t one = space_at_end(text.substr(0, text.size() - n))) n += one;
  return n;
}

std::string_view stripped(std::string_view text) {
  text.remove_suffix(trailing_space(text));
  while (const std::size_t one = space_at_begin(text)) text.remove_prefix(one);
  return text;
}

std::size_t code_points(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U;
  }));
}

}  // namespace mixlora
