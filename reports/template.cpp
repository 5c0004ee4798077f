#include "reports/template.h"

#include <stdexcept>
#include <vector>

#include <nlohmann/json.hpp>

namespace mixlora {
namespace {

using Json = nlohmann::json;

class Filler {
 public:
  explicit Filler(const std::function<std::string_view(const std::string&)>& files)
      : files_(files) {}

  std::string run(std::string_view text, std::vector<const Json*>& scope) {
    std::string out;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t open = text.find("{{", at);
      out += text.substr(at, open - at);
      if (open == std::string_view::npos) break;
      const bool raw = text.substr(open, 3) == "{{{";
      const std::string_view closing = raw ? "}}}" : "}}";
      const std::size_t close = text.find(closing, open);
      if (close == std::string_view::npos) throw std::logic_error("template: {{ without }}");
      std::string name(text.substr(open + closing.size(), close - open - closing.size()));
      at = close + closing.size();
      const char kind = raw || name.empty() ? ' ' : name.front();
      if (kind == '#' || kind == '^') {
        name.erase(0, 1);
        const std::size_t end = end_of(text, at, name);
        section(text.substr(at, end - at), name, kind == '#', scope, out);
        at = end + name.size() + 5;  // {{/name}}
      } else if (kind == '>') {
        out += run(files_(name.substr(1)), scope);
      } else {
        const Json* value = find(name, scope);
        if (value == nullptr) throw std::logic_error("template: no value \"" + name + "\"");
        const std::string filled = value->is_string() ? value->get<std::string>() : value->dump();
        out += raw ? filled : escape_html(filled);
      }
    }
    return out;
  }

 private:
  static const Json* find(const std::string& name, const std::vector<const Json*>& scope) {
    if (name == ".") return scope.back();
    for (auto s = scope.rbegin(); s != scope.rend(); ++s)
      if ((*s)->is_object())
        if (const auto at = (*s)->find(name); at != (*s)->end()) return &*at;
    return nullptr;
  }
  /// Where {{/name}} stands that closes the section opened just before `at`.
  static std::size_t end_of(std::string_view text, std::size_t at, const std::string& name) {
    const std::string open = "{{#" + name + "}}", unless = "{{^" + name + "}}",
                      close = "{{/" + name + "}}";
    for (int depth = 1;; ++at) {
      at = text.find("{{", at);
      if (at == std::string_view::npos)
        throw std::logic_error("template: section \"" + name + "\" is left open");
      if (text.substr(at, open.size()) == open || text.substr(at, unless.size()) == unless) ++depth;
      if (text.substr(at, close.size()) == close && --depth == 0) return at;
    }
  }
  void section(std::string_view body, const std::string& name, bool wanted,
               std::vector<const Json*>& scope, std::string& out) {
    const Json* value = find(name, scope);
    const bool there = value != nullptr && !value->is_null() && *value != Json(false) &&
                       *value != Json("") && !(value->is_array() && value->empty());
    if (there != wanted) return;
    if (!wanted || !(value->is_array() || value->is_object())) {
      out += run(body, scope);
      return;
    }
    if (value->is_object()) {
      scope.push_back(value);
      out += run(body, scope);
      scope.pop_back();
      return;
    }
    for (const Json& entry : *value) {
      scope.push_back(&entry);
      out += run(body, scope);
      scope.pop_back();
    }
  }

  const std::function<std::string_view(const std::string&)>& files_;
};

}  // namespace

std::string escape_html(std::string_view text) {
  std::string out;
  for (const char c : text) switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  return out;
}

std::string fill(std::string_view text, const nlohmann::json& values,
                 const std::function<std::string_view(const std::string&)>& files) {
  std::vector<const Json*> scope{&values};
  return Filler(files).run(text, scope);
}

}  // namespace mixlora
