// White space as Python's str.strip() and str.isspace() see it, in UTF-8.
#pragma once
#include <string_view>

namespace mixlora {

/// Bytes of white space at the end of a text.
std::size_t trailing_space(std::string_view text);
/// The text without white space at both ends.
std::string_view stripped(std::string_view text);
/// Unicode code points of valid UTF-8.
std::size_t code_points(std::string_view text);

}  // namespace mixlora
