// Rows of a suite: an accepted one has an answer among its choices.
#include "suites/dataset.h"
#include "tests/fuzz/target.h"

using namespace mixlora;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return accept_or_refuse([&] {
    for (const Row& row : parse_dataset(text_of(data, size), "fuzz").rows)
      must(row.answer >= 0 && static_cast<std::size_t>(row.answer) < row.choices.size());
  });
}
