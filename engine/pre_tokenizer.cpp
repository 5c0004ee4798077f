#include "engine/pre_tokenizer.h"

#include <array>
#include <cstddef>
#include <string>

#include "engine/utf8.h"

namespace mixlora {

const char* const kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

namespace {

/// Walks a text by code points; `at` past the end gives 0.
class Cursor {
 public:
  explicit Cursor(std::string_view text) : text_(text) {}
  char32_t peek(std::size_t at) const {
    const auto c = code_point(text_, at);
    return c ? c->value : 0;
  }
  std::size_t next(std::size_t at) const {
    const auto c = code_point(text_, at);
    return at + (c ? c->bytes : 1);
  }
  bool end(std::size_t at) const { return at >= text_.size(); }
  template <class P> std::size_t run(std::size_t at, P&& member) const {
    while (!end(at) && member(peek(at))) at = next(at);
    return at;
  }
  std::string_view text() const { return text_; }

 private:
  std::string_view text_;
};

bool is_other(char32_t c) { return !is_space(c) && !is_letter(c) && !is_number(c); }
bool is_break(char32_t c) { return c == '\r' || c == '\n'; }

/// 's 't 're 've 'm 'll 'd at `at`: the end of the match, or `at`.
std::size_t contraction(const Cursor& c, std::size_t at, bool any_case) {
  if (c.peek(at) != '\'') return at;
  if (any_case && c.peek(at + 1) == 0x17f) return c.next(at + 1);  // the long s folds to s
  for (const std::string_view tail : {"s", "t", "re", "ve", "m", "ll", "d"}) {
    std::string found(c.text().substr(at + 1, tail.size()));
    if (any_case)
      for (char& x : found) x = x >= 'A' && x <= 'Z' ? static_cast<char>(x - 'A' + 'a') : x;
    if (found == tail) return at + 1 + tail.size();
  }
  return at;
}

/// \s+(?!\S)|\s+ : white space, leaving its last character to the word that follows.
std::size_t spaces(const Cursor& c, std::size_t at) {
  const std::size_t end = c.run(at, is_space);
  if (c.end(end)) return end;
  std::size_t last = at;
  for (std::size_t i = at; c.next(i) < end; i = c.next(i)) last = c.next(i);
  return last == at ? end : last;
}

std::size_t digits_piece(const Cursor& c, std::size_t at) {
  if (is_number(c.peek(at))) return c.next(at);
  return c.run(at, [](char32_t v) { return !is_number(v); });
}

std::size_t gpt2_piece(const Cursor& c, std::size_t at) {
  if (const auto end = contraction(c, at, false); end != at) return end;
  const std::size_t word = c.peek(at) == ' ' ? at + 1 : at;
  for (bool (*member)(char32_t) : {is_letter, is_number, is_other})
    if (!c.end(word) && member(c.peek(word))) return c.run(word, member);
  return spaces(c, at);
}

std::size_t llama3_piece(const Cursor& c, std::size_t at) {
  if (const auto end = contraction(c, at, true); end != at) return end;
  const char32_t first = c.peek(at);
  const bool lead = !is_break(first) && !is_letter(first) && !is_number(first);
  const std::size_t word = lead ? c.next(at) : at;
  if (!c.end(word) && is_letter(c.peek(word))) return c.run(word, is_letter);
  if (is_number(first)) {
    std::size_t end = at;
    for (int i = 0; i < 3 && !c.end(end) && is_number(c.peek(end)); ++i) end = c.next(end);
    return end;
  }
  const std::size_t other = first == ' ' ? at + 1 : at;
  if (!c.end(other) && is_other(c.peek(other))) return c.run(c.run(other, is_other), is_break);
  // \s*[\r\n]+ : white space up to its last line break
  const std::size_t end = c.run(at, is_space);
  std::size_t last_break = at;
  for (std::size_t i = at; i < end; i = c.next(i))
    if (is_break(c.peek(i))) last_break = c.next(i);
  return last_break != at ? last_break : spaces(c, at);
}

template <class Piece>
void cut(std::vector<std::string_view>& out, std::string_view text, Piece&& piece) {
  const Cursor c(text);
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = piece(c, at);
    out.push_back(text.substr(at, end - at));
    at = end;
  }
}

}  // namespace

std::vector<std::string_view> split(const std::vector<Split>& kinds, std::string_view text) {
  std::vector<std::string_view> out;
  if (!text.empty()) out.push_back(text);
  for (const Split kind : kinds) {
    std::vector<std::string_view> finer;
    for (const auto part : out) {
      switch (kind) {
        case Split::digits:
          cut(finer, part, digits_piece);
          break;
        case Split::gpt2:
          cut(finer, part, gpt2_piece);
          break;
        case Split::llama3:
          cut(finer, part, llama3_piece);
          break;
      }
    }
    out = std::move(finer);
  }
  return out;
}

}  // namespace mixlora
