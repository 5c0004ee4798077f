#include "experiments/saved_training.h"

#include <cstring>
#include <span>

#include <nlohmann/json.hpp>

#include "engine/atomic_file.h"
#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/sha256.h"
#include "engine/specs_json.h"

namespace mixlora {
namespace {

// One line of JSON (kind, identity, step, sizes, hash), then the numbers as they lie in memory: by
// job values, both moments and expert counts, then the records.
constexpr const char* kKind = "mixlora-bench training state 1";
constexpr std::size_t kLargest = std::size_t{64} << 30;

template <class T> void put(std::string& out, const std::vector<T>& numbers) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (!numbers.empty())
    // NOLINTNEXTLINE(cppcoreguidelines-pro-type-reinterpret-cast): numbers as bytes
    out.append(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T));
}
template <class T>
std::vector<T> take(std::string_view& from, std::size_t count, const std::string& name) {
  require(count <= from.size() / sizeof(T), "{}: shorter than its header says", name);
  std::vector<T> out(count);
  if (count > 0) std::memcpy(out.data(), from.data(), count * sizeof(T));
  from.remove_prefix(count * sizeof(T));
  return out;
}

}  // namespace

void write_training(const std::filesystem::path& file, const std::string& identity,
                    const TrainState& state, const std::vector<StepRecord>& records) {
  std::string payload;
  Json sizes = Json::array();
  for (const TrainState::Job& job : state.jobs) {
    put(payload, job.values);
    put(payload, job.moment1);
    put(payload, job.moment2);
    put(payload, job.expert_counts);
    sizes.push_back(
        {job.values.size(), job.moment1.size(), job.moment2.size(), job.expert_counts.size()});
  }
  put(payload, records);
  const Json header = {{"kind", kKind},
                       {"identity", identity},
                       {"recompute", write(state.recompute)},
                       {"step", state.step},
                       {"jobs", sizes},
                       {"records", records.size()},
                       {"sha256", sha256(payload)}};
  AtomicFile out(file);
  out.write(header.dump() + "\n");
  out.write(payload);
  out.commit();
}

std::optional<SavedTraining> read_training(const std::filesystem::path& file,
                                           const std::string& identity) {
  if (!std::filesystem::exists(file)) return std::nullopt;
  const std::string name = file.string(), text = read_text(file, kLargest);
  std::string_view payload = text;
  const std::size_t line = payload.find('\n');
  require(line != std::string_view::npos, "{}: not a training state: no header line", name);
  const Json header = parse_json(payload.substr(0, line), name);
  payload.remove_prefix(line + 1);
  SavedTraining out;
  try {
    require(header.at("kind") == kKind, "{}: not a training state of this version", name);
    out.identity = header.at("identity").get<std::string>();
    require(out.identity == identity,
            "{}: saved by another build, machine or pack of trials than this one", name);
    require(header.at("sha256") == sha256(std::string(payload)),
            "{}: its numbers are not those that were saved (wrong SHA-256)", name);
    read(header.at("recompute"), out.state.recompute, "recompute");
    out.state.step = header.at("step").get<std::int64_t>();
    for (const Json& job : header.at("jobs")) {
      const auto count = [&](std::size_t i) { return job.at(i).get<std::size_t>(); };
      TrainState::Job& to = out.state.jobs.emplace_back();
      to.values = take<float>(payload, count(0), name);
      to.moment1 = take<float>(payload, count(1), name);
      to.moment2 = take<float>(payload, count(2), name);
      to.expert_counts = take<double>(payload, count(3), name);
    }
    out.records = take<StepRecord>(payload, header.at("records").get<std::size_t>(), name);
  } catch (const Json::exception& e) {
    fail("{}: not a training state: {}", name, e.what());
  }
  require(payload.empty(), "{}: longer than its header says", name);
  return out;
}

}  // namespace mixlora
