// Low-rank updates of a row's own experts, beside a pass over rows: B2 of all experts waits in
// shared memory, a warp multiplies what its rows chose.
//
// For top-2 of experts of 16 ranks. A warp takes 8 rows, its tiles are 64 columns: a lane has eight
// neighbouring columns of rows 2q and 2q + 1 (low_rank.cuh).
#pragma once
#include "kernels/cuda/low_rank.cuh"

namespace mixlora::cuda {

struct SlotUpdate {
  static constexpr int kSlots = 2, kRank = 16, kMostExperts = 8;
  static constexpr int kOwn = 8, kTile = 8 * kOwn, kTiles = 4;  // of a block: 256 columns
  static constexpr int kColumns = kTiles * kTile;
  /// Bytes of a tile's B2, and of a block's: 64 KiB of eight experts.
  template <int E> static constexpr int kTileBytes = E* kUpdateTile<kOwn>;
  template <int E> static constexpr int kBytes = kTiles* kTileBytes<E>;

  /// Starts fetching B2 of `tiles` tiles from column `col` on, by all threads of the block.
  template <int E>
  static __device__ void fetch(std::uint32_t to, const __nv_bfloat16* b, int col, int tiles) {
    for (int t = 0; t < tiles; ++t)
      fetch_update<kOwn, E>(to + static_cast<std::uint32_t>(t * kTileBytes<E>),
                            b + static_cast<Index>(col + t * kTile) * (E * kRank), E * kRank,
                            static_cast<int>(threadIdx.x), kUpdateWarps * kWarp);
    fetch_commit();
  }
};

/// What the slots of one row bring: a lane has ranks 2q, 2q + 1, 2q + 8 and 2q + 9 of row g.
struct SlotRanks {
  uint2 z[SlotUpdate::kSlots];
  int expert[SlotUpdate::kSlots];
  __device__ void load(const __nv_bfloat16* row_z, const std::int32_t* row_expert, int q) {
#pragma unroll
    for (int k = 0; k < SlotUpdate::kSlots; ++k) {
      const __nv_bfloat16* p = row_z + k * SlotUpdate::kRank + 2 * q;
      z[k] = make_uint2(load_pair(p), load_pair(p + 8));
      expert[k] = row_expert[k];
    }
  }
  /// The experts that any of the warp's rows has in slot k, by bits.
  __device__ unsigned used(int k) const {
    return __reduce_or_sync(kAll, expert[k] >= 0 ? 1U << expert[k] : 0U);
  }
};

/// Whether tensors are what these kernels take, for E of 4 or 8.
inline bool takes_slots(ConstTensor z, ConstTensor b, const Slots& s, Index rows, Index cols) {
  const auto half = [](const auto& t) { return t.dtype == DType::bf16 && by_eights(t); };
  return half(z) && half(b) && s.expert && s.weight && s.expert.contiguous() &&
         s.weight.contiguous() && b.contiguous() && s.count == SlotUpdate::kSlots &&
         s.rank == SlotUpdate::kRank && (s.experts == 4 || s.experts == SlotUpdate::kMostExperts) &&
         s.expert.rows() == rows && s.weight.rows() == rows && cols % SlotUpdate::kTile == 0 &&
         cols < (1 << 20) && rows < (Index{1} << 24) && z.rows() == rows &&
         z.cols() == SlotUpdate::kSlots * SlotUpdate::kRank && b.rows() == cols &&
         b.cols() == s.experts * SlotUpdate::kRank;
}

}  // namespace mixlora::cuda
