// Routing: which experts a row uses, how evenly, and the gradient to the router.
#include <climits>
#include <cmath>

#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::kChunk;
using cuda::kTogether;
using cuda::kWarp;
using cuda::Rows;

constexpr int kExperts = 8;  // of a thread's running sums at once
constexpr int kWarps = 8;    // of a block whose warps take a row each

// ---- products -----------------------------------------------------------------------------------

constexpr int kLogitsWarps = 4;

/// Lane l's first number becomes the warp's sum of number l of 2 Half: each step hands one half of
/// the numbers on.
template <int Half> __device__ void shared_sums(float (&x)[kWarp], int lane) {
  const bool upper = (lane & Half) != 0;
#pragma unroll
  for (int i = 0; i < Half; ++i) {
    const float other = upper ? x[i] : x[i + Half];
    x[i] = (upper ? x[i + Half] : x[i]) + __shfl_xor_sync(cuda::kAll, other, Half);
  }
  if constexpr (Half > 1) shared_sums<Half / 2>(x, lane);
}

/// One block four rows and eight experts, its warps share the columns: x read once for eight
/// experts, wg from L1.
template <bool Aligned, class T>
__global__ void __launch_bounds__(kLogitsWarps* kWarp, 3)
    logits_kernel(Rows<float> logits, Rows<const T> x, Rows<const float> wg, Index rows, Index cols,
                  int experts) {
  static_assert(kTogether * kExperts == kWarp);
  __shared__ float shared[kLogitsWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp,
            first = static_cast<int>(blockIdx.y) * kExperts;
  const Index row = static_cast<Index>(blockIdx.x) * kTogether;
  float sum[kWarp] = {};  // row by row
  for (Index col = static_cast<Index>(threadIdx.x) * kChunk; col < cols;
       col += kLogitsWarps * kWarp * kChunk) {
    const int count = cuda::chunk_at(col, cols);
    Eight e[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
      e[t] = cuda::take<Aligned>(x.at(min(row + t, rows - 1), col), count);
#pragma unroll
    for (int g = 0; g < kExperts; ++g) {
      const Eight w = cuda::take<Aligned>(wg.at(min(first + g, experts - 1), col), count);
#pragma unroll
      for (int t = 0; t < kTogether; ++t)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum[t * kExperts + g] += e[t].v[i] * w.v[i];
    }
  }
  shared_sums<kWarp / 2>(sum, lane);
  shared[warp][lane] = sum[0];
  __syncthreads();
  const int t = lane / kExperts, e = first + lane % kExperts;
  if (warp != 0 || row + t >= rows || e >= experts) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < kLogitsWarps; ++w) total += shared[w][lane];
  *logits.at(row + t, e) = total;
}

constexpr int kStaged = 64;  // rows whose d_logits lie in shared memory at a time
/// f(row, their d_logits of eight experts) for every Count rows of a range, by a whole block; rows
/// that are not there have no gradient.
template <int Count, class F>
__device__ void each_rows(Rows<const float> d_logits, int first, int experts, Index begin,
                          Index end, F f) {
  __shared__ float staged[kStaged][kExperts];
  for (Index piece = begin; piece < end; piece += kStaged) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kStaged * kExperts;
         i += static_cast<int>(blockDim.x)) {
      const int r = i / kExperts, e = first + i % kExperts;
      staged[r][i % kExperts] = piece + r < end && e < experts ? *d_logits.at(piece + r, e) : 0.0F;
    }
    __syncthreads();
    for (Index row = piece; row < min(piece + kStaged, end); row += Count)
      f(row, staged + (row - piece));
  }
}

/// d_x += d_logits Wg over a range of rows: each thread holds its columns of the first eight
/// experts' wg, each row is read and written.
template <bool Aligned, class T>
__global__ void __launch_bounds__(128, sizeof(T) == 2 ? 3 : 2)
    input_backward_kernel(Rows<T> d_x, Rows<const float> d_logits, Rows<const float> wg, Index rows,
                          Index cols, Index length, int experts) {
  const Index col = (static_cast<Index>(blockIdx.y) * blockDim.x + threadIdx.x) * kChunk;
  const bool live = col < cols;
  const Index at = live ? col : 0;
  const int count = live ? cuda::chunk_at(col, cols) : 0;
  const Index begin = static_cast<Index>(blockIdx.x) * length, end = min(rows, begin + length);
  Eight w[kExperts];
#pragma unroll
  for (int g = 0; g < kExperts; ++g)
    w[g] = cuda::take<Aligned>(wg.at(min(g, experts - 1), at), count);
  cuda::Packed<T> next[kTogether];
  const auto fetch = [&](Index row) {
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
      next[t] = cuda::take_packed<Aligned>(d_x.at(min(row + t, end - 1), at), count);
  };
  fetch(begin);
  each_rows<kTogether>(d_logits, 0, experts, begin, end, [&](Index row, const float(*d)[kExperts]) {
    cuda::Packed<T> own[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) own[t] = next[t];
    // The rows after the last four are these again, read before they are written.
    fetch(row + kTogether);
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      Eight sum = cuda::unpacked(own[t]);
#pragma unroll
      for (int g = 0; g < kExperts; ++g)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum.v[i] += d[t][g] * w[g].v[i];
      for (int e = kExperts; e < experts; ++e) {
        const Eight more = cuda::take<Aligned>(wg.at(e, at), count);
        const float by = *d_logits.at(min(row + t, end - 1), e);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum.v[i] += by * more.v[i];
      }
      if (live && row + t < end) cuda::put<Aligned>(d_x.at(row + t, at), sum, count);
    }
  });
}

/// d_logits^T x over a range of rows, eight experts a block: each row of x read once for them.
template <bool Aligned, class T>
__global__ void __launch_bounds__(128, sizeof(T) == 2 ? 3 : 2)
    weight_backward_kernel(float* parts, Rows<const float> d_logits, Rows<const T> x, Index rows,
                           Index cols, Index length, int experts) {
  const Index col = (static_cast<Index>(blockIdx.y) * blockDim.x + threadIdx.x) * kChunk;
  const bool live = col < cols;
  const Index at = live ? col : 0;
  const int count = live ? cuda::chunk_at(col, cols) : 0,
            first = static_cast<int>(blockIdx.z) * kExperts;
  const Index begin = static_cast<Index>(blockIdx.x) * length, end = min(rows, begin + length);
  Eight sum[kExperts] = {};
  constexpr int kAhead = sizeof(T) == 2 ? 2 * kTogether : kTogether;
  cuda::Packed<T> next[kAhead];
  const auto fetch = [&](Index row) {
#pragma unroll
    for (int t = 0; t < kAhead; ++t)
      next[t] = cuda::take_packed<Aligned>(x.at(min(row + t, end - 1), at), count);
  };
  fetch(begin);
  each_rows<kAhead>(d_logits, first, experts, begin, end,
                    [&](Index row, const float(*d)[kExperts]) {
                      cuda::Packed<T> own[kAhead];
#pragma unroll
                      for (int t = 0; t < kAhead; ++t) own[t] = next[t];
                      fetch(row + kAhead);
#pragma unroll
                      for (int t = 0; t < kAhead; ++t) {
                        const Eight e = cuda::unpacked(own[t]);
#pragma unroll
                        for (int g = 0; g < kExperts; ++g)
#pragma unroll
                          for (int i = 0; i < kChunk; ++i) sum[g].v[i] += d[t][g] * e.v[i];
                      }
                    });
  if (!live) return;
#pragma unroll
  for (int g = 0; g < kExperts; ++g)
    if (first + g < experts)
      cuda::put<Aligned>(
          parts + (static_cast<Index>(blockIdx.x) * experts + first + g) * cols + col, sum[g],
          count);
}

// ---- the choice ---------------------------------------------------------------------------------

constexpr int kEach = 4;  // experts of a lane: e = lane + 32 i
constexpr int kMostExperts = kEach * kWarp;
constexpr int kMostStats = 2 * kMostExperts + 2;
constexpr Index kMostBlocks = 256;

__device__ double warp_sum(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(cuda::kAll, x, step);
  return x;
}
/// The expert of the largest logit among those whose bit in `open` is set, the first of equal ones.
/// Logits order experts as probabilities do, without rounding's ties.
__device__ int best_of(const float* x, unsigned open, int lane) {
  float value = -INFINITY;
  int index = INT_MAX;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float own = isnan(x[i]) ? -INFINITY : x[i];
    if ((open >> i & 1U) != 0 && (own > value || index == INT_MAX)) {
      value = own;
      index = lane + kWarp * i;
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(cuda::kAll, value, step);
    const int at = __shfl_xor_sync(cuda::kAll, index, step);
    if (other > value || (other == value && at < index)) {
      value = other;
      index = at;
    }
  }
  return index;
}
/// x[i] = the row's number of expert lane + 32 i, `otherwise` where there is none.
__device__ void take_row(float* x, const float* row, int lane, int experts, float otherwise) {
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    x[i] = lane + kWarp * i < experts ? row[lane + kWarp * i] : otherwise;
}
/// A bit for each of the lane's experts.
__device__ unsigned bits_of(int lane, int experts) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) bits |= lane + kWarp * i < experts ? 1U << i : 0U;
  return bits;
}

/// One warp a row: softmax in double as on the CPU, then the choice expert by expert; the row's
/// part of the statistics stays in registers until the block's sums are written.
__global__ void route_kernel(Rows<std::int32_t> expert, Rows<float> weight, Rows<float> p,
                             double* parts, Rows<const float> logits, Router r, Index rows) {
  __shared__ double shared[kWarps][kMostStats];
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto experts = static_cast<int>(r.experts), slots = static_cast<int>(r.slots);
  const double divide =
      r.kind == RouterKind::top_p && r.temperature > 0 ? static_cast<double>(r.temperature) : 1.0;
  double count[kEach] = {}, mass[kEach] = {}, squares = 0, entropy = 0;
  for (Index row = static_cast<Index>(blockIdx.x) * kWarps + warp; row < rows;
       row += static_cast<Index>(gridDim.x) * kWarps) {
    float x[kEach];
    take_row(x, logits.at(row, 0), lane, experts, -INFINITY);
    const auto top =
        static_cast<double>(cuda::warp_max(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]))));
    unsigned open = bits_of(lane, experts);
    double q[kEach] = {}, sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if ((open >> i & 1U) != 0) sum += exp(static_cast<double>(x[i]) - top);
    const double lse = top + log(warp_sum(sum));
    squares += lse * lse;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if ((open >> i & 1U) != 0) {
        const double log_p = static_cast<double>(x[i]) - lse;
        q[i] = exp(log_p);
        mass[i] += q[i];
        entropy -= q[i] > 0 ? q[i] * log_p : 0;
        *p.at(row, lane + kWarp * i) = static_cast<float>(q[i]);
      }

    double total = 0;
    int used = 0;
    for (; used < slots && !(r.kind == RouterKind::top_p && total > r.top_p); ++used) {
      const int e = best_of(x, open, lane);
      double own = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (e == lane + kWarp * i) {
          open &= ~(1U << i);
          count[i] += 1;
          own = q[i];
        }
      own = __shfl_sync(cuda::kAll, own, e % kWarp) / divide;
      total += own;
      if (lane == 0) {
        *expert.at(row, used) = e;
        *weight.at(row, used) = static_cast<float>(own);
      }
    }
    for (int k = used + lane; k < slots; k += kWarp) {
      *expert.at(row, k) = -1;
      *weight.at(row, k) = 0;
    }
    if (r.kind != RouterKind::top_k) continue;
    __syncwarp();
    for (int k = lane; k < slots; k += kWarp)
      *weight.at(row, k) = static_cast<float>(static_cast<double>(*weight.at(row, k)) / total);
  }

  entropy = warp_sum(entropy);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (const int e = lane + kWarp * i; e < experts) {
      shared[warp][e] = count[i];
      shared[warp][experts + e] = mass[i];
    }
  if (lane == 0) {
    shared[warp][2 * experts] = squares;
    shared[warp][2 * experts + 1] = entropy;
  }
  __syncthreads();
  const int width = 2 * experts + 2;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared[w][i];
    parts[static_cast<Index>(blockIdx.x) * width + i] = sum;
  }
}

/// One warp a statistic: the blocks' parts in a fixed order.
__global__ void stats_kernel(float* stats, const double* parts, int blocks, int width) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < width; i += kWarp) {
    double sum = 0;
    for (int b = lane; b < blocks; b += kWarp) sum += parts[static_cast<Index>(b) * width + i];
    sum = warp_sum(sum);
    if (lane == 0) stats[i] = static_cast<float>(sum);
  }
}

/// One warp a sequence, 32 rows at a time: a row beyond the expert's capacity, counting the rows
/// before it, loses the expert.
__global__ void capacity_kernel(Rows<std::int32_t> expert, Rows<float> weight,
                                Rows<const std::int32_t> table, Index capacity, bool base) {
  __shared__ int taken[kMostExperts];
  const int lane = static_cast<int>(threadIdx.x);
  for (int e = lane; e < kMostExperts; e += kWarp) taken[e] = 0;
  __syncwarp();
  const std::int32_t begin = *table.at(blockIdx.x, 0), end = begin + *table.at(blockIdx.x, 1);
  for (std::int32_t at = begin; at < end; at += kTogether * kWarp) {
    int own[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const std::int32_t row = at + t * kWarp + lane;
      own[t] = row < end ? *expert.at(row, 0) : -1;
    }
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const unsigned same = __match_any_sync(cuda::kAll, own[t]);
      const int before = __popc(same & ((1U << lane) - 1));
      const bool over = own[t] >= 0 && taken[max(own[t], 0)] + before >= capacity;
      __syncwarp();
      if (own[t] >= 0 && before == 0) taken[own[t]] += __popc(same);
      __syncwarp();
      if (!over) continue;
      *expert.at(at + t * kWarp + lane, 0) = -1;
      if (base) *weight.at(at + t * kWarp + lane, 0) = 1;
    }
  }
}

/// One block: a thread an expert, in double.
__global__ void balance_kernel(float* loss, Rows<float> fraction, Rows<const float> stats,
                               int layers, int experts, double rows, double coef, double z_coef,
                               bool per_layer) {
  __shared__ double shared[2][kMostExperts];
  const auto thread = static_cast<int>(threadIdx.x);
  const double all = rows * layers;
  double aux = 0, z = 0;
  for (int e = thread; e < experts; e += kMostExperts) {
    double count = 0, mass = 0;
    for (int l = 0; l < layers; ++l) {
      const auto c = static_cast<double>(*stats.at(l, e)),
                 p = static_cast<double>(*stats.at(l, experts + e));
      count += c;
      mass += p;
      if (!per_layer) continue;
      aux += c / rows * p / all;
      *fraction.at(l, e) = static_cast<float>(c / all);
    }
    if (per_layer) continue;
    aux += count / all * (mass / all);
    for (int l = 0; l < layers; ++l) *fraction.at(l, e) = static_cast<float>(count / all / layers);
  }
  for (int l = thread; l < layers; l += kMostExperts)
    z += static_cast<double>(*stats.at(l, 2 * experts));
  shared[0][thread] = aux;
  shared[1][thread] = z;
  __syncthreads();
  if (thread > 1) return;
  double sum = 0;
  for (int i = 0; i < kMostExperts; ++i) sum += shared[thread][i];
  loss[thread] = static_cast<float>(thread == 0 ? coef * experts * sum : z_coef * sum / all);
}

/// One warp a row: through the choice, then what the two losses add.
__global__ void route_backward_kernel(Rows<float> d_logits, Rows<const float> d_weight,
                                      Rows<const std::int32_t> expert, Rows<const float> weight,
                                      Rows<const float> p, Rows<const float> logits,
                                      const float* fraction, Router r, float aux, float z,
                                      Index rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Index row = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (row >= rows) return;
  const auto experts = static_cast<int>(r.experts), slots = static_cast<int>(r.slots);
  const bool top_k = r.kind == RouterKind::top_k;
  const float divide = r.kind == RouterKind::top_p && r.temperature > 0 ? r.temperature : 1;
  float x[kEach], own[kEach], f[kEach], d[kEach] = {}, through[kEach] = {};
  take_row(x, logits.at(row, 0), lane, experts, -INFINITY);
  take_row(own, p.at(row, 0), lane, experts, 0);
  take_row(f, fraction, lane, experts, 0);
  float mean = 0;
  for (int k = 0; k < slots; ++k) {
    int e = *expert.at(row, k);
    if (e < 0 && r.kind == RouterKind::switch_top1 && r.overflow == Overflow::input)
      e = best_of(x, bits_of(lane, experts), lane);  // its weight is still p_max
    if (e < 0) continue;
    const float w = top_k ? *weight.at(row, k) : *p.at(row, e) / divide;
    const float share = w * *d_weight.at(row, k);
    mean += share;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (e == lane + kWarp * i) {
        d[i] += share;
        through[i] += w;
      }
  }
  const float top = cuda::warp_max(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
  float sum = 0, balance = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    sum += expf(x[i] - top);
    balance += own[i] * f[i];
  }
  const float lse = top + logf(cuda::warp_sum(sum));
  balance = cuda::warp_sum(balance);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (const int e = lane + kWarp * i; e < experts)
      *d_logits.at(row, e) =
          d[i] - (top_k ? through[i] : own[i]) * mean + own[i] * (aux * (f[i] - balance) + z * lse);
}

unsigned row_blocks(Index rows, Index each) {
  return static_cast<unsigned>(cuda::ceil_div(rows, each));
}

}  // namespace

void CudaBackend::router_logits(Tensor logits, ConstTensor x, ConstTensor wg) {
  const char* op = "router_logits";
  const Index rows = x.rows(), cols = x.cols(), experts = wg.rows();
  cuda::expect(logits.rows() == rows && logits.cols() == experts && wg.cols() == cols, op);
  if (rows == 0) return;
  const dim3 blocks(row_blocks(rows, kTogether), row_blocks(experts, kExperts));
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      kernel<<<blocks, kLogitsWarps * kWarp, 0, stream_>>>(
          cuda::rows_of<float>(logits), cuda::rows_of<T>(x), cuda::rows_of<float>(wg), rows, cols,
          static_cast<int>(experts));
    };
    if (cuda::aligned(x, wg))
      run(logits_kernel<true, T>);
    else
      run(logits_kernel<false, T>);
  });
  cuda::launched(op);
}

void CudaBackend::route(Slots& slots, Tensor probabilities, Tensor stats, ConstTensor logits,
                        const Router& router, const Sequences& s) {
  const char* op = "route";
  const Index rows = logits.rows(), experts = router.experts;
  const int width = static_cast<int>(2 * experts + 2);
  cuda::expect(logits.cols() == experts && experts <= kMostExperts && router.slots <= experts &&
                   slots.expert.rows() == rows && slots.expert.cols() == router.slots &&
                   slots.weight.rows() == rows && slots.weight.cols() == router.slots &&
                   probabilities.rows() == rows && probabilities.cols() == experts &&
                   stats.numel() == width && stats.contiguous(),
               op);
  const Index blocks = std::min(kMostBlocks, cuda::ceil_div<Index>(rows, kWarps));
  auto* parts = room().take<double>(kMostBlocks * width);
  if (blocks > 0) {
    route_kernel<<<static_cast<unsigned>(blocks), kWarps * kWarp, 0, stream_>>>(
        cuda::rows_of<std::int32_t>(slots.expert), cuda::rows_of<float>(slots.weight),
        cuda::rows_of<float>(probabilities), parts, cuda::rows_of<float>(logits), router, rows);
    cuda::launched(op);
  }
  stats_kernel<<<1, kWarp * kWarp, 0, stream_>>>(cuda::data<float>(stats), parts,
                                                 static_cast<int>(blocks), width);
  cuda::launched(op);
  if (router.kind != RouterKind::switch_top1 || router.capacity == 0 || s.count == 0) return;
  capacity_kernel<<<static_cast<unsigned>(s.count), kWarp, 0, stream_>>>(
      cuda::rows_of<std::int32_t>(slots.expert), cuda::rows_of<float>(slots.weight),
      cuda::rows_of<std::int32_t>(s.table), router.capacity, router.overflow == Overflow::base);
  cuda::launched(op);
}

void CudaBackend::balance_loss(Tensor loss, Tensor fraction, ConstTensor stats, std::int64_t rows,
                               float coef, float z_coef, bool per_layer) {
  const Index layers = stats.rows(), experts = fraction.cols();
  cuda::expect(loss.numel() == 2 && loss.contiguous() && fraction.rows() == layers &&
                   stats.cols() == 2 * experts + 2,
               "balance_loss");
  balance_kernel<<<1, kMostExperts, 0, stream_>>>(
      cuda::data<float>(loss), cuda::rows_of<float>(fraction), cuda::rows_of<float>(stats),
      static_cast<int>(layers), static_cast<int>(experts), static_cast<double>(rows),
      static_cast<double>(coef), static_cast<double>(z_coef), per_layer);
  cuda::launched("balance_loss");
}

void CudaBackend::route_backward(Tensor d_logits, ConstTensor d_weight, const Slots& slots,
                                 ConstTensor probabilities, ConstTensor logits,
                                 ConstTensor fraction, const Router& router, float coef,
                                 float z_coef, std::int64_t layers, float factor) {
  const char* op = "route_backward";
  const Index rows = logits.rows();
  const auto is = [&](ConstTensor t, Index cols) { return t.rows() == rows && t.cols() == cols; };
  cuda::expect(is(d_logits, router.experts) && is(logits, router.experts) &&
                   is(probabilities, router.experts) && is(d_weight, router.slots) &&
                   is(slots.expert, router.slots) && is(slots.weight, router.slots) &&
                   fraction.numel() == router.experts && fraction.contiguous() &&
                   router.experts <= kMostExperts,
               op);
  if (rows == 0) return;
  const auto n = static_cast<float>(rows);
  const float aux = factor * coef * static_cast<float>(router.experts) / n,
              z = factor * z_coef * 2 / (n * static_cast<float>(layers));
  route_backward_kernel<<<row_blocks(rows, kWarps), kWarps * kWarp, 0, stream_>>>(
      cuda::rows_of<float>(d_logits), cuda::rows_of<float>(d_weight),
      cuda::rows_of<std::int32_t>(ConstTensor(slots.expert)),
      cuda::rows_of<float>(ConstTensor(slots.weight)), cuda::rows_of<float>(probabilities),
      cuda::rows_of<float>(logits), cuda::data<float>(fraction), router, aux, z, rows);
  cuda::launched(op);
}

void CudaBackend::router_weight_backward(Tensor d_wg, ConstTensor d_logits, ConstTensor x) {
  const char* op = "router_backward";
  const Index rows = x.rows(), cols = x.cols(), experts = d_wg.rows();
  cuda::expect(d_wg.cols() == cols && d_logits.rows() == rows && d_logits.cols() == experts &&
                   d_wg.contiguous(),
               op);
  if (rows == 0) return;
  const cuda::Parts parts = cuda::parts_of(rows, experts * cols);
  const unsigned threads = cuda::column_threads(cols);
  const dim3 blocks(static_cast<unsigned>(parts.count), row_blocks(cols, threads * kChunk),
                    row_blocks(experts, kExperts));
  auto* sums = room().take<float>(parts.count * experts * cols);
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      kernel<<<blocks, threads, 0, stream_>>>(sums, cuda::rows_of<float>(d_logits),
                                              cuda::rows_of<T>(x), rows, cols, parts.length,
                                              static_cast<int>(experts));
    };
    if (cuda::aligned(x))
      run(weight_backward_kernel<true, T>);
    else
      run(weight_backward_kernel<false, T>);
  });
  cuda::launched(op);
  cuda::add_partials(stream_, op, cuda::data<float>(d_wg), sums, parts.count, experts * cols);
}

void CudaBackend::router_backward(Tensor d_wg, Tensor d_x, ConstTensor d_logits, ConstTensor x,
                                  ConstTensor wg) {
  const char* op = "router_backward";
  const Index rows = x.rows(), cols = x.cols(), experts = wg.rows();
  cuda::expect_same(d_x, x, op);
  cuda::expect_same(d_wg, wg, op);
  router_weight_backward(d_wg, d_logits, x);
  if (rows == 0) return;
  const unsigned threads = cuda::column_threads(cols), across = row_blocks(cols, threads * kChunk);
  // Ranges of d_x's rows: about three blocks a processor.
  const Index length = std::max<Index>(
      kTogether, cuda::ceil_div<Index>(rows * across, 3 * static_cast<Index>(processors_)));
  const dim3 blocks(row_blocks(rows, length), across);
  cuda::with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel) {
      kernel<<<blocks, threads, 0, stream_>>>(cuda::rows_of<T>(d_x), cuda::rows_of<float>(d_logits),
                                              cuda::rows_of<float>(wg), rows, cols, length,
                                              static_cast<int>(experts));
    };
    if (cuda::aligned(d_x, wg))
      run(input_backward_kernel<true, T>);
    else
      run(input_backward_kernel<false, T>);
  });
  cuda::launched(op);
}

}  // namespace mixlora
