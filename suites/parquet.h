// Parquet: chosen columns of a table file, as the Hugging Face Hub keeps data sets.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace mixlora {

using Json = nlohmann::json;

/// One record a row, with the columns named: strings and whole numbers, alone, in structs
/// ("choices.text") or in lists. An absent value is null. Read: data pages of both versions, plain
/// and dictionary encoding, uncompressed or Snappy; anything else is named in the error.
/// Throws InputError; `name` is what errors call the file.
std::vector<Json> read_parquet(std::string_view bytes, const std::string& name,
                               const std::vector<std::string>& columns);

/// Snappy's block format [google/snappy format_description.txt]; exactly `size` bytes come out.
std::string decompress_snappy(std::string_view bytes, std::size_t size, const std::string& name);

}  // namespace mixlora
