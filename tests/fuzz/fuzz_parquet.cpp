// Parquet, as it comes from a hub: an accepted file gives every record every column asked for.
#include <nlohmann/json.hpp>

#include "suites/parquet.h"
#include "tests/fuzz/target.h"

using namespace mixlora;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return accept_or_refuse([&] {
    for (const Json& record :
         read_parquet(text_of(data, size), "fuzz", {"id", "choices.text", "label"}))
      must(record.contains("id") && record.contains("label") &&
           record.at("choices").contains("text"));
  });
}
