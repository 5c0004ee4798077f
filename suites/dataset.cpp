#include "suites/dataset.h"

#include <cstdlib>
#include <memory>
#include <set>

#include <nlohmann/json.hpp>
#include <zlib.h>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/sha256.h"

namespace mixlora {
namespace {

constexpr std::size_t kMaxText = std::size_t{1} << 30;

std::string string_at(const Json& j, const char* key, const std::string& where) {
  require(j.contains(key), "{}: the key \"{}\" is missing", where, key);
  require(j[key].is_string(), "{}: \"{}\": expected a string, found {}", where, key,
          j[key].type_name());
  return j[key].get<std::string>();
}
std::vector<std::string> strings_at(const Json& j, const char* key, const std::string& where) {
  require(j.contains(key) && j[key].is_array(), "{}: \"{}\": expected a list of strings", where,
          key);
  std::vector<std::string> out;
  for (const Json& v : j[key]) {
    require(v.is_string(), "{}: \"{}\": expected a list of strings, found {}", where, key,
            v.type_name());
    out.push_back(v.get<std::string>());
  }
  return out;
}

Row read_row(const Json& j, const std::string& where) {
  require(j.is_object(), "{}: expected an object", where);
  for (const auto& [key, value] : j.items())
    require(key == "id" || key == "context" || key == "question" || key == "choices" ||
                key == "labels" || key == "answer",
            "{}: unknown key \"{}\"; a row has id, context, question, choices, labels, answer",
            where, key);
  Row r{string_at(j, "id", where),       string_at(j, "context", where),
        string_at(j, "question", where), strings_at(j, "choices", where),
        strings_at(j, "labels", where),  0};
  require(r.choices.size() >= 2, "{}: {} choices; expected 2 or more", where, r.choices.size());
  require(r.labels.size() == r.choices.size(), "{}: {} labels for {} choices", where,
          r.labels.size(), r.choices.size());
  require(std::set<std::string>(r.labels.begin(), r.labels.end()).size() == r.labels.size(),
          "{}: a label stands twice", where);
  require(j.contains("answer") && j["answer"].is_number_integer(),
          "{}: \"answer\": expected the index of the right choice", where);
  r.answer = j["answer"].get<std::int64_t>();
  require(r.answer >= 0 && r.answer < static_cast<std::int64_t>(r.choices.size()),
          "{}: \"answer\" is {}; expected 0 to {}", where, r.answer, r.choices.size() - 1);
  return r;
}

}  // namespace

std::string read_lines(const std::filesystem::path& file) {
  // zlib reads plain files as they are.
  const std::unique_ptr<gzFile_s, decltype(&gzclose)> in(gzopen(file.c_str(), "rb"), &gzclose);
  require(in != nullptr, "{}: cannot be opened", file.string());
  std::string text, chunk(1 << 20, '\0');
  for (;;) {
    const int n = gzread(in.get(), chunk.data(), static_cast<unsigned>(chunk.size()));
    int code = Z_OK;
    const char* message = gzerror(in.get(), &code);
    require(n >= 0 && (code == Z_OK || code == Z_STREAM_END), "{}: not a whole gzip file: {}",
            file.string(), message);
    if (n == 0) break;
    text.append(chunk, 0, static_cast<std::size_t>(n));
    require(text.size() <= kMaxText, "{}: more than {} bytes of text", file.string(), kMaxText);
  }
  return text;
}

Dataset parse_dataset(std::string_view text, const std::string& name, std::int64_t limit) {
  Dataset d;
  d.file = name;
  d.hash = sha256(text);
  std::set<std::string> ids;
  std::int64_t line = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view one = text.substr(at, end - at);
    at = end + 1;
    ++line;
    if (one.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = fmt::format("{}:{}", name, line);
    d.rows.push_back(read_row(parse_json(one, where), where));
    require(ids.insert(d.rows.back().id).second, "{}: the id \"{}\" stands twice", where,
            d.rows.back().id);
    if (limit > 0 && static_cast<std::int64_t>(d.rows.size()) == limit) break;
  }
  require(!d.rows.empty(), "{}: no rows", name);
  return d;
}

Dataset read_dataset(const std::filesystem::path& file, std::int64_t limit) {
  require(std::filesystem::exists(file), "{}: no such file", file.string());
  return parse_dataset(read_lines(file), file.string(), limit);
}

std::filesystem::path data_directory() {
  const char* set =
      std::getenv("MIXLORA_DATA");  // NOLINT(concurrency-mt-unsafe): read once at start
  return set != nullptr && *set != '\0' ? set : "data";
}

}  // namespace mixlora
