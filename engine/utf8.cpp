#include "engine/utf8.h"

#include <algorithm>
#include <iterator>

#include "engine/unicode_tables.h"

namespace mixlora {
namespace {

template <std::size_t N> bool in(const CodeRange (&table)[N], char32_t c) {
  const auto* at = std::upper_bound(std::begin(table), std::end(table), c,
                                    [](char32_t v, const CodeRange& r) { return v < r.first; });
  return at != std::begin(table) && c <= std::prev(at)->last;
}

}  // namespace

std::optional<CodePoint> code_point(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
  if (at >= text.size()) return std::nullopt;
  const unsigned first = byte(0);
  if (first < 0x80) return CodePoint{first, 1};
  const std::size_t n = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || at + n > text.size()) return std::nullopt;
  char32_t value = first & (0xffU >> (n + 1));
  for (std::size_t i = 1; i < n; ++i) {
    if ((byte(i) & 0xc0U) != 0x80) return std::nullopt;
    value = (value << 6) | (byte(i) & 0x3fU);
  }
  const bool overlong = (n == 3 && value < 0x800) || (n == 4 && value < 0x10000);
  if (overlong || value > 0x10ffff || (value >= 0xd800 && value <= 0xdfff)) return std::nullopt;
  return CodePoint{value, n};
}

std::optional<std::size_t> invalid_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto c = code_point(text, at);
    if (!c) return at;
    at += c->bytes;
  }
  return std::nullopt;
}

std::string with_replacements(std::string_view text) {
  std::string out;
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  for (std::size_t at = 0; at < text.size();) {
    if (const auto c = code_point(text, at)) {
      out += text.substr(at, c->bytes);
      at += c->bytes;
      continue;
    }
    append_utf8(out, 0xfffd);
    const unsigned first = byte(at++);
    if (first < 0xc2 || first > 0xf4) continue;
    // The second byte's range keeps out overlong forms, surrogates and what lies above 0x10ffff.
    const unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    const unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    const int more = first >= 0xf0   ? 2
                     : first >= 0xe0 ? 1
                                     : 0;  // bytes a cut-off form may still have
    for (int i = 0; i < more && at < text.size(); ++i, ++at)
      if (byte(at) < (i == 0 ? low : 0x80) || byte(at) > (i == 0 ? high : 0xbf)) break;
  }
  return out;
}

void append_utf8(std::string& text, char32_t v) {
  const auto put = [&](char32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (v < 0x80) {
    put(v);
  } else if (v < 0x800) {
    put(0xc0 | (v >> 6));
    put(0x80 | (v & 0x3f));
  } else if (v < 0x10000) {
    put(0xe0 | (v >> 12));
    put(0x80 | ((v >> 6) & 0x3f));
    put(0x80 | (v & 0x3f));
  } else {
    put(0xf0 | (v >> 18));
    put(0x80 | ((v >> 12) & 0x3f));
    put(0x80 | ((v >> 6) & 0x3f));
    put(0x80 | (v & 0x3f));
  }
}

bool is_letter(char32_t c) {
  if (c < 0x80) return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
  return in(kLetters, c);
}
bool is_number(char32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  return in(kNumbers, c);
}
bool is_space(char32_t c) {  // White_Space
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

}  // namespace mixlora
