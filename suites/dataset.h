// Dataset: the rows of a suite's split, from .jsonl or .jsonl.gz, checked.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace mixlora {

struct Row {
  std::string id, context, question;
  std::vector<std::string> choices, labels;
  std::int64_t answer = 0;  // index of the gold choice
};

struct Dataset {
  std::vector<Row> rows;
  std::string hash;  // of the file's text, for trial keys
  std::string file;
};

/// Reads a file; throws InputError with file and line. `limit` > 0 keeps the first rows (the hash
/// stays the whole file's).
Dataset read_dataset(const std::filesystem::path& file, std::int64_t limit = 0);
/// Parses text of JSON lines; `name` is what errors call it.
Dataset parse_dataset(std::string_view text, const std::string& name, std::int64_t limit = 0);
/// A file of rows as text, unpacked where it is .gz. Throws InputError.
std::string read_lines(const std::filesystem::path& file);
/// Where suites lie: $MIXLORA_DATA, else ./data; may not exist.
std::filesystem::path data_directory();

}  // namespace mixlora
