// HTTP: one GET at a time.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>

namespace mixlora {

struct HttpAnswer {
  long status = 0;                             // of the last answer, after redirects
  std::map<std::string, std::string> headers;  // names in lower case; of all answers on the way
  std::string problem;                         // why no whole answer came; empty: one did
};

/// GET, following redirects; the token goes to the first host alone. A body of status 200 or 206
/// goes to `sink`, told its status first; what it does not take (false) ends the transfer. `from`:
/// first byte wanted. Throws InputError where the program was built without libcurl.
HttpAnswer http_get(const std::string& url, const std::string& token, std::int64_t from,
                    const std::function<bool(long status, std::string_view)>& sink);

}  // namespace mixlora
