// Dropout and jitter from Philox: the masks that every backend must draw bit for bit.
#pragma once
#include "kernels/backend.h"
#include "kernels/reference/scalar.h"

namespace mixlora::reference {

/// The sixteen bits of one column of the row that `id` = {sample, position, step, adapter} names.
inline std::uint32_t column_bits(RandomKey key, std::int32_t layer, std::uint32_t site,
                                 const std::int32_t* id, Index column) {
  const Philox4 bits =
      row_bits(key, static_cast<std::uint32_t>(layer), site, static_cast<std::uint32_t>(id[2]),
               static_cast<std::uint32_t>(id[0]), static_cast<std::uint32_t>(id[1]),
               static_cast<std::uint32_t>(column / 8));
  return (bits.v[column % 8 / 2] >> (16 * (column % 2))) & 0xffffU;
}

/// 0 where the column is dropped, 1 / (1 - p) where it is kept; 1 when dropout is inactive.
/// `expert` moves the site: each expert's down projection has a mask of its own.
inline double mask(const Dropout& d, const std::int32_t* id, Index column, Index expert = 0) {
  if (!d.active()) return 1;
  const auto bits = column_bits(random_key(d.seed, Purpose::dropout), d.layer,
                                d.site + static_cast<std::uint32_t>(expert), id, column);
  return bits < dropout_threshold(d.p) ? 0 : static_cast<double>(dropout_scale(d.p));
}

/// y = mask / (1 - p) x.  y, x (N, C)  ids (N, 4)
template <class T>
void dropout(T* y, const T* x, const Dropout& d, const std::int32_t* ids, Index rows, Index cols) {
  for (Index n = 0; n < rows; ++n)
    for (Index c = 0; c < cols; ++c) y[n * cols + c] = T(mask(d, ids + 4 * n, c)) * x[n * cols + c];
}

/// d_x += mask / (1 - p) d_y.
template <class T>
void dropout_backward_add(T* d_x, const T* d_y, const Dropout& d, const std::int32_t* ids,
                          Index rows, Index cols) {
  for (Index n = 0; n < rows; ++n)
    for (Index c = 0; c < cols; ++c)
      d_x[n * cols + c] += T(mask(d, ids + 4 * n, c)) * d_y[n * cols + c];
}

/// a = s drop(x) A^T.  a (N, R)  x (N, D)  weight A (R, D)  ids (N, 4)
template <class T>
void lora_a(T* a, const T* x, const T* weight, double s, const Dropout& d, const std::int32_t* ids,
            Index rows, Index cols, Index rank) {
  for (Index n = 0; n < rows; ++n)
    for (Index r = 0; r < rank; ++r) {
      T sum(0);
      for (Index c = 0; c < cols; ++c)
        sum += T(mask(d, ids + 4 * n, c)) * x[n * cols + c] * weight[r * cols + c];
      a[n * rank + r] = T(s) * sum;
    }
}

/// d_weight += d_a^T drop(x); d_x += drop(d_a A) unless null.
template <class T>
void lora_a_backward(T* d_weight, T* d_x, const T* d_a, const T* x, const T* weight,
                     const Dropout& d, const std::int32_t* ids, Index rows, Index cols,
                     Index rank) {
  for (Index n = 0; n < rows; ++n)
    for (Index c = 0; c < cols; ++c) {
      const T keep(mask(d, ids + 4 * n, c));
      T through(0);
      for (Index r = 0; r < rank; ++r) {
        d_weight[r * cols + c] += d_a[n * rank + r] * keep * x[n * cols + c];
        through += d_a[n * rank + r] * weight[r * cols + c];
      }
      if (d_x != nullptr) d_x[n * cols + c] += keep * through;
    }
}

/// y = x (1 + amount (2 u - 1)), u = (bits + 1/2) / 65536: U(1 - amount, 1 + amount) a column.
template <class T>
void jitter(T* y, const T* x, double amount, std::uint64_t seed, std::int32_t layer,
            const std::int32_t* ids, Index rows, Index cols) {
  const RandomKey key = random_key(seed, Purpose::jitter);
  for (Index n = 0; n < rows; ++n)
    for (Index c = 0; c < cols; ++c) {
      const double u = (column_bits(key, layer, site_router, ids + 4 * n, c) + 0.5) / 65536.0;
      y[n * cols + c] = x[n * cols + c] * T(1 + amount * (2 * u - 1));
    }
}

}  // namespace mixlora::reference
