#include "suites/http.h"

#include "engine/error.h"

#ifdef MIXLORA_CURL
#include <algorithm>
#include <cctype>
#include <memory>

#include <curl/curl.h>

namespace mixlora {
namespace {

struct Transfer {
  CURL* handle;
  HttpAnswer answer;
  const std::function<bool(long, std::string_view)>& sink;
};

std::size_t on_header(char* data, std::size_t size, std::size_t count, void* to) {
  const std::string_view line(data, size * count);
  if (const auto colon = line.find(':'); colon != std::string_view::npos) {
    std::string name(line.substr(0, colon));
    std::transform(name.begin(), name.end(), name.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    std::string_view value = line.substr(colon + 1);
    const auto from = value.find_first_not_of(" \t"), last = value.find_last_not_of(" \t\r\n");
    value = from == std::string_view::npos ? "" : value.substr(from, last - from + 1);
    static_cast<Transfer*>(to)->answer.headers[name] = value;
  }
  return line.size();
}

std::size_t on_body(char* data, std::size_t size, std::size_t count, void* to) {
  auto& t = *static_cast<Transfer*>(to);
  long status = 0;
  curl_easy_getinfo(t.handle, CURLINFO_RESPONSE_CODE, &status);
  if (status != 200 && status != 206) return size * count;  // an error's page
  return t.sink(status, {data, size * count}) ? size * count : 0;
}

}  // namespace

HttpAnswer http_get(const std::string& url, const std::string& token, std::int64_t from,
                    const std::function<bool(long, std::string_view)>& sink) {
  static const CURLcode kStarted = curl_global_init(CURL_GLOBAL_DEFAULT);
  const std::unique_ptr<CURL, decltype(&curl_easy_cleanup)> handle(curl_easy_init(),
                                                                   &curl_easy_cleanup);
  require(kStarted == CURLE_OK && handle != nullptr, "libcurl does not start");
  CURL* h = handle.get();
  Transfer t{h, {}, sink};
  const std::string range = std::to_string(from) + "-";
  constexpr long kMostRedirects = 10, kConnectSeconds = 30, kStallSeconds = 60;
  curl_easy_setopt(h, CURLOPT_URL, url.c_str());
  curl_easy_setopt(h, CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(h, CURLOPT_REDIR_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(h, CURLOPT_FOLLOWLOCATION, 1L);
  curl_easy_setopt(h, CURLOPT_MAXREDIRS, kMostRedirects);
  curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(h, CURLOPT_CONNECTTIMEOUT, kConnectSeconds);
  curl_easy_setopt(h, CURLOPT_LOW_SPEED_LIMIT, 1L);
  curl_easy_setopt(h, CURLOPT_LOW_SPEED_TIME, kStallSeconds);
  curl_easy_setopt(h, CURLOPT_USERAGENT, "mixlora-bench");
  curl_easy_setopt(h, CURLOPT_HEADERFUNCTION, &on_header);
  curl_easy_setopt(h, CURLOPT_HEADERDATA, &t);
  curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, &on_body);
  curl_easy_setopt(h, CURLOPT_WRITEDATA, &t);
  if (from > 0) curl_easy_setopt(h, CURLOPT_RANGE, range.c_str());
  if (!token.empty()) {
    curl_easy_setopt(h, CURLOPT_HTTPAUTH, CURLAUTH_BEARER);
    curl_easy_setopt(h, CURLOPT_XOAUTH2_BEARER, token.c_str());
  }
  const CURLcode code = curl_easy_perform(h);
  curl_easy_getinfo(h, CURLINFO_RESPONSE_CODE, &t.answer.status);
  if (code != CURLE_OK) t.answer.problem = curl_easy_strerror(code);
  return std::move(t.answer);
}

}  // namespace mixlora
#else
namespace mixlora {

HttpAnswer http_get(const std::string&, const std::string&, std::int64_t,
                    const std::function<bool(long, std::string_view)>&) {
  fail(
      "this program was built without libcurl (Debian, Ubuntu: libcurl4-openssl-dev); fetch from a "
      "folder with --from instead");
}

}  // namespace mixlora
#endif
