// Dropout masks of one row, bit for bit those of random.h's row_bits.
#pragma once
#include <cstdint>

#include "kernels/backend.h"

namespace mixlora::cpu {

/// mask[c] = 0 or 1 / (1 - p) for columns [0, n). `id` is the row's (sample, position, step,
/// adapter).
void mask_row(float* mask, const Dropout& d, const std::int32_t* id, std::int64_t n);

}  // namespace mixlora::cpu
