// Slots combined with their experts' low-rank updates in the same pass.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/slot_update.cuh"

namespace mixlora {
namespace {

using cuda::Index;
using cuda::kWarp;
using cuda::SlotUpdate;
using Number = __nv_bfloat16;

constexpr int kRows = cuda::kUpdateRows, kWarps = cuda::kUpdateWarps;
constexpr int kSlots = SlotUpdate::kSlots, kOwn = SlotUpdate::kOwn, kTile = SlotUpdate::kTile,
              kTiles = SlotUpdate::kTiles;

struct Call {
  Number *y, *core;
  const Number *z, *b;
  const float *scale, *weight;  // (E, D); (N, 2)
  const std::int32_t* expert;   // (N, 2)
  Index stride_y, stride_z;
  int rows, cols;
};

/// grid (rows / 64, columns / 256): two rows of core read and written, one of y written. All B2 of
/// the block's columns comes first; a lane has eight columns of two rows, an expert's step is
/// taken where one of the warp's rows chose it, with zeros for those that did not.
template <int E>
__global__ void __launch_bounds__(kWarps* kWarp, 2) combine_kernel(const __grid_constant__ Call m) {
  extern __shared__ __align__(16) std::byte memory[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int row0 = (static_cast<int>(blockIdx.x) * kWarps + warp) * kRows,
            col0 = static_cast<int>(blockIdx.y) * kTiles * kTile;
  const int tiles = min(kTiles, (m.cols - col0) / kTile);
  const std::uint32_t tile0 = cuda::shared_address(memory);
  SlotUpdate::fetch<E>(tile0, m.b, col0, tiles);

  const auto row_of = [&](int i) { return static_cast<Index>(min(row0 + i, m.rows - 1)); };
  // The tensor core's columns are rows g; what leaves it are rows 2q and 2q + 1.
  cuda::SlotRanks own;
  own.load(m.z + row_of(g) * m.stride_z, m.expert + row_of(g) * kSlots, q);
  int expert[2][kSlots];
  unsigned used[kSlots];
  float weight[2][kSlots];
  bool live[2];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    used[k] = own.used(k);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      live[i] = row0 + 2 * q + i < m.rows;
      expert[i][k] = m.expert[row_of(2 * q + i) * kSlots + k];
      weight[i][k] = m.weight[row_of(2 * q + i) * kSlots + k];
    }
  }
  Number* core[2][kSlots];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
      core[i][k] = m.core + (static_cast<Index>(k) * m.rows + row_of(2 * q + i)) * m.cols;
  unsigned words[2][kSlots][kOwn / 2];  // of the tile to come
  const auto load = [&](int col) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < kSlots; ++k) cuda::load_words<kOwn>(words[i][k], core[i][k] + col);
  };
  load(col0 + kOwn * g);
  cuda::fetch_wait<0>();
  __syncthreads();

  for (int t = 0; t < tiles; ++t) {
    const int col = col0 + t * kTile + kOwn * g;
    const std::uint32_t tile = tile0 + static_cast<std::uint32_t>(t * SlotUpdate::kTileBytes<E>);
    float sums[kSlots][kOwn / 2][4];
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[k][j][i] = cuda::low(words[i][k][j]);
          sums[k][j][2 + i] = cuda::high(words[i][k][j]);
        }
    if (t + 1 < tiles) load(col + kTile);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (((used[0] | used[1]) >> e & 1U) == 0) continue;
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j) {
        unsigned b[4];
        cuda::read_matrices(b, cuda::update_row<kOwn>(tile, j, lane) +
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
    for (int i = 0; i < 2; ++i) {
      float y[kOwn] = {};
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        unsigned out[kOwn / 2];
#pragma unroll
        for (int j = 0; j < kOwn / 2; ++j) out[j] = cuda::pack2(sums[k][j][i], sums[k][j][2 + i]);
        if (live[i]) cuda::store_words<kOwn>(core[i][k] + col, out);
        const float w = weight[i][k];
        if (w == 0) continue;
        cuda::Eight by = {{1, 1, 1, 1, 1, 1, 1, 1}};
        if (expert[i][k] >= 0)
          by = cuda::load8(m.scale + static_cast<Index>(expert[i][k]) * m.cols + col);
#pragma unroll
        for (int j = 0; j < kOwn; ++j) y[j] += w * by.v[j] * sums[k][j / 2][2 * (j % 2) + i];
      }
      unsigned out[kOwn / 2];
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j) out[j] = cuda::pack2(y[2 * j], y[2 * j + 1]);
      if (live[i]) cuda::store_words<kOwn>(m.y + row_of(2 * q + i) * m.stride_y + col, out);
    }
  }
}

template <int E> void launch(const Call& m, cudaStream_t stream) {
  const auto* kernel = reinterpret_cast<const void*>(combine_kernel<E>);
  constexpr int kBytes = SlotUpdate::kBytes<E>;
  cuda::admit_shared(kernel, kBytes);
  const dim3 grid(static_cast<unsigned>(cuda::ceil_div(m.rows, kWarps * kRows)),
                  static_cast<unsigned>(cuda::ceil_div(m.cols, kTiles * kTile)));
  combine_kernel<E><<<grid, kWarps * kWarp, kBytes, stream>>>(m);
  cuda::launched("lora_slot_combine");
}

}  // namespace

void CudaBackend::lora_slot_combine(Tensor y, Tensor core, ConstTensor z, ConstTensor b,
                                    ConstTensor scale, const Slots& s, Tensor room_for_columns) {
  const Index rows = y.rows(), cols = y.cols();
  const auto half = [](const auto& t) { return t.dtype == DType::bf16 && cuda::by_eights(t); };
  const bool fits = half(y) && half(core) && core.contiguous() &&
                    core.numel() == kSlots * rows * cols && cuda::by_eights(scale) &&
                    scale.contiguous() && scale.rows() == s.experts && scale.cols() == cols &&
                    cuda::takes_slots(z, b, s, rows, cols);
  if (!fits) return Backend::lora_slot_combine(y, core, z, b, scale, s, room_for_columns);
  if (rows == 0) return;
  const Call m{cuda::data<Number>(y),
               cuda::data<Number>(core),
               cuda::data<Number>(z),
               cuda::data<Number>(b),
               cuda::data<float>(scale),
               cuda::data<float>(ConstTensor(s.weight)),
               s.expert.ptr<std::int32_t>(),
               y.stride,
               z.stride,
               static_cast<int>(rows),
               static_cast<int>(cols)};
  if (s.experts == SlotUpdate::kMostExperts)
    launch<SlotUpdate::kMostExperts>(m, stream_);
  else
    launch<4>(m, stream_);
}

}  // namespace mixlora
