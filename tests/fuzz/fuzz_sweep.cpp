// A sweep file: an accepted one expands to labelled trials.
#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "experiments/sweep.h"
#include "tests/fuzz/target.h"

using namespace mixlora;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return accept_or_refuse([&] {
    const Sweep sweep = parse_sweep(parse_json(text_of(data, size), "fuzz"), "fuzz");
    must(!sweep.trials.empty());
  });
}
