// Configuration files of other programs: what comes of an accepted one is an object.
#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "experiments/import.h"
#include "tests/fuzz/target.h"

using namespace mixlora;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return accept_or_refuse([&] {
    const Json config = parse_json(text_of(data, size), "fuzz");
    must(import_config(config, "fuzz", "fuzz", "shape:smollm2-135m").sweep.is_object());
  });
}
