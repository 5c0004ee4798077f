#include "experiments/trial.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>

#include "engine/sha256.h"
#include "suites/evaluate.h"

namespace mixlora {

void check(const TrialSpec& s, const std::string& path) {
  require(!s.model.empty(),
          "{}.model: missing; expected a Hugging Face directory or \"shape:llama-2-7b\"", path);
  check(s.adapter, path + ".adapter");
  check(s.train, path + ".train");
  check(static_cast<const ProtocolSpec&>(s.evaluate), path + ".evaluate");
  require(s.evaluate.limit >= 0, "{}.evaluate.limit: {}; expected 0 (all) or more", path,
          s.evaluate.limit);
  require(s.evaluate.cutoff_len >= 8, "{}.evaluate.cutoff_len: {}; expected 8 or more", path,
          s.evaluate.cutoff_len);
  const auto known = [&](const std::vector<std::string>& names, const char* key) {
    try {
      for (const auto& n : mix_names(names)) find_task(n);
    } catch (const InputError& e) {
      fail("{}.{}: {}", path, key, e.what());
    }
  };
  known(s.train.tasks, "train.tasks");
  known(s.evaluate.suites, "evaluate.suites");
  require(s.adapter.method == Method::base || !s.train.tasks.empty(),
          "{}.train.tasks: empty; method \"{}\" learns from one task or more", path,
          write(s.adapter.method).get<std::string>());
  require(!s.evaluate.suites.empty() || !s.train.tasks.empty(),
          "{}: neither train.tasks nor evaluate.suites: nothing to do", path);
}

TrialSpec canonical(TrialSpec s) {
  const AdapterSpec defaults;
  AdapterSpec& a = s.adapter;
  s.train.micro_batch_size = 0;
  if (a.method == Method::base) {  // the untrained model is one trial, whatever training says
    s.train = {};
    a = {};
    a.method = Method::base;
    return s;
  }
  if (s.train.optim != Optim::sgd) s.train.momentum = 0;
  if (!has_router(a)) {
    AdapterSpec plain;
    plain.method = a.method;
    plain.r = a.r;
    plain.lora_alpha = a.lora_alpha;
    plain.lora_dropout = a.lora_dropout;
    plain.target_modules = a.target_modules;
    plain.use_rslora = a.use_rslora;
    plain.lora_init = a.lora_init;
    plain.act_fn = a.act_fn;
    plain.ffn_dropout = a.ffn_dropout;
    plain.jitter_noise = a.jitter_noise;
    a = plain;
    return s;
  }
  if (a.routing_strategy != Routing::mixlora) a.top_k = defaults.top_k;
  if (a.routing_strategy != Routing::mixlora_dynamic) {
    a.top_p = defaults.top_p;
    a.temperature = defaults.temperature;
  }
  if (a.routing_strategy != Routing::mixlora_switch) {
    a.router_z_loss_coef = defaults.router_z_loss_coef;
    a.expert_capacity = defaults.expert_capacity;
    a.overflow = defaults.overflow;
  }
  a.router_init_range = router_init_range(a);
  a.jitter_noise = jitter_noise(a);
  return s;
}

std::string trial_key(const TrialSpec& spec, const std::string& model_hash,
                      const std::string& data_hash, DType matrix_type) {
  TrialSpec s = canonical(spec);
  s.model.clear();
  return sha256(fmt::format("{}\n{}\n{}\n{}", write(s).dump(), model_hash, data_hash,
                            matrix_type == DType::bf16 ? "bf16" : "f32"))
      .substr(0, 16);
}

std::string model_fingerprint(const std::string& source) {
  if (source.starts_with("shape:")) return source;
  std::vector<std::filesystem::path> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(source, error)) {
    const auto ending = entry.path().extension();
    if (ending == ".json" || ending == ".safetensors") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  std::string text;
  for (const auto& f : files) {
    // A weight file's head names every tensor; two spots of its numbers tell one training from
    // another.
    constexpr std::size_t kSpot = 1 << 20;
    const auto size = std::filesystem::file_size(f);
    std::ifstream in(f, std::ios::binary);
    std::string spot(kSpot, '\0');
    text += f.filename().string() + " " + std::to_string(size) + " ";
    for (const auto at : {std::uintmax_t{0}, size / 2}) {
      in.clear();
      in.seekg(static_cast<std::streamoff>(at));
      in.read(spot.data(), static_cast<std::streamsize>(kSpot));
      text +=
          sha256(std::string_view(spot).substr(0, static_cast<std::size_t>(in.gcount()))) + "\n";
    }
  }
  return sha256(text);
}

std::string data_fingerprint(const TrialSpec& spec) {
  static std::map<std::string, std::string> known;  // hashing a split once a run is enough
  std::string text;
  const auto add = [&](const std::string& name, bool train) {
    std::string& hash = known[name + (train ? "/train" : "/test")];
    if (hash.empty()) hash = load_split(find_task(name), train, 0).hash;
    text += name + (train ? " train " : " test ") + hash + "\n";
  };
  if (spec.adapter.method != Method::base)
    for (const auto& t : mix_names(spec.train.tasks)) add(t, true);
  for (const auto& s : mix_names(spec.evaluate.suites)) {
    add(s, false);
    text += few_shot_of(find_task(s), spec.evaluate);
  }
  return sha256(text);
}

}  // namespace mixlora
