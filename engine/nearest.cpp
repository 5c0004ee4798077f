#include "engine/nearest.h"

#include <algorithm>
#include <numeric>

#include <fmt/format.h>

namespace mixlora {
namespace {

/// Edits (insert, delete, replace) from a to b                                    [Levenshtein
/// 1966]
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t corner = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = corner + (a[i - 1] == b[j - 1] ? 0 : 1);
      corner = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row.back();
}

}  // namespace

std::string nearest(std::string_view name, const std::vector<std::string>& names) {
  const std::string* best = nullptr;
  std::size_t least = std::max<std::size_t>(2, name.size() / 3) + 1;
  for (const auto& n : names) {
    const std::size_t d = distance(name, n);
    if (d < least) {
      least = d;
      best = &n;
    }
  }
  if (best != nullptr) return fmt::format("did you mean \"{}\"?", *best);
  return fmt::format("expected one of {}", fmt::join(names, ", "));
}

}  // namespace mixlora
