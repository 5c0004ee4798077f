// The nearest valid name, for error messages.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace mixlora {

/// `did you mean "X"?` when a name is near, else `expected one of X, Y, ...`.
std::string nearest(std::string_view name, const std::vector<std::string>& names);

}  // namespace mixlora
