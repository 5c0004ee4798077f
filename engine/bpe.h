// Bpe: a vocabulary and the byte-pair merging of one word, from tokenizer.json's "model".
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace mixlora {

/// GPT-2's printable stand-in for each byte, as byte-level vocabularies are written.
const std::array<std::string, 256>& byte_symbols();

class Bpe {
 public:
  /// Reads "model" and "added_tokens" of a tokenizer.json; `file` is what errors call it. Throws
  /// InputError.
  Bpe(const nlohmann::json& tokenizer, const std::string& file);

  /// Appends the ids of one pre-tokenized word; a byte-level word is given as its bytes.
  void encode(std::vector<std::int32_t>& out, std::string_view word, bool byte_level) const;
  /// -1 when there is no such token.
  std::int32_t id(std::string_view token) const;
  const std::string& token(std::int32_t id) const { return tokens_[static_cast<std::size_t>(id)]; }
  std::int64_t size() const { return static_cast<std::int64_t>(tokens_.size()); }
  bool byte_fallback() const { return byte_fallback_; }

 private:
  struct Merge {
    std::int32_t rank = 0, token = 0;
  };
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
  };
  using Ids = std::vector<std::int32_t>;
  void put(const std::string& token, const nlohmann::json& id, std::size_t limit,
           const std::string& where);
  void read_merges(const nlohmann::json& merges, const std::string& where);
  Ids symbols(std::string_view word, bool byte_level) const;
  void merge(Ids& symbols) const;

  std::vector<std::string> tokens_;
  std::unordered_map<std::string, std::int32_t, Hash, std::equal_to<>> ids_;
  std::unordered_map<std::uint64_t, Merge> merges_;
  std::array<std::int32_t, 256> byte_level_ids_{}, fallback_ids_{};  // -1: not in the vocabulary
  std::int32_t unknown_ = -1;
  bool byte_fallback_ = false, fuse_unknown_ = false, ignore_merges_ = false;
};

}  // namespace mixlora
