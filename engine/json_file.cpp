#include "engine/json_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <vector>

#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "engine/error.h"

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

std::string read_text(const std::filesystem::path& file, std::size_t limit) {
  std::error_code error;
  require(std::filesystem::exists(file, error), "{}: no such file", file.string());
  require(!std::filesystem::is_directory(file, error), "{}: is a directory, expected a file",
          file.string());
  const auto size = std::filesystem::file_size(file, error);
  require(!error, "{}: cannot be read: {}", file.string(), error.message());
  require(size <= limit, "{}: {} bytes; at most {} are read", file.string(), size, limit);
  std::ifstream in(file, std::ios::binary);
  require(in.good(), "{}: cannot be opened: {}", file.string(), std::strerror(errno));
  std::string text{std::istreambuf_iterator<char>(in), {}};
  require(!in.bad(), "{}: reading failed", file.string());
  return text;
}

Json parse_json(std::string_view text, const std::string& name) {
  constexpr int kDepth = 64;
  std::vector<std::set<std::string>> keys;
  std::string twice;
  bool deep = false;
  const Json::parser_callback_t watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    deep = deep || depth > kDepth;
    if (deep) throw InputError(fmt::format("{}: nested more than {} deep", name, kDepth));
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end && !keys.empty()) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second)
      fail("{}: the key \"{}\" stands twice in one object", name, parsed.get<std::string>());
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const Json::parse_error& e) {
    fail("{}: {}: {}", name, place(text, e.byte > 0 ? e.byte - 1 : 0), plain(e.what()));
  } catch (const Json::exception& e) {
    fail("{}: {}", name, plain(e.what()));
  }
}

Json read_json(const std::filesystem::path& file, std::size_t limit) {
  return parse_json(read_text(file, limit), file.string());
}

void write_text(const std::filesystem::path& file, std::string_view text) {
  const std::string temporary = file.string() + ".part";
  const int fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  require(fd >= 0, "{}: cannot be written: {}", temporary, std::strerror(errno));
  bool good = true;
  while (good && !text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    good = n > 0;
    if (good) text.remove_prefix(static_cast<std::size_t>(n));
  }
  good = good && ::fsync(fd) == 0;
  const int code = errno;
  ::close(fd);
  if (good && ::rename(temporary.c_str(), file.c_str()) == 0) return;
  ::unlink(temporary.c_str());
  fail("{}: cannot be written: {}", file.string(), std::strerror(good ? errno : code));
}

}  // namespace mixlora
