#include "experiments/environment.h"

#include <fstream>
#include <thread>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/utsname.h>
#include <unistd.h>

#include "experiments/revision.h"

namespace mixlora {
namespace {

/// The value of the first "key ...: value" line of a file under /proc.
std::string proc_value(const char* file, const std::string& key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(key)) continue;
    const std::size_t colon = line.find(':');
    const std::size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

}  // namespace

std::string version_text() {
  return fmt::format("{} (commit {}, compiler {})", kVersion, kRevision, __VERSION__);
}

std::string cpu_name() {
  const std::string name = proc_value("/proc/cpuinfo", "model name");
  return name.empty() ? "unknown CPU" : name;
}

std::size_t available_memory() {
  return std::strtoull(proc_value("/proc/meminfo", "MemAvailable").c_str(), nullptr, 10) * 1024;
}

Json environment_of(const Backend& ops) {
  utsname system{};
  uname(&system);
  return {{"version", kVersion},
          {"commit", kRevision},
          {"compiler", __VERSION__},
          {"system", fmt::format("{} {} {}", system.sysname, system.release, system.machine)},
          {"cpu", cpu_name()},
          {"threads", std::thread::hardware_concurrency()},
          {"memory_bytes", static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) *
                               static_cast<std::int64_t>(sysconf(_SC_PAGE_SIZE))},
          {"device", ops.description()},
          {"products", name_of(ops.matrix_type())},
          {"activations", name_of(ops.activation_type())}};
}

}  // namespace mixlora
