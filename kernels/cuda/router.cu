// Routing: which experts a row uses, how evenly, and the gradient to the router.
#include <algorithm>
#include <climits>
#include <cmath>
#include <type_traits>

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
constexpr int kWarps = 8;    // of a block whose warps take rows

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

// A row's experts lie on Lanes lanes of a warp, Each a lane: e = lane + Lanes i. What follows is
// asked by all lanes of a warp.

constexpr int kMostExperts = 4 * kWarp;
constexpr int kRouteBlocks = 128, kRouteWarps = 16;  // rows go to a block's first warps first

template <int Lanes, class T> __device__ T row_sum(T x) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(cuda::kAll, x, step);
  return x;
}
template <int Lanes, int Each> __device__ float row_max(const float (&x)[Each]) {
  float most = x[0];
#pragma unroll
  for (int i = 1; i < Each; ++i) most = fmaxf(most, x[i]);
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2)
    most = fmaxf(most, __shfl_xor_sync(cuda::kAll, most, step));
  return most;
}
/// The sum over a warp's rows of what each has on the same lane.
template <int Lanes, class T> __device__ T rows_sum(T x) {
#pragma unroll
  for (int step = Lanes; step < kWarp; step *= 2) x += __shfl_xor_sync(cuda::kAll, x, step);
  return x;
}
/// x[i] = the row's number lane + Lanes i, `otherwise` from the count-th on.
template <int Lanes, int Each, class T>
__device__ void take_row(T (&x)[Each], const T* row, int lane, int count, T otherwise) {
#pragma unroll
  for (int i = 0; i < Each; ++i)
    x[i] = lane + Lanes * i < count ? row[lane + Lanes * i] : otherwise;
}
/// The row's number i of those that take_row took; i is the same on all of its lanes.
template <int Lanes, int Each, class T> __device__ T number_of(const T (&x)[Each], int i) {
  T own = x[0];
#pragma unroll
  for (int j = 1; j < Each; ++j)
    if (i / Lanes == j) own = x[j];
  return __shfl_sync(cuda::kAll, own, i % Lanes, Lanes);
}

/// A row's experts by their logits, the largest first, the first of equal ones before the others.
/// Logits order experts as probabilities do, without rounding's ties.
template <int Lanes, int Each> class Ranking {
 public:
  __device__ Ranking(const float (&logits)[Each], int lane, int experts) : lane_(lane) {
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      x_[i] = isnan(logits[i]) ? -INFINITY : logits[i];
      open_ |= lane + Lanes * i < experts ? 1U << i : 0U;
    }
    if constexpr (Each == 1) {
#pragma unroll
      for (int step = 1; step < Lanes; ++step) {
        const float other = __shfl_xor_sync(cuda::kAll, x_[0], step);
        before_ += other > x_[0] || (other == x_[0] && (lane ^ step) < lane) ? 1 : 0;
      }
    }
  }
  /// Expert k of the order, asked for one after another.
  __device__ int next(int k) {
    if constexpr (Each == 1) {
      const unsigned here = static_cast<unsigned>(static_cast<int>(threadIdx.x) % kWarp - lane_);
      return __ffs(static_cast<int>(__ballot_sync(cuda::kAll, before_ == k) >> here)) - 1;
    } else {
      float value = -INFINITY;
      int index = INT_MAX;
#pragma unroll
      for (int i = 0; i < Each; ++i)
        if ((open_ >> i & 1U) != 0 && (x_[i] > value || index == INT_MAX)) {
          value = x_[i];
          index = lane_ + Lanes * i;
        }
#pragma unroll
      for (int step = Lanes / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(cuda::kAll, value, step);
        const int at = __shfl_xor_sync(cuda::kAll, index, step);
        if (other > value || (other == value && at < index)) {
          value = other;
          index = at;
        }
      }
      if (index % Lanes == lane_) open_ &= ~(1U << (index / Lanes));
      return index;
    }
  }

 private:
  float x_[Each];
  int lane_, before_ = 0;
  unsigned open_ = 0;
};

/// Counts a block that has come, 0 again after the last of `blocks`: whether this one is it. The
/// last one sees, behind its next barrier, what the others wrote before theirs.
__device__ bool is_last(unsigned* arrived, unsigned blocks) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(arrived), "r"(blocks - 1)
               : "memory");
  return before == blocks - 1;
}

/// `Lanes` lanes a row: softmax in double as on the CPU, then the choice expert by expert. A row's
/// part of the statistics stays in registers until the block's sums are written; the block that is
/// the last to come adds all blocks' in a fixed order. `arrived` counts them, 0 before and after.
template <int Lanes, int Each>
__global__ void __launch_bounds__(kRouteWarps* kWarp)
    route_kernel(Rows<std::int32_t> expert, Rows<float> weight, Rows<float> p, float* stats,
                 double* parts, unsigned* arrived, Rows<const float> logits, Router r, Index rows) {
  constexpr int kRows = kWarp / Lanes;
  __shared__ double shared[kRouteWarps][2 * Lanes * Each + 2];
  __shared__ bool last;
  const int lane = static_cast<int>(threadIdx.x) % Lanes,
            warp = static_cast<int>(threadIdx.x) / kWarp,
            own_row = static_cast<int>(threadIdx.x) % kWarp / Lanes;
  const auto experts = static_cast<int>(r.experts), slots = static_cast<int>(r.slots);
  const bool top_p = r.kind == RouterKind::top_p, divided = top_p && r.temperature > 0;
  int count[Each] = {};
  double mass[Each] = {}, squares = 0, entropy = 0;
#pragma unroll 1
  for (Index first = (static_cast<Index>(warp) * kRouteBlocks + blockIdx.x) * kRows; first < rows;
       first += kRouteBlocks * kRouteWarps * kRows) {
    const Index row = min(first + own_row, rows - 1);
    const bool live = first + own_row < rows;
    float x[Each];
    take_row<Lanes>(x, logits.at(row, 0), lane, experts, -INFINITY);
    Ranking<Lanes, Each> ranking(x, lane, experts);
    const auto top = static_cast<double>(row_max<Lanes>(x));
    double q[Each], sum = 0;
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      q[i] = lane + Lanes * i < experts ? exp(static_cast<double>(x[i]) - top) : 0;
      sum += q[i];
    }
    sum = row_sum<Lanes>(sum);
    const double lse = top + log(sum);
    if (live) squares += lse * lse;
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      q[i] /= sum;
      if (!live || lane + Lanes * i >= experts) continue;
      mass[i] += q[i];
      entropy -= q[i] > 0 ? q[i] * (static_cast<double>(x[i]) - lse) : 0;
      *p.at(row, lane + Lanes * i) = static_cast<float>(q[i]);
    }

    int chosen[Each];  // of slot lane + Lanes i
    double share[Each], total = 0;
#pragma unroll
    for (int i = 0; i < Each; ++i) chosen[i] = -1, share[i] = 0;
#pragma unroll 1
    for (int k = 0; k < slots; ++k) {
      const bool used = !(top_p && total > r.top_p);
      if (top_p && __ballot_sync(cuda::kAll, used) == 0) break;
      const int e = ranking.next(k);
      double own = number_of<Lanes>(q, e);
      if (divided) own /= static_cast<double>(r.temperature);
      if (!used) continue;
      total += own;
#pragma unroll
      for (int i = 0; i < Each; ++i) {
        if (live && e == lane + Lanes * i) ++count[i];
        if (k == lane + Lanes * i) chosen[i] = e, share[i] = own;
      }
    }
#pragma unroll
    for (int i = 0; i < Each; ++i)
      if (const int k = lane + Lanes * i; live && k < slots) {
        const auto own = static_cast<float>(share[i]);
        *expert.at(row, k) = chosen[i];
        *weight.at(row, k) = r.kind == RouterKind::top_k
                                 ? static_cast<float>(static_cast<double>(own) / total)
                                 : own;
      }
  }

  squares = rows_sum<Lanes>(squares);
  entropy = row_sum<kWarp>(entropy);
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    count[i] = rows_sum<Lanes>(count[i]);
    mass[i] = rows_sum<Lanes>(mass[i]);
    if (const int e = lane + Lanes * i; own_row == 0 && e < experts) {
      shared[warp][e] = count[i];
      shared[warp][experts + e] = mass[i];
    }
  }
  if (own_row == 0 && lane == 0) {
    shared[warp][2 * experts] = squares;
    shared[warp][2 * experts + 1] = entropy;
  }
  __syncthreads();
  // Short code, since it runs once: to fetch an instruction takes longer than to run it.
  const int width = 2 * experts + 2;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kRouteWarps * kWarp) {
    double sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += shared[w][i];
    parts[i * kRouteBlocks + static_cast<int>(blockIdx.x)] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) last = is_last(arrived, kRouteBlocks);
  __syncthreads();
  if (!last) return;
  constexpr int kLanes = 16;  // of a statistic
  const int part = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (int first = 0; first < width; first += kRouteWarps * kWarp / kLanes) {
    const int i = first + static_cast<int>(threadIdx.x) / kLanes;
    const double* from = parts + min(i, width - 1) * kRouteBlocks + part;
    double x[kRouteBlocks / kLanes], sum = 0;
#pragma unroll
    for (int j = 0; j < kRouteBlocks / kLanes; ++j) x[j] = __ldcg(from + j * kLanes);
#pragma unroll
    for (int j = 0; j < kRouteBlocks / kLanes; ++j) sum += x[j];
    sum = row_sum<kLanes>(sum);
    if (i < width && part == 0) stats[i] = static_cast<float>(sum);
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

/// `Lanes` lanes a row: through the choice, then what the two losses add.
template <int Lanes, int Each>
__global__ void __launch_bounds__(kWarps* kWarp)
    route_backward_kernel(Rows<float> d_logits, Rows<const float> d_weight,
                          Rows<const std::int32_t> expert, Rows<const float> weight,
                          Rows<const float> p, Rows<const float> logits, const float* fraction,
                          Router r, float aux, float z, Index rows) {
  const int lane = static_cast<int>(threadIdx.x) % Lanes;
  const Index at = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) / Lanes,
              row = min(at, rows - 1);
  const auto experts = static_cast<int>(r.experts), slots = static_cast<int>(r.slots);
  const bool top_k = r.kind == RouterKind::top_k;
  const float divide = r.kind == RouterKind::top_p && r.temperature > 0 ? r.temperature : 1;
  float x[Each], own[Each], f[Each], d[Each] = {}, through[Each] = {};
  std::int32_t chosen[Each];
  float w[Each], d_w[Each];
  take_row<Lanes>(x, logits.at(row, 0), lane, experts, -INFINITY);
  take_row<Lanes>(own, p.at(row, 0), lane, experts, 0.0F);
  take_row<Lanes>(f, fraction, lane, experts, 0.0F);
  take_row<Lanes>(chosen, expert.at(row, 0), lane, slots, -1);
  take_row<Lanes>(w, weight.at(row, 0), lane, slots, 0.0F);
  take_row<Lanes>(d_w, d_weight.at(row, 0), lane, slots, 0.0F);
  const int lost =
      r.kind == RouterKind::switch_top1 && r.overflow == Overflow::input
          ? Ranking<Lanes, Each>(x, lane, experts).next(0)  // its weight is still p_max
          : -1;
  float mean = 0;
#pragma unroll 1
  for (int k = 0; k < slots; ++k) {
    int e = number_of<Lanes>(chosen, k);
    e = e < 0 ? lost : e;
    const float by = top_k ? number_of<Lanes>(w, k) : number_of<Lanes>(own, max(e, 0)) / divide;
    const float share = by * number_of<Lanes>(d_w, k);
    if (e < 0) continue;
    mean += share;
#pragma unroll
    for (int i = 0; i < Each; ++i)
      if (e == lane + Lanes * i) {
        d[i] += share;
        through[i] += by;
      }
  }
  const float top = row_max<Lanes>(x);
  float sum = 0, balance = 0;
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    sum += expf(x[i] - top);
    balance += own[i] * f[i];
  }
  const float lse = top + logf(row_sum<Lanes>(sum));
  balance = row_sum<Lanes>(balance);
#pragma unroll
  for (int i = 0; i < Each; ++i)
    if (const int e = lane + Lanes * i; at < rows && e < experts)
      *d_logits.at(row, e) =
          d[i] - (top_k ? through[i] : own[i]) * mean + own[i] * (aux * (f[i] - balance) + z * lse);
}

/// Calls f(Lanes, Each) with how many lanes take a row of so many experts.
template <class F> void with_lanes(Index experts, F&& f) {
  using std::integral_constant;
  if (experts <= 8)
    f(integral_constant<int, 8>{}, integral_constant<int, 1>{});
  else if (experts <= 16)
    f(integral_constant<int, 16>{}, integral_constant<int, 1>{});
  else
    f(integral_constant<int, kWarp>{}, integral_constant<int, kMostExperts / kWarp>{});
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
  auto* parts = room().take<double>(kRouteBlocks * width);
  with_lanes(experts, [&](auto lanes, auto each) {
    route_kernel<lanes(), each()><<<kRouteBlocks, kRouteWarps * kWarp, 0, stream_>>>(
        cuda::rows_of<std::int32_t>(slots.expert), cuda::rows_of<float>(slots.weight),
        cuda::rows_of<float>(probabilities), cuda::data<float>(stats), parts, arrived(),
        cuda::rows_of<float>(logits), router, rows);
  });
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
  with_lanes(router.experts, [&](auto lanes, auto each) {
    route_backward_kernel<lanes(), each()>
        <<<row_blocks(rows, kWarps * kWarp / lanes()), kWarps * kWarp, 0, stream_>>>(
            cuda::rows_of<float>(d_logits), cuda::rows_of<float>(d_weight),
            cuda::rows_of<std::int32_t>(ConstTensor(slots.expert)),
            cuda::rows_of<float>(ConstTensor(slots.weight)), cuda::rows_of<float>(probabilities),
            cuda::rows_of<float>(logits), cuda::data<float>(fraction), router, aux, z, rows);
  });
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
