// Catch2, whichever major version is installed.
#pragma once
#if __has_include(<catch2/catch_all.hpp>)  // 3
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else  // 2, one header; names of 3
#include <catch2/catch.hpp>
namespace Catch::Matchers {
inline auto ContainsSubstring(const std::string& s) { return Catch::Contains(s); }
}  // namespace Catch::Matchers
#endif
