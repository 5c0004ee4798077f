#include "experiments/trial.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>

#include "engine/sha256.h"
#include "suites/task.h"

namespace mixlora {

void check(const TrialSpec& s, const std::string& path) {
  require(!s.model.empty(),
          "{}.model: missing; expected a Hugging Face directory or \"shape:llama-2-7b\"", path);
  check(s.adapter, path + ".adapter");
  check(s.train, path + ".train");
  require(s.evaluate.protocol == "label-token",
          "{}.evaluate.protocol: \"{}\"; expected \"label-token\"", path, s.evaluate.protocol);
  require(s.evaluate.limit >= 0, "{}.evaluate.limit: {}; expected 0 (all) or more", path,
          s.evaluate.limit);
  require(s.evaluate.cutoff_len >= 8, "{}.evaluate.cutoff_len: {}; expected 8 or more", path,
          s.evaluate.cutoff_len);
  const auto known = [&](const std::vector<std::string>& names, const char* key) {
    for (const auto& n : names) try {
        find_task(n);
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

std::string trial_key(const TrialSpec& spec, const std::string& model_hash,
                      const std::string& data_hash) {
  TrialSpec s = spec;
  s.model.clear();
  s.train.micro_batch_size = 0;
  if (s.adapter.method ==
      Method::base) {  // the untrained model is one trial, whatever the training says
    s.train = {};
    s.adapter = {};
    s.adapter.method = Method::base;
  }
  return sha256(write(s).dump() + "\n" + model_hash + "\n" + data_hash).substr(0, 16);
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
    for (const auto& t : spec.train.tasks) add(t, true);
  for (const auto& s : spec.evaluate.suites) add(s, false);
  return sha256(text);
}

}  // namespace mixlora
