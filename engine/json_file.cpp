#include "engine/json_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <unordered_set>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/atomic_file.h"
#include "engine/error.h"
#include "engine/utf8.h"

namespace mixlora {
namespace {

/// "line 3, column 7" of a byte in a text.
std::string place(std::string_view text, std::size_t byte) {
  const std::size_t at = std::min(byte, text.size());
  const auto line =
      1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(at), '\n');
  const std::size_t newline = text.substr(0, at).rfind('\n');
  return fmt::format("line {}, column {}", line,
                     newline == std::string_view::npos ? at : at - newline);
}

/// "[json.exception.parse_error.101] parse error at line 1, column 2: ..." without the library's
/// prefix.
std::string plain(const std::string& message) {
  const std::size_t colon = message.find("syntax error");
  if (colon != std::string::npos) return message.substr(colon);
  const std::size_t bracket = message.find("] ");
  return bracket == std::string::npos ? message : message.substr(bracket + 2);
}

}  // namespace

std::string shown_text(std::string_view text) {
  constexpr std::size_t kShown = 120;
  if (text.size() <= kShown) return with_replacements(text);
  std::size_t end = kShown;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0U) == 0x80) --end;
  return fmt::format("{}... ({} bytes)", with_replacements(text.substr(0, end)), text.size());
}
std::string shown(const Json& value) {
  return shown_text(value.dump(-1, ' ', false, Json::error_handler_t::replace));
}
std::string in_quotes(const std::string& name) { return shown(Json(name)); }

std::string read_text(const std::filesystem::path& file, std::size_t limit) {
  std::error_code error;
  require(std::filesystem::exists(file, error), "{}: no such file", file.string());
  require(std::filesystem::is_regular_file(file, error), "{}: not a regular file", file.string());
  const auto size = std::filesystem::file_size(file, error);
  require(!error, "{}: cannot be read: {}", file.string(), error.message());
  require(size <= limit, "{}: {} bytes; at most {} are read", file.string(), size, limit);
  std::ifstream in(file, std::ios::binary);
  require(in.good(), "{}: cannot be opened: {}", file.string(), std::strerror(errno));
  std::string text(size, '\0');
  in.read(text.data(), static_cast<std::streamsize>(size));
  require(in.gcount() == static_cast<std::streamsize>(size), "{}: reading failed", file.string());
  return text;
}

Json parse_json(std::string_view text, const std::string& name) {
  constexpr int kDepth = 64;
  std::vector<std::unordered_set<std::string>> keys;
  const Json::parser_callback_t watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    require(depth <= kDepth, "{}: nested deeper than {} levels", name, kDepth);
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second)
        fail("{}: the key {} stands twice in one object", name, in_quotes(key));
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const Json::parse_error& e) {
    fail("{}: {}: {}", name, place(text, e.byte > 0 ? e.byte - 1 : 0), shown_text(plain(e.what())));
  } catch (const Json::exception& e) {
    fail("{}: {}", name, shown_text(plain(e.what())));
  }
}

Json read_json(const std::filesystem::path& file, std::size_t limit) {
  return parse_json(read_text(file, limit), file.string());
}

void write_text(const std::filesystem::path& file, std::string_view text) {
  AtomicFile out(file);
  out.write(text);
  out.commit();
}

}  // namespace mixlora
