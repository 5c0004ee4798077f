// The gated unit's activation and its slope, row by row.
#pragma once
#include <cstdint>

#include "kernels/backend.h"

namespace mixlora::cpu {

/// act[i] = f(u[i]); slope[i] = f'(u[i]) when `slope` is not null.
void activate(Activation kind, float* act, float* slope, const float* u, std::int64_t n);

}  // namespace mixlora::cpu
