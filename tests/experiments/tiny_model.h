// A Hugging Face directory of a tiny random Llama whose tokens are bytes: real files, no download.
#pragma once
#include <filesystem>
#include <fstream>
#include <list>

#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/safetensors.h"
#include "kernels/random.h"

namespace mixlora {

/// GPT-2's printable stand-in for a byte, as UTF-8.
inline std::string byte_symbol(int byte) {
  static const std::vector<int> kPoints = [] {
    std::vector<int> points(256);
    int next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      points[static_cast<std::size_t>(b)] = printable ? b : next++;
    }
    return points;
  }();
  const int c = kPoints[static_cast<std::size_t>(byte)];
  if (c < 0x80) return {static_cast<char>(c)};
  return {static_cast<char>(0xC0 | (c >> 6)), static_cast<char>(0x80 | (c & 0x3F))};
}

inline void write_tiny_model(const std::filesystem::path& folder) {
  constexpr std::int64_t kVocab = 257, kHidden = 32, kLayers = 2, kFfn = 48, kHeads = 4, kKv = 2,
                         kHead = 8;
  std::filesystem::create_directories(folder);
  std::ofstream(folder / "config.json") << Json{{"architectures", {"LlamaForCausalLM"}},
                                                {"model_type", "llama"},
                                                {"hidden_act", "silu"},
                                                {"hidden_size", kHidden},
                                                {"intermediate_size", kFfn},
                                                {"num_hidden_layers", kLayers},
                                                {"num_attention_heads", kHeads},
                                                {"num_key_value_heads", kKv},
                                                {"head_dim", kHead},
                                                {"vocab_size", kVocab},
                                                {"max_position_embeddings", 128},
                                                {"rms_norm_eps", 1e-5},
                                                {"rope_theta", 10000.0},
                                                {"tie_word_embeddings", true},
                                                {"bos_token_id", 256},
                                                {"eos_token_id", 256}};
  Json vocab = {{"<|end|>", 256}};
  for (int b = 0; b < 256; ++b) vocab[byte_symbol(b)] = b;
  const Json level = {{"type", "ByteLevel"},
                      {"add_prefix_space", false},
                      {"trim_offsets", true},
                      {"use_regex", true}};
  std::ofstream(folder / "tokenizer.json")
      << Json{{"version", "1.0"},
              {"added_tokens",
               {{{"id", 256}, {"content", "<|end|>"}, {"special", true}, {"normalized", false}}}},
              {"normalizer", nullptr},
              {"pre_tokenizer", level},
              {"post_processor", nullptr},
              {"decoder", level},
              {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", Json::array()}}}};

  std::vector<WriteTensor> tensors;
  std::list<std::vector<float>> kept;
  std::uint32_t n = 0;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape,
                       bool norm = false) {
    std::int64_t count = 1;
    for (const auto d : shape) count *= d;
    const RandomKey key = random_key(7, Purpose::test);
    std::vector<float>& numbers = kept.emplace_back();
    for (std::int64_t i = 0; i < count; ++i)
      numbers.push_back(
          norm ? 1.0F
               : static_cast<float>(
                     philox(static_cast<std::uint32_t>(i), n, 0, 0, key.k0, key.k1).v[0]) /
                         4294967296.0F * 0.4F -
                     0.2F);
    ++n;
    tensors.push_back(
        {name, std::move(shape), Tensor(numbers.data(), {count}, DType::f32, Device::cpu)});
  };
  add("model.embed_tokens.weight", {kVocab, kHidden});
  add("model.norm.weight", {kHidden}, true);
  for (std::int64_t l = 0; l < kLayers; ++l) {
    const std::string at = "model.layers." + std::to_string(l) + ".";
    add(at + "input_layernorm.weight", {kHidden}, true);
    add(at + "post_attention_layernorm.weight", {kHidden}, true);
    add(at + "self_attn.q_proj.weight", {kHeads * kHead, kHidden});
    add(at + "self_attn.k_proj.weight", {kKv * kHead, kHidden});
    add(at + "self_attn.v_proj.weight", {kKv * kHead, kHidden});
    add(at + "self_attn.o_proj.weight", {kHidden, kHeads * kHead});
    add(at + "mlp.gate_proj.weight", {kFfn, kHidden});
    add(at + "mlp.up_proj.weight", {kFfn, kHidden});
    add(at + "mlp.down_proj.weight", {kHidden, kFfn});
  }
  write_safetensors(folder / "model.safetensors", tensors);
}

}  // namespace mixlora
