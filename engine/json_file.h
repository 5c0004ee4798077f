// JSON files read strictly: size limit, valid UTF-8, no key twice, errors with file and line.
#pragma once
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace mixlora {

using Json = nlohmann::json;

/// The whole file as text; throws InputError when it is missing, unreadable or larger than `limit`
/// bytes.
std::string read_text(const std::filesystem::path& file,
                      std::size_t limit = std::size_t{256} << 20);
/// Parses text; `name` is what errors call it. Throws InputError with line and column; keys must be
/// unique, nesting at most 64 deep.
Json parse_json(std::string_view text, const std::string& name);
Json read_json(const std::filesystem::path& file, std::size_t limit = std::size_t{256} << 20);
/// A value or a text as messages show it: at most 120 bytes of it, valid UTF-8. `in_quotes`: a
/// name, with what cannot be printed escaped.
std::string shown(const Json& value);
std::string shown_text(std::string_view text);
std::string in_quotes(const std::string& name);
/// Writes the file whole or not at all (AtomicFile). Throws InputError.
void write_text(const std::filesystem::path& file, std::string_view text);

}  // namespace mixlora
