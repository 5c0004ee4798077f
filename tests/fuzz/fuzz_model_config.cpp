// config.json: an accepted one has a parameter count and finite rotary frequencies.
#include <cmath>

#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "engine/model_config.h"
#include "tests/fuzz/target.h"

using namespace mixlora;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return accept_or_refuse([&] {
    const auto config = parse_model_config(parse_json(text_of(data, size), "fuzz"), "fuzz");
    must(config.parameters() > 0);
    for (const double f : rope_frequencies(config)) must(std::isfinite(f));
  });
}
