// Dropout and A together: what the kernels of lora_a.cu, lora_a_tiles.cu and lora_a_90a.cu share.
#pragma once
#include "kernels/cuda/rank_tiles.cuh"

namespace mixlora::cuda {

/// The call, and its mask: an element is kept when its 16 bits are not below the upper half of
/// `threshold`.
struct DroppedA {
  const Number *x, *weight, *d_a;
  Number* d_x;
  Index stride_x, stride_d_x, stride_d_a;
  int rows, cols, rank;
  const std::int32_t* ids;
  RandomKey key;
  std::uint32_t threshold, layer, site;
  const float *norm_w, *norm_r;  // d_weight of many ranks by a norm: what drops is x r w
  float* sums;  // forward (split, row, rank); backward (split, rank, column); a router's behind
  std::uint8_t*
      masks;  // backward of many ranks: (row, column / 8), bit i keeps column i of the eight

  __device__ int4 id(Index row) const { return __ldg(reinterpret_cast<const int4*>(ids) + row); }
  __device__ Philox4 bits(int4 id, int block) const {
    return row_bits(key, layer, site, static_cast<std::uint32_t>(id.z),
                    static_cast<std::uint32_t>(id.x), static_cast<std::uint32_t>(id.y),
                    static_cast<std::uint32_t>(block));
  }
};

/// Columns 2i, 2i + 1 of a lane's eight with those dropped zeroed.
__device__ inline unsigned masked(unsigned pair, const Philox4& bits, int i,
                                  std::uint32_t threshold) {
  const unsigned first = kept(bits, 2 * i, threshold) ? 0xffffU : 0;
  const unsigned second = kept(bits, 2 * i + 1, threshold) ? 0xffff0000U : 0;
  return pair & (first | second);
}

/// Bytes of x as the selector's digits name them; from 8 on, a byte's sign eight times.
__device__ inline unsigned permuted(unsigned x, unsigned selector) {
  unsigned y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "r"(selector));
  return y;
}
/// The words' masks of eight columns' bits.
__device__ inline void spread_bits(unsigned (&to)[4], unsigned bits) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // The four bits as the bytes' signs.
    const unsigned signs = (bits >> (4 * half) & 15) * 0x10204080U;
    to[2 * half] = permuted(signs, 0x9988);
    to[2 * half + 1] = permuted(signs, 0xbbaa);
  }
}
/// Eight numbers in shared memory with those dropped zeroed.
__device__ inline void drop_piece(std::byte* at, unsigned bits) {
  auto* piece = reinterpret_cast<uint4*>(at);
  const uint4 x = *piece;
  unsigned mask[4];
  spread_bits(mask, bits);
  *piece = make_uint4(x.x & mask[0], x.y & mask[1], x.z & mask[2], x.w & mask[3]);
}

/// The same, of bits as they are drawn.
__device__ inline void drop_piece(std::byte* at, const Philox4& bits, std::uint32_t threshold) {
  auto* piece = reinterpret_cast<uint4*>(at);
  const uint4 x = *piece;
  *piece = make_uint4(masked(x.x, bits, 0, threshold), masked(x.y, bits, 1, threshold),
                      masked(x.z, bits, 2, threshold), masked(x.w, bits, 3, threshold));
}

/// A warp's d_weight of 32 columns, as products leave it turned over, into rows of kColumns + 1
/// numbers, a rank each: the first of the warps that take turns stores, the others add.
template <int C>
__device__ void add_in_turn(float* rows, const float (&d_weight)[2][2 * C][4], bool first, int g,
                            int q) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair)
#pragma unroll
    for (int i = 0; i < 2 * C; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& to = rows[(8 * i + 2 * q + c % 2) * (kColumns + 1) + g / 2 * 8 +
                         2 * (2 * pair + c / 2) + g % 2];
        to = first ? d_weight[pair][i][c] : to + d_weight[pair][i][c];
      }
}

/// Rows (or columns, of d_weight) of a block of the kernels below.
constexpr int kDroppedTile = 128;
/// Up to kRankChunks sixteens of ranks; kFewTogether blocks run at a time on a processor.
constexpr int kFewTogether = 3, kFewStep = 32;
void few_ranks_weight(const DroppedA& m, int splits, cudaStream_t stream);
/// What a norm before A adds to the call; of m, x is the norm's input.
struct BehindNorm {
  const Number *d_y, *a;  // forward's a
  Index stride_d_y, stride_a;
  const float *w, *r;
  float inverse_s, keep;
  const float* dots;  // <y, d> of each row, d with what A sends back; null: made of a and d_a
  float* room;        // then for as many
};
/// Of up to kRankChunks sixteens of ranks: d_x and d_weight's parts; see lora_norm_backward.cu. One
/// block runs at a time on a processor.
constexpr int kNormGroups = 3, kNormStep = kNormGroups * kRows;
void norm_backward(const DroppedA& m, BehindNorm n, int splits, cudaStream_t stream);
/// Draws m.masks, which warpgroup_weight and warpgroup_input take.
void draw_masks(const DroppedA& m, cudaStream_t stream);

// Of compute capability 9.0, for many ranks; one block runs at a time on a processor.
constexpr int kWarpgroupStep = 64;
/// Of a router beside A at most.
constexpr int kRoutedExperts = 8;

/// A router before the same rows, or null: x Wg^T (rows, E), d_logits, Wg and its gradient (E,
/// columns); E a multiple of four, rows of Wg begin at multiples of 16 bytes.
struct Routed {
  float* logits;
  const float *d_logits, *wg;
  float* d_wg;
  Index stride_logits, stride_wg;
  int experts;
  /// Numbers that it adds to m.rank, backward and forward.
  __host__ __device__ int more() const { return d_wg != nullptr ? experts : 0; }
  __host__ __device__ int more_forward() const { return logits != nullptr ? kRoutedExperts : 0; }
};
/// Parts of x~ A^T into m.sums, of x Wg^T behind a row's ranks.
void warpgroup_forward(const DroppedA& m, const Routed& router, int splits, cudaStream_t stream);
/// Parts of d_a^T x~ into m.sums, of d_logits^T x behind the ranks; x by a norm or not.
void warpgroup_weight(const DroppedA& m, const Routed& router, int splits, cudaStream_t stream);
/// d_x += keep mask (d_a A) + d_logits Wg; a block has at most kMostInputColumns columns. With a
/// norm before, whose input, w and r m has, m.d_x is read alone, and what the norm makes of the sum
/// is added to `d_input`; `dots` are <y, sum> of each row without the router's share, which its
/// logits (rows, E) give. At most kInputRanks ranks then.
struct ThroughNorm {
  Number* d_input;  // null: no norm
  Index stride;
  const float *dots, *logits;
};
constexpr int kMostInputColumns = 1024, kInputRanks = 256;
void warpgroup_input(DroppedA m, Routed router, const ThroughNorm& norm, float keep, int splits,
                     cudaStream_t stream);

}  // namespace mixlora::cuda
