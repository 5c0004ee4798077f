// Text templates: "{name}" stands for a value, "{{" and "}}" for braces.
#pragma once
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mixlora {

using TemplateValues = std::vector<std::pair<std::string_view, std::string_view>>;

/// Fills a template that check_template has passed.
std::string fill_template(std::string_view text, const TemplateValues& values);
/// Throws InputError that begins with `where` for a name not in `names` or a lone brace.
void check_template(std::string_view text, const std::vector<std::string>& names,
                    const std::string& where);

}  // namespace mixlora
