// Low-rank updates of a row's own experts, beside a pass over rows: B2 of all experts waits in
// shared memory, a warp multiplies what its rows chose.
//
// For top-2 of experts of 16 ranks. A warp takes 16 rows, its tiles are 32 columns: a lane has
// eight neighbouring columns of rows g and g + 8 (rank_tiles.cuh).
#pragma once
#include "kernels/backend.h"
#include "kernels/cuda/rank_tiles.cuh"

namespace mixlora::cuda {

struct SlotUpdate {
  static constexpr int kSlots = 2, kRank = 16, kMostExperts = 8;
  static constexpr int kTiles = 8;  // of a block: 256 columns
  static constexpr int kBlockColumns = kTiles * kColumns;
  /// Bytes of a tile's B2, and of a block's: 64 KiB of eight experts.
  template <int E> static constexpr int kTileBytes = E* kFactorBytes;
  template <int E> static constexpr int kBytes = kTiles* kTileBytes<E>;

  /// Starts fetching B2 of `tiles` tiles from column `col` on, a warp each.
  template <int E>
  static __device__ void fetch(std::uint32_t to, const Number* b, int col, int tiles) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int t = static_cast<int>(threadIdx.x) / kWarp; t < tiles;
         t += static_cast<int>(blockDim.x) / kWarp)
      fetch_factor<E>(to + static_cast<std::uint32_t>(t * kTileBytes<E>),
                      b + static_cast<Index>(col + t * kColumns) * (E * kRank), E * kRank, lane);
    fetch_commit();
  }
};

/// Whether tensors are what these kernels take, for E of 4 or 8.
inline bool takes_slots(ConstTensor z, ConstTensor b, const Slots& s, Index rows, Index cols) {
  const auto half = [](const auto& t) { return t.dtype == DType::bf16 && by_eights(t); };
  return half(z) && half(b) && s.expert && s.weight && s.expert.contiguous() &&
         s.weight.contiguous() && b.contiguous() && s.count == SlotUpdate::kSlots &&
         s.rank == SlotUpdate::kRank && (s.experts == 4 || s.experts == SlotUpdate::kMostExperts) &&
         s.expert.rows() == rows && s.weight.rows() == rows && cols % kColumns == 0 &&
         cols < (1 << 20) && rows < (Index{1} << 24) && z.rows() == rows &&
         z.cols() == SlotUpdate::kSlots * SlotUpdate::kRank && b.rows() == cols &&
         b.cols() == s.experts * SlotUpdate::kRank;
}

}  // namespace mixlora::cuda
