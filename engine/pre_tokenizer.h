// Pre-tokenizers: where a text is cut before byte-pair merging.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace mixlora {

enum class Split : std::uint8_t {
  digits,  // every digit apart
  gpt2,    // GPT-2's pattern, the one ByteLevel uses
  llama3,  // Llama-3's pattern
};

/// Llama-3's pattern as tokenizer.json writes it.
extern const char* const kLlama3Pattern;

/// Cuts `text` (valid UTF-8) by each of `kinds` in turn into pieces that together are the text.
std::vector<std::string_view> split(const std::vector<Split>& kinds, std::string_view text);

}  // namespace mixlora
