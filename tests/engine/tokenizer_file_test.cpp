// tokenizer.json: what is refused, and how it is said.
#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/tokenizer.h"
#include "tests/support/catch.h"
#include "tests/support/refusal.h"

using namespace mixlora;

namespace {

Json good() {
  return Json::parse(R"({"added_tokens": [{"id": 0, "content": "<s>"}], "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}, "post_processor": null,
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}})");
}

}  // namespace

TEST_CASE("a bad tokenizer.json is refused with what and where", "[engine][hostile][tokenizer]") {
  struct Case {
    const char* patch;
    const char* message;
  };
  const std::vector<Case> cases{
      {R"(7)", "expected an object \"model\""},
      {R"({"model": []})", "expected an object \"model\""},
      {R"({"model": {"type": "Unigram"}})", "type \"Unigram\" is not supported; expected \"BPE\""},
      {R"({"model": {"type": null}})", "type null is not supported; expected \"BPE\""},
      {R"({"model": {"vocab": []}})", "expected an object \"vocab\""},
      {R"({"model": {"vocab": {"c": -1}}})", "vocab: \"c\": expected an id from 0 to"},
      {R"({"model": {"vocab": {"c": "4"}}})", "expected an id from 0 to 65541, found \"4\""},
      {R"({"model": {"vocab": {"c": 4000000000}}})", "expected an id from 0 to 65541"},
      {R"({"model": {"vocab": {"c": 18446744073709551615}}})", "expected an id from 0 to 65541"},
      {R"({"model": {"vocab": {"c": 3}}})", "the id 3 stands for both"},
      {R"({"model": {"merges": null}})", "expected a list \"merges\""},
      {R"({"model": {"merges": [["a"]]}})", "merges[0]: expected two tokens"},
      {R"({"model": {"merges": [["a", 1]]}})", "merges[0]: expected two tokens"},
      {R"({"model": {"merges": ["ab"]}})", "merges[0]: expected two tokens"},
      {R"({"model": {"merges": ["a b c"]}})", "merges[0]: expected two tokens"},
      {R"({"model": {"merges": [["b", "a"]]}})", "\"b\", \"a\" and both joined must be in the"},
      {R"({"model": {"dropout": 0.1}})", "\"dropout\" is 0.1; expected null"},
      {R"({"model": {"continuing_subword_prefix": "##"}})", "is \"##\"; expected null"},
      {R"({"model": {"byte_fallback": 1}})", "\"byte_fallback\": expected true or false, found 1"},
      {R"({"model": {"unk_token": "<unk>"}})", "the unk_token \"<unk>\" is not in the vocabulary"},
      {R"({"model": {"unk_token": 0}})", "\"unk_token\": expected a token or null, found 0"},
      {R"({"added_tokens": {}})", "\"added_tokens\": expected a list, found object"},
      {R"({"added_tokens": [1]})", "added_tokens[0]: expected an object with a \"content\""},
      {R"({"added_tokens": [{"content": "", "id": 4}]})", "expected an object with a \"content\""},
      {R"({"added_tokens": [{"content": "x"}]})", "expected an id from 0 to 65540, found null"},
      {R"({"added_tokens": [{"content": "a", "id": 9}]})", "\"a\" has the id 9, and 1 elsewhere"},
      {R"({"added_tokens": [{"content": "x", "id": 1}]})", "the id 1 stands for both \"a\" and"},
      {R"({"added_tokens": [{"content": "<s>", "id": 0, "lstrip": true}]})",
       "\"<s>\": \"lstrip\" true is not supported"},
      {R"({"added_tokens": [{"content": "<s>", "id": 0, "single_word": 3}]})",
       "\"single_word\": expected true or false, found 3"},
      {R"({"normalizer": 3})", "normalizer: expected a string \"type\""},
      {R"({"normalizer": {"type": "NFC"}})", "normalizer: type \"NFC\" is not supported"},
      {R"({"normalizer": {"type": "Sequence"}})", "expected a list \"normalizers\""},
      {R"({"normalizer": {"type": "Prepend", "prepend": "x"}})", "only one Prepend, of U+2581"},
      {R"({"normalizer": {"type": "Replace", "pattern": "x", "content": "y"}})", "only Replace of"},
      {R"({"pre_tokenizer": "x"})", "pre_tokenizer: expected a string \"type\""},
      {R"({"pre_tokenizer": {"type": "Whitespace"}})", "type \"Whitespace\" is not supported"},
      {R"({"pre_tokenizer": {"add_prefix_space": true}})", "only add_prefix_space false"},
      {R"({"pre_tokenizer": {"type": "Digits", "individual_digits": false}})", "individual_digits"},
      {R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}})",
       "Split by {\"Regex\":\"(a+)+$\"} is not supported; expected Llama-3's pattern"},
      {R"({"pre_tokenizer": {"type": "Metaspace"}})", "Metaspace: only split false is supported"},
      {R"({"pre_tokenizer": {"type": "Metaspace", "split": false, "prepend_scheme": "last"}})",
       "prepend_scheme \"last\"; expected \"always\", \"first\" or \"never\""},
      {R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel",
           "add_prefix_space": false}, {"type": "Digits", "individual_digits": true}]}})",
       "\"Digits\" after ByteLevel; expected ByteLevel last"},
      {R"({"post_processor": {"type": "BertProcessing"}})", "\"BertProcessing\" is not supported"},
      {R"({"post_processor": {"type": "TemplateProcessing"}})", "expected a list \"single\""},
      {R"({"post_processor": {"type": "TemplateProcessing", "single": []}})", "has no Sequence"},
      {R"({"post_processor": {"type": "TemplateProcessing", "single": [3]}})",
       "expected SpecialToken or Sequence, found 3"},
      {R"({"post_processor": {"type": "TemplateProcessing", "single":
           [{"SpecialToken": {"id": "<bos>"}}, {"Sequence": {"id": "A"}}]}})",
       "the special token \"<bos>\" is not in the vocabulary"},
  };
  const Tokenizer works(good(), "tokenizer.json");
  REQUIRE(works.encode("abb<s>") == std::vector<std::int32_t>{3, 2, 0});
  for (const Case& c : cases) {
    Json json = good();
    json.merge_patch(Json::parse(c.patch));
    require_refusal([&] { const Tokenizer t(json, "tokenizer.json"); }, "tokenizer.json",
                    c.message);
  }
}

TEST_CASE("a text that is not UTF-8 is refused with its place", "[engine][hostile][tokenizer]") {
  const Tokenizer t(good(), "tokenizer.json");
  for (const char* text :
       {"ab\xff", "ab\xc3", "ab\xed\xa0\x80", "ab\xc0\x80", "ab\xf4\x90\x80\x80"})
    require_refusal([&] { t.encode(text); }, "tokenizer", "byte 2 of the text is not UTF-8");
  require_refusal([&] { t.decode({4}); }, "tokenizer", "token 4 is outside the vocabulary of 4");
  require_refusal([&] { t.decode({-1}); }, "tokenizer", "token -1 is outside");
}
