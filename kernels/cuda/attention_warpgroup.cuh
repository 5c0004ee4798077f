// What the attention kernels of attention_forward_90a.cu and attention_backward_90a.cu share.
//
// A block stays on its processor and walks through many tiles of 128 rows. Its first warpgroup
// fetches tiles ahead into rings in shared memory; the other two take 64 rows of the tile each and
// meet it, not one another, at barriers.
#pragma once
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/warpgroup.cuh"

namespace mixlora::cuda {

constexpr int kUsers = 2, kGroupRows = 64, kBlockRows = kUsers * kGroupRows;
constexpr int kUserWarps = kUsers * kGroup / kWarp, kBlockThreads = (kUsers + 1) * kGroup;

/// A block's tiles. A causal row meets as many others as its position says, so tiles go in pairs,
/// the last of a sequence with its first: pairs of one sequence length are equally long.
struct Walk {
  int at = static_cast<int>(blockIdx.x), tile = 0, head = 0, sequence = 0;
  bool second = false, backwards = false;  // backwards: from the last head of the last sequence on
  Sequence s{};
  /// Goes to the next tile; false when none is left. `heads` to walk, `pairs` of the longest
  /// sequence.
  __device__ bool next(const AttentionCall<Number>& m, int heads, int pairs) {
    const int count = pairs * heads * m.sequences;
    for (; at < count; at += static_cast<int>(gridDim.x)) {
      const int place = backwards ? count - 1 - at : at, i = place % pairs;
      head = place / pairs % heads;
      sequence = place / pairs / heads;
      s = sequence_of(m.table, sequence);
      const int mirrored = ceil_div(s.length, kBlockRows) - 1 - i;
      if (!second && mirrored >= i) {
        tile = mirrored;
        second = true;
        return true;
      }
      if (second && mirrored > i) {
        tile = i;
        second = false;
        at += static_cast<int>(gridDim.x);
        return true;
      }
      second = false;
    }
    return false;
  }
  __device__ int first() const { return tile * kBlockRows; }
};

/// The lane, as if it changed from call to call: addresses made of it would otherwise be kept, in
/// registers that products want, over the whole walk.
__device__ inline int lane_now() {
  int lane = static_cast<int>(threadIdx.x) % kWarp;
  asm volatile("" : "+r"(lane));
  return lane;
}
/// Packs 64 rows of C tiles into rows [64 group, ...) of a tile of 128, each warp its 16; row h of
/// a lane times by[h].
__device__ inline void stage_rows(std::byte* tile, int group, const float (&x)[16][4], float by0,
                                  float by1) {
  const int lane = lane_now();
  const int row = group * kGroupRows + static_cast<int>(threadIdx.x) % kGroup / kWarp * 16;
  const float by[2] = {by0, by1};
#pragma unroll
  for (int n = 0; n < 16; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<unsigned*>(tile + place_in_tile(kBlockRows, row + lane / 4 + 8 * h, n) +
                                   lane % 4 * 4) =
          pack2(x[n][2 * h] * by[h], x[n][2 * h + 1] * by[h]);
  __syncwarp();
}
/// A warp copies its 16 rows of stage_rows out, as far as below `rows`, to rows `stride` numbers
/// apart; `first` is where the tile's row 0 goes.
__device__ inline void copy_rows_out(Number* first, Index stride, const std::byte* tile, int group,
                                     int rows) {
  const int lane = lane_now();
  const int row = group * kGroupRows + static_cast<int>(threadIdx.x) % kGroup / kWarp * 16;
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    const int r = row + i + lane / 16;
    if (r < rows)
      *reinterpret_cast<uint4*>(first + r * stride + lane % 16 * 8) =
          *reinterpret_cast<const uint4*>(tile + place_in_tile(kBlockRows, r, lane % 16));
  }
}
/// A warp's arrival, when all its lanes have come.
__device__ inline void warp_arrives(Barrier* b) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) arrive(b);
}

/// Launches a kernel on every processor, or on as many as there are pairs of tiles.
template <class... Parameters, class... Arguments>
void launch_walk(void (*kernel)(Parameters...), const AttentionCall<Number>& c, int heads,
                 int pairs, int processors, int bytes, cudaStream_t stream,
                 const Arguments&... arguments) {
  admit_shared(reinterpret_cast<const void*>(kernel), bytes);
  const int blocks = std::min(processors, pairs * heads * c.sequences);
  kernel<<<static_cast<unsigned>(blocks), kBlockThreads, static_cast<std::size_t>(bytes), stream>>>(
      arguments...);
}

}  // namespace mixlora::cuda
