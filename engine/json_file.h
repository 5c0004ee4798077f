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
/// Writes to a neighbour file, syncs and renames, so that a reader never sees half. Throws
/// InputError.
void write_text(const std::filesystem::path& file, std::string_view text);

}  // namespace mixlora
