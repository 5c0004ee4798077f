// config.json: what is read, what is refused and how it is said; and that no memory is taken for a
// claim.
#include "engine/model_config.h"

#include <filesystem>
#include <fstream>

#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/model.h"
#include "tests/experiments/folder.h"
#include "tests/support/catch.h"
#include "tests/support/refusal.h"

using namespace mixlora;

namespace {

Json good() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 64},
          {"num_hidden_layers", 2},
          {"intermediate_size", 96},
          {"vocab_size", 100},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"rope_theta", 10000}};
}

}  // namespace

TEST_CASE("a bad config.json is refused with what and where", "[engine][hostile]") {
  struct Case {
    const char* patch;
    const char* message;
  };
  const std::vector<Case> cases{
      {R"([])", "expected an object"},
      {R"({"architectures": null})", "\"architectures\": expected a list with one name"},
      {R"({"architectures": []})", "\"architectures\": expected a list"},
      {R"({"architectures": [7]})", "\"architectures\": expected a list"},
      {R"({"architectures": ["MistralForCausalLM"]})",
       "architecture \"MistralForCausalLM\" is not supported; expected \"LlamaForCausalLM\""},
      {R"({"hidden_size": null})", "\"hidden_size\" is missing"},
      {R"({"hidden_size": "64"})", "\"hidden_size\": expected a whole number, found \"64\""},
      {R"({"hidden_size": 64.5})", "\"hidden_size\": expected a whole number, found 64.5"},
      {R"({"hidden_size": 0})", "\"hidden_size\" is 0; expected 1 to 262144"},
      {R"({"hidden_size": -64})", "\"hidden_size\" is -64; expected 1 to"},
      {R"({"hidden_size": 1e30})", "\"hidden_size\": expected a whole number"},
      {R"({"hidden_size": 18446744073709551615})", "\"hidden_size\" is 18446744073709551615"},
      {R"({"hidden_size": 65})", "hidden_size 65 does not divide by 4 heads"},
      {R"({"num_hidden_layers": 0})", "\"num_hidden_layers\" is 0; expected 1 to 1024"},
      {R"({"num_hidden_layers": 100000})", "\"num_hidden_layers\" is 100000"},
      {R"({"intermediate_size": 0})", "\"intermediate_size\" is 0"},
      {R"({"vocab_size": 99999999999})", "\"vocab_size\" is 99999999999"},
      {R"({"num_attention_heads": 0})", "\"num_attention_heads\" is 0"},
      {R"({"num_key_value_heads": 3})", "4 attention heads do not divide over 3 key/value heads"},
      {R"({"num_key_value_heads": 0})", "\"num_key_value_heads\" is 0"},
      {R"({"head_dim": 15})", "\"head_dim\" is 15; rotary embedding needs an even one"},
      {R"({"head_dim": 4096})", "\"head_dim\" is 4096; expected 2 to 1024"},
      {R"({"max_position_embeddings": 2000000000})", "\"max_position_embeddings\" is 2000000000"},
      {R"({"rms_norm_eps": 0})", "\"rms_norm_eps\" is 0; expected"},
      {R"({"rms_norm_eps": "small"})", "\"rms_norm_eps\": expected a number, found \"small\""},
      {R"({"rope_theta": -1})", "\"rope_theta\" is -1"},
      {R"({"rope_scaling": 2})", "\"rope_scaling\": expected an object or null, found 2"},
      {R"({"rope_scaling": {"type": "yarn", "factor": 4}})",
       "rope scaling \"yarn\" is not supported; expected \"default\", \"linear\" or \"llama3\""},
      {R"({"rope_scaling": {"type": 3}})", "\"type\": expected a string, found 3"},
      {R"({"rope_scaling": {"type": "linear"}})", "rope scaling without \"factor\""},
      {R"({"rope_scaling": {"type": "linear", "factor": 0}})", "\"factor\" is 0"},
      {R"({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
           "high_freq_factor": 4}})",
       "\"low_freq_factor\" is 4; expected less than \"high_freq_factor\", 4"},
      {R"({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}})",
       "\"partial_rotary_factor\": only 1 is supported"},
      {R"({"hidden_act": "tanh"})", "\"hidden_act\" is \"tanh\"; expected \"silu\""},
      {R"({"hidden_act": {}})", "\"hidden_act\": expected a string, found {}"},
      {R"({"tie_word_embeddings": 1})", "\"tie_word_embeddings\": expected true or false, found 1"},
      {R"({"attention_bias": true})", "\"attention_bias\": true is not supported"},
      {R"({"mlp_bias": true})", "\"mlp_bias\": true is not supported"},
      {R"({"quantization_config": {"bits": 4}})", "quantized weights are not supported"},
      {R"({"bos_token_id": 100})", "\"bos_token_id\": expected token ids under 100, found 100"},
      {R"({"eos_token_id": [1, -2]})", "\"eos_token_id\": expected token ids under 100, found -2"},
      {R"({"eos_token_id": 18446744073709551615})", "\"eos_token_id\": expected token ids"},
      {R"({"eos_token_id": "</s>"})", "\"eos_token_id\": expected token ids under 100"},
  };
  REQUIRE_NOTHROW(parse_model_config(good(), "config.json"));
  for (const Case& c : cases) {
    Json json = good();
    json.merge_patch(Json::parse(c.patch));
    require_refusal([&] { parse_model_config(json, "config.json"); }, "config.json", c.message);
  }
}

TEST_CASE("a config.json that is not strict JSON is refused with line and column",
          "[engine][hostile]") {
  const Folder folder;
  const auto file = folder.path / "config.json";
  for (const auto& [text, message] : std::vector<std::pair<std::string, std::string>>{
           {"", "line 1, column 0"},
           {"{\n \"a\": }", "line 2, column 7"},
           {"{\"a\": 1,}", "line 1"},
           {"{\"a\": NaN}", "line 1"},
           {"{\"a\": 1e999}", "1e999"},
           {"{\"a\": \"\xff\"}", "line 1"},
           {"{\"a\": 1, \"a\": 2}", "the key \"a\" stands twice"},
           {"{\"a\": 1} x", "line 1"}}) {
    std::ofstream(file, std::ios::binary) << text;
    require_refusal([&] { read_model_config(file); }, file.string(), message);
  }
  std::filesystem::remove(file);
  require_refusal([&] { read_model_config(file); }, file.string(), "no such file");
  require_refusal([&] { read_model_config(file.parent_path()); }, file.parent_path().string(),
                  "not a regular file");
}

TEST_CASE("sizes that the weights do not have are refused before memory is taken",
          "[engine][hostile]") {
  const Folder folder;
  const auto& dir = folder.path;
  std::filesystem::copy(
      std::filesystem::path(MIXLORA_GOLDEN_DIR) / "tiny-llama" / "model.safetensors",
      dir / "model.safetensors");
  const Json tiny =
      read_json(std::filesystem::path(MIXLORA_GOLDEN_DIR) / "tiny-llama" / "config.json");
  const auto ops = make_cpu_backend(Precision::fp32);
  for (const auto& [patch, message] : std::vector<std::pair<const char*, const char*>>{
           {R"({"vocab_size": 4000000})", "the tensor \"model.embed_tokens.weight\" has shape"},
           {R"({"intermediate_size": 262144})", "mlp.gate_proj.weight\" has shape"},
           {R"({"num_hidden_layers": 1024})", "is missing"}}) {
    Json json = tiny;
    json.merge_patch(Json::parse(patch));
    std::ofstream(dir / "config.json") << json;
    require_refusal([&] { Model::load(*ops, dir.string()); }, dir.string(), message);
  }
}
