// tokenizer.json, a zero byte, a text: an accepted tokenizer encodes the text to ids it can decode.
#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/tokenizer.h"
#include "engine/utf8.h"
#include "tests/fuzz/target.h"

using namespace mixlora;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return accept_or_refuse([&] {
    const std::string_view all = text_of(data, size);
    const std::size_t cut = std::min(all.find('\0'), all.size());
    const Tokenizer tokenizer(parse_json(all.substr(0, cut), "fuzz"), "fuzz");
    const auto ids = tokenizer.encode_with_special(all.substr(std::min(cut + 1, all.size())));
    for (const auto id : ids) must(id >= 0 && id < tokenizer.size());
    must(!invalid_utf8(tokenizer.decode(ids)));
  });
}
