// Tokenizer: text to ids and back, from Hugging Face's tokenizer.json.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace mixlora {

/// Byte-level BPE (GPT-2, Llama-3, SmolLM2) and BPE with byte fallback (Llama-2's SentencePiece
/// model).
class Tokenizer {
 public:
  /// Reads the directory's tokenizer.json; throws InputError.
  explicit Tokenizer(const std::filesystem::path& directory);
  /// From what stands in a tokenizer.json; `name` is what errors call it.
  Tokenizer(const nlohmann::json& json, const std::string& name);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  /// Ids of `text`, no special tokens added; special tokens written in the text are recognised.
  std::vector<std::int32_t> encode(std::string_view text) const;
  /// As the tokenizer's own post-processor: with BOS (and EOS) where the model has one.
  std::vector<std::int32_t> encode_with_special(std::string_view text) const;
  /// The text of ids, special tokens as they are written; bytes that are not UTF-8 become U+FFFD.
  std::string decode(const std::vector<std::int32_t>& ids) const;
  /// The bytes of one token as shown to people ("Ġthe", "▁the").
  std::string token(std::int32_t id) const;
  std::int64_t size() const;
  /// Tokens put before a text by the post-processor (BOS), maybe none.
  std::vector<std::int32_t> prefix() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mixlora
