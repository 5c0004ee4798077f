// adapter_config.json: PEFT's for LoRA and DoRA, MoE-PEFT's for MixLoRA and MixDoRA.
#pragma once
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "engine/specs.h"

namespace mixlora {

nlohmann::json write_adapter_config(const AdapterSpec& spec, const std::string& base_model);
/// What the file says of the adapter; keys that do not change its meaning are passed over, those
/// that would (rank_pattern, lora_bias, ...) are refused. `file` is what errors call it. Throws
/// InputError.
AdapterSpec read_adapter_config(const nlohmann::json& json, const std::string& file);
/// Throws InputError naming the first key in which the file's adapter is another than `spec`.
void require_same_adapter(const AdapterSpec& found, const AdapterSpec& spec,
                          const std::string& file);

}  // namespace mixlora
