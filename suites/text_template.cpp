#include "suites/text_template.h"

#include <algorithm>
#include <stdexcept>

#include "engine/error.h"
#include "engine/nearest.h"

namespace mixlora {
namespace {

/// Calls text(piece) and name(piece) in order; lone(byte) for a brace that stands alone.
template <class Text, class Name, class Lone>
void walk(std::string_view t, Text&& text, Name&& name, Lone&& lone) {
  for (std::size_t at = 0; at < t.size();) {
    const std::size_t brace = std::min(t.find_first_of("{}", at), t.size());
    text(t.substr(at, brace - at));
    if (brace == t.size()) return;
    if (brace + 1 < t.size() && t[brace + 1] == t[brace]) {  // doubled: itself
      text(t.substr(brace, 1));
      at = brace + 2;
      continue;
    }
    const std::size_t end = t.find('}', brace);
    if (t[brace] == '}' || end == std::string_view::npos) return lone(brace);
    name(t.substr(brace + 1, end - brace - 1));
    at = end + 1;
  }
}

}  // namespace

std::string fill_template(std::string_view text, const TemplateValues& values) {
  std::string out;
  walk(
      text, [&](std::string_view piece) { out += piece; },
      [&](std::string_view name) {
        const auto at = std::find_if(values.begin(), values.end(),
                                     [&](const auto& v) { return v.first == name; });
        if (at == values.end())
          throw std::logic_error("fill_template: no value for " + std::string(name));
        out += at->second;
      },
      [](std::size_t) { throw std::logic_error("fill_template: a lone brace"); });
  return out;
}

void check_template(std::string_view text, const std::vector<std::string>& names,
                    const std::string& where) {
  walk(
      text, [](std::string_view) {},
      [&](std::string_view name) {
        if (std::find(names.begin(), names.end(), name) == names.end())
          fail("{}: no field \"{{{}}}\"; {}", where, name, nearest(name, names));
      },
      [&](std::size_t at) {
        fail("{}: the brace at byte {} stands alone; a brace itself is written twice", where, at);
      });
}

}  // namespace mixlora
