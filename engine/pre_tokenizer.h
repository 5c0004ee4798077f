// Pre-tokenizers: where a text is cut before byte-pair merging.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace mixlora {

enum class Split : std::uint8_t {
  none,         // the text stays whole
  gpt2,         // GPT-2's pattern, the one ByteLevel uses
  digits_gpt2,  // every digit apart, then GPT-2's pattern (SmolLM2)
  llama3,       // Llama-3's pattern
};

/// GPT-2's and Llama-3's patterns as tokenizer.json writes them.
extern const char* const kLlama3Pattern;

/// Cuts `text` (valid UTF-8) into pieces that together are the text.
std::vector<std::string_view> split(Split kind, std::string_view text);

}  // namespace mixlora
