// Template: text with places to fill from JSON, a small part of Mustache.
#pragma once
#include <functional>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace mixlora {

/// {{name}} the value, escaped for HTML; {{{name}}} as it is; {{#name}}...{{/name}} once an entry
/// of a list, or once when the value is true, a text or an object; {{^name}}...{{/name}} when it is
/// absent, false or empty; {{>file}} another template. "." is the entry itself. Names are looked up
/// in the entry first, then outwards. Throws std::logic_error on a name that is nowhere or a
/// section left open: templates are the program's own.
std::string fill(std::string_view text, const nlohmann::json& values,
                 const std::function<std::string_view(const std::string&)>& files);
std::string escape_html(std::string_view text);

}  // namespace mixlora
