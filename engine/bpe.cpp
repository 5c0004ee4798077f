#include "engine/bpe.h"

#include <algorithm>
#include <queue>

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/utf8.h"

namespace mixlora {
namespace {

constexpr std::size_t kMaxTokens = 4'000'000;
constexpr std::size_t kMaxHoles = 65'536;  // ids that no token has: some models reserve a range

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) |
         static_cast<std::uint32_t>(right);
}

bool boolean(const Json& model, const char* key, const std::string& where) {
  const Json value = model.value(key, Json(false));
  require(value.is_boolean(), "{}: \"{}\": expected true or false, found {}", where, key,
          shown(value));
  return value.get<bool>();
}

/// "left right" (tokenizers before 0.20) or ["left", "right"].
std::pair<std::string, std::string> merge_of(const Json& m, std::int32_t rank,
                                             const std::string& where) {
  if (m.is_array() && m.size() == 2 && m[0].is_string() && m[1].is_string())
    return {m[0].get<std::string>(), m[1].get<std::string>()};
  const std::string text = m.is_string() ? m.get<std::string>() : "";
  const std::size_t space = text.find(' ');
  if (space == std::string::npos || space != text.rfind(' '))
    fail("{}: merges[{}]: expected two tokens, [\"a\", \"b\"] or \"a b\", found {}", where, rank,
         shown(m));
  return {text.substr(0, space), text.substr(space + 1)};
}

}  // namespace

const std::array<std::string, 256>& byte_symbols() {
  static const auto kSymbols = [] {
    std::array<std::string, 256> symbols;
    char32_t spare = 256;
    for (char32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      append_utf8(symbols.at(b), printable ? b : spare);
      spare += printable ? 0 : 1;
    }
    return symbols;
  }();
  return kSymbols;
}

Bpe::Bpe(const Json& tokenizer, const std::string& file) {
  require(tokenizer.is_object() && tokenizer.contains("model") && tokenizer["model"].is_object(),
          "{}: expected an object \"model\"", file);
  const Json& model = tokenizer["model"];
  const std::string where = file + ": model";
  require(model.contains("type") && model["type"] == "BPE",
          "{}: type {} is not supported; expected \"BPE\"", where,
          shown(model.value("type", Json())));
  require(model.contains("vocab") && model["vocab"].is_object() && !model["vocab"].empty(),
          "{}: expected an object \"vocab\" of token: id", where);
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json value = model.value(key, Json());
    require(value.is_null() || value == "", "{}: \"{}\" is {}; expected null", where, key,
            shown(value));
  }
  byte_fallback_ = boolean(model, "byte_fallback", where);
  fuse_unknown_ = boolean(model, "fuse_unk", where);
  ignore_merges_ = boolean(model, "ignore_merges", where);

  const Json added = tokenizer.value("added_tokens", Json::array());
  require(added.is_array(), "{}: \"added_tokens\": expected a list, found {}", file,
          added.type_name());
  const std::size_t count = model["vocab"].size() + added.size();
  require(count <= kMaxTokens, "{}: {} tokens; at most {}", where, count, kMaxTokens);
  ids_.reserve(count);
  tokens_.reserve(count);
  // Room is taken by the highest id, so that may not be far above the number of tokens.
  const std::size_t limit = count + kMaxHoles;
  for (const auto& [token, value] : model["vocab"].items())
    put(token, value, limit, where + ": vocab");
  require(model.contains("merges") && model["merges"].is_array(), "{}: expected a list \"merges\"",
          where);
  read_merges(model["merges"], where);
  for (std::size_t i = 0; i < added.size(); ++i) {
    const Json& t = added[i];
    const std::string here = fmt::format("{}: added_tokens[{}]", file, i);
    require(
        t.is_object() && t.contains("content") && t["content"].is_string() && t["content"] != "",
        "{}: expected an object with a \"content\", found {}", here, shown(t));
    put(t["content"].get<std::string>(), t.value("id", Json()), limit, here);
  }
  if (model.contains("unk_token") && !model["unk_token"].is_null()) {
    require(model["unk_token"].is_string(), "{}: \"unk_token\": expected a token or null, found {}",
            where, shown(model["unk_token"]));
    unknown_ = id(model["unk_token"].get<std::string>());
    require(unknown_ >= 0, "{}: the unk_token {} is not in the vocabulary", where,
            shown(model["unk_token"]));
  }
  for (std::size_t b = 0; b < 256; ++b) {
    byte_level_ids_.at(b) = id(byte_symbols().at(b));
    fallback_ids_.at(b) = id(fmt::format("<0x{:02X}>", b));
  }
}

void Bpe::put(const std::string& token, const Json& value, std::size_t limit,
              const std::string& where) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() >= limit)
    fail("{}: {}: expected an id from 0 to {}, found {}", where, in_quotes(token), limit - 1,
         shown(value));
  const auto number = value.get<std::size_t>();
  if (number >= tokens_.size()) tokens_.resize(number + 1);
  if (!tokens_[number].empty() && tokens_[number] != token)
    fail("{}: the id {} stands for both {} and {}", where, number, in_quotes(tokens_[number]),
         in_quotes(token));
  const auto [at, fresh] = ids_.emplace(token, static_cast<std::int32_t>(number));
  if (!fresh && at->second != static_cast<std::int32_t>(number))
    fail("{}: {} has the id {}, and {} elsewhere", where, in_quotes(token), number, at->second);
  tokens_[number] = token;
}

void Bpe::read_merges(const Json& merges, const std::string& where) {
  require(merges.size() <= kMaxTokens, "{}: {} merges; at most {}", where, merges.size(),
          kMaxTokens);
  merges_.reserve(merges.size());
  std::int32_t rank = 0;
  for (const Json& m : merges) {
    const auto [left, right] = merge_of(m, rank, where);
    const std::int32_t a = id(left), b = id(right), c = id(left + right);
    if (a < 0 || b < 0 || c < 0)
      fail("{}: merges[{}]: {}, {} and both joined must be in the vocabulary", where, rank,
           in_quotes(left), in_quotes(right));
    merges_.insert_or_assign(pair_key(a, b), Merge{rank, c});  // the last one counts
    ++rank;
  }
}

std::int32_t Bpe::id(std::string_view token) const {
  const auto at = ids_.find(token);
  return at == ids_.end() ? -1 : at->second;
}

Bpe::Ids Bpe::symbols(std::string_view word, bool byte_level) const {
  Ids out;
  out.reserve(word.size());
  bool pending = false;  // an unknown letter not yet written: with fuse_unk its neighbours join it
  const auto letter = [&](std::int32_t token, std::string_view bytes) {
    if (token >= 0) {
      if (pending) out.push_back(unknown_);
      pending = false;
      out.push_back(token);
      return;
    }
    const auto fallback = [&](char c) { return fallback_ids_.at(static_cast<unsigned char>(c)); };
    if (byte_fallback_ &&
        std::all_of(bytes.begin(), bytes.end(), [&](char c) { return fallback(c) >= 0; })) {
      for (const char c : bytes) out.push_back(fallback(c));
      return;
    }
    if (unknown_ < 0) return;  // nothing stands for it: dropped, as the tokenizers package does
    if (pending && !fuse_unknown_) out.push_back(unknown_);
    pending = true;
  };
  for (std::size_t at = 0; at < word.size();) {
    if (byte_level) {
      const auto byte = static_cast<unsigned char>(word[at++]);
      letter(byte_level_ids_.at(byte), byte_symbols().at(byte));
    } else {
      const std::string_view bytes = word.substr(at, code_point(word, at)->bytes);
      at += bytes.size();
      letter(id(bytes), bytes);
    }
  }
  if (pending) out.push_back(unknown_);
  return out;
}

/// Joins neighbours in the order of their merges' ranks, leftmost first among equals.
void Bpe::merge(Ids& s) const {
  struct Candidate {
    std::int32_t rank, at, left, right, token;
    bool operator<(const Candidate& o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
  };
  const auto n = static_cast<std::int32_t>(s.size());
  Ids next(s.size()), previous(s.size());
  for (std::int32_t i = 0; i < n; ++i) {
    next[static_cast<std::size_t>(i)] = i + 1 < n ? i + 1 : -1;
    previous[static_cast<std::size_t>(i)] = i - 1;
  }
  std::priority_queue<Candidate> queue;
  const auto offer = [&](std::int32_t i) {
    if (i < 0 || next[static_cast<std::size_t>(i)] < 0) return;
    const std::int32_t a = s[static_cast<std::size_t>(i)],
                       b = s[static_cast<std::size_t>(next[static_cast<std::size_t>(i)])];
    if (const auto m = merges_.find(pair_key(a, b)); m != merges_.end())
      queue.push({m->second.rank, i, a, b, m->second.token});
  };
  for (std::int32_t i = 0; i < n; ++i) offer(i);
  while (!queue.empty()) {
    const Candidate c = queue.top();
    queue.pop();
    const auto at = static_cast<std::size_t>(c.at);
    const std::int32_t right = next[at];
    if (s[at] != c.left || right < 0 || s[static_cast<std::size_t>(right)] != c.right)
      continue;  // already joined otherwise
    s[at] = c.token;
    s[static_cast<std::size_t>(right)] = -1;
    next[at] = next[static_cast<std::size_t>(right)];
    if (next[at] >= 0) previous[static_cast<std::size_t>(next[at])] = c.at;
    offer(previous[at]);
    offer(c.at);
  }
  s.erase(std::remove(s.begin(), s.end(), -1), s.end());
}

void Bpe::encode(Ids& out, std::string_view word, bool byte_level) const {
  if (ignore_merges_) {
    std::string whole;
    if (byte_level)
      for (const char c : word) whole += byte_symbols().at(static_cast<unsigned char>(c));
    else
      whole = word;
    if (const std::int32_t t = id(whole); t >= 0) {
      out.push_back(t);
      return;
    }
  }
  Ids s = symbols(word, byte_level);
  if (s.size() > 1) merge(s);
  out.insert(out.end(), s.begin(), s.end());
}

}  // namespace mixlora
