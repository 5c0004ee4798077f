// Safetensors: every tensor of an accepted file lies inside it and converts.
#include <vector>

#include "engine/safetensors.h"
#include "tests/fuzz/target.h"

using namespace mixlora;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return accept_or_refuse([&] {
    const auto file = std::as_bytes(std::span(data, size));
    for (const auto& [name, view] : parse_safetensors(file, "fuzz")) {
      must(view.bytes.data() >= file.data() &&
           view.bytes.data() + view.bytes.size() <= file.data() + file.size());
      if (view.type == FileType::other) continue;
      std::vector<float> numbers(view.bytes.size() / (view.type == FileType::f32 ? 4 : 2));
      convert_to_f32(numbers, view.bytes, view.type);
    }
  });
}
