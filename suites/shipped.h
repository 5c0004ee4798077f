// Shipped texts: the task files and the starter suites' rows, which lie in the program itself.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace mixlora {

/// A shipped file by its path below suites/ ("tasks/arc-e.json",
/// "starter/starter-truth/train.jsonl").
std::string_view shipped_text(const std::string& path);
/// The shipped task files, in the order of tables.
const std::vector<std::string>& shipped_tasks();

}  // namespace mixlora
