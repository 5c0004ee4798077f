// Adapter files: adapter_config.json beside adapter_model.safetensors; names as README.md lists
// them.
#include <algorithm>
#include <set>
#include <string_view>

#include <nlohmann/json.hpp>

#include "engine/adapter.h"
#include "engine/adapter_config.h"
#include "engine/atomic_file.h"
#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/safetensors.h"

namespace mixlora {
namespace {

/// m-LoRA's names for feed-forward tensors and routers (0.3.1), from today's.
std::string older_name(std::string name) {
  const auto replace = [&](std::string_view from, std::string_view to) {
    const std::size_t at = name.find(from);
    if (at != std::string::npos) name.replace(at, from.size(), to);
    return at != std::string::npos;
  };
  if (replace(".mlp.moe_gate.", ".gate.")) return name;
  for (const auto& [now, then] :
       {std::pair{"gate_proj", "w1_proj"}, {"down_proj", "w2_proj"}, {"up_proj", "w3_proj"}}) {
    const std::string module = std::string(".mlp.") + now + ".";
    if (const std::size_t at = name.find(module + "experts."); at != std::string::npos) {
      const std::size_t number = at + module.size() + 8, end = name.find('.', number);
      return name.substr(0, at) + ".experts." + name.substr(number, end - number) + "." + then +
             name.substr(end);
    }
    if (replace(module, std::string(".self_attn.") + then + ".")) return name;
  }
  return name;
}

}  // namespace

void Adapter::save(const std::filesystem::path& directory, const std::string& base_model) const {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  require(!error, "{}: cannot be made: {}", directory.string(), error.message());
  std::vector<WriteTensor> tensors;
  for (const FileTensor& t : file_tensors()) tensors.push_back({t.name, t.shape, t.view});
  AtomicFile weights(directory / "adapter_model.safetensors"),
      config(directory / "adapter_config.json");
  write_safetensors(weights, tensors);
  config.write(write_adapter_config(spec_, base_model).dump(2) + "\n");
  weights.sync();
  config.sync();
  weights.commit();
  config.commit();
}

void Adapter::load(const std::filesystem::path& directory) {
  const auto config = directory / "adapter_config.json";
  require_same_adapter(read_adapter_config(read_json(config, 1 << 20), config.string()), spec_,
                       config.string());
  const TensorFiles files = TensorFiles::open_file(directory / "adapter_model.safetensors");
  std::set<std::string> used;
  for (const FileTensor& t : file_tensors()) {
    const std::string older = older_name(t.name);
    const std::string& name = files.has(older) && !files.has(t.name) ? older : t.name;
    std::vector<float> numbers(static_cast<std::size_t>(t.view.numel()));
    files.read_f32(name, numbers, t.shape);
    for (std::int64_t i = 0; i < t.view.rows(); ++i)
      std::copy_n(numbers.begin() + i * t.view.cols(), t.view.cols(), t.view.row<float>(i));
    used.insert(name);
  }
  for (const auto& [name, view] : files.tensors())
    if (used.count(name) == 0)
      fail("{}: the tensor {} is not of this adapter", directory.string(), in_quotes(name));
}

}  // namespace mixlora
