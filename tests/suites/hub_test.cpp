// The Hub, played by a server on this machine: what it redirects, drops, refuses and gets wrong.
#include "suites/hub.h"

#include <nlohmann/json.hpp>

#include "engine/sha256.h"
#include "tests/suites/hub_server.h"
#include "tests/suites/temporary.h"
#include "tests/support/catch.h"

using namespace mixlora;
using Catch::Matchers::ContainsSubstring;

namespace {

constexpr double kNoPause = 0.001;
const char* const kFile = "/datasets/a/b/resolve/refs%2Fconvert%2Fparquet/c/train/0000.parquet";
const char* const kTree = "/api/datasets/a/b/tree/refs%2Fconvert%2Fparquet/c/train";

std::string bytes_of_size(std::size_t n) {
  std::string out;
  for (std::size_t i = 0; i < n; ++i) out += static_cast<char>(i * 7 + i / 251);
  return out;
}
HubFile file_of(const std::string& body) {
  return {"c/train/0000.parquet", static_cast<std::int64_t>(body.size()), sha256(body)};
}
/// What downloading says of a server that always answers so.
std::string complaint(const HubReply& reply, const std::string& token = "") {
  const Temporary folder("hub-refuses");
  const HubServer server([&](const HubRequest&) { return reply; });
  const std::string said = message_of(
      [&] { Hub(server.url(), token, kNoPause).download("a/b", file_of("x"), folder.path / "f"); });
  CHECK(std::filesystem::is_empty(folder.path));
  return said;
}

}  // namespace

TEST_CASE("a listing names a split's files with sizes and hashes", "[suites][hub]") {
  const HubServer server([](const HubRequest& r) -> HubReply {
    if (r.path != kTree) return {404, "", {}};
    return {
        200,
        R"([{"type":"directory","path":"c/train/x","size":0},)"
        R"({"type":"file","path":"c/train/0000.parquet","size":12,"lfs":{"oid":"ab","size":12}},)"
        R"({"type":"file","path":"c/train/README.md","size":1}])",
        {}};
  });
  const auto files = Hub(server.url() + "/", "", kNoPause).parquet_files("a/b", "c", "train");
  REQUIRE(files.size() == 1);
  CHECK(files[0].path == "c/train/0000.parquet");
  CHECK(files[0].size == 12);
  CHECK(files[0].sha256 == "ab");
  CHECK_THAT(message_of([&] { Hub(server.url(), "", kNoPause).parquet_files("a/b", "c", "tst"); }),
             ContainsSubstring("/c/tst: not there (HTTP 404)"));
}

TEST_CASE("a redirect is followed, and the token stays with the first host", "[suites][hub]") {
  const Temporary folder("hub-redirect");
  const std::string body = bytes_of_size(1000);
  std::string elsewhere;
  const HubServer server([&](const HubRequest& r) -> HubReply {
    if (r.path == kFile) return {302, "", {{"Location", elsewhere + "/blob"}}};
    return {200, body, {}};
  });
  elsewhere = server.url("localhost");
  Hub(server.url(), "secret", kNoPause).download("a/b", file_of(body), folder.path / "f");
  CHECK(read_text(folder.path / "f") == body);
  const auto asked = server.requests();
  REQUIRE(asked.size() == 2);
  CHECK(asked[0].authorization == "Bearer secret");
  CHECK(asked[1].path == "/blob");
  CHECK(asked[1].authorization.empty());
}

TEST_CASE("a dropped connection goes on where it stopped", "[suites][hub]") {
  const Temporary folder("hub-drop");
  const std::string body = bytes_of_size(100000);
  int calls = 0;
  const HubServer server([&](const HubRequest&) -> HubReply {
    return {200, body, {}, true, ++calls == 1 ? 30000 : calls == 2 ? 0 : std::string::npos};
  });
  Hub(server.url(), "", kNoPause).download("a/b", file_of(body), folder.path / "f");
  CHECK(read_text(folder.path / "f") == body);
  const auto asked = server.requests();
  REQUIRE(asked.size() == 3);
  CHECK(asked[0].range.empty());
  CHECK(asked[1].range == "bytes=30000-");
  CHECK(asked[2].range == "bytes=30000-");
}

TEST_CASE("a later call goes on with what an earlier one left", "[suites][hub]") {
  const Temporary folder("hub-resume");
  const std::string body = bytes_of_size(5000);
  const auto part = folder.write("f.part", body.substr(0, 2000));
  SECTION("from the byte it had come to") {
    const HubServer server([&](const HubRequest&) -> HubReply { return {200, body, {}}; });
    Hub(server.url(), "", kNoPause).download("a/b", file_of(body), folder.path / "f");
    CHECK(server.requests().at(0).range == "bytes=2000-");
  }
  SECTION("from the start, where the server gives no ranges") {
    const HubServer server([&](const HubRequest&) -> HubReply { return {200, body, {}, false}; });
    Hub(server.url(), "", kNoPause).download("a/b", file_of(body), folder.path / "f");
    CHECK(server.requests().size() == 1);
  }
  SECTION("from the start, where the part was of another file") {
    folder.write("f.part", "something else");
    const HubServer server([&](const HubRequest&) -> HubReply { return {200, body, {}}; });
    Hub(server.url(), "", kNoPause).download("a/b", file_of(body), folder.path / "f");
    CHECK(server.requests().size() == 2);
  }
  SECTION("without a request, where nothing is missing") {
    folder.write("f.part", body);
    const HubServer server([&](const HubRequest&) -> HubReply { return {500, "", {}}; });
    Hub(server.url(), "", kNoPause).download("a/b", file_of(body), folder.path / "f");
    CHECK(server.requests().empty());
  }
  CHECK(read_text(folder.path / "f") == body);
  CHECK_FALSE(std::filesystem::exists(part));
}

TEST_CASE("a wrong hash leaves nothing", "[suites][hub]") {
  CHECK_THAT(complaint({200, "y", {}}),
             ContainsSubstring("SHA-256") && ContainsSubstring("nothing was kept"));
}

TEST_CASE("a busy server is asked again, not for ever", "[suites][hub]") {
  const Temporary folder("hub-busy");
  int calls = 0;
  const HubServer server([&](const HubRequest&) -> HubReply {
    return ++calls < 3 ? HubReply{calls == 1 ? 503 : 429, "later", {}} : HubReply{200, "x", {}};
  });
  Hub(server.url(), "", kNoPause).download("a/b", file_of("x"), folder.path / "f");
  CHECK(read_text(folder.path / "f") == "x");
  CHECK_THAT(complaint({503, "later", {}}), ContainsSubstring("HTTP 503"));
}

TEST_CASE("what the Hub refuses is said with what to do", "[suites][hub]") {
  CHECK_THAT(complaint({401, "", {}}), ContainsSubstring("set HF_TOKEN to a token of yours"));
  CHECK_THAT(complaint({401, "", {}}, "old"), ContainsSubstring("HF_TOKEN is not accepted"));
  CHECK_THAT(
      complaint(
          {404, "", {{"X-Error-Code", "EntryNotFound"}, {"X-Error-Message", "Entry not found"}}}),
      ContainsSubstring("0000.parquet: not there (HTTP 404: Entry not found)"));
  for (const int status : {401, 403})
    CHECK_THAT(complaint({status, "", {{"X-Error-Code", "GatedRepo"}}}),
               ContainsSubstring("a/b is gated") && ContainsSubstring("accept its terms at http") &&
                   ContainsSubstring("/datasets/a/b and set HF_TOKEN"));
  CHECK_THAT(message_of([] { Hub("huggingface.co", ""); }), ContainsSubstring("expected a URL"));
}

TEST_CASE("no server at all is an error with its address", "[suites][hub]") {
  std::string url;
  {
    url = HubServer([](const HubRequest&) -> HubReply { return {}; }).url();
  }
  CHECK_THAT(message_of([&] { Hub(url, "", kNoPause).parquet_files("a/b", "c", "train"); }),
             ContainsSubstring(url));
}
