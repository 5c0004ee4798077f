// Environment: what a result came from: machine, build, settings.
#pragma once
#include <cstdint>
#include <string>

#include "engine/json_file.h"
#include "kernels/backend.h"

namespace mixlora {

/// "0.1.0 (commit 4946029abc, g++ 12.2.0)"; "+" after the commit: the tree had changes.
std::string version_text();
/// "AMD EPYC 9B14", from the kernel's own listing.
std::string cpu_name();
/// Bytes a new allocation may take before the machine swaps; 0 where the system does not say.
std::size_t available_memory();
/// As JSON, for attempt.environment: version, commit, compiler, operating system, CPU, threads,
/// memory, device, type of the frozen products.
Json environment_of(const Backend& ops);

}  // namespace mixlora
