// Slots apart: spreading them over experts, combining them, and rows over capacity.
#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::kChunk;
using cuda::kTogether;
using cuda::Rows;

/// The choice of `Slots` as kernels see it.
struct Choice {
  Rows<const std::int32_t> expert;
  Rows<const float> weight;
  int slots, rank;
  __device__ int expert_of(Index row, int k) const {
    return expert.data != nullptr ? *expert.at(row, k) : 0;
  }
  __device__ float weight_of(Index row, int k) const {
    return weight.data != nullptr ? *weight.at(row, k) : 1.0F;
  }
};
Choice choice_of(const Slots& s, Index rows, const char* op) {
  cuda::expect((!s.expert || (s.expert.rows() == rows && s.expert.cols() == s.count)) &&
                   (!s.weight || (s.weight.rows() == rows && s.weight.cols() == s.count)),
               op);
  return {cuda::rows_of<std::int32_t>(ConstTensor(s.expert)),
          cuda::rows_of<float>(ConstTensor(s.weight)), static_cast<int>(s.count),
          static_cast<int>(s.rank)};
}

/// Columns of one expert's factor: E R numbers written a row, K R read. Aligned: R too is a
/// multiple of eight.
template <class T> struct Spread {
  Rows<T> columns;
  Rows<const T> z;
  Choice s;
  Index rows;  // of z
  bool per_slot;
  template <bool Aligned> __device__ void at(Index m, Index col, int count) const {
    const Index row = per_slot ? m % rows : m;
    const int first = per_slot ? static_cast<int>(m / rows) : 0,
              last = per_slot ? first + 1 : s.slots;
    const int c = static_cast<int>(col);
    Eight sum = {};
    for (int k = first; k < last; ++k) {
      const int e = s.expert_of(row, k), at = c - e * s.rank;
      if (e < 0 || at + count <= 0 || at >= s.rank) continue;
      const float w = per_slot ? 1.0F : s.weight_of(row, k);
      if constexpr (Aligned) {
        const Eight own = cuda::take<true>(z.at(row, k * s.rank + at), count);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum.v[i] += w * own.v[i];
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          if (i < count && at + i >= 0 && at + i < s.rank)
            sum.v[i] += w * cuda::to_float(*z.at(row, k * s.rank + at + i));
      }
    }
    cuda::put<Aligned>(columns.at(m, col), sum, count);
  }
};

/// y = sum_k w_k scale_e core_k: K rows read, one written; the scales stay in L1.
template <class T> struct Combine {
  Rows<T> y;
  Rows<const T> core;
  Rows<const float> scale;
  Choice s;
  Index rows;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    Eight sum = {};
    for (int k = 0; k < s.slots; ++k) {
      const int e = s.expert_of(row, k);
      const float w = s.weight_of(row, k);
      if (w == 0) continue;
      const Eight c = cuda::take<Aligned>(core.at(k * rows + row, col), count);
      Eight by = {{1, 1, 1, 1, 1, 1, 1, 1}};
      if (e >= 0) by = cuda::take<Aligned>(scale.at(e, col), count);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum.v[i] += w * by.v[i] * c.v[i];
    }
    cuda::put<Aligned>(y.at(row, col), sum, count);
  }
};

/// d_core = w scale d_y, and the parts of two sums: over the columns of a warp for d_weight
/// (warps of all columns, N K), over a range of rows for d_scale (ranges, E, D), the latter in
/// shared memory, where a thread owns its eight columns of every expert. A row of d_y and K of core
/// read, K written; four rows of a slot go together, while the next four are on their way.
template <bool Aligned, class T>
__global__ void __launch_bounds__(128, sizeof(T) == 2 ? 4 : 2)
    combine_backward_kernel(Rows<T> d_core, float* weight_parts, float* scale_parts,
                            Rows<const T> d_y, Rows<const T> core, Rows<const float> scale,
                            Choice s, Index rows, Index cols, Index length, int experts) {
  extern __shared__ float4 sums[];  // (E, 2, threads)
  const auto threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const Index own_col = (static_cast<Index>(blockIdx.y) * threads + thread) * kChunk;
  const bool live = own_col < cols;  // others go along for the sums of their warp
  const Index col = live ? own_col : 0;
  const int count = live ? cuda::chunk_at(col, cols) : 0;
  const Index begin = static_cast<Index>(blockIdx.x) * length, end = min(rows, begin + length);
  const Index warp = (static_cast<Index>(blockIdx.y) * threads + thread) / cuda::kWarp;
  const auto own = [&](int e, int half) -> float4& {
    return sums[(e * 2 + half) * threads + thread];
  };
  for (int i = 0; i < 2 * experts; ++i) sums[i * threads + thread] = make_float4(0, 0, 0, 0);

  struct Four {
    cuda::Packed<T> g[kTogether], c[kTogether];
    int expert[kTogether];
    float weight[kTogether];
  };
  Four next;
  const auto fetch = [&](Index at, int k) {
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const Index row = min(at + t, end - 1);
      next.g[t] = cuda::take_packed<Aligned>(d_y.at(row, col), count);
      next.c[t] = cuda::take_packed<Aligned>(core.at(k * rows + row, col), count);
      next.expert[t] = s.expert_of(row, k);
      next.weight[t] = s.weight_of(row, k);
    }
  };
  int k = 0;
  fetch(begin, 0);
  for (Index at = begin; at < end;) {
    const Four now = next;
    const Index here = at;
    const int slot = k;
    if (++k == s.slots) k = 0, at += kTogether;
    fetch(at, k);
    Eight by[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
      by[t] = cuda::take<Aligned>(scale.at(max(now.expert[t], 0), col), count);
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      if (here + t >= end) break;
      const Index row = here + t;
      const int e = now.expert[t];
      const float w = now.weight[t];
      const Eight g = cuda::unpacked(now.g[t]), c = cuda::unpacked(now.c[t]);
      Eight d;
      float sum = 0, product[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        product[i] = g.v[i] * c.v[i];
        const float scaled = e >= 0 ? by[t].v[i] : 1.0F;
        sum += scaled * product[i];
        d.v[i] = w * (scaled * g.v[i]);
      }
      if (e >= 0)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* p = product + 4 * half;
          float4 to = own(e, half);
          to.x += w * p[0], to.y += w * p[1], to.z += w * p[2], to.w += w * p[3];
          own(e, half) = to;
        }
      if (live) cuda::put<Aligned>(d_core.at(slot * rows + row, col), d, count);
      sum = cuda::warp_sum(live ? sum : 0.0F);
      if (thread % cuda::kWarp == 0) weight_parts[(warp * rows + row) * s.slots + slot] = sum;
    }
  }
  if (!live) return;
  for (int e = 0; e < experts; ++e) {
    const float4 low = own(e, 0), high = own(e, 1);
    cuda::put<Aligned>(scale_parts + (blockIdx.x * experts + e) * cols + col,
                       Eight{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}}, count);
  }
}

/// d_weight[n, k] = sum of the warps' parts, in their order.
__global__ void weight_parts_kernel(Rows<float> d_weight, const float* parts, Index warps,
                                    Index rows, int slots) {
  const Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * slots) return;
  float sum = 0;
#pragma unroll 8
  for (Index w = 0; w < warps; ++w) sum += parts[w * rows * slots + i];
  *d_weight.at(i / slots, i % slots) = sum;
}

/// y = w x where the row is over capacity: a row read and written there, nothing elsewhere.
template <class T> struct OverflowInput {
  Rows<T> y;
  Rows<const T> x;
  Choice s;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    if (s.expert_of(row, 0) >= 0) return;
    Eight e = cuda::take<Aligned>(x.at(row, col), count);
    const float w = s.weight_of(row, 0);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) e.v[i] *= w;
    cuda::put<Aligned>(y.at(row, col), e, count);
  }
};

/// One block a row; those over capacity: d_x += w d_y, d_weight = <d_y, x>, d_y = 0. Three rows
/// read and two written there, nothing elsewhere.
template <bool Aligned, class T>
__global__ void overflow_backward_kernel(Rows<T> d_x, Rows<float> d_weight, Rows<T> d_y,
                                         Rows<const T> x, Choice s, Index cols) {
  __shared__ float shared[cuda::kWarp];
  const Index row = blockIdx.x;
  if (s.expert_of(row, 0) >= 0) return;
  const float w = s.weight_of(row, 0);
  float sum = 0;
  for (Index col = static_cast<Index>(threadIdx.x) * kChunk; col < cols;
       col += static_cast<Index>(blockDim.x) * kChunk) {
    const int count = cuda::chunk_at(col, cols);
    const Eight g = cuda::take<Aligned>(d_y.at(row, col), count),
                own = cuda::take<Aligned>(x.at(row, col), count);
    Eight to = cuda::take<Aligned>(d_x.at(row, col), count);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      to.v[i] += w * g.v[i];
      sum += g.v[i] * own.v[i];
    }
    cuda::put<Aligned>(d_x.at(row, col), to, count);
    cuda::put<Aligned>(d_y.at(row, col), Eight{}, count);
  }
  sum = cuda::block_sum(sum, shared);
  if (threadIdx.x == 0) *d_weight.at(row, 0) = sum;
}

}  // namespace

void CudaBackend::slots_to_columns(Tensor columns, ConstTensor z, const Slots& slots,
                                   bool per_slot) {
  const char* op = "slots_to_columns";
  const Index rows = z.rows();
  cuda::expect(columns.rows() == (per_slot ? slots.count : 1) * rows &&
                   columns.cols() == slots.experts * slots.rank &&
                   z.cols() == slots.count * slots.rank && columns.dtype == z.dtype,
               op);
  const bool whole = slots.rank % kChunk == 0 && cuda::aligned(columns, z);
  cuda::with_type(z.dtype, [&](auto number) {
    using T = decltype(number);
    cuda::each_chunk(stream_, op, columns.rows(), columns.cols(), whole,
                     Spread<T>{cuda::rows_of<T>(columns), cuda::rows_of<T>(z),
                               choice_of(slots, rows, op), rows, per_slot});
  });
}

void CudaBackend::slot_combine(Tensor y, ConstTensor core, ConstTensor scale, const Slots& slots) {
  const char* op = "slot_combine";
  cuda::expect(core.rows() == slots.count * y.rows() && core.cols() == y.cols() &&
                   scale.cols() == y.cols() && core.dtype == y.dtype,
               op);
  cuda::with_type(y.dtype, [&](auto number) {
    using T = decltype(number);
    cuda::each_chunk(
        stream_, op, y.rows(), y.cols(), cuda::aligned(y, core, scale),
        Combine<T>{cuda::rows_of<T>(y), cuda::rows_of<T>(core), cuda::rows_of<float>(scale),
                   choice_of(slots, y.rows(), op), y.rows()});
  });
}

void CudaBackend::slot_combine_backward(Tensor d_core, Tensor d_weight, Tensor d_scale,
                                        ConstTensor d_y, ConstTensor core, ConstTensor scale,
                                        const Slots& slots) {
  const char* op = "slot_combine_backward";
  const Index rows = d_y.rows(), cols = d_y.cols(), experts = slots.experts;
  cuda::expect_same(d_core, core, op);
  cuda::expect_same(d_scale, scale, op);
  cuda::expect(core.rows() == slots.count * rows && core.cols() == cols &&
                   d_weight.rows() == rows && d_weight.cols() == slots.count &&
                   d_scale.contiguous() && d_scale.numel() == experts * cols,
               op);
  if (rows == 0 || cols == 0) return;
  constexpr std::size_t kShared = 48 << 10;  // more has to be asked for
  const auto bytes = [&](unsigned threads) {
    return static_cast<std::size_t>(experts) * threads * kChunk * sizeof(float);
  };
  unsigned threads = cuda::column_threads(cols);
  while (threads > cuda::kWarp && bytes(threads) > kShared) threads /= 2;
  // Twice the usual ranges: four blocks a processor have twice as much on its way as two.
  const cuda::Parts parts = cuda::parts_of(rows, experts * cols / 2);
  const dim3 blocks(static_cast<unsigned>(parts.count),
                    static_cast<unsigned>(cuda::ceil_div<Index>(cols, threads * kChunk)));
  const Index warps = static_cast<Index>(blocks.y) * threads / cuda::kWarp;
  Room r = room();
  auto* weight_parts = r.take<float>(warps * rows * slots.count);
  auto* scale_parts = r.take<float>(parts.count * experts * cols);
  cuda::with_type(d_y.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      if (bytes(threads) > kShared)
        cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(bytes(threads))),
                    op);
      kernel<<<blocks, threads, bytes(threads), stream_>>>(
          cuda::rows_of<T>(d_core), weight_parts, scale_parts, cuda::rows_of<T>(d_y),
          cuda::rows_of<T>(core), cuda::rows_of<float>(scale), choice_of(slots, rows, op), rows,
          cols, parts.length, static_cast<int>(experts));
    };
    if (cuda::aligned(d_core, d_y, core, scale))
      run(combine_backward_kernel<true, T>);
    else
      run(combine_backward_kernel<false, T>);
  });
  cuda::launched(op);
  weight_parts_kernel<<<static_cast<unsigned>(cuda::ceil_div<Index>(rows * slots.count, 128)), 128,
                        0, stream_>>>(cuda::rows_of<float>(d_weight), weight_parts, warps, rows,
                                      static_cast<int>(slots.count));
  cuda::launched(op);
  cuda::add_partials(stream_, op, cuda::data<float>(d_scale), scale_parts, parts.count,
                     experts * cols);
}

void CudaBackend::overflow_input(Tensor y, ConstTensor x, const Slots& slots) {
  const char* op = "overflow_input";
  cuda::expect_same(y, x, op);
  cuda::with_type(y.dtype, [&](auto number) {
    using T = decltype(number);
    cuda::each_chunk(
        stream_, op, y.rows(), y.cols(), cuda::aligned(y, x),
        OverflowInput<T>{cuda::rows_of<T>(y), cuda::rows_of<T>(x), choice_of(slots, y.rows(), op)});
  });
}
void CudaBackend::overflow_input_backward(Tensor d_x, Tensor d_weight, Tensor d_y, ConstTensor x,
                                          const Slots& slots) {
  const char* op = "overflow_input_backward";
  cuda::expect_same(d_x, x, op);
  cuda::expect_same(d_y, x, op);
  cuda::expect(d_weight.rows() == x.rows(), op);
  if (x.numel() == 0) return;
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(x.rows()), 128, 0, stream_>>>(
          cuda::rows_of<T>(d_x), cuda::rows_of<float>(d_weight), cuda::rows_of<T>(d_y),
          cuda::rows_of<T>(x), choice_of(slots, x.rows(), op), x.cols());
    };
    if (cuda::aligned(d_x, d_y, x))
      run(overflow_backward_kernel<true, T>);
    else
      run(overflow_backward_kernel<false, T>);
  });
  cuda::launched(op);
}

}  // namespace mixlora
