// Starter suites: four small ones that ship with the program (suites/starter/, CC0).
#pragma once
#include <string>
#include <string_view>

namespace mixlora {

/// JSON lines of a starter suite's split ("train" or "test").
std::string_view starter_text(const std::string& task, const std::string& split);

}  // namespace mixlora
