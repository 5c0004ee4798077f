// Embedded: the files of this folder that the program carries (CMakeLists.txt lists them).
#pragma once
#include <string>
#include <string_view>

namespace mixlora {

/// By path below reports/, "html/page.html"; throws std::logic_error when it was not built in.
std::string_view embedded(const std::string& path);

}  // namespace mixlora
