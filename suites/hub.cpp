#include "suites/hub.h"

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <thread>

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/sha256.h"
#include "suites/http.h"

namespace mixlora {
namespace {

constexpr int kAttempts = 6;
constexpr std::size_t kMaxListing = std::size_t{8} << 20;
const char* const kConverted = "refs%2Fconvert%2Fparquet";  // the branch that the Hub writes

std::string environment(const char* name) {
  const char* value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): read once at start
  return value == nullptr ? "" : value;
}

/// Text as one segment, or several, of a URL's path.
std::string escaped(const std::string& path) {
  std::string out;
  for (const char c : path) {
    const auto b = static_cast<unsigned char>(c);
    if (std::isalnum(b) != 0 || std::string_view("-._~/").find(c) != std::string_view::npos)
      out += c;
    else
      out += fmt::format("%{:02X}", b);
  }
  return out;
}

bool passing(const HttpAnswer& a) {
  return a.status == 429 || a.status >= 500 || (a.status < 400 && !a.problem.empty());
}

std::string reason_of(const HttpAnswer& a) {
  if (!a.problem.empty()) return a.problem;
  const auto said = a.headers.find("x-error-message");
  return fmt::format("HTTP {}{}{}", a.status, said == a.headers.end() ? "" : ": ",
                     said == a.headers.end() ? "" : shown_text(said->second));
}

/// What an answer that is none means for people.
[[noreturn]] void refuse(const HttpAnswer& a, const std::string& url, const std::string& repository,
                         const std::string& endpoint, bool with_token) {
  const auto code_at = a.headers.find("x-error-code");
  const std::string code = code_at == a.headers.end() ? "" : code_at->second;
  const char* const token =
      with_token ? "the token in HF_TOKEN is not accepted" : "set HF_TOKEN to a token of yours";
  if (code == "GatedRepo" || a.status == 403)
    fail("{}: {} is gated ({}): accept its terms at {}/datasets/{} and {}", url, repository,
         reason_of(a), endpoint, repository,
         with_token ? "use a token of that account in HF_TOKEN" : token);
  if (a.status == 401)
    fail("{}: not allowed ({}): {}, or {} is not there", url, reason_of(a), token, repository);
  if (a.status == 404) fail("{}: not there ({})", url, reason_of(a));
  fail("{}: {}", url, reason_of(a));
}

}  // namespace

Hub::Hub(std::string endpoint, std::string token, double pause)
    : endpoint_(std::move(endpoint)), token_(std::move(token)), pause_(pause) {
  require(endpoint_.starts_with("http://") || endpoint_.starts_with("https://"),
          "HF_ENDPOINT: \"{}\": expected a URL such as https://huggingface.co", endpoint_);
  while (endpoint_.ends_with('/')) endpoint_.pop_back();
}

Hub Hub::from_environment() {
  const std::string endpoint = environment("HF_ENDPOINT");
  std::string token = environment("HF_TOKEN");
  if (token.empty()) {
    const std::string home = environment("HF_HOME");
    const auto file = home.empty()
                          ? std::filesystem::path(environment("HOME")) / ".cache/huggingface/token"
                          : std::filesystem::path(home) / "token";
    if (std::ifstream in(file); in) in >> token;
  }
  return {endpoint.empty() ? "https://huggingface.co" : endpoint, token};
}

std::vector<HubFile> Hub::parquet_files(const std::string& repository, const std::string& config,
                                        const std::string& split) const {
  const std::string url =
      fmt::format("{}/api/datasets/{}/tree/{}/{}/{}", endpoint_, escaped(repository), kConverted,
                  escaped(config), escaped(split));
  double pause = pause_;
  for (int attempt = 1;; ++attempt, pause *= 2) {
    std::string text;
    const HttpAnswer a = http_get(url, token_, 0, [&](long, std::string_view bytes) {
      text += bytes;
      return text.size() <= kMaxListing;
    });
    if (passing(a) && attempt < kAttempts) {
      std::this_thread::sleep_for(std::chrono::duration<double>(pause));
      continue;
    }
    if (a.status != 200 || !a.problem.empty())
      refuse(a, url, repository, endpoint_, !token_.empty());
    std::vector<HubFile> files;
    const Json listing = parse_json(text, url);
    require(listing.is_array(), "{}: expected a list of files", url);
    for (const Json& entry : listing) {
      HubFile f;
      if (entry.value("type", "") != "file") continue;
      f.path = entry.value("path", "");
      f.size = entry.value("size", std::int64_t{0});
      if (const auto lfs = entry.find("lfs"); lfs != entry.end() && lfs->is_object())
        f.sha256 = lfs->value("oid", "");
      if (f.path.ends_with(".parquet")) files.push_back(std::move(f));
    }
    require(!files.empty(), "{}: no Parquet file in it", url);
    return files;
  }
}

void Hub::download(const std::string& repository, const HubFile& file,
                   const std::filesystem::path& to) const {
  const std::string url = fmt::format("{}/datasets/{}/resolve/{}/{}", endpoint_,
                                      escaped(repository), kConverted, escaped(file.path));
  const std::filesystem::path part = to.string() + ".part";
  double pause = pause_;
  bool resumed = false;
  for (int attempt = 1;; ++attempt, pause *= 2) {
    std::error_code absent;
    const auto size = std::filesystem::file_size(part, absent);
    const std::int64_t had = absent ? 0 : static_cast<std::int64_t>(size);
    HttpAnswer a;
    // A part of the whole size was dropped before its hash was read.
    if (file.size == 0 || had < file.size) {
      resumed = resumed || had > 0;
      std::ofstream out(part, std::ios::binary | std::ios::app);
      bool begun = false;
      a = http_get(url, token_, had, [&](long status, std::string_view bytes) {
        if (!begun && status == 200 && had > 0) {  // the server sends the whole file again
          out.close();
          out.open(part, std::ios::binary | std::ios::trunc);
        }
        begun = true;
        return static_cast<bool>(
            out.write(bytes.data(), static_cast<std::streamsize>(bytes.size())));
      });
      out.flush();
      require(out.good(), "{}: cannot be written", part.string());
      if (a.status == 416) std::filesystem::remove(part);  // more than the file has
      if ((passing(a) || a.status == 416) && attempt < kAttempts) {
        std::this_thread::sleep_for(std::chrono::duration<double>(pause));
        continue;
      }
      if ((a.status != 200 && a.status != 206) || !a.problem.empty()) {
        if (a.status >= 400) std::filesystem::remove(part, absent);
        refuse(a, url, repository, endpoint_, !token_.empty());
      }
    }
    const std::string found = sha256(read_text(part));
    if (!file.sha256.empty() && found != file.sha256) {
      std::filesystem::remove(part);
      if (resumed && attempt < kAttempts) {  // the part was of an older file
        resumed = false;
        continue;
      }
      fail("{}: its SHA-256 is {}, the Hub says {}; nothing was kept", url, found, file.sha256);
    }
    std::filesystem::rename(part, to);
    return;
  }
}

}  // namespace mixlora
