// Dropout masks of one row, from random.h's bits.
#pragma once
#include "kernels/backend.h"

namespace mixlora::cpu {

/// Columns [from, from + n) of the row's mask: 0 or 1 / (1 - p). `id` is {sample, position, step,
/// adapter}; `from` is a multiple of 8.
void mask_row(float* mask, const Dropout& d, const std::int32_t* id, std::int64_t from,
              std::int64_t n);
/// y = x times the mask.
void masked_row(float* y, const float* x, const Dropout& d, const std::int32_t* id, std::int64_t n);
/// y += x times the mask.
void add_masked_row(float* y, const float* x, const Dropout& d, const std::int32_t* id,
                    std::int64_t n);

}  // namespace mixlora::cpu
