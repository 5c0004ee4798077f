// Operations on rows: look-ups, normalisation, dropout, DoRA's columns, rotary embedding.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/shapes.h"

namespace mixlora {
namespace {

using cpu::expect_same;
using cpu::parallel_for;

MIXLORA_CLONES void add_to(float* y, const float* x, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] += x[i];
}
MIXLORA_CLONES void add_rows(float* y, const float* a, const float* b, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i];
}
MIXLORA_CLONES float dot(const float* a, const float* b, std::int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
MIXLORA_CLONES void normalise(float* y, const float* x, const float* w, float r, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * r * w[i];
}
MIXLORA_CLONES void normalise_backward(float* d_x, const float* d_y, const float* x, const float* w,
                                       float r, std::int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * w[i] * d_y[i];
  const float k = r * r * r * sum / static_cast<float>(n);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) d_x[i] += r * w[i] * d_y[i] - x[i] * k;
}
MIXLORA_CLONES void times(float* y, const float* x, const float* s, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * s[i];
}

}  // namespace

void CpuBackend::embedding(Tensor y, ConstTensor table, ConstTensor tokens) {
  parallel_for(y.rows(), [&](std::int64_t i) {
    const std::int64_t t = tokens.ptr<std::int32_t>()[i];
    if (table.dtype == DType::f32)
      std::copy_n(table.row<float>(t), y.cols(), y.row<float>(i));
    else
      for (std::int64_t c = 0; c < y.cols(); ++c)
        y.row<float>(i)[c] = static_cast<float>(table.row<Bf16>(t)[c]);
  });
}
void CpuBackend::gather_rows(Tensor y, ConstTensor x, ConstTensor index) {
  parallel_for(y.rows(), [&](std::int64_t i) {
    const std::int64_t from = index.ptr<std::int32_t>()[i];
    if (y.dtype == DType::bf16)
      std::copy_n(x.row<Bf16>(from), y.cols(), y.row<Bf16>(i));
    else
      std::copy_n(x.row<float>(from), y.cols(), y.row<float>(i));
  });
}
void CpuBackend::scatter_add_rows(Tensor x, ConstTensor y, ConstTensor index) {
  parallel_for(y.rows(), [&](std::int64_t i) {
    add_to(x.row<float>(index.ptr<std::int32_t>()[i]), y.row<float>(i), y.cols());
  });
}
void CpuBackend::add(Tensor y, ConstTensor x) {
  expect_same("add", "x", x, y);
  parallel_for(y.rows(),
               [&](std::int64_t i) { add_to(y.row<float>(i), x.row<float>(i), y.cols()); });
}

void CpuBackend::rmsnorm(Tensor y, Tensor r, ConstTensor x, ConstTensor w, float eps) {
  expect_same("rmsnorm", "x", x, y);
  parallel_for(x.rows(), [&](std::int64_t i) {
    const std::int64_t n = x.cols();
    const float mean = dot(x.row<float>(i), x.row<float>(i), n) / static_cast<float>(n);
    const float inverse = 1.0F / std::sqrt(mean + eps);
    r.ptr<float>()[i] = inverse;
    normalise(y.row<float>(i), x.row<float>(i), w.ptr<float>(), inverse, n);
  });
}
void CpuBackend::rmsnorm_again(Tensor y, ConstTensor x, ConstTensor w, ConstTensor r) {
  expect_same("rmsnorm_again", "x", x, y);
  parallel_for(x.rows(), [&](std::int64_t i) {
    normalise(y.row<float>(i), x.row<float>(i), w.ptr<float>(), r.ptr<float>()[i], x.cols());
  });
}
void CpuBackend::rmsnorm_backward(Tensor d_x, ConstTensor d_y, ConstTensor x, ConstTensor w,
                                  ConstTensor r) {
  expect_same("rmsnorm_backward", "d_y", d_y, d_x);
  parallel_for(x.rows(), [&](std::int64_t i) {
    normalise_backward(d_x.row<float>(i), d_y.row<float>(i), x.row<float>(i), w.ptr<float>(),
                       r.ptr<float>()[i], x.cols());
  });
}
void CpuBackend::add_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, ConstTensor delta,
                             ConstTensor w, float eps) {
  expect_same("add_rmsnorm", "delta", delta, x);
  parallel_for(x.rows(), [&](std::int64_t i) {
    const std::int64_t n = x.cols();
    float* to = sum.row<float>(i);
    add_rows(to, x.row<float>(i), delta.row<float>(i), n);
    const float mean = dot(to, to, n) / static_cast<float>(n);
    const float inverse = 1.0F / std::sqrt(mean + eps);
    r.ptr<float>()[i] = inverse;
    normalise(y.row<float>(i), to, w.ptr<float>(), inverse, n);
  });
}

void CpuBackend::dropout(Tensor y, ConstTensor x, const Dropout& d, RowIds ids) {
  expect_same("dropout", "x", x, y);
  parallel_for(x.rows(), [&](std::int64_t i) {
    cpu::masked_row(y.row<float>(i), x.row<float>(i), d, ids.row<std::int32_t>(i), x.cols());
  });
}
void CpuBackend::dropout_backward_add(Tensor d_x, ConstTensor d_y, const Dropout& d, RowIds ids) {
  expect_same("dropout_backward_add", "d_y", d_y, d_x);
  parallel_for(d_x.rows(), [&](std::int64_t i) {
    cpu::add_masked_row(d_x.row<float>(i), d_y.row<float>(i), d, ids.row<std::int32_t>(i),
                        d_x.cols());
  });
}
void CpuBackend::jitter(Tensor y, ConstTensor x, float amount, std::uint64_t seed,
                        std::int32_t layer, RowIds ids) {
  const RandomKey key = random_key(seed, Purpose::jitter);
  parallel_for(x.rows(), [&](std::int64_t i) {
    const auto* id = ids.row<std::int32_t>(i);
    for (std::int64_t from = 0; from < x.cols(); from += 8) {
      const Philox4 bits =
          row_bits(key, static_cast<std::uint32_t>(layer), site_router,
                   static_cast<std::uint32_t>(id[2]), static_cast<std::uint32_t>(id[0]),
                   static_cast<std::uint32_t>(id[1]), static_cast<std::uint32_t>(from / 8));
      for (std::int64_t c = from; c < std::min(x.cols(), from + 8); ++c) {
        const std::uint32_t sixteen = (bits.v[(c - from) / 2] >> (16 * (c % 2))) & 0xffffU;
        const float u = (static_cast<float>(sixteen) + 0.5F) / 65536.0F;
        y.row<float>(i)[c] = x.row<float>(i)[c] * (1.0F + amount * (2.0F * u - 1.0F));
      }
    }
  });
}

void CpuBackend::dora_scale(Tensor scale, Tensor inverse_norm, ConstTensor m, ConstTensor w_squared,
                            ConstTensor a, ConstTensor wa, ConstTensor b, float s) {
  const std::int64_t rank = a.rows(), out = scale.numel();
  if (wa.rows() != rank || wa.cols() != out || b.rows() != out || b.cols() != rank)
    throw std::logic_error("dora_scale: shapes do not match");
  std::vector<double> gram(static_cast<std::size_t>(rank * rank));  // A A^T
  parallel_for(rank, [&](std::int64_t i) {
    for (std::int64_t j = 0; j < rank; ++j) {
      double sum = 0;
      for (std::int64_t c = 0; c < a.cols(); ++c)
        sum += static_cast<double>(a.row<float>(i)[c]) * static_cast<double>(a.row<float>(j)[c]);
      gram[static_cast<std::size_t>(i * rank + j)] = sum;
    }
  });
  const auto factor = static_cast<double>(s);
  parallel_for(out, [&](std::int64_t o) {
    const float* row = b.row<float>(o);
    double cross = 0, own = 0;
    for (std::int64_t i = 0; i < rank; ++i) {
      cross += static_cast<double>(wa.row<float>(i)[o]) * static_cast<double>(row[i]);
      double part = 0;
      for (std::int64_t j = 0; j < rank; ++j)
        part += gram[static_cast<std::size_t>(i * rank + j)] * static_cast<double>(row[j]);
      own += static_cast<double>(row[i]) * part;
    }
    const double squared =
        static_cast<double>(w_squared.ptr<float>()[o]) + 2 * factor * cross + factor * factor * own;
    const double inverse = squared > 0 ? 1 / std::sqrt(squared) : 0;
    inverse_norm.ptr<float>()[o] = static_cast<float>(inverse);
    const auto exact = static_cast<float>(static_cast<double>(m.ptr<float>()[o]) * inverse);
    scale.ptr<float>()[o] = std::copysign(std::max(std::abs(exact), kLeastScale), exact);
  });
}
void CpuBackend::dora_magnitudes_backward(std::span<const DoraMagnitude> all) {
  for (const DoraMagnitude& x : all)
    for (std::int64_t i = 0; i < x.d_m.numel(); ++i) {
      x.d_m.ptr<float>()[i] += x.d_scale.ptr<float>()[i] * x.inverse_norm.ptr<float>()[i];
      x.d_scale.ptr<float>()[i] = 0;
    }
}
void CpuBackend::scale_columns(Tensor y, ConstTensor core, ConstTensor scale) {
  expect_same("scale_columns", "core", core, y);
  parallel_for(y.rows(), [&](std::int64_t i) {
    times(y.row<float>(i), core.row<float>(i), scale.ptr<float>(), y.cols());
  });
}
void CpuBackend::scale_columns_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y,
                                        ConstTensor core, ConstTensor scale) {
  expect_same("scale_columns_backward", "core", core, d_core);
  constexpr std::int64_t kColumns = 64;  // a task sums its own columns over all rows, in order
  const std::int64_t n = core.rows(), cols = core.cols();
  parallel_for((cols + kColumns - 1) / kColumns, [&](std::int64_t block) {
    const std::int64_t from = block * kColumns, to = std::min(cols, from + kColumns);
    double sums[kColumns] = {};
    for (std::int64_t i = 0; i < n; ++i) {
      const float *g = d_y.row<float>(i), *k = core.row<float>(i);
      for (std::int64_t c = from; c < to; ++c)
        sums[c - from] += static_cast<double>(g[c]) * static_cast<double>(k[c]);
    }
    for (std::int64_t c = from; c < to; ++c)
      d_scale.ptr<float>()[c] += static_cast<float>(sums[c - from]);
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t c = from; c < to; ++c)
        d_core.row<float>(i)[c] = scale.ptr<float>()[c] * d_y.row<float>(i)[c];
  });
}

void CpuBackend::rope(Tensor y, ConstTensor x, ConstTensor table, RowIds ids, Heads h,
                      bool inverse) {
  expect_same("rope", "x", x, y);
  const std::int64_t d = h.head_dim, half = d / 2, turned = h.heads + h.kv_heads;
  parallel_for(x.rows(), [&](std::int64_t i) {
    const float* cosine = table.row<float>(ids.row<std::int32_t>(i)[1]);
    const float* sine = cosine + half;
    const float sign = inverse ? -1.0F : 1.0F;
    const float* from = x.row<float>(i);
    float* to = y.row<float>(i);
    for (std::int64_t head = 0; head < turned; ++head) {
      for (std::int64_t j = 0; j < half; ++j) {
        const float a = from[head * d + j], b = from[head * d + half + j], s = sign * sine[j];
        to[head * d + j] = a * cosine[j] - b * s;
        to[head * d + half + j] = b * cosine[j] + a * s;
      }
    }
    if (to != from) std::copy(from + turned * d, from + (turned + h.kv_heads) * d, to + turned * d);
  });
}

void CpuBackend::scale_rope_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y, ConstTensor y,
                                     ConstTensor scale, ConstTensor table, RowIds ids, Heads h) {
  expect_same("scale_rope_backward", "y", y, d_core);
  const std::int64_t n = y.rows(), d = h.head_dim, half = d / 2;
  parallel_for(h.heads + 2 * h.kv_heads, [&](std::int64_t head) {  // its sums over rows, in order
    const bool turned = head < h.heads + h.kv_heads;
    const float* by = scale.ptr<float>() + head * d;
    std::vector<double> sums(static_cast<std::size_t>(d));
    for (std::int64_t i = 0; i < n; ++i) {
      const float *cosine = table.row<float>(ids.row<std::int32_t>(i)[1]), *sine = cosine + half,
                  *from = y.row<float>(i) + head * d, *g = d_y.row<float>(i) + head * d;
      float* to = d_core.row<float>(i) + head * d;
      for (std::int64_t j = 0; j < half; ++j) {
        float a = from[j], b = from[half + j];
        if (turned) {
          a = from[j] * cosine[j] + from[half + j] * sine[j];
          b = from[half + j] * cosine[j] - from[j] * sine[j];
        }
        sums[static_cast<std::size_t>(j)] += static_cast<double>(g[j]) * static_cast<double>(a);
        sums[static_cast<std::size_t>(half + j)] +=
            static_cast<double>(g[half + j]) * static_cast<double>(b);
        to[j] = by[j] * g[j];
        to[half + j] = by[half + j] * g[half + j];
      }
    }
    for (std::int64_t j = 0; j < d; ++j)
      d_scale.ptr<float>()[head * d + j] +=
          static_cast<float>(sums[static_cast<std::size_t>(j)] / static_cast<double>(by[j]));
  });
}

}  // namespace mixlora
