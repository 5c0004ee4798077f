#include "engine/tokenizer.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <unordered_map>

#include <nlohmann/json.hpp>

#include "engine/bpe.h"
#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/pre_tokenizer.h"
#include "engine/utf8.h"

namespace mixlora {
namespace {

constexpr const char* kMark = "\xe2\x96\x81";  // U+2581, SentencePiece's visible space

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
const Json& list_of(const Json& j, const char* key, const std::string& where) {
  require(j.is_object() && j.contains(key) && j[key].is_array(), "{}: expected a list \"{}\"",
          where, key);
  return j[key];
}
bool flag_of(const Json& j, const char* key, bool otherwise, const std::string& where) {
  if (!j.contains(key) || j[key].is_null()) return otherwise;
  require(j[key].is_boolean(), "{}: \"{}\": expected true or false, found {}", where, key,
          shown(j[key]));
  return j[key].get<bool>();
}

/// Added tokens and where they stand in a text: at every place the longest.
class AddedTokens {
 public:
  struct Token {
    std::string text;
    std::int32_t id = 0;
  };
  void add(Token token) {
    starts_.at(static_cast<unsigned char>(token.text[0])) = true;
    const auto longer = [](const Token& a, const Token& b) {
      return a.text.size() > b.text.size();
    };
    tokens_.insert(std::upper_bound(tokens_.begin(), tokens_.end(), token, longer), token);
  }
  /// Calls plain(text, begin) for what lies between tokens and token(id) for each of them.
  template <class Plain, class Special>
  void cut(std::string_view text, Plain&& plain, Special&& special) const {
    std::size_t from = 0;
    for (std::size_t at = 0; at < text.size();) {
      const Token* found =
          starts_.at(static_cast<unsigned char>(text[at])) ? find(text, at) : nullptr;
      if (found == nullptr) {
        ++at;
        continue;
      }
      if (at > from) plain(text.substr(from, at - from), from);
      special(found->id);
      at += found->text.size();
      from = at;
    }
    if (text.size() > from) plain(text.substr(from), from);
  }

 private:
  const Token* find(std::string_view text, std::size_t at) const {
    const auto here = [&](const Token& t) { return text.compare(at, t.text.size(), t.text) == 0; };
    const auto token = std::find_if(tokens_.begin(), tokens_.end(), here);
    return token == tokens_.end() ? nullptr : &*token;
  }
  std::vector<Token> tokens_;  // longest first
  std::array<bool, 256> starts_{};
};

enum class Metaspace : std::uint8_t { none, never, first, always };

}  // namespace

struct Tokenizer::Impl {
  std::string file;
  Bpe bpe;
  AddedTokens raw, normalised;  // found before, and after, the normaliser has run
  std::vector<std::int32_t> special_ids, prefix, suffix;
  std::vector<Split> splits;
  bool byte_level = false;
  bool prepend = false, replace = false;  // the normaliser
  Metaspace metaspace = Metaspace::none;  // the pre-tokenizer that does both instead

  Impl(const Json& json, std::string name);
  void read_added(const Json& added);
  void read_normalizer(const Json& n);
  void read_pre_tokenizer(const Json& p);
  void read_split(const Json& p, const std::string& where);
  void read_metaspace(const Json& p, const std::string& where);
  void read_post_processor(const Json& p);
  std::string normalise(std::string_view text) const;
  void encode_piece(std::vector<std::int32_t>& out, std::string_view text, bool first) const;
};

Tokenizer::Impl::Impl(const Json& json, std::string name) : file(std::move(name)), bpe(json, file) {
  read_normalizer(json.value("normalizer", Json()));
  read_pre_tokenizer(json.value("pre_tokenizer", Json()));
  read_post_processor(json.value("post_processor", Json()));
  read_added(json.value("added_tokens", Json::array()));
}

void Tokenizer::Impl::read_added(const Json& added) {
  for (const Json& t : added) {
    const auto content = t["content"].get<std::string>();
    const std::string where = fmt::format("{}: added_tokens: {}", file, in_quotes(content));
    for (const char* key : {"single_word", "lstrip", "rstrip"})
      require(!flag_of(t, key, false, where), "{}: \"{}\" true is not supported; expected false",
              where, key);
    const std::int32_t id = bpe.id(content);
    special_ids.push_back(id);
    if (flag_of(t, "normalized", false, where))
      normalised.add({normalise(content), id});
    else
      raw.add({content, id});
  }
  std::sort(special_ids.begin(), special_ids.end());
}

void Tokenizer::Impl::read_normalizer(const Json& n) {
  if (n.is_null()) return;
  const std::string where = file + ": normalizer", type = text_of(n, "type", where);
  if (type == "Sequence") {
    for (const Json& part : list_of(n, "normalizers", where)) read_normalizer(part);
  } else if (type == "Prepend") {
    require(text_of(n, "prepend", where) == kMark && !prepend,
            "{}: only one Prepend, of U+2581, is supported", where);
    prepend = true;
  } else if (type == "Replace") {
    require(n.contains("pattern") && n["pattern"] == Json{{"String", " "}} &&
                text_of(n, "content", where) == kMark,
            "{}: only Replace of \" \" by U+2581 is supported", where);
    replace = true;
  } else {
    fail("{}: type {} is not supported; expected Prepend and Replace as Llama-2 has, or null",
         where, in_quotes(type));
  }
}

void Tokenizer::Impl::read_pre_tokenizer(const Json& p) {
  if (p.is_null()) return;
  const std::string where = file + ": pre_tokenizer", type = text_of(p, "type", where);
  require(!byte_level, "{}: {} after ByteLevel; expected ByteLevel last", where, in_quotes(type));
  if (type == "Sequence") {
    for (const Json& part : list_of(p, "pretokenizers", where)) read_pre_tokenizer(part);
  } else if (type == "Digits") {
    require(flag_of(p, "individual_digits", false, where),
            "{}: Digits: only individual_digits true is supported", where);
    splits.push_back(Split::digits);
  } else if (type == "ByteLevel") {
    require(!flag_of(p, "add_prefix_space", true, where),
            "{}: ByteLevel: only add_prefix_space false is supported", where);
    byte_level = true;
    if (flag_of(p, "use_regex", true, where)) splits.push_back(Split::gpt2);
  } else if (type == "Split") {
    read_split(p, where);
  } else if (type == "Metaspace") {
    read_metaspace(p, where);
  } else {
    fail("{}: type {} is not supported; expected ByteLevel, Digits, Split or Metaspace", where,
         in_quotes(type));
  }
}

void Tokenizer::Impl::read_split(const Json& p, const std::string& where) {
  const Json pattern = p.value("pattern", Json());
  require(pattern == Json{{"Regex", kLlama3Pattern}},
          "{}: Split by {} is not supported; expected Llama-3's pattern", where, shown(pattern));
  require(p.value("behavior", Json()) == "Isolated" && !flag_of(p, "invert", false, where),
          "{}: Split: expected behavior \"Isolated\" and invert false", where);
  splits.push_back(Split::llama3);
}

void Tokenizer::Impl::read_metaspace(const Json& p, const std::string& where) {
  require(metaspace == Metaspace::none && splits.empty(), "{}: Metaspace must stand alone", where);
  require(!flag_of(p, "split", true, where), "{}: Metaspace: only split false is supported", where);
  require(p.value("replacement", Json(kMark)) == kMark,
          "{}: Metaspace: only the replacement U+2581 is supported", where);
  const std::string scheme = p.contains("prepend_scheme") ? text_of(p, "prepend_scheme", where)
                             : flag_of(p, "add_prefix_space", true, where) ? "always"
                                                                           : "never";
  require(scheme == "always" || scheme == "first" || scheme == "never",
          "{}: prepend_scheme {}; expected \"always\", \"first\" or \"never\"", where,
          in_quotes(scheme));
  metaspace = scheme == "always"  ? Metaspace::always
              : scheme == "first" ? Metaspace::first
                                  : Metaspace::never;
}

void Tokenizer::Impl::read_post_processor(const Json& p) {
  if (p.is_null()) return;
  const std::string where = file + ": post_processor", type = text_of(p, "type", where);
  if (type == "Sequence") {
    for (const Json& part : list_of(p, "processors", where)) read_post_processor(part);
  } else if (type == "TemplateProcessing") {
    bool before = true;
    for (const Json& part : list_of(p, "single", where)) {
      if (part.is_object() && part.contains("Sequence")) {
        require(before, "{}: the text stands twice in \"single\"", where);
        before = false;
        continue;
      }
      require(part.is_object() && part.contains("SpecialToken"),
              "{}: expected SpecialToken or Sequence, found {}", where, shown(part));
      const std::string token = text_of(part["SpecialToken"], "id", where);
      require(bpe.id(token) >= 0, "{}: the special token {} is not in the vocabulary", where,
              in_quotes(token));
      (before ? prefix : suffix).push_back(bpe.id(token));
    }
    require(!before, "{}: \"single\" has no Sequence: the text itself is missing", where);
  } else {
    require(type == "ByteLevel",
            "{}: type {} is not supported; expected TemplateProcessing, ByteLevel or null", where,
            in_quotes(type));
  }
}

std::string Tokenizer::Impl::normalise(std::string_view text) const {
  std::string out = prepend && !text.empty() ? kMark : "";
  out += text;
  if (replace) replace_all(out, " ", kMark);
  return out;
}

/// Pre-tokenizes and merges what lies between added tokens; `first`: it begins the whole text.
void Tokenizer::Impl::encode_piece(std::vector<std::int32_t>& out, std::string_view text,
                                   bool first) const {
  std::string marked;
  if (metaspace != Metaspace::none) {
    marked = text;
    replace_all(marked, " ", kMark);
    const bool wanted = metaspace == Metaspace::always || (metaspace == Metaspace::first && first);
    if (wanted && !marked.starts_with(kMark)) marked = kMark + marked;
    text = marked;
  }
  for (const auto word : split(splits, text)) bpe.encode(out, word, byte_level);
}

Tokenizer::Tokenizer(const std::filesystem::path& directory) {
  const auto path = directory / "tokenizer.json";
  impl_ = std::make_unique<Impl>(read_json(path, std::size_t{64} << 20), path.string());
}
Tokenizer::Tokenizer(const Json& json, const std::string& name)
    : impl_(std::make_unique<Impl>(json, name)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  if (const auto bad = invalid_utf8(text))
    fail("tokenizer: byte {} of the text is not UTF-8", *bad);
  std::vector<std::int32_t> out;
  const auto special = [&](std::int32_t id) { out.push_back(id); };
  impl_->raw.cut(
      text,
      [&](std::string_view plain, std::size_t begin) {
        const std::string normal = impl_->normalise(plain);
        impl_->normalised.cut(
            normal,
            [&](std::string_view piece, std::size_t at) {
              impl_->encode_piece(out, piece, begin + at == 0);
            },
            special);
      },
      special);
  return out;
}

std::vector<std::int32_t> Tokenizer::encode_with_special(std::string_view text) const {
  std::vector<std::int32_t> out = impl_->prefix;
  const auto rest = encode(text);
  out.insert(out.end(), rest.begin(), rest.end());
  out.insert(out.end(), impl_->suffix.begin(), impl_->suffix.end());
  return out;
}

std::string Tokenizer::decode(const std::vector<std::int32_t>& ids) const {
  static const auto kByteOf = [] {
    std::unordered_map<std::string, char> map;
    for (std::size_t b = 0; b < 256; ++b) map.emplace(byte_symbols().at(b), static_cast<char>(b));
    return map;
  }();
  std::string out;
  for (const auto t : ids) {
    const std::string token = this->token(t);
    if (impl_->byte_level &&
        !std::binary_search(impl_->special_ids.begin(), impl_->special_ids.end(), t)) {
      for (std::size_t at = 0; at < token.size();) {
        const auto c = code_point(token, at);
        const std::string symbol = token.substr(at, c ? c->bytes : 1);
        const auto byte = kByteOf.find(symbol);
        out += byte == kByteOf.end() ? symbol : std::string(1, byte->second);
        at += symbol.size();
      }
    } else if (impl_->bpe.byte_fallback() && token.size() == 6 && token.starts_with("<0x") &&
               token.back() == '>' && std::isxdigit(static_cast<unsigned char>(token[3])) != 0 &&
               std::isxdigit(static_cast<unsigned char>(token[4])) != 0) {
      out.push_back(static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16)));
    } else {
      out += token;
    }
  }
  if (impl_->replace || impl_->metaspace != Metaspace::none) {
    replace_all(out, kMark, " ");
    const bool added = impl_->prepend || impl_->metaspace > Metaspace::never;
    if (added && out.starts_with(' ')) out.erase(0, 1);
  }
  return with_replacements(out);
}

std::string Tokenizer::token(std::int32_t id) const {
  require(id >= 0 && id < size(), "tokenizer: token {} is outside the vocabulary of {}", id,
          size());
  return impl_->bpe.token(id);
}
std::int64_t Tokenizer::size() const { return impl_->bpe.size(); }
std::vector<std::int32_t> Tokenizer::prefix() const { return impl_->prefix; }

}  // namespace mixlora
