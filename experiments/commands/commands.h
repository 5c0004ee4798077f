// Commands: the subcommands of mixlora-bench, one file each, and what they share.
//
// A subcommand is a function that adds itself to the parser; its callback sets `exit_code`:
//     void add_status_command(CLI::App& app, int& exit_code) {
//       const auto file = std::make_shared<std::string>();  // the parser and the callback share it
//       CLI::App* command = app.add_subcommand("status", "the trials of a store's last sweep");
//       command->add_option("db", *file, "store")->required();
//       command->callback([=, &exit_code] { exit_code = status(*file); });
//     }
// InputError means kBadInput: main() catches it. A new file stands in CMakeLists.txt and in main().
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "engine/tokenizer.h"
#include "experiments/sweep.h"
#include "kernels/backend.h"

namespace CLI {
class App;
}

namespace mixlora {

class Database;
class TimedBackend;

// Exit codes: 0 all done, 1 a trial failed, 2 the input is wrong, 130 stopped by a signal.
inline constexpr int kDone = 0, kFailed = 1, kBadInput = 2, kStopped = 130;

void add_bench_command(CLI::App& app, int& exit_code);
void add_check_command(CLI::App& app, int& exit_code);
void add_compare_command(CLI::App& app, int& exit_code);
void add_doctor_command(CLI::App& app, int& exit_code);
void add_fetch_command(CLI::App& app, int& exit_code);
void add_import_command(CLI::App& app, int& exit_code);
void add_plan_command(CLI::App& app, int& exit_code);
void add_profile_command(CLI::App& app, int& exit_code);
void add_prompts_command(CLI::App& app, int& exit_code);
void add_report_command(CLI::App& app, int& exit_code);
void add_run_command(CLI::App& app, int& exit_code);
void add_schema_command(CLI::App& app, int& exit_code);
void add_status_command(CLI::App& app, int& exit_code);
void add_suites_command(CLI::App& app, int& exit_code);

/// The device and precision that a sweep's "run" asks for; throws InputError when it is not here.
/// Under a profiler its op families are NVTX ranges.
std::unique_ptr<Backend> make_backend(const RunSpec& run);
/// The same, to be timed call by call.
std::unique_ptr<TimedBackend> make_timed_backend(const RunSpec& run);
/// Where a sweep's rows go: `given`, else runs/NAME.db.
std::filesystem::path store_file(const Sweep& sweep, const std::string& given);
/// Makes a folder and those above it; throws InputError with the reason.
void make_folder(const std::filesystem::path& folder);
/// A model source's tokenizer; null for a shape.
std::unique_ptr<Tokenizer> tokenizer_of(const std::string& source);
/// Sets the trials' keys for a backend; returns the model's fingerprint. Throws InputError.
std::string set_keys(Sweep& sweep, const Backend& ops);
/// Prints tables of a sweep in a store; also writes them as .md, .csv and .tex into `directory`
/// when it is not empty.
void print_tables(Database& db, std::int64_t sweep, const std::vector<std::string>& names,
                  const std::string& directory);

}  // namespace mixlora
