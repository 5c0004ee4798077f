#include "engine/specs_json.h"

#include <algorithm>

namespace mixlora {
namespace {

std::vector<std::string> projection_names() {
  std::vector<std::string> names;
  for (std::size_t p = 0; p < kProjections; ++p)
    names.emplace_back(name_of(static_cast<Projection>(p)));
  return names;
}
std::size_t projection(const std::string& name, const std::string& path) {
  static const std::vector<std::string> kNames = projection_names();
  // The founding document numbers Llama's feed-forward matrices; its w2 is down.
  const std::string known = name == "w1_proj"   ? "gate_proj"
                            : name == "w2_proj" ? "down_proj"
                            : name == "w3_proj" ? "up_proj"
                                                : name;
  const auto at = std::find(kNames.begin(), kNames.end(), known);
  if (at == kNames.end()) fail("{}: no projection \"{}\"; {}", path, name, nearest(name, kNames));
  return static_cast<std::size_t>(at - kNames.begin());
}

void range(bool good, const std::string& path, const char* key, const std::string& found,
           const char* expected) {
  require(good, "{}.{}: {}; expected {}", path, key, found, expected);
}

}  // namespace

void read_field(const Json& j, Targets& out, const std::string& path) {
  if (j == "all-linear") {
    out = kAllTargets;
    return;
  }
  require(j.is_array() || j.is_object(),
          "{}: expected \"all-linear\", a list of projections or {{name: true}}, found {}", path,
          shown(j));
  out.fill(false);
  if (j.is_array()) {
    for (const Json& v : j) {
      require(v.is_string(), "{}: expected names of projections, found {}", path, shown(v));
      out.at(projection(v.get<std::string>(), path)) = true;
    }
    return;
  }
  for (const auto& [name, on] : j.items()) {
    require(on.is_boolean(), "{}.{}: expected true or false, found {}", path, name, shown(on));
    out.at(projection(name, path)) = on.get<bool>();
  }
}

Json write_field(const Targets& in) {
  Json list = Json::array();
  for (std::size_t p = 0; p < kProjections; ++p)
    if (in.at(p)) list.push_back(name_of(static_cast<Projection>(p)));
  return list;
}

void check(const AdapterSpec& s, const std::string& path) {
  range(s.r >= 1 && s.r <= 4096, path, "r", std::to_string(s.r), "1 to 4096");
  range(s.lora_alpha > 0, path, "lora_alpha", fmt::format("{}", s.lora_alpha), "more than 0");
  range(s.lora_dropout >= 0 && s.lora_dropout < 1, path, "lora_dropout",
        fmt::format("{}", s.lora_dropout), "0 up to, not including, 1");
  range(s.ffn_dropout >= 0 && s.ffn_dropout < 1, path, "ffn_dropout",
        fmt::format("{}", s.ffn_dropout), "0 up to, not including, 1");
  range(s.method == Method::base ||
            std::count(s.target_modules.begin(), s.target_modules.end(), true) > 0,
        path, "target_modules", "none", "one projection or more");
  if (!has_router(s)) return;
  range(s.num_experts >= 1 && s.num_experts <= 128, path, "num_experts",
        std::to_string(s.num_experts), "1 to 128");
  range(s.top_k >= 1, path, "top_k", std::to_string(s.top_k), "1 or more");
  require(s.routing_strategy != Routing::mixlora || s.top_k <= s.num_experts,
          "{}.top_k: {} of {} experts; expected at most num_experts", path, s.top_k, s.num_experts);
  range(s.top_p > 0 && s.top_p <= 1, path, "top_p", fmt::format("{}", s.top_p),
        "more than 0, at most 1");
  range(s.temperature >= 0, path, "temperature", fmt::format("{}", s.temperature),
        "0 (off) or more");
  range(s.expert_capacity >= 1, path, "expert_capacity", std::to_string(s.expert_capacity),
        "1 or more");
  range(jitter_noise(s) >= 0 && jitter_noise(s) < 1, path, "jitter_noise",
        fmt::format("{}", jitter_noise(s)), "0 up to, not including, 1");
  range(expert_rank(s) >= 1 && expert_rank(s) <= 4096, path, "expert_lora.r",
        std::to_string(expert_rank(s)), "1 to 4096");
  range(expert_dropout(s) >= 0 && expert_dropout(s) < 1, path, "expert_lora.lora_dropout",
        fmt::format("{}", expert_dropout(s)), "0 up to, not including, 1");
  const auto target = [&](Projection p) {
    return s.target_modules.at(static_cast<std::size_t>(p));
  };
  require(target(Projection::gate) || target(Projection::up) || target(Projection::down),
          "{}.target_modules: no gate_proj, up_proj or down_proj: all experts would be equal",
          path);
}

void check(const TrainSpec& s, const std::string& path) {
  range(s.lr > 0 && s.lr < 10, path, "lr", fmt::format("{}", s.lr), "more than 0, less than 10");
  range(s.loraplus_lr_ratio > 0, path, "loraplus_lr_ratio", fmt::format("{}", s.loraplus_lr_ratio),
        "more than 0");
  range(s.weight_decay >= 0, path, "weight_decay", fmt::format("{}", s.weight_decay), "0 or more");
  range(s.momentum >= 0 && s.momentum < 1, path, "momentum", fmt::format("{}", s.momentum),
        "0 up to, not including, 1");
  range(s.warmup_steps >= 0, path, "warmup_steps", std::to_string(s.warmup_steps), "0 or more");
  range(s.warmup_ratio >= 0 && s.warmup_ratio <= 1, path, "warmup_ratio",
        fmt::format("{}", s.warmup_ratio), "0 to 1");
  range(s.num_epochs > 0 && s.num_epochs <= 10000, path, "num_epochs",
        fmt::format("{}", s.num_epochs), "more than 0");
  range(s.max_steps >= 0, path, "max_steps", std::to_string(s.max_steps), "0 (by epochs) or more");
  range(s.batch_size >= 1 && s.batch_size <= 65536, path, "batch_size",
        std::to_string(s.batch_size), "1 to 65536");
  range(s.micro_batch_size >= 0 && s.micro_batch_size <= s.batch_size, path, "micro_batch_size",
        std::to_string(s.micro_batch_size), "0 (all at once) to batch_size");
  range(s.cutoff_len >= 8 && s.cutoff_len <= 1 << 20, path, "cutoff_len",
        std::to_string(s.cutoff_len), "8 to 1048576");
  range(s.max_grad_norm >= 0, path, "max_grad_norm", fmt::format("{}", s.max_grad_norm),
        "0 (off) or more");
  range(s.limit >= 0, path, "limit", std::to_string(s.limit), "0 (all) or more");
}

}  // namespace mixlora
