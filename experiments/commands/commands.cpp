#include "experiments/commands/commands.h"

#include <fmt/format.h>

#include "engine/error.h"
#include "engine/json_file.h"
#include "kernels/timed_backend.h"
#include "kernels/trace.h"
#include "reports/report.h"

namespace mixlora {
namespace {

std::unique_ptr<Backend> plain_backend(const RunSpec& run) {
  const std::string reason =
      run.device == DeviceChoice::cpu ? "not asked for" : cuda_unavailable_reason();
  require(run.device != DeviceChoice::cuda || reason.empty(), "run.device \"cuda\": {}", reason);
  return reason.empty() ? make_cuda_backend(run.precision) : make_cpu_backend(run.precision);
}

}  // namespace

std::unique_ptr<TimedBackend> make_timed_backend(const RunSpec& run) {
  return std::make_unique<TimedBackend>(plain_backend(run));
}

std::unique_ptr<Backend> make_backend(const RunSpec& run) {
  if (trace::attached()) return make_timed_backend(run);
  return plain_backend(run);
}

std::filesystem::path store_file(const Sweep& sweep, const std::string& given) {
  return given.empty() ? std::filesystem::path("runs") / (sweep.name + ".db")
                       : std::filesystem::path(given);
}

void make_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  require(!error, "{}: the folder cannot be made: {}", folder.string(), error.message());
}

std::unique_ptr<Tokenizer> tokenizer_of(const std::string& source) {
  if (source.starts_with("shape:")) return nullptr;
  return std::make_unique<Tokenizer>(source);
}

std::string set_keys(Sweep& sweep, const Backend& ops) {
  std::string model_hash;
  for (Trial& t : sweep.trials) {
    require(t.spec.model == sweep.trials.front().spec.model,
            "{}: one model a sweep; found \"{}\" and \"{}\"", sweep.file,
            sweep.trials.front().spec.model, t.spec.model);
    if (model_hash.empty()) model_hash = model_fingerprint(t.spec.model);
    t.key = trial_key(t.spec, model_hash, data_fingerprint(t.spec), ops.matrix_type());
  }
  return model_hash;
}

void print_tables(Database& db, std::int64_t sweep, const std::vector<std::string>& names,
                  const std::string& directory) {
  const Study study = read_study(db, sweep);
  for (const auto& name : names) {
    const TableKind& kind = find_table_kind(name);
    for (const Table& t : kind.build(study, {})) {
      if (kind.brief) fmt::print("\n{}\n", render(t, Format::terminal));
      if (!directory.empty()) write_table(t, directory);
    }
  }
}

}  // namespace mixlora
