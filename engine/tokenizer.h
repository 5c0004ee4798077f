// Tokenizer: text to ids and back, from Hugging Face's tokenizer.json.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace mixlora {

/// Byte-level BPE (GPT-2, Llama-3, SmolLM2) and BPE with byte fallback (Llama-2's SentencePiece
/// model).
class Tokenizer {
 public:
  /// Reads tokenizer.json (and tokenizer_config.json beside it for BOS rules); throws InputError.
  explicit Tokenizer(const std::filesystem::path& directory);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  /// Ids of `text`, no special tokens added; special tokens written in the text are recognised.
  std::vector<std::int32_t> encode(std::string_view text) const;
  /// As the tokenizer's own post-processor: with BOS where the model has one.
  std::vector<std::int32_t> encode_with_special(std::string_view text) const;
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
