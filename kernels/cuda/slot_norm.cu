// The residual sum behind a mixture, and RMSNorm: the experts' low-rank updates join the sum.
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
};

/// grid (columns / 256, walkers): sum = x + delta + sum_k w_k z_k B_e^T and, by block of columns,
/// each row's squares of it. A block keeps B2 of its columns and walks down the rows, 64 at a time;
/// the next tile's numbers and the next rows' ranks are on their way meanwhile.
template <int E>
__global__ void __launch_bounds__(kWarps* kWarp, 2) sum_kernel(const __grid_constant__ Call m) {
  extern __shared__ __align__(16) std::byte memory[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int col0 = static_cast<int>(blockIdx.x) * SlotUpdate::kColumns;
  const int tiles = min(kTiles, (m.cols - col0) / kTile);
  const std::uint32_t b0 = cuda::shared_address(memory);
  SlotUpdate::fetch<E>(b0, m.b, col0, tiles);

  const int step = static_cast<int>(gridDim.y) * kWarps * kRows;
  int row0 = (static_cast<int>(blockIdx.y) * kWarps + warp) * kRows;
  const auto row_of = [&](int from, int i) {
    return static_cast<Index>(min(from + i, m.rows - 1));
  };
  SlotRanks next;
  float2 next_weight;
  const auto load_ranks = [&](int from) {
    const Index row = row_of(from, g);
    next.load(m.z + row * m.stride_z, m.expert + row * SlotUpdate::kSlots, q);
    next_weight = *reinterpret_cast<const float2*>(m.weight + row * SlotUpdate::kSlots);
  };
  unsigned x[2][kOwn / 2], delta[2][kOwn / 2];  // of the tile to come
  const auto load = [&](int from, int col) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Index row = row_of(from, 2 * q + i);
      cuda::load_words<kOwn>(x[i], m.x + row * m.stride_x + col);
      cuda::load_words<kOwn>(delta[i], m.delta + row * m.stride_delta + col);
    }
  };
  if (row0 < m.rows) {
    load_ranks(row0);
    load(row0, col0 + kOwn * g);
  }
  cuda::fetch_wait<0>();
  __syncthreads();

  for (; row0 < m.rows; row0 += step) {
    const bool more = row0 + step < m.rows;
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
    if (more) load_ranks(row0 + step);
    float own[2] = {};
    for (int t = 0; t < tiles; ++t) {
      const int col = col0 + t * kTile + kOwn * g;
      const std::uint32_t tile = b0 + static_cast<std::uint32_t>(t * SlotUpdate::kTileBytes<E>);
      float sums[kOwn / 2][4];
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[j][i] = cuda::low(x[i][j]) + cuda::low(delta[i][j]);
          sums[j][2 + i] = cuda::high(x[i][j]) + cuda::high(delta[i][j]);
        }
      if (t + 1 < tiles)
        load(row0, col + kTile);
      else if (more)
        load(row0 + step, col0 + kOwn * g);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if ((used >> e & 1U) == 0) continue;
        const bool first = chosen[0] == e, mine = first || chosen[1] == e;
        const uint2 r = first ? ranks[0] : ranks[1];
        const unsigned low = mine ? r.x : 0, high = mine ? r.y : 0;
#pragma unroll
        for (int j = 0; j < kOwn / 2; ++j) {
          unsigned b[4];
          cuda::read_matrices(b, cuda::update_row<kOwn>(tile, j, lane) +
                                     static_cast<std::uint32_t>(e * cuda::kUpdateTile<kOwn>));
          cuda::mma(sums[j], b[0], b[1], b[2], b[3], low, high);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unsigned words[kOwn / 2];
#pragma unroll
        for (int j = 0; j < kOwn / 2; ++j) {
          words[j] = cuda::pack2(sums[j][i], sums[j][2 + i]);
          const float low = cuda::low(words[j]), high = cuda::high(words[j]);
          own[i] += low * low + high * high;  // as it is stored
        }
        if (row0 + 2 * q + i < m.rows)
          cuda::store_words<kOwn>(m.sum + row_of(row0, 2 * q + i) * m.stride_sum + col, words);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int apart = 4; apart < kWarp; apart *= 2)
        own[i] += __shfl_xor_sync(cuda::kAll, own[i], apart);
      if (g == 0 && row0 + 2 * q + i < m.rows)
        m.squares[static_cast<Index>(row0 + 2 * q + i) * gridDim.x + blockIdx.x] = own[i];
    }
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
  cuda::admit_shared(reinterpret_cast<const void*>(sum_kernel<E>), SlotUpdate::kBytes<E>);
  const dim3 grid(static_cast<unsigned>(cuda::ceil_div(m.cols, SlotUpdate::kColumns)),
                  static_cast<unsigned>(walkers));
  sum_kernel<E><<<grid, kWarps * kWarp, SlotUpdate::kBytes<E>, stream>>>(m);
  cuda::launched("add_slots_rmsnorm");
}

}  // namespace

void CudaBackend::add_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                    ConstTensor z, ConstTensor b, const Slots& s, ConstTensor w,
                                    float eps, Tensor room_for_columns) {
  const Index rows = x.rows(), cols = x.cols();
  const auto fits = [&](const auto& t) {
    return t.dtype == DType::bf16 && cuda::by_eights(t) && t.rows() == rows && t.cols() == cols;
  };
  if (!fits(sum) || !fits(y) || !fits(x) || !fits(delta) || !cuda::by_eights(w) ||
      w.numel() != cols || r.numel() != rows || !r.contiguous() ||
      !cuda::takes_slots(z, b, s, rows, cols))
    return Backend::add_slots_rmsnorm(sum, y, r, x, delta, z, b, s, w, eps, room_for_columns);
  if (rows == 0) return;
  const int parts = static_cast<int>(cuda::ceil_div<Index>(cols, SlotUpdate::kColumns));
  const Index groups = cuda::ceil_div<Index>(rows, kWarps * kRows);
  // Two blocks a processor, each with as many rows as the next.
  const Index turns = cuda::ceil_div<Index>(groups * parts, 2 * processors_);
  const int walkers = static_cast<int>(cuda::ceil_div(groups, turns));
  auto* squares = room().take<float>(rows * parts);
  const Call m{cuda::data<Number>(sum),
               cuda::data<Number>(x),
               cuda::data<Number>(delta),
               cuda::data<Number>(z),
               cuda::data<Number>(b),
               cuda::data<float>(ConstTensor(s.weight)),
               s.expert.ptr<std::int32_t>(),
               squares,
               sum.stride,
               x.stride,
               delta.stride,
               z.stride,
               static_cast<int>(rows),
               static_cast<int>(cols)};
  if (s.experts == SlotUpdate::kMostExperts)
    launch<SlotUpdate::kMostExperts>(m, walkers, stream_);
  else
    launch<4>(m, walkers, stream_);
  cuda::each_chunk(stream_, "add_slots_rmsnorm", rows, cols, true,
                   Finish{cuda::rows_of<Number>(y), cuda::rows_of<Number>(ConstTensor(sum)),
                          cuda::data<float>(w), squares, cuda::data<float>(r), parts,
                          1.0F / static_cast<float>(cols), eps});
}

}  // namespace mixlora
