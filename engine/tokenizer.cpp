#include "engine/tokenizer.h"

#include <algorithm>
#include <array>
#include <limits>
#include <queue>
#include <unordered_map>

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/pre_tokenizer.h"
#include "engine/utf8.h"

namespace mixlora {
namespace {

constexpr std::size_t kMaxTokens = 4'000'000;
constexpr const char* kMark = "\xe2\x96\x81";  // U+2581, SentencePiece's visible space

/// GPT-2's printable stand-in for each byte.
std::array<std::string, 256> byte_symbols() {
  std::array<std::string, 256> symbols;
  char32_t spare = 256;
  for (char32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    append_utf8(symbols.at(b), printable ? b : spare);
    spare += printable ? 0 : 1;
  }
  return symbols;
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (std::size_t at = text.find(from); at != std::string::npos;
       at = text.find(from, at + to.size()))
    text.replace(at, from.size(), to);
}

std::string text_of(const Json& j, const char* key, const std::string& where) {
  require(j.is_object() && j.contains(key) && j[key].is_string(), "{}: expected a string \"{}\"",
          where, key);
  return j[key].get<std::string>();
}
bool flag_of(const Json& j, const char* key, bool otherwise) {
  return j.contains(key) && j[key].is_boolean() ? j[key].get<bool>() : otherwise;
}

}  // namespace

struct Tokenizer::Impl {
  struct Merge {
    std::int32_t rank = 0, token = 0;
  };
  struct Special {
    std::string content;
    std::int32_t id = 0;
  };
  std::string file;
  std::vector<std::string> tokens;
  std::unordered_map<std::string, std::int32_t> ids;
  std::unordered_map<std::uint64_t, Merge> merges;
  std::vector<Special> specials;  // longest first
  std::vector<std::int32_t> prefix;
  std::array<std::string, 256> bytes = byte_symbols();
  std::unordered_map<std::string, unsigned char> byte_of;
  Split split_kind = Split::none;
  bool byte_level = false, byte_fallback = false, ignore_merges = false;
  bool mark_prepend = false, mark_first_only = false, mark_replace = false;
  std::int32_t unknown = -1;

  void read(const std::filesystem::path& directory);
  void read_model(const Json& model);
  void read_normalizer(const Json& normalizer);
  void read_pre_tokenizer(const Json& pre);
  void read_post_processor(const Json& post);
  std::int32_t id(const std::string& token) const {
    const auto at = ids.find(token);
    return at == ids.end() ? -1 : at->second;
  }
  void encode_piece(std::vector<std::int32_t>& out, std::string_view piece) const;
  void encode_plain(std::vector<std::int32_t>& out, std::string_view text, bool first) const;
  std::vector<std::int32_t> symbols(std::string_view piece) const;
  void merge(std::vector<std::int32_t>& symbols) const;
};

void Tokenizer::Impl::read_model(const Json& model) {
  const std::string where = file + ": model";
  require(text_of(model, "type", where) == "BPE", "{}: type {} is not supported; expected BPE",
          where, model["type"].dump());
  require(model.contains("vocab") && model["vocab"].is_object() && !model["vocab"].empty(),
          "{}: expected an object \"vocab\"", where);
  require(model["vocab"].size() <= kMaxTokens, "{}: {} tokens; at most {}", where,
          model["vocab"].size(), kMaxTokens);
  byte_fallback = flag_of(model, "byte_fallback", false);
  ignore_merges = flag_of(model, "ignore_merges", false);
  for (const auto& [token, value] : model["vocab"].items()) {
    require(value.is_number_unsigned() && value.get<std::uint64_t>() < 2 * kMaxTokens,
            "{}: vocab \"{}\": expected an id, found {}", where, token, value.dump());
    const auto number = value.get<std::size_t>();
    if (number >= tokens.size()) tokens.resize(number + 1);
    tokens[number] = token;
    ids.emplace(token, static_cast<std::int32_t>(number));
  }
  require(model.contains("merges") && model["merges"].is_array(), "{}: expected a list \"merges\"",
          where);
  std::int32_t rank = 0;
  for (const Json& m : model["merges"]) {
    std::string left, right;
    if (m.is_string()) {
      const auto text = m.get<std::string>();
      const std::size_t space = text.find(' ', 1);
      require(space != std::string::npos && space + 1 < text.size(),
              "{}: merge {}: expected two tokens, found {}", where, rank, m.dump());
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else {
      require(m.is_array() && m.size() == 2 && m[0].is_string() && m[1].is_string(),
              "{}: merge {}: expected two tokens, found {}", where, rank, m.dump());
      left = m[0].get<std::string>();
      right = m[1].get<std::string>();
    }
    const std::int32_t a = id(left), b = id(right), c = id(left + right);
    require(a >= 0 && b >= 0 && c >= 0, "{}: merge {}: \"{}\" + \"{}\" is not in the vocabulary",
            where, rank, left, right);
    merges.emplace((static_cast<std::uint64_t>(a) << 32) | static_cast<std::uint32_t>(b),
                   Merge{rank, c});
    ++rank;
  }
  if (model.contains("unk_token") && model["unk_token"].is_string())
    unknown = id(model["unk_token"].get<std::string>());
}

void Tokenizer::Impl::read_normalizer(const Json& n) {
  if (n.is_null()) return;
  const std::string where = file + ": normalizer", type = text_of(n, "type", where);
  if (type == "Sequence") {
    require(n.contains("normalizers") && n["normalizers"].is_array(),
            "{}: expected a list \"normalizers\"", where);
    for (const Json& part : n["normalizers"]) read_normalizer(part);
  } else if (type == "Prepend") {
    require(text_of(n, "prepend", where) == kMark, "{}: only Prepend of U+2581 is supported",
            where);
    mark_prepend = true;
  } else if (type == "Replace") {
    require(n.contains("pattern") && n["pattern"].is_object() &&
                n["pattern"].value("String", Json()) == " " &&
                text_of(n, "content", where) == kMark,
            "{}: only Replace of \" \" by U+2581 is supported", where);
    mark_replace = true;
  } else {
    fail("{}: type {} is not supported; expected Prepend and Replace as Llama-2 has, or null",
         where, type);
  }
}

void Tokenizer::Impl::read_pre_tokenizer(const Json& p) {
  if (p.is_null()) return;
  const std::string where = file + ": pre_tokenizer", type = text_of(p, "type", where);
  if (type == "Sequence") {
    require(p.contains("pretokenizers") && p["pretokenizers"].is_array(),
            "{}: expected a list \"pretokenizers\"", where);
    for (const Json& part : p["pretokenizers"]) read_pre_tokenizer(part);
  } else if (type == "Digits") {
    require(flag_of(p, "individual_digits", false),
            "{}: Digits: only individual_digits true is supported", where);
    split_kind = Split::digits_gpt2;
  } else if (type == "ByteLevel") {
    require(!flag_of(p, "add_prefix_space", true),
            "{}: ByteLevel: add_prefix_space true is not supported", where);
    byte_level = true;
    if (flag_of(p, "use_regex", true) && split_kind == Split::none) split_kind = Split::gpt2;
  } else if (type == "Split") {
    const bool known = p.contains("pattern") && p["pattern"].is_object() &&
                       p["pattern"].value("Regex", Json()) == kLlama3Pattern;
    require(known, "{}: Split by {} is not supported; known: Llama-3's pattern", where,
            p.value("pattern", Json()).dump());
    split_kind = Split::llama3;
  } else if (type == "Metaspace") {
    require(!flag_of(p, "split", true), "{}: Metaspace: only split false is supported", where);
    const std::string scheme = p.contains("prepend_scheme") && p["prepend_scheme"].is_string()
                                   ? p["prepend_scheme"].get<std::string>()
                                   : "always";
    mark_replace = true;
    mark_prepend = scheme != "never";
    mark_first_only = scheme == "first";
  } else {
    fail("{}: type {} is not supported; expected ByteLevel, Digits, Split or Metaspace", where,
         type);
  }
}

void Tokenizer::Impl::read_post_processor(const Json& p) {
  if (p.is_null()) return;
  const std::string where = file + ": post_processor", type = text_of(p, "type", where);
  if (type == "Sequence") {
    require(p.contains("processors") && p["processors"].is_array(),
            "{}: expected a list \"processors\"", where);
    for (const Json& part : p["processors"]) read_post_processor(part);
  } else if (type == "TemplateProcessing") {
    require(p.contains("single") && p["single"].is_array(), "{}: expected a list \"single\"",
            where);
    for (const Json& part : p["single"]) {
      if (part.contains("Sequence")) break;
      require(part.contains("SpecialToken"), "{}: expected SpecialToken or Sequence, found {}",
              where, part.dump());
      const std::string token = text_of(part["SpecialToken"], "id", where);
      require(id(token) >= 0, "{}: the special token \"{}\" is not in the vocabulary", where,
              token);
      prefix.push_back(id(token));
    }
  } else {
    require(type == "ByteLevel",
            "{}: type {} is not supported; expected TemplateProcessing, ByteLevel or null", where,
            type);
  }
}

void Tokenizer::Impl::read(const std::filesystem::path& directory) {
  const auto path = directory / "tokenizer.json";
  file = path.string();
  const Json json = read_json(path, std::size_t{64} << 20);
  require(json.is_object() && json.contains("model"), "{}: expected an object with \"model\"",
          file);
  read_model(json["model"]);
  const Json added = json.value("added_tokens", Json::array());
  require(added.is_array(), "{}: added_tokens: expected a list", file);
  for (const Json& t : added) {
    const std::string content = text_of(t, "content", file + ": added_tokens");
    require(!content.empty() && t.contains("id") && t["id"].is_number_unsigned() &&
                t["id"].get<std::uint64_t>() < 2 * kMaxTokens,
            "{}: added_tokens: expected a content and an id, found {}", file, t.dump());
    const auto number = t["id"].get<std::size_t>();
    if (number >= tokens.size()) tokens.resize(number + 1);
    tokens[number] = content;
    ids[content] = static_cast<std::int32_t>(number);
    specials.push_back({content, static_cast<std::int32_t>(number)});
  }
  std::stable_sort(specials.begin(), specials.end(), [](const Special& a, const Special& b) {
    return a.content.size() > b.content.size();
  });
  read_normalizer(json.value("normalizer", Json()));
  read_pre_tokenizer(json.value("pre_tokenizer", Json()));
  read_post_processor(json.value("post_processor", Json()));
  for (std::size_t b = 0; b < 256; ++b) {
    byte_of.emplace(bytes.at(b), static_cast<unsigned char>(b));
  }
}

std::vector<std::int32_t> Tokenizer::Impl::symbols(std::string_view piece) const {
  std::vector<std::int32_t> out;
  if (byte_level) {
    for (const char c : piece) {
      const std::int32_t t = id(bytes.at(static_cast<unsigned char>(c)));
      if (t >= 0 || unknown >= 0)
        out.push_back(t >= 0 ? t : unknown);  // some vocabularies lack some bytes: dropped
    }
    return out;
  }
  for (std::size_t at = 0; at < piece.size();) {
    const std::size_t n = code_point(piece, at)->bytes;
    const std::string letter(piece.substr(at, n));
    at += n;
    if (const std::int32_t t = id(letter); t >= 0) {
      out.push_back(t);
      continue;
    }
    std::vector<std::int32_t> fallback;
    for (const char c : letter)
      fallback.push_back(
          byte_fallback ? id(fmt::format("<0x{:02X}>", static_cast<unsigned char>(c))) : -1);
    if (std::find(fallback.begin(), fallback.end(), -1) == fallback.end())
      out.insert(out.end(), fallback.begin(), fallback.end());
    else if (unknown >= 0 && (out.empty() || out.back() != unknown))
      out.push_back(unknown);
  }
  return out;
}

/// Joins neighbours in the order of their merges' ranks, leftmost first among equals.
void Tokenizer::Impl::merge(std::vector<std::int32_t>& s) const {
  struct Candidate {
    std::int32_t rank, at, left, right, token;
    bool operator<(const Candidate& o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
  };
  const auto n = static_cast<std::int32_t>(s.size());
  std::vector<std::int32_t> next(s.size()), previous(s.size());
  for (std::int32_t i = 0; i < n; ++i) {
    next[static_cast<std::size_t>(i)] = i + 1 < n ? i + 1 : -1;
    previous[static_cast<std::size_t>(i)] = i - 1;
  }
  std::priority_queue<Candidate> queue;
  const auto offer = [&](std::int32_t i) {
    if (i < 0 || next[static_cast<std::size_t>(i)] < 0) return;
    const std::int32_t a = s[static_cast<std::size_t>(i)],
                       b = s[static_cast<std::size_t>(next[static_cast<std::size_t>(i)])];
    const auto m = merges.find((static_cast<std::uint64_t>(static_cast<std::uint32_t>(a)) << 32) |
                               static_cast<std::uint32_t>(b));
    if (m != merges.end()) queue.push({m->second.rank, i, a, b, m->second.token});
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

void Tokenizer::Impl::encode_piece(std::vector<std::int32_t>& out, std::string_view piece) const {
  std::vector<std::int32_t> s;
  if (ignore_merges) {
    std::string whole;
    if (byte_level)
      for (const char c : piece) whole += bytes.at(static_cast<unsigned char>(c));
    else
      whole = piece;
    if (const std::int32_t t = id(whole); t >= 0) {
      out.push_back(t);
      return;
    }
  }
  s = symbols(piece);
  merge(s);
  out.insert(out.end(), s.begin(), s.end());
}

void Tokenizer::Impl::encode_plain(std::vector<std::int32_t>& out, std::string_view text,
                                   bool first) const {
  if (text.empty()) return;
  if (!mark_prepend && !mark_replace) {
    for (const auto piece : split(split_kind, text)) encode_piece(out, piece);
    return;
  }
  std::string marked(text);
  if (mark_replace) replace_all(marked, " ", kMark);
  if (mark_prepend && (first || !mark_first_only) &&
      !(mark_first_only && marked.starts_with(kMark)))
    marked = kMark + marked;
  for (const auto piece : split(split_kind, marked)) encode_piece(out, piece);
}

Tokenizer::Tokenizer(const std::filesystem::path& directory) : impl_(std::make_unique<Impl>()) {
  impl_->read(directory);
}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  if (const auto bad = invalid_utf8(text))
    fail("tokenizer: byte {} of the text is not UTF-8", *bad);
  std::vector<std::int32_t> out;
  std::size_t from = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Impl::Special* found = nullptr;
    for (const auto& s : impl_->specials)
      if (text[at] == s.content[0] && text.compare(at, s.content.size(), s.content) == 0) {
        found = &s;
        break;
      }
    if (found == nullptr) {
      ++at;
      continue;
    }
    impl_->encode_plain(out, text.substr(from, at - from), from == 0);
    out.push_back(found->id);
    at += found->content.size();
    from = at;
  }
  impl_->encode_plain(out, text.substr(from), from == 0);
  return out;
}

std::vector<std::int32_t> Tokenizer::encode_with_special(std::string_view text) const {
  std::vector<std::int32_t> out = impl_->prefix;
  const auto rest = encode(text);
  out.insert(out.end(), rest.begin(), rest.end());
  return out;
}

std::string Tokenizer::decode(const std::vector<std::int32_t>& ids) const {
  std::string out;
  for (const auto t : ids) {
    const std::string token = this->token(t);
    const bool special = std::any_of(impl_->specials.begin(), impl_->specials.end(),
                                     [&](const auto& s) { return s.id == t; });
    if (special) {
      out += token;
    } else if (impl_->byte_level) {
      for (std::size_t at = 0; at < token.size();) {
        const auto c = code_point(token, at);
        const std::size_t n = c ? c->bytes : 1;
        const auto byte = impl_->byte_of.find(token.substr(at, n));
        if (byte != impl_->byte_of.end())
          out.push_back(static_cast<char>(byte->second));
        else
          out += token.substr(at, n);
        at += n;
      }
    } else if (impl_->byte_fallback && token.size() == 6 && token.starts_with("<0x") &&
               token.back() == '>') {
      out.push_back(static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16)));
    } else {
      out += token;
    }
  }
  if (impl_->mark_replace) {
    replace_all(out, kMark, " ");
    if (impl_->mark_prepend && out.starts_with(' ')) out.erase(0, 1);
  }
  return out;
}

std::string Tokenizer::token(std::int32_t id) const {
  require(id >= 0 && id < size(), "tokenizer: token {} is outside the vocabulary of {}", id,
          size());
  return impl_->tokens[static_cast<std::size_t>(id)];
}
std::int64_t Tokenizer::size() const { return static_cast<std::int64_t>(impl_->tokens.size()); }
std::vector<std::int32_t> Tokenizer::prefix() const { return impl_->prefix; }

}  // namespace mixlora
