// Devices that a machine or a build may lack.
#pragma once
#include <iostream>

#include "kernels/backend.h"

namespace mixlora {

/// Whether a test on CUDA has to be left out; says why.
inline bool no_cuda() {
  const auto reason = cuda_unavailable_reason();
  if (!reason.empty()) std::cout << "skipped: " << reason << '\n';
  return !reason.empty();
}

}  // namespace mixlora
