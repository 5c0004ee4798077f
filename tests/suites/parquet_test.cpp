// Parquet files that pyarrow wrote (scripts/make_parquet_golden.py), and broken ones.
#include "suites/parquet.h"

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/json_file.h"
#include "kernels/random.h"
#include "suites/thrift.h"
#include "tests/suites/temporary.h"
#include "tests/support/catch.h"

using namespace mixlora;
using Catch::Matchers::ContainsSubstring;

namespace {

const std::vector<std::string> kColumns{"id",           "question",      "kind",
                                        "choices.text", "choices.label", "answerKey",
                                        "label",        "small",         "endings"};

std::string golden(const std::string& name) {
  return read_text(std::filesystem::path(MIXLORA_GOLDEN_DIR) / "parquet" / name);
}
std::vector<Json> expected_rows() {
  std::vector<Json> out;
  const std::string text = golden("rows.jsonl");
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = text.find('\n', at);
    out.push_back(Json::parse(text.substr(at, end - at)));
    at = end + 1;
  }
  return out;
}

}  // namespace

TEST_CASE("tables come out as pyarrow put them in", "[suites][parquet]") {
  const auto expected = expected_rows();
  for (const char* name : {"hub.parquet", "pages.parquet", "plain.parquet"}) {
    CAPTURE(name);
    auto rows = read_parquet(golden(name), name, kColumns);
    REQUIRE(rows.size() == expected.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      CAPTURE(i);
      if (!rows[i].contains("small")) rows[i]["small"] = nullptr;
      REQUIRE(rows[i] == expected[i]);
    }
  }
}

TEST_CASE("what is not read says what it is", "[suites][parquet]") {
  const std::string hub = golden("hub.parquet");
  CHECK_THAT(message_of([&] { read_parquet(hub, "hub", {"qestion"}); }),
             ContainsSubstring("no column \"qestion\"; it has id, question, kind, choices.text"));
  CHECK_THAT(message_of([&] { read_parquet(hub, "hub", {"real"}); }),
             ContainsSubstring("neither strings nor whole numbers"));
  CHECK_THAT(message_of([&] { read_parquet(golden("zstd.parquet"), "z", {"id"}); }),
             ContainsSubstring("compression 6 is not read here (only none and Snappy)"));
  CHECK_THAT(message_of([&] { read_parquet(hub.substr(0, hub.size() / 2), "half", kColumns); }),
             ContainsSubstring("half: not a whole Parquet file"));
}

TEST_CASE("a damaged table is an error or other rows, never a crash", "[suites][parquet]") {
  const RandomKey key = random_key(11, Purpose::test);
  std::size_t refused = 0;
  for (std::uint32_t i = 0; i < 600; ++i) {
    std::string bytes = golden(i % 2 == 0 ? "pages.parquet" : "hub.parquet");
    // The footer is where sizes and places stand; half the damage goes there.
    const std::size_t span = i % 4 < 2 ? std::min<std::size_t>(2600, bytes.size()) : bytes.size();
    const Philox4 random = philox(i, 0, 0, 0, key.k0, key.k1);
    for (std::size_t n = 0; n < 3; ++n)
      bytes[bytes.size() - 5 - random.v[n] % (span - 8)] =
          static_cast<char>(random.v[3] >> (8 * n));
    try {
      read_parquet(bytes, "damaged", kColumns);
    } catch (const InputError&) {
      ++refused;
    }
  }
  CHECK(refused > 100);
}

TEST_CASE("numbers of fields stay in their range", "[suites][parquet]") {
  // A field of the greatest 32-bit number, then one 15 behind it.
  const std::string far{"\x05\xfe\xff\xff\xff\x0f\x02\xf5\x02\x00", 10};
  std::size_t used = 0;
  CHECK_THAT(message_of([&] { read_thrift(far, used, "far"); }),
             ContainsSubstring("far: a field 2147483647"));
}

TEST_CASE("Snappy blocks", "[suites][parquet]") {
  const auto block = [](std::initializer_list<int> bytes) {
    std::string out;
    for (const int b : bytes) out += static_cast<char>(b);
    return out;
  };
  // "ab", then 6 bytes from 2 back, then a literal.
  CHECK(decompress_snappy(block({9, 1 << 2, 'a', 'b', 2 << 2 | 1, 2, 0, '!'}), 9, "s") ==
        "abababab!");
  CHECK(decompress_snappy(block({5, 0, 'z', 3 << 2 | 2, 1, 0}), 5, "s") == "zzzzz");
  const auto bad = [&](std::initializer_list<int> bytes, std::size_t size) {
    return message_of([&] { decompress_snappy(block(bytes), size, "s"); });
  };
  CHECK_THAT(bad({2, 0, 'z', 1, 2}, 2), ContainsSubstring("more than 2 bytes"));
  CHECK_THAT(bad({8, 0, 'z', 1, 2}, 8), ContainsSubstring("before the start"));
  CHECK_THAT(bad({3, 2 << 2, 'z'}, 3), ContainsSubstring("ends early"));
  CHECK_THAT(bad({3, 0, 'z'}, 3), ContainsSubstring("1 bytes came out"));
  CHECK_THAT(bad({3, 0, 'z'}, 4), ContainsSubstring("3 bytes stated"));
}
