#include "engine/model_config.h"

#include <array>
#include <cmath>
#include <limits>
#include <numbers>

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/json_file.h"

namespace mixlora {
namespace {

/// Typed look-ups in one JSON object; errors name file and key.
class Keys {
 public:
  Keys(const Json& json, std::string file) : json_(json), file_(std::move(file)) {}
  bool has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }
  std::int64_t whole(const char* key, std::int64_t low, std::int64_t high) const {
    require(has(key), "{}: \"{}\" is missing", file_, key);
    const Json& v = json_[key];
    require(v.is_number_integer(), "{}: \"{}\": expected a whole number, found {}", file_, key,
            shown(v));
    const auto n = v.is_number_unsigned() &&
                           v.get<std::uint64_t>() >
                               static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())
                       ? std::numeric_limits<std::int64_t>::max()
                       : v.get<std::int64_t>();
    require(n >= low && n <= high, "{}: \"{}\" is {}; expected {} to {}", file_, key, shown(v), low,
            high);
    return n;
  }
  std::int64_t whole_or(const char* key, std::int64_t low, std::int64_t high,
                        std::int64_t otherwise) const {
    return has(key) ? whole(key, low, high) : otherwise;
  }
  double number_or(const char* key, double low, double high, double otherwise) const {
    if (!has(key)) return otherwise;
    const Json& v = json_[key];
    require(v.is_number(), "{}: \"{}\": expected a number, found {}", file_, key, shown(v));
    const auto d = v.get<double>();
    require(d >= low && d <= high, "{}: \"{}\" is {}; expected {} to {}", file_, key, d, low, high);
    return d;
  }
  bool flag_or(const char* key, bool otherwise) const {
    if (!has(key)) return otherwise;
    require(json_[key].is_boolean(), "{}: \"{}\": expected true or false, found {}", file_, key,
            shown(json_[key]));
    return json_[key].get<bool>();
  }
  std::string text_or(const char* key, const std::string& otherwise) const {
    if (!has(key)) return otherwise;
    require(json_[key].is_string(), "{}: \"{}\": expected a string, found {}", file_, key,
            shown(json_[key]));
    return json_[key].get<std::string>();
  }
  const Json& at(const char* key) const { return json_[key]; }
  const std::string& file() const { return file_; }

 private:
  const Json& json_;
  std::string file_;
};

// Far above every model there is, and small enough that no product of sizes overflows 64 bits.
constexpr std::int64_t kMaxWidth = 1 << 18, kMaxVocab = 1 << 22, kMaxPositions = 1 << 20;

Activation activation_of(const std::string& name, const std::string& file) {
  if (name == "silu" || name == "swish") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh") return Activation::gelu_new;
  if (name == "relu") return Activation::relu;
  fail("{}: \"hidden_act\" is {}; expected \"silu\", \"gelu\", \"gelu_new\" or \"relu\"", file,
       in_quotes(name));
}

void read_rope(const Json& json, const std::string& file, ModelConfig& c) {
  const Keys k(json, file);
  c.rope_theta = k.number_or("rope_theta", 1, 1e12, c.rope_theta);
  require(k.number_or("partial_rotary_factor", 0, 1, 1) == 1,
          "{}: \"partial_rotary_factor\": only 1 is supported", file);
  const std::string kind = k.text_or("rope_type", k.text_or("type", "default"));
  if (kind == "default") return;
  require(kind == "linear" || kind == "llama3",
          "{}: rope scaling {} is not supported; expected \"default\", \"linear\" or \"llama3\"",
          file, in_quotes(kind));
  c.rope_scaling = kind == "linear" ? RopeScaling::linear : RopeScaling::llama3;
  require(k.has("factor"), "{}: rope scaling without \"factor\"", file);
  c.rope_factor = k.number_or("factor", 1e-3, 1e6, 1);
  c.rope_low_freq = k.number_or("low_freq_factor", 1e-3, 1e6, 1);
  c.rope_high_freq = k.number_or("high_freq_factor", 1e-3, 1e6, 4);
  require(c.rope_low_freq < c.rope_high_freq || kind == "linear",
          "{}: \"low_freq_factor\" is {}; expected less than \"high_freq_factor\", {}", file,
          c.rope_low_freq, c.rope_high_freq);
  c.rope_original_positions =
      k.whole_or("original_max_position_embeddings", 1, kMaxPositions, 8192);
}

std::vector<std::int32_t> token_ids(const Keys& k, const char* key, std::int64_t vocab) {
  std::vector<std::int32_t> ids;
  if (!k.has(key)) return ids;
  const Json list = k.at(key).is_array() ? k.at(key) : Json::array({k.at(key)});
  for (const Json& v : list) {
    require(v.is_number_integer() && v.get<std::int64_t>() >= 0 && v.get<std::int64_t>() < vocab,
            "{}: \"{}\": expected token ids under {}, found {}", k.file(), key, vocab, shown(v));
    ids.push_back(v.get<std::int32_t>());
  }
  return ids;
}

}  // namespace

std::int64_t ModelConfig::parameters() const {
  const std::int64_t attention = qkv_width() * hidden + hidden * heads * head_dim;
  const std::int64_t layer = attention + 3 * ffn * hidden + 2 * hidden;
  return layers * layer + vocab * hidden * (tied_embeddings ? 1 : 2) + hidden;
}

ModelConfig read_model_config(const std::filesystem::path& file) {
  return parse_model_config(read_json(file, 1 << 20), file.string());
}

ModelConfig parse_model_config(const Json& json, const std::string& file) {
  require(json.is_object(), "{}: expected an object", file);
  const Keys k(json, file);
  ModelConfig c;
  require(k.has("architectures") && k.at("architectures").is_array() &&
              !k.at("architectures").empty() && k.at("architectures")[0].is_string(),
          "{}: \"architectures\": expected a list with one name", file);
  c.architecture = k.at("architectures")[0].get<std::string>();
  require(c.architecture == "LlamaForCausalLM",
          "{}: architecture {} is not supported; expected \"LlamaForCausalLM\"", file,
          in_quotes(c.architecture));
  require(
      !k.has("quantization_config"),
      "{}: \"quantization_config\": quantized weights are not supported; expected a model stored "
      "as F32, F16 or BF16",
      file);
  for (const char* bias : {"attention_bias", "mlp_bias"})
    require(!k.flag_or(bias, false),
            "{}: \"{}\": true is not supported; Llama's own projections have no bias", file, bias);
  c.hidden = k.whole("hidden_size", 1, kMaxWidth);
  c.layers = k.whole("num_hidden_layers", 1, 1024);
  c.ffn = k.whole("intermediate_size", 1, kMaxWidth);
  c.vocab = k.whole("vocab_size", 1, kMaxVocab);
  c.heads = k.whole("num_attention_heads", 1, 4096);
  c.kv_heads = k.whole_or("num_key_value_heads", 1, 4096, c.heads);
  require(c.heads % c.kv_heads == 0, "{}: {} attention heads do not divide over {} key/value heads",
          file, c.heads, c.kv_heads);
  require(k.has("head_dim") || c.hidden % c.heads == 0,
          "{}: hidden_size {} does not divide by {} heads and there is no head_dim", file, c.hidden,
          c.heads);
  c.head_dim = k.whole_or("head_dim", 2, 1024, c.hidden / c.heads);
  require(c.head_dim % 2 == 0, "{}: \"head_dim\" is {}; rotary embedding needs an even one", file,
          c.head_dim);
  c.max_positions = k.whole_or("max_position_embeddings", 1, kMaxPositions, 2048);
  c.rms_eps = k.number_or("rms_norm_eps", 1e-12, 1e-1, 1e-6);
  c.rope_theta = k.number_or("rope_theta", 1, 1e12, 10000);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!k.has(key)) continue;
    require(k.at(key).is_object(), "{}: \"{}\": expected an object or null, found {}", file, key,
            shown(k.at(key)));
    read_rope(k.at(key), file, c);
  }
  c.activation = activation_of(k.text_or("hidden_act", "silu"), file);
  c.tied_embeddings = k.flag_or("tie_word_embeddings", false);
  c.bos = token_ids(k, "bos_token_id", c.vocab);
  c.eos = token_ids(k, "eos_token_id", c.vocab);
  return c;
}

ModelConfig shape_config(std::string_view name) {
  struct Known {
    const char* name;
    std::int64_t hidden, layers, ffn, vocab, heads, kv_heads, positions;
    double theta;
    bool tied;
  };
  constexpr std::array<Known, 4> kKnown{
      {{"llama-2-7b", 4096, 32, 11008, 32000, 32, 32, 4096, 10000, false},
       {"llama-2-13b", 5120, 40, 13824, 32000, 40, 40, 4096, 10000, false},
       {"llama-3-8b", 4096, 32, 14336, 128256, 32, 8, 8192, 500000, false},
       {"smollm2-135m", 576, 30, 1536, 49152, 9, 3, 8192, 100000, true}}};
  std::string names;
  for (const Known& k : kKnown) {
    names += names.empty() ? k.name : std::string(", ") + k.name;
    if (name != k.name) continue;
    ModelConfig c;
    c.hidden = k.hidden;
    c.layers = k.layers;
    c.ffn = k.ffn;
    c.vocab = k.vocab;
    c.heads = k.heads;
    c.kv_heads = k.kv_heads;
    c.head_dim = k.hidden / k.heads;
    c.max_positions = k.positions;
    c.rms_eps = 1e-5;
    c.rope_theta = k.theta;
    c.tied_embeddings = k.tied;
    return c;
  }
  fail("shape:{}: unknown; expected one of {}", name, names);
}

std::vector<double> rope_frequencies(const ModelConfig& c) {
  std::vector<double> f;
  for (std::int64_t i = 0; i < c.head_dim / 2; ++i) {
    double value =
        std::pow(c.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(c.head_dim));
    if (c.rope_scaling == RopeScaling::linear) value /= c.rope_factor;
    if (c.rope_scaling ==
        RopeScaling::llama3) {  // [Llama 3.1's released configuration; as in transformers]
      const double length = 2 * std::numbers::pi / value,
                   original = static_cast<double>(c.rope_original_positions);
      const double low = original / c.rope_low_freq, high = original / c.rope_high_freq;
      if (length > low) {
        value /= c.rope_factor;
      } else if (length > high) {
        const double smooth =
            (original / length - c.rope_low_freq) / (c.rope_high_freq - c.rope_low_freq);
        value = (1 - smooth) * value / c.rope_factor + smooth * value;
      }
    }
    f.push_back(value);
  }
  return f;
}

}  // namespace mixlora
