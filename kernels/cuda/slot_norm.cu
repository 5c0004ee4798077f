// The residual sum behind a mixture, and RMSNorm: the experts' low-rank updates join the sum, and
// with DoRA what scales and sums the slots.
#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/slot_update.cuh"

namespace mixlora {
namespace {

using cuda::Index;
using cuda::kWarp;
using cuda::SlotRanks;
using cuda::SlotUpdate;
using Number = __nv_bfloat16;

constexpr int kRows = cuda::kUpdateRows, kWarps = cuda::kUpdateWarps;
constexpr int kOwn = SlotUpdate::kOwn, kTile = SlotUpdate::kTile, kTiles = SlotUpdate::kTiles;

struct Call {
  Number* sum;
  const Number *x, *delta, *z, *b;
  const float* weight;         // (N, 2)
  const std::int32_t* expert;  // (N, 2)
  float* squares;              // (N, blocks of columns)
  Index stride_sum, stride_x, stride_delta, stride_z;
  int rows, cols;
  // DoRA's slots, in place of delta:
  Number* core;        // (2, N, D)
  const float* scale;  // (E, D)
};

/// Where a thread of a grid (columns / 256, walkers) is, and what it does alike in both kernels: a
/// block keeps B2 of its columns and walks down the rows, 64 at a time; the next tile's numbers and
/// the next rows' ranks are on their way meanwhile. A lane has eight columns of rows 2q and 2q + 1.
struct Walk {
  const Call& m;
  int lane, g, q, col0, tiles, step;
  int row0;  // of the warp
  std::uint32_t b0;
  __device__ Walk(const Call& call, std::byte* memory)
      : m(call),
        lane(static_cast<int>(threadIdx.x) % kWarp),
        g(lane / 4),
        q(lane % 4),
        col0(static_cast<int>(blockIdx.x) * SlotUpdate::kColumns),
        tiles(min(kTiles, (m.cols - col0) / kTile)),
        step(static_cast<int>(gridDim.y) * kWarps * kRows),
        row0((static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / kWarp) *
             kRows),
        b0(cuda::shared_address(memory)) {}
  __device__ bool more() const { return row0 + step < m.rows; }
  __device__ bool live(int i) const { return row0 + 2 * q + i < m.rows; }
  __device__ Index row_of(int from, int i) const {
    return static_cast<Index>(min(from + i, m.rows - 1));
  }
  template <int E> __device__ std::uint32_t tile(int t) const {
    return b0 + static_cast<std::uint32_t>(t * SlotUpdate::kTileBytes<E>);
  }
  /// Stores two rows' sums of a tile, in bf16, and adds their squares as they are stored.
  __device__ void store(const float (&sums)[kOwn / 2][4], int col, float (&squares)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned words[kOwn / 2];
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j) {
        words[j] = cuda::pack2(sums[j][i], sums[j][2 + i]);
        const float low = cuda::low(words[j]), high = cuda::high(words[j]);
        squares[i] += low * low + high * high;
      }
      if (live(i))
        cuda::store_words<kOwn>(m.sum + row_of(row0, 2 * q + i) * m.stride_sum + col, words);
    }
  }
  /// Leaves the block's part of the rows' squares.
  __device__ void leave(float (&squares)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int apart = 4; apart < kWarp; apart *= 2)
        squares[i] += __shfl_xor_sync(cuda::kAll, squares[i], apart);
      if (g == 0 && live(i))
        m.squares[static_cast<Index>(row0 + 2 * q + i) * gridDim.x + blockIdx.x] = squares[i];
    }
  }
};

/// sum = x + delta + sum_k w_k z_k B_e^T and, by block of columns, each row's squares of it.
template <int E>
__global__ void __launch_bounds__(kWarps* kWarp, 2) sum_kernel(const __grid_constant__ Call m) {
  extern __shared__ __align__(16) std::byte memory[];
  Walk at(m, memory);
  SlotUpdate::fetch<E>(at.b0, m.b, at.col0, at.tiles);
  SlotRanks next;
  float2 next_weight;
  const auto load_ranks = [&](int from) {
    const Index row = at.row_of(from, at.g);
    next.load(m.z + row * m.stride_z, m.expert + row * SlotUpdate::kSlots, at.q);
    next_weight = *reinterpret_cast<const float2*>(m.weight + row * SlotUpdate::kSlots);
  };
  unsigned x[2][kOwn / 2], delta[2][kOwn / 2];  // of the tile to come
  const auto load = [&](int from, int col) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Index row = at.row_of(from, 2 * at.q + i);
      cuda::load_words<kOwn>(x[i], m.x + row * m.stride_x + col);
      cuda::load_words<kOwn>(delta[i], m.delta + row * m.stride_delta + col);
    }
  };
  const int first = at.col0 + kOwn * at.g;
  if (at.row0 < m.rows) {
    load_ranks(at.row0);
    load(at.row0, first);
  }
  cuda::fetch_wait<0>();
  __syncthreads();

  for (; at.row0 < m.rows; at.row0 += at.step) {
    // A row chooses an expert once: one step of the tensor core an expert has both slots.
    const unsigned used = next.used(0) | next.used(1);
    const int chosen[2] = {next.expert[0], next.expert[1]};
    uint2 ranks[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float w = k == 0 ? next_weight.x : next_weight.y;
      ranks[k] = make_uint2(cuda::pack2(w * cuda::low(next.z[k].x), w * cuda::high(next.z[k].x)),
                            cuda::pack2(w * cuda::low(next.z[k].y), w * cuda::high(next.z[k].y)));
    }
    if (at.more()) load_ranks(at.row0 + at.step);
    float squares[2] = {};
    for (int t = 0; t < at.tiles; ++t) {
      float sums[kOwn / 2][4];
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[j][i] = cuda::low(x[i][j]) + cuda::low(delta[i][j]);
          sums[j][2 + i] = cuda::high(x[i][j]) + cuda::high(delta[i][j]);
        }
      const int col = first + t * kTile;
      if (t + 1 < at.tiles)
        load(at.row0, col + kTile);
      else if (at.more())
        load(at.row0 + at.step, first);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if ((used >> e & 1U) == 0) continue;
        const bool upper = chosen[1] == e, mine = upper || chosen[0] == e;
        const uint2 r = upper ? ranks[1] : ranks[0];
        const unsigned low = mine ? r.x : 0, high = mine ? r.y : 0;
#pragma unroll
        for (int j = 0; j < kOwn / 2; ++j) {
          unsigned b[4];
          cuda::read_matrices(b, cuda::update_row<kOwn>(at.tile<E>(t), j, at.lane) +
                                     static_cast<std::uint32_t>(e * cuda::kUpdateTile<kOwn>));
          cuda::mma(sums[j], b[0], b[1], b[2], b[3], low, high);
        }
      }
      at.store(sums, col, squares);
    }
    at.leave(squares);
  }
}

/// core_k += z_k B_e^T, sum = x + sum_k w_k scale_e core_k and the squares.
template <int E>
__global__ void __launch_bounds__(kWarps* kWarp, 2) combine_kernel(const __grid_constant__ Call m) {
  constexpr int kSlots = SlotUpdate::kSlots;
  extern __shared__ __align__(16) std::byte memory[];
  Walk at(m, memory);
  SlotUpdate::fetch<E>(at.b0, m.b, at.col0, at.tiles);
  SlotRanks own;
  unsigned x[2][kOwn / 2], core[2][kSlots][kOwn / 2];  // of the tile to come
  const auto core_of = [&](int from, int i, int k) {
    return m.core + (static_cast<Index>(k) * m.rows + at.row_of(from, 2 * at.q + i)) * m.cols;
  };
  const auto load = [&](int from, int col) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      cuda::load_words<kOwn>(x[i], m.x + at.row_of(from, 2 * at.q + i) * m.stride_x + col);
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
        cuda::load_words<kOwn>(core[i][k], core_of(from, i, k) + col);
    }
  };
  const int first = at.col0 + kOwn * at.g;
  if (at.row0 < m.rows) load(at.row0, first);
  cuda::fetch_wait<0>();
  __syncthreads();

  for (; at.row0 < m.rows; at.row0 += at.step) {
    const Index row = at.row_of(at.row0, at.g);
    own.load(m.z + row * m.stride_z, m.expert + row * kSlots, at.q);
    unsigned used[kSlots];
    int expert[2][kSlots];
    float weight[2][kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      used[k] = own.used(k);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Index at_slot = at.row_of(at.row0, 2 * at.q + i) * kSlots + k;
        expert[i][k] = m.expert[at_slot];
        weight[i][k] = m.weight[at_slot];
      }
    }
    float squares[2] = {};
    for (int t = 0; t < at.tiles; ++t) {
      const int col = first + t * kTile;
      float sums[kSlots][kOwn / 2][4], total[kOwn / 2][4];
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          total[j][i] = cuda::low(x[i][j]);
          total[j][2 + i] = cuda::high(x[i][j]);
#pragma unroll
          for (int k = 0; k < kSlots; ++k) {
            sums[k][j][i] = cuda::low(core[i][k][j]);
            sums[k][j][2 + i] = cuda::high(core[i][k][j]);
          }
        }
      if (t + 1 < at.tiles)
        load(at.row0, col + kTile);
      else if (at.more())
        load(at.row0 + at.step, first);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if (((used[0] | used[1]) >> e & 1U) == 0) continue;
#pragma unroll
        for (int j = 0; j < kOwn / 2; ++j) {
          unsigned b[4];
          cuda::read_matrices(b, cuda::update_row<kOwn>(at.tile<E>(t), j, at.lane) +
                                     static_cast<std::uint32_t>(e * cuda::kUpdateTile<kOwn>));
#pragma unroll
          for (int k = 0; k < kSlots; ++k) {
            const bool mine = own.expert[k] == e;
            if ((used[k] >> e & 1U) != 0)
              cuda::mma(sums[k][j], b[0], b[1], b[2], b[3], mine ? own.z[k].x : 0,
                        mine ? own.z[k].y : 0);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int k = 0; k < kSlots; ++k) {
          unsigned words[kOwn / 2];
#pragma unroll
          for (int j = 0; j < kOwn / 2; ++j)
            words[j] = cuda::pack2(sums[k][j][i], sums[k][j][2 + i]);
          if (at.live(i)) cuda::store_words<kOwn>(core_of(at.row0, i, k) + col, words);
          const float w = weight[i][k];
          if (w == 0) continue;
          cuda::Eight by = {{1, 1, 1, 1, 1, 1, 1, 1}};
          if (expert[i][k] >= 0)
            by = cuda::load8(m.scale + static_cast<Index>(expert[i][k]) * m.cols + col);
#pragma unroll
          for (int j = 0; j < kOwn / 2; ++j) {
            total[j][i] += w * by.v[2 * j] * sums[k][j][i];
            total[j][2 + i] += w * by.v[2 * j + 1] * sums[k][j][2 + i];
          }
        }
      at.store(total, col, squares);
    }
    at.leave(squares);
  }
}

/// y = sum r w, r from the blocks' squares.
struct Finish {
  cuda::Rows<Number> y;
  cuda::Rows<const Number> sum;
  const float *w, *squares;
  float* r;
  int parts;
  float inverse_cols, eps;
  template <bool Aligned> __device__ void at(Index row, Index col, int count) const {
    cuda::Eight e = cuda::take<Aligned>(sum.at(row, col), count);
    const cuda::Eight scale = cuda::take<Aligned>(w + col, count);
    float total = 0;
    for (int i = 0; i < parts; ++i) total += squares[row * parts + i];
    const float inverse = 1.0F / sqrtf(total * inverse_cols + eps);
    if (col == 0) r[row] = inverse;
#pragma unroll
    for (int i = 0; i < cuda::kChunk; ++i) e.v[i] *= inverse * scale.v[i];
    cuda::put<Aligned>(y.at(row, col), e, count);
  }
};

template <int E> void launch(const Call& m, int walkers, cudaStream_t stream) {
  auto* const kernel = m.core != nullptr ? combine_kernel<E> : sum_kernel<E>;
  cuda::admit_shared(reinterpret_cast<const void*>(kernel), SlotUpdate::kBytes<E>);
  const dim3 grid(static_cast<unsigned>(cuda::ceil_div(m.cols, SlotUpdate::kColumns)),
                  static_cast<unsigned>(walkers));
  kernel<<<grid, kWarps * kWarp, SlotUpdate::kBytes<E>, stream>>>(m);
  cuda::launched("the sum behind a mixture");
}

/// What both operations share: the call but for delta or core, whether it can be taken.
bool takes(ConstTensor sum, ConstTensor y, ConstTensor r, ConstTensor x, ConstTensor z,
           ConstTensor b, const Slots& s, ConstTensor w) {
  const auto fits = [&](const auto& t) {
    return t.dtype == DType::bf16 && cuda::by_eights(t) && t.rows() == x.rows() &&
           t.cols() == x.cols();
  };
  return fits(sum) && fits(y) && fits(x) && cuda::by_eights(w) && w.numel() == x.cols() &&
         r.numel() == x.rows() && r.contiguous() && cuda::takes_slots(z, b, s, x.rows(), x.cols());
}

}  // namespace

void CudaBackend::slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, ConstTensor delta,
                                Tensor core, ConstTensor z, ConstTensor b, ConstTensor scale,
                                const Slots& s, ConstTensor w, float eps) {
  const Index rows = x.rows(), cols = x.cols();
  if (rows == 0) return;
  const int parts = static_cast<int>(cuda::ceil_div<Index>(cols, SlotUpdate::kColumns));
  const Index groups = cuda::ceil_div<Index>(rows, kWarps * kRows);
  // Two blocks a processor, each with as many rows as the next.
  const Index turns = cuda::ceil_div<Index>(groups * parts, 2 * processors_);
  const int walkers = static_cast<int>(cuda::ceil_div(groups, turns));
  auto* squares = room().take<float>(rows * parts);
  const Call m{cuda::data<Number>(sum),
               cuda::data<Number>(x),
               delta ? cuda::data<Number>(delta) : nullptr,
               cuda::data<Number>(z),
               cuda::data<Number>(b),
               cuda::data<float>(ConstTensor(s.weight)),
               s.expert.ptr<std::int32_t>(),
               squares,
               sum.stride,
               x.stride,
               delta ? delta.stride : 0,
               z.stride,
               static_cast<int>(rows),
               static_cast<int>(cols),
               core ? cuda::data<Number>(core) : nullptr,
               scale ? cuda::data<float>(scale) : nullptr};
  if (s.experts == SlotUpdate::kMostExperts)
    launch<SlotUpdate::kMostExperts>(m, walkers, stream_);
  else
    launch<4>(m, walkers, stream_);
  cuda::each_chunk(stream_, "the norm behind a mixture", rows, cols, true,
                   Finish{cuda::rows_of<Number>(y), cuda::rows_of<Number>(ConstTensor(sum)),
                          cuda::data<float>(w), squares, cuda::data<float>(r), parts,
                          1.0F / static_cast<float>(cols), eps});
}

void CudaBackend::add_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                    ConstTensor z, ConstTensor b, const Slots& s, ConstTensor w,
                                    float eps, Tensor room_for_columns) {
  if (takes(sum, y, r, x, z, b, s, w) && delta.dtype == DType::bf16 && cuda::by_eights(delta) &&
      delta.rows() == x.rows() && delta.cols() == x.cols())
    slots_rmsnorm(sum, y, r, x, delta, {}, z, b, {}, s, w, eps);
  else
    Backend::add_slots_rmsnorm(sum, y, r, x, delta, z, b, s, w, eps, room_for_columns);
}

void CudaBackend::combine_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                        Tensor core, ConstTensor z, ConstTensor b,
                                        ConstTensor scale, const Slots& s, ConstTensor w, float eps,
                                        Tensor room_for_columns) {
  if (takes(sum, y, r, x, z, b, s, w) && core.dtype == DType::bf16 && cuda::by_eights(core) &&
      core.contiguous() && core.numel() == SlotUpdate::kSlots * x.rows() * x.cols() &&
      cuda::by_eights(scale) && scale.contiguous() && scale.rows() == s.experts &&
      scale.cols() == x.cols())
    slots_rmsnorm(sum, y, r, x, {}, core, z, b, scale, s, w, eps);
  else
    Backend::combine_slots_rmsnorm(sum, y, r, x, delta, core, z, b, scale, s, w, eps,
                                   room_for_columns);
}

}  // namespace mixlora
