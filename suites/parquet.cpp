#include "suites/parquet.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "suites/thrift.h"

namespace mixlora {
namespace {

constexpr std::int64_t kMaxRows = 1'000'000, kMaxValues = 1 << 24, kMaxPage = 1 << 28;
enum Type { int32 = 1, int64 = 2, byte_array = 6 };            // parquet.thrift, Type
enum PageType { data_page = 0, dictionary = 2, data_v2 = 3 };  // PageType
enum Encoding { plain = 0, plain_dictionary = 2, rle_dictionary = 8 };

std::uint32_t word_at(std::string_view bytes, std::size_t at, const std::string& name) {
  require(bytes.size() >= 4 && at <= bytes.size() - 4, "{}: a page ends early", name);
  std::uint32_t n = 0;
  std::memcpy(&n, bytes.data() + at, 4);
  return n;
}

/// A column's place in the schema.
struct Leaf {
  std::string path;    // as in the file: "choices.text.list.element"
  std::string column;  // as people write it: "choices.text"
  std::int64_t type = 0;
  unsigned definition = 0, repetition = 0;  // highest levels
  unsigned listed = 0;                      // definition level at which a list has an element
};

/// The runs and packed groups in which levels and dictionary indices are kept.
std::vector<std::uint32_t> hybrid(std::string_view bytes, unsigned width, std::size_t count,
                                  const std::string& name) {
  std::vector<std::uint32_t> out;
  out.reserve(count);
  require(width <= 32, "{}: numbers of {} bits", name, width);
  std::size_t at = 0;
  const auto next = [&]() -> std::uint32_t {
    require(at < bytes.size(), "{}: a page ends early", name);
    return static_cast<unsigned char>(bytes[at++]);
  };
  while (out.size() < count) {
    std::uint64_t head = 0;
    for (unsigned shift = 0;; shift += 7) {
      require(shift < 35, "{}: a run's length does not end", name);
      const std::uint64_t b = next();
      head |= (b & 127) << shift;
      if (b < 128) break;
    }
    if ((head & 1) == 0) {
      std::uint32_t value = 0;
      for (unsigned i = 0; i < (width + 7) / 8; ++i) value |= next() << (8 * i);
      const std::uint64_t run = std::min<std::uint64_t>(head >> 1, count - out.size());
      require(head >> 1 > 0, "{}: an empty run", name);
      out.insert(out.end(), run, value);
      continue;
    }
    std::uint64_t held = 0;
    unsigned bits = 0;
    for (std::uint64_t i = 0; i < (head >> 1) * 8 && out.size() < count; ++i) {
      for (; bits < width; bits += 8) held |= std::uint64_t{next()} << bits;
      out.push_back(static_cast<std::uint32_t>(held & ((std::uint64_t{1} << width) - 1)));
      held >>= width;
      bits -= width;
    }
    require(head >> 1 > 0, "{}: an empty group", name);
  }
  return out;
}

std::vector<Json> plain_values(std::string_view bytes, std::int64_t type, std::size_t count,
                               const std::string& name) {
  std::vector<Json> out;
  std::size_t at = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (type == byte_array) {
      const std::uint32_t length = word_at(bytes, at, name);
      require(length <= bytes.size() - at - 4, "{}: a page ends early", name);
      out.emplace_back(std::string(bytes.substr(at + 4, length)));
      at += 4 + length;
    } else if (type == int32) {
      out.emplace_back(static_cast<std::int32_t>(word_at(bytes, at, name)));
      at += 4;
    } else {
      const std::uint64_t low = word_at(bytes, at, name), high = word_at(bytes, at + 4, name);
      out.emplace_back(static_cast<std::int64_t>(high << 32 | low));
      at += 8;
    }
  }
  return out;
}

/// One column chunk, page by page, set into records.
class Chunk {
 public:
  Chunk(const Leaf& leaf, std::string name, std::vector<Json>& records, std::size_t first,
        std::size_t rows)
      : leaf_(leaf), name_(std::move(name)), records_(records), first_(first), rows_(rows) {
    std::string pointer = "/";
    for (const char c : leaf.column) pointer += c == '.' ? '/' : c;
    at_ = Json::json_pointer(pointer);
  }

  /// Takes the values it holds from `left`, what the whole file may still hold: a run of a few
  /// bytes can state millions.
  void read(std::string_view file, const ThriftValue& meta, std::int64_t& left) {
    const std::int64_t total = meta.at(5, name_).number;
    std::int64_t at = meta.at(9, name_).number;
    if (meta.has(11)) at = std::min(at, meta.at(11, name_).number);
    codec_ = meta.at(4, name_).number;
    require(codec_ == 0 || codec_ == 1,
            "{}: compression {} is not read here (only none and Snappy)", name_, codec_);
    for (std::int64_t seen = 0; seen < total;) {
      require(at >= 0 && at < static_cast<std::int64_t>(file.size()), "{}: a page lies outside",
              name_);
      std::size_t used = 0;
      const auto from = static_cast<std::size_t>(at);
      const ThriftValue head = read_thrift(file.substr(from), used, name_);
      const std::int64_t size = head.at(3, name_).number, whole = head.at(2, name_).number;
      require(size >= 0 && whole >= 0 && whole <= kMaxPage &&
                  static_cast<std::uint64_t>(size) <= file.size() - from - used,
              "{}: a page of {} bytes lies outside the file", name_, size);
      const auto bytes = file.substr(from + used, static_cast<std::size_t>(size));
      at += static_cast<std::int64_t>(used) + size;
      const std::int64_t held = page(head, bytes, static_cast<std::size_t>(whole), left);
      seen += held;
      left -= held;
    }
    require(row_ == rows_, "{}: {} rows, expected {}", name_, row_, rows_);
  }

 private:
  /// Returns how many values the page holds, `most` or fewer.
  std::int64_t page(const ThriftValue& head, std::string_view bytes, std::size_t whole,
                    std::int64_t most) {
    const std::int64_t kind = head.at(1, name_).number;
    if (kind == dictionary) {
      const std::string plain_bytes = unpacked(bytes, whole, true);
      dictionary_ = plain_values(plain_bytes, leaf_.type,
                                 count_of(head.at(7, name_).at(1, name_).number), name_);
      return 0;
    }
    require(kind == data_page || kind == data_v2, "{}: no page type {}", name_, kind);
    const bool newer = kind == data_v2;
    const ThriftValue& h = head.at(newer ? 8 : 5, name_);
    const std::size_t count = count_of(h.at(1, name_).number);
    require(static_cast<std::int64_t>(count) <= most, "{}: more than {} values in the file", name_,
            kMaxValues);
    const std::int64_t encoding = h.at(newer ? 4 : 2, name_).number;
    std::vector<std::uint32_t> repetition(count, 0), definition(count, leaf_.definition);
    std::string values;
    if (newer) {
      const auto definitions = count_of(h.at(5, name_).number),
                 repetitions = count_of(h.at(6, name_).number);
      const std::size_t levels = definitions + repetitions;
      require(levels <= bytes.size() && levels <= whole, "{}: a page ends early", name_);
      if (leaf_.repetition > 0)
        repetition = hybrid(bytes.substr(0, repetitions), width(leaf_.repetition), count, name_);
      if (leaf_.definition > 0)
        definition =
            hybrid(bytes.substr(repetitions, definitions), width(leaf_.definition), count, name_);
      values =
          unpacked(bytes.substr(levels), whole - levels, !h.has(7) || h.at(7, name_).number != 0);
    } else {
      values = unpacked(bytes, whole, true);
      std::size_t at = 0;
      for (auto* levels : {&repetition, &definition}) {
        const unsigned deepest = levels == &repetition ? leaf_.repetition : leaf_.definition;
        if (deepest == 0) continue;
        const std::uint32_t length = word_at(values, at, name_);
        require(length <= values.size() - at - 4, "{}: a page ends early", name_);
        *levels =
            hybrid(std::string_view(values).substr(at + 4, length), width(deepest), count, name_);
        at += 4 + length;
      }
      values.erase(0, at);
    }
    place(repetition, definition, decoded(values, encoding, present(definition)));
    return static_cast<std::int64_t>(count);
  }

  std::size_t count_of(std::int64_t n) const {
    require(n >= 0 && n <= kMaxValues, "{}: a count of {}", name_, n);
    return static_cast<std::size_t>(n);
  }
  static unsigned width(unsigned most) { return static_cast<unsigned>(std::bit_width(most)); }
  std::size_t present(const std::vector<std::uint32_t>& definition) const {
    return static_cast<std::size_t>(
        std::count(definition.begin(), definition.end(), leaf_.definition));
  }
  std::string unpacked(std::string_view bytes, std::size_t whole, bool packed) const {
    if (codec_ == 1 && packed) return decompress_snappy(bytes, whole, name_);
    require(bytes.size() == whole, "{}: a page of {} bytes, expected {}", name_, bytes.size(),
            whole);
    return std::string(bytes);
  }
  std::vector<Json> decoded(const std::string& values, std::int64_t encoding, std::size_t count) {
    if (encoding == plain) return plain_values(values, leaf_.type, count, name_);
    require(encoding == plain_dictionary || encoding == rle_dictionary,
            "{}: encoding {} is not read here (only plain and dictionary)", name_, encoding);
    std::vector<Json> out;
    if (count == 0) return out;
    require(!values.empty(), "{}: a page ends early", name_);
    const auto bits = static_cast<unsigned char>(values.front());
    for (const std::uint32_t i : hybrid(std::string_view(values).substr(1), bits, count, name_)) {
      require(i < dictionary_.size(), "{}: entry {} of a dictionary of {}", name_, i,
              dictionary_.size());
      out.push_back(dictionary_[i]);
    }
    return out;
  }
  /// Dremel's assembly for one list level.
  void place(const std::vector<std::uint32_t>& repetition,
             const std::vector<std::uint32_t>& definition, std::vector<Json> values) {
    std::size_t next = 0;
    for (std::size_t i = 0; i < repetition.size(); ++i) {
      if (repetition[i] == 0) {
        require(row_ < rows_, "{}: more than {} rows", name_, rows_);
        ++row_;
      }
      require(row_ > 0, "{}: a list begins before the first row", name_);
      Json& slot = records_[first_ + row_ - 1][at_];
      const bool there = definition[i] == leaf_.definition;
      if (leaf_.repetition == 0) {
        if (there) slot = std::move(values[next++]);
        continue;
      }
      if (repetition[i] == 0) slot = Json::array();
      if (definition[i] >= leaf_.listed)
        slot.push_back(there ? std::move(values[next++]) : Json(nullptr));
    }
  }

  const Leaf& leaf_;
  std::string name_;
  std::vector<Json>& records_;
  std::size_t first_, rows_, row_ = 0;
  std::int64_t codec_ = 0;
  Json::json_pointer at_;
  std::vector<Json> dictionary_;
};

/// The schema's columns, depth first as the file lists them.
std::vector<Leaf> leaves_of(const ThriftValue& schema, const std::string& name) {
  std::vector<Leaf> out;
  std::size_t next = 0;
  const auto visit = [&](auto& self, Leaf above, int depth) -> void {
    require(next < schema.list.size() && depth < 16, "{}: a broken schema", name);
    const ThriftValue& element = schema.list[next++];
    Leaf leaf = std::move(above);
    const bool root = depth == 0;
    if (!root) {
      const std::string own(element.at(4, name).text);
      const std::int64_t repeats = element.has(3) ? element.at(3, name).number : 0;
      leaf.path += (leaf.path.empty() ? "" : ".") + own;
      if (repeats != 0) ++leaf.definition;
      if (repeats == 2) {
        ++leaf.repetition;
        leaf.listed = leaf.definition;
      }
      // A list is a group "list" around an "element": neither is part of the column's name.
      if (leaf.repetition == 0) leaf.column += (leaf.column.empty() ? "" : ".") + own;
    }
    const std::int64_t children = element.has(5) ? element.at(5, name).number : 0;
    if (children == 0 && !root) {
      leaf.type = element.at(1, name).number;
      out.push_back(std::move(leaf));
      return;
    }
    for (std::int64_t i = 0; i < children; ++i) self(self, leaf, depth + 1);
  };
  visit(visit, Leaf{}, 0);
  return out;
}

}  // namespace

std::vector<Json> read_parquet(std::string_view bytes, const std::string& name,
                               const std::vector<std::string>& columns) {
  require(bytes.size() >= 12 && bytes.starts_with("PAR1") && bytes.ends_with("PAR1"),
          "{}: not a whole Parquet file", name);
  const std::uint32_t length = word_at(bytes, bytes.size() - 8, name);
  require(length <= bytes.size() - 12, "{}: not a whole Parquet file", name);
  std::size_t used = 0;
  const ThriftValue file = read_thrift(bytes.substr(bytes.size() - 8 - length, length), used, name);
  const std::int64_t rows = file.at(3, name).number;
  require(rows >= 0 && rows <= kMaxRows, "{}: {} rows; expected at most {}", name, rows, kMaxRows);
  const auto leaves = leaves_of(file.at(2, name), name);
  std::vector<Json> records(static_cast<std::size_t>(rows), Json::object());
  std::int64_t values_left = kMaxValues;
  for (const std::string& column : columns) {
    std::string there;
    std::size_t at = leaves.size();
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      there += (there.empty() ? "" : ", ") + leaves[i].column;
      if (leaves[i].column == column) at = i;
    }
    require(at < leaves.size(), "{}: no column \"{}\"; it has {}", name, column, there);
    const Leaf& leaf = leaves[at];
    require(leaf.type == int32 || leaf.type == int64 || leaf.type == byte_array,
            "{}: column \"{}\" holds neither strings nor whole numbers", name, column);
    require(leaf.repetition <= 1, "{}: column \"{}\" is a list of lists", name, column);
    std::size_t first = 0;
    for (const ThriftValue& group : file.at(4, name).list) {
      const std::int64_t in_group = group.at(3, name).number;
      const auto& chunks = group.at(1, name).list;
      require(in_group >= 0 && static_cast<std::uint64_t>(in_group) <= records.size() - first &&
                  at < chunks.size(),
              "{}: a broken row group", name);
      Chunk(leaf, fmt::format("{}: column \"{}\"", name, column), records, first,
            static_cast<std::size_t>(in_group))
          .read(bytes, chunks[at].at(3, name), values_left);
      first += static_cast<std::size_t>(in_group);
    }
    require(first == records.size(), "{}: {} rows in its groups, {} stated", name, first,
            records.size());
  }
  return records;
}

}  // namespace mixlora
