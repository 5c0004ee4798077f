// The tokenizers package's ids (scripts/make_tokenizer_golden.py): real rows, hard strings, cuts
// around every code point; and what a tokenizer.json must be.
#include "engine/tokenizer.h"

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/pre_tokenizer.h"
#include "engine/sha256.h"
#include "engine/utf8.h"
#include "suites/dataset.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

const std::filesystem::path kGolden = std::filesystem::path(MIXLORA_GOLDEN_DIR) / "tokenizer";
using Ids = std::vector<std::int32_t>;

/// The tokenizer.json of a kind; null where the model is not there.
Json tokenizer_json(const std::string& kind) {
  if (kind != "smollm2") return read_json(kGolden / (kind + ".json"));
  const char* named = std::getenv("MIXLORA_MODEL");
  const auto file =
      std::filesystem::path(named != nullptr ? named : MIXLORA_SOURCE_DIR "/models/smollm2-135m") /
      "tokenizer.json";
  if (std::filesystem::exists(file)) return read_json(file);
  WARN("skipped: no " << file.string() << " (scripts/fetch_model.sh, or MIXLORA_MODEL)");
  return {};
}

std::string row_text(const Row& row) {
  std::string text = row.context + "\n" + row.question;
  for (const auto& choice : row.choices) text += "\n" + choice;
  return text;
}

/// The golden's rows, or none where the data are not there or are others.
std::vector<std::string> real_rows(const Json& golden) {
  std::vector<std::string> texts;
  for (const Json& part : golden["files"]) {
    const auto file = data_directory() / (part["file"].get<std::string>() + ".jsonl.gz");
    if (!std::filesystem::exists(file)) {
      WARN("skipped: no " << file.string() << " (MIXLORA_DATA names the folder of the suites)");
      return {};
    }
    std::string all;
    for (const Row& row : read_dataset(file, part["rows"].get<std::int64_t>()).rows) {
      texts.push_back(row_text(row));
      if (!all.empty()) all += '\0';
      all += texts.back();
    }
    if (sha256(all) != part["text"]) {
      WARN("skipped: " << file.string() << " holds other rows than the golden was made from");
      return {};
    }
  }
  return texts;
}

void append_word(std::string& bytes, std::uint32_t v) {
  for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<char>(v >> (8 * i)));
}

void rows_agree(const std::string& kind) {
  const Json golden = read_json(kGolden / "rows.json");
  const Json json = tokenizer_json(kind);
  const auto texts = json.is_null() ? std::vector<std::string>() : real_rows(golden);
  if (texts.empty()) return;
  REQUIRE(texts.size() == 10'000);
  const Tokenizer tokenizer(json, kind);
  const auto block = golden["block"].get<std::size_t>();
  std::int64_t tokens = 0;
  for (std::size_t b = 0; b * block < texts.size(); ++b) {
    std::string bytes;
    for (std::size_t i = b * block; i < (b + 1) * block; ++i) {
      const Ids ids = tokenizer.encode(texts[i]);
      tokens += static_cast<std::int64_t>(ids.size());
      append_word(bytes, static_cast<std::uint32_t>(ids.size()));
      for (const auto t : ids) append_word(bytes, static_cast<std::uint32_t>(t));
    }
    INFO("rows " << b * block << " to " << (b + 1) * block - 1);
    CHECK(sha256(bytes) == golden[kind]["digests"][b]);
  }
  CHECK(tokens == golden[kind]["tokens"].get<std::int64_t>());
}

}  // namespace

TEST_CASE("SmolLM2's ids of 10,000 real rows are the tokenizers package's",
          "[engine][golden][tokenizer]") {
  rows_agree("smollm2");
}
TEST_CASE("Llama-2's kind of BPE gives 10,000 real rows the tokenizers package's ids",
          "[engine][golden][tokenizer]") {
  rows_agree("llama2");
}
TEST_CASE("Llama-3's kind of BPE gives 10,000 real rows the tokenizers package's ids",
          "[engine][golden][tokenizer]") {
  rows_agree("llama3");
}

TEST_CASE("hard strings have the tokenizers package's ids and texts",
          "[engine][golden][tokenizer]") {
  const auto* kind = GENERATE("smollm2", "llama2", "llama3");
  const Json json = tokenizer_json(kind);
  if (json.is_null()) return;
  const Json golden = read_json(kGolden / "strings.json");
  const Json& expected = golden["kinds"][kind];
  const Tokenizer tokenizer(json, kind);
  CHECK(tokenizer.encode_with_special("a b") == expected["with_special"].get<Ids>());
  for (std::size_t i = 0; i < golden["strings"].size(); ++i) {
    INFO(kind << ", string " << i << ": " << golden["strings"][i].dump());
    const Ids ids = tokenizer.encode(golden["strings"][i].get<std::string>());
    CHECK(ids == expected["ids"][i].get<Ids>());
    CHECK(tokenizer.decode(expected["ids"][i].get<Ids>()) ==
          expected["decoded"][i].get<std::string>());
  }
}

TEST_CASE("variants of Llama-2's configuration have the tokenizers package's ids",
          "[engine][golden][tokenizer]") {
  const Json golden = read_json(kGolden / "strings.json");
  for (const Json& variant : golden["variants"]) {
    Json json = tokenizer_json("llama2");
    json.merge_patch(variant["patch"]);
    const Tokenizer tokenizer(json, variant["name"].get<std::string>());
    for (std::size_t i = 0; i < variant["ids"].size(); ++i) {
      const auto text = golden["strings"][3 * i].get<std::string>();
      INFO(variant["name"] << ", string " << 3 * i << ": " << golden["strings"][3 * i].dump());
      CHECK(tokenizer.encode_with_special(text) == variant["ids"][i].get<Ids>());
    }
  }
}

TEST_CASE("pre-tokenizers cut around every code point as the tokenizers package does",
          "[engine][golden][tokenizer]") {
  const Json golden = read_json(kGolden / "splits.json");
  const auto skipped = golden["skipped"].get<std::vector<char32_t>>();
  const std::vector<std::vector<Split>> kinds{{Split::digits, Split::gpt2}, {Split::llama3}};
  for (const Json& block : golden["blocks"]) {
    const auto begin = block[0].get<char32_t>();
    for (std::size_t k = 0; k < kinds.size(); ++k) {
      std::string lengths;
      for (char32_t c = begin; c < begin + 0x1000; ++c) {
        if (c >= 0xd800 && c < 0xe000) continue;
        if (std::find(skipped.begin(), skipped.end(), c) != skipped.end()) continue;
        std::string x;
        append_utf8(x, c);
        const std::string text = "a" + x + "1" + x + " " + x + "!" + x + "\n" + x + "'" + x + "s";
        for (const auto piece : split(kinds[k], text))
          lengths.push_back(static_cast<char>(piece.size()));
        lengths.push_back('\0');
      }
      INFO(golden["kinds"][k] << " from code point " << static_cast<std::uint32_t>(begin));
      CHECK(sha256(lengths) == block[k + 1]);
    }
  }
}
