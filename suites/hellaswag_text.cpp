#include "suites/hellaswag_text.h"

#include <algorithm>
#include <array>
#include <cctype>

#include "suites/white_space.h"

namespace mixlora {
namespace {

constexpr std::array<std::string_view, 19> kWikiHow{"Cars & Other Vehicles",
                                                    "Computers and Electronics",
                                                    "Education and Communications",
                                                    "Family Life",
                                                    "Finance and Business",
                                                    "Food and Entertaining",
                                                    "Health",
                                                    "Holidays and Traditions",
                                                    "Home and Garden",
                                                    "Home,Categories",
                                                    "Personal Care and Style",
                                                    "Pets and Animals",
                                                    "Philosophy and Religion",
                                                    "Relationships",
                                                    "Sports and Fitness",
                                                    "Travel",
                                                    "Uncategorized",
                                                    "Work World",
                                                    "Youth"};

std::string replaced(std::string_view text, std::string_view what, std::string_view with) {
  std::string out;
  for (std::size_t at = 0;;) {
    const std::size_t found = text.find(what, at);
    out += text.substr(at, found - at);
    if (found == std::string_view::npos) return out;
    out += with;
    at = found + what.size();
  }
}

/// Deletes what the expression \[.*?\] matches: from a "[" to the next "]" on the same line.
std::string without_brackets(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (text[at] == '[') {
      const std::size_t end = text.find_first_of("]\n", at);
      if (end != std::string_view::npos && text[end] == ']') {
        at = end;
        continue;
      }
    }
    out += text[at];
  }
  return out;
}

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

/// Where ctx_b begins: after the last match of [.!?]["')]*\s+; the end when there is none.
std::size_t last_sentence(std::string_view ctx) {
  std::size_t begin = ctx.size();
  for (std::size_t i = 0; i < ctx.size(); ++i) {
    if (std::string_view(".!?").find(ctx[i]) == std::string_view::npos) continue;
    std::size_t j = i + 1;
    while (j < ctx.size() && std::string_view("\"')").find(ctx[j]) != std::string_view::npos) ++j;
    if (j == ctx.size() || !is_space(ctx[j])) continue;
    while (j < ctx.size() && is_space(ctx[j])) ++j;
    begin = j;
  }
  return begin;
}

}  // namespace

std::string clean_hellaswag(std::string_view text) {
  return replaced(without_brackets(replaced(stripped(text), " [title]", ". ")), "  ", " ");
}

std::string capitalise_hellaswag(std::string_view activity, std::string_view ctx) {
  std::string out(ctx);
  if (std::find(kWikiHow.begin(), kWikiHow.end(), activity) != kWikiHow.end()) return out;
  const std::size_t begin = last_sentence(ctx);
  for (std::size_t i = begin; i < out.size(); ++i) {
    const auto c = static_cast<unsigned char>(out[i]);
    out[i] = static_cast<char>(i == begin ? std::toupper(c) : std::tolower(c));
  }
  return out;
}

}  // namespace mixlora
