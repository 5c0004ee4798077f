// ModelConfig: the shape of a Llama-family model, from Hugging Face's config.json.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "kernels/backend.h"

namespace mixlora {

enum class RopeScaling : std::uint8_t { none, linear, llama3 };

struct ModelConfig {
  std::string architecture = "LlamaForCausalLM";
  std::int64_t hidden = 0;  // D
  std::int64_t layers = 0;  // L
  std::int64_t ffn = 0;     // F
  std::int64_t vocab = 0;   // V
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0;
  std::int64_t max_positions = 2048;
  double rms_eps = 1e-6;
  double rope_theta = 10000;
  RopeScaling rope_scaling = RopeScaling::none;
  double rope_factor = 1, rope_low_freq = 1, rope_high_freq = 4;
  std::int64_t rope_original_positions = 8192;
  Activation activation = Activation::silu;
  bool tied_embeddings = false;
  std::vector<std::int32_t> bos, eos;

  Heads attention_heads() const { return {heads, kv_heads, head_dim}; }
  std::int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
  std::int64_t parameters() const;  // of the base model, tied ones once
};

/// Reads and checks config.json; throws InputError naming the file, the key and what would be
/// right.
ModelConfig read_model_config(const std::filesystem::path& file);
/// What stands in a config.json; `file` is what errors call it.
ModelConfig parse_model_config(const nlohmann::json& json, const std::string& file);
/// "llama-2-7b", "llama-2-13b", "llama-3-8b", "smollm2-135m": the shape alone. Throws InputError
/// with the known names.
ModelConfig shape_config(std::string_view name);
/// Angles' frequencies (head_dim / 2), rope_scaling applied.
std::vector<double> rope_frequencies(const ModelConfig& c);

}  // namespace mixlora
