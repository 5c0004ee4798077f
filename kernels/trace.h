// Ranges: where a step is, for Nsight (NVTX, domain "mixlora") and for TimedBackend.
#pragma once
#include "kernels/backend.h"

namespace mixlora::trace {

/// Whether a profiler listens to NVTX in this process; false in a build without NVTX.
bool attached();

/// Calls while it lives belong to `name`: the step, "forward", "layer" 3, ... `name` is a literal.
class Range {
 public:
  explicit Range(Backend& ops, const char* name, std::int64_t index = -1) : ops_(ops) {
    ops_.enter(name, index);
  }
  ~Range() { ops_.leave(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  Backend& ops_;
};

}  // namespace mixlora::trace
