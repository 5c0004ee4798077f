// What a top-2 mixture of scaled slots sends back beside B2: d_core, the gradients of weights and
// scales, q and d_B2, in one pass over d_y and core.
//
// d_core itself is not multiplied: with d_core_k = w_k scale_e d_y,
//   q_k  = w_k d_y (scale_e B_e)            of the row's own experts
//   d_B_e = scale_e (d_y^T sum_k w_k z_k)   over the rows that chose e
// so that both products are of d_y, once for both slots. d_scale is the product of (d_y core_k)^T
// with the slots' weights, an expert a column.
#include <algorithm>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/slot_update.cuh"

namespace mixlora {
namespace {

using cuda::ceil_div;
using cuda::Index;
using cuda::kPiece;
using cuda::kRows;
using cuda::kWarp;
using cuda::Number;
using cuda::SlotUpdate;

constexpr int kSlots = SlotUpdate::kSlots, kRank = SlotUpdate::kRank;
constexpr int kBlockColumns = SlotUpdate::kBlockColumns;
constexpr int kWarps = kRows, kThreads = kWarps * kWarp;  // a warp a row of a tile
constexpr int kStages = 4;                                // tiles that are there or on their way
constexpr int kTiles = SlotUpdate::kTiles;                // of 32 columns
constexpr int kGroups = 4, kGroupColumns = kBlockColumns / kGroups;  // of columns, for q
static_assert(kBlockColumns == 8 * kWarp && kWarps == 2 * kTiles && (kStages & (kStages - 1)) == 0);

struct Call {
  const Number *d_y, *core, *z, *b;
  const float *scale, *weight;  // (E, D), (N, 2)
  const std::int32_t* expert;   // (N, 2)
  Number *d_core, *q;
  float *d_weight, *d_scale, *d_b;
  Number* q_sums;                  // (blocks of columns, N, 2, 16), without weights
  float* weight_sums;              // (blocks of columns, N, 2)
  float *d_b_sums, *d_scale_sums;  // (part, D, E R), (part, slot, E, D)
  int stride_d_y, stride_z, stride_q;
  int rows, cols, experts, blocks;
  int splits, parts;  // of the rows, and what they leave: a part each, or each two
};

/// A block's shared memory, in bytes. 16-byte units of a row change places by the row's number
/// (unit u of row r at u ^ r % 8), so that eight rows' units of one column lie in different banks.
///
/// scale B2, a row of all experts' ranks a column; the scales, and one of ones for no expert, by
/// halves of eights; the ring, of each stage d_y and both slots of core by rows; lists of z,
/// experts, weights of eight tiles; w z in the columns of its expert, and the slots' weights in
/// those of theirs, of two tiles; where q's groups of columns meet, twice.
template <int E> struct Layout {
  static constexpr int kFactorRow = E * kRank * 2, kScaleRow = kBlockColumns * 4,
                       kRowBytes = kBlockColumns * 2;
  static constexpr int kArray = kRows * kRowBytes, kStage = (1 + kSlots) * kArray;
  static constexpr int kListExperts = kRows * kSlots * kRank * 2,
                       kListWeights = kListExperts + kRows * kSlots * 4,
                       kList = kListWeights + kRows * kSlots * 4, kLists = 8;
  static constexpr int kChosen = kRows * kFactorRow, kColumns = kChosen + kRows * kSlots * 16;
  static constexpr int kMeeting = kGroups * kRows * kSlots * kRank * 4;
  static constexpr int kScales = kBlockColumns * kFactorRow, kRing = kScales + (E + 1) * kScaleRow,
                       kListsAt = kRing + kStages * kStage, kColumnsAt = kListsAt + kLists * kList,
                       kMeetingAt = kColumnsAt + 2 * kColumns, kBytes = kMeetingAt + 2 * kMeeting;
  static_assert(kLists > kStages && (kLists & (kLists - 1)) == 0);
};

__device__ std::uint32_t u32(int x) { return static_cast<std::uint32_t>(x); }
struct Place {
  int warp, lane;
  int g, q;             // as it holds tiles
  int r, upper, right;  // as it points at matrices
  __device__ Place() {
    const auto thread = static_cast<unsigned>(cuda::thread_anew());
    warp = static_cast<int>(thread / kWarp), lane = static_cast<int>(thread % kWarp);
    g = lane / 4, q = lane % 4;
    r = lane % 8, upper = lane / 8 % 2, right = lane / 16;
  }
};
/// Two products of bf16 numbers, each rounded once.
__device__ unsigned product2(unsigned a, unsigned b) {
  const __nv_bfloat162 p = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                   *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const unsigned*>(&p);
}
__device__ void scale_word(unsigned& word, float by) {
  word = cuda::pack2(by * cuda::low(word), by * cuda::high(word));
}

/// grid (blocks of 256 columns, splits of the rows). A block goes down its tiles of 16 rows, three
/// on their way. Of a tile, warp w takes row w for d_core and d_weight; columns 32 (w % 8) and on,
/// and half of the experts, for d_B2 (in registers from first row to last), and one slot for
/// d_scale; columns 64 (w % 4) and on, and a quarter of the experts, for q. Paired: two splits are
/// a cluster and leave one part, each the sums of half of its warps.
template <int E, bool Paired>
__global__ void __launch_bounds__(kThreads, 1) slots_b_kernel(const __grid_constant__ Call m) {
  using L = Layout<E>;
  extern __shared__ __align__(128) std::byte memory[];
  const std::uint32_t base = cuda::shared_address(memory);
  const int col0 = static_cast<int>(blockIdx.x) * kBlockColumns;
  const int tiles = ceil_div(m.rows, kRows), split = static_cast<int>(blockIdx.y);
  const int begin = tiles * split / m.splits, end = tiles * (split + 1) / m.splits;
  const auto* scales = reinterpret_cast<const float*>(memory + L::kScales);
  const auto scale_of = [&](int e, int c) {
    return scales[e * kBlockColumns + c / 4 % 2 * (kBlockColumns / 2) + c / 8 * 4 + c % 4];
  };
  const auto list_of = [&](int tile) {
    return memory + L::kListsAt + (tile & L::kLists - 1) * L::kList;
  };

  const auto fetch_lists = [&](int tile) {
    const auto [warp, lane, g, q, r, upper, right] = Place();
    if (tile >= end || warp > 2) return;
    const std::uint32_t at = base + u32(L::kListsAt + (tile & L::kLists - 1) * L::kList);
    // Rows that are not there have zeros, z and weights too.
    if (warp < 2) {
      const int unit = warp * kWarp + lane, row = tile * kRows + unit / 4;
      const bool there = row < m.rows;
      cuda::fetch16(at + u32(16 * unit), m.z + (there ? row : 0) * m.stride_z + unit % 4 * 8,
                    there);
    } else {
      const int slot = tile * kRows * kSlots + lane;
      const bool there = slot < m.rows * kSlots;
      cuda::fetch4(at + u32(L::kListExperts + 4 * lane), m.expert + (there ? slot : 0), there);
      cuda::fetch4(at + u32(L::kListWeights + 4 * lane), m.weight + (there ? slot : 0), there);
    }
  };
  const auto fetch = [&](int tile) {
    if (tile < end) {
      const auto [warp, lane, g, q, r, upper, right] = Place();
      const int row = tile * kRows + warp;
      const bool there = row < m.rows && col0 + 8 * lane < m.cols;
      const int own = there ? row : 0, col = there ? col0 + 8 * lane : 0;
      const std::uint32_t to = base + u32(L::kRing + (tile & kStages - 1) * L::kStage +
                                          warp * L::kRowBytes + 16 * (lane ^ (warp & 7)));
      cuda::fetch16(to, m.d_y + (own * m.stride_d_y + col), there);
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
        cuda::fetch16(to + u32((1 + k) * L::kArray), m.core + ((k * m.rows + own) * m.cols + col),
                      there);
    }
    fetch_lists(tile + 1);
    cuda::fetch_commit();
  };

  constexpr int kUnits = L::kFactorRow / 16;
  const auto each_unit = [&](auto&& f) {  // of the block's B2: its place, column, sixteen bytes
#pragma unroll
    for (int i = 0; i < kBlockColumns * kUnits / kThreads; ++i) {
      const int id = static_cast<int>(threadIdx.x) + i * kThreads, c = id / kUnits,
                unit = id % kUnits;
      f(c * L::kFactorRow + 16 * (unit ^ (c & 7)), c, unit);
    }
  };
  each_unit([&](int at, int c, int unit) {
    const bool there = col0 + c < m.cols;
    cuda::fetch16(base + u32(at), m.b + ((there ? col0 + c : 0) * (E * kRank) + 8 * unit), there);
  });
  for (int i = static_cast<int>(threadIdx.x); i < E * kBlockColumns / 4; i += kThreads) {
    const int e = i / (kBlockColumns / 4), four = i % (kBlockColumns / 4);
    const bool there = col0 + 4 * four < m.cols;
    cuda::fetch16(
        base + u32(L::kScales + e * L::kScaleRow + four % 2 * (L::kScaleRow / 2) + four / 2 * 16),
        m.scale + (e * m.cols + (there ? col0 + 4 * four : 0)), there);
  }
  if (threadIdx.x < kBlockColumns)
    reinterpret_cast<float*>(memory + L::kScales)[E * kBlockColumns + threadIdx.x] = 1;
  fetch_lists(begin);
  cuda::fetch_commit();
#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) fetch(begin + i);

  /// w z of a tile in the columns of its expert, a warp a row and a lane four ranks; the slots'
  /// weights.
  const auto build = [&](int tile) {
    if (tile >= end) return;
    const auto [warp, lane, g, q, r, upper, right] = Place();
    const std::byte* list = list_of(tile);
    std::byte* to = memory + L::kColumnsAt + (tile & 1) * L::kColumns;
    if (lane < E * kRank / 4) {
      const int2 e = reinterpret_cast<const int2*>(list + L::kListExperts)[warp];
      const float2 w = reinterpret_cast<const float2*>(list + L::kListWeights)[warp];
      const int own = lane / 4;
      uint2 words = make_uint2(0, 0);
      if (e.x == own || e.y == own) {
        const int k = e.x == own ? 0 : 1;
        words = reinterpret_cast<const uint2*>(list)[(warp * kSlots + k) * 4 + lane % 4];
        scale_word(words.x, k == 0 ? w.x : w.y);
        scale_word(words.y, k == 0 ? w.x : w.y);
      }
      *reinterpret_cast<uint2*>(to + warp * L::kFactorRow + 16 * (lane / 2 ^ (warp & 7)) +
                                8 * (lane % 2)) = words;
    }
    if (warp == 3) {
      const int row = lane / kSlots, k = lane % kSlots;
      const int e = reinterpret_cast<const int*>(list + L::kListExperts)[lane];
      const float w = reinterpret_cast<const float*>(list + L::kListWeights)[lane];
      const unsigned word = e % 2 == 0 ? cuda::pack2(w, 0) : cuda::pack2(0, w);
      *reinterpret_cast<uint4*>(to + L::kChosen + 32 * row + 16 * (k ^ (row / 4 & 1))) =
          make_uint4(e / 2 == 0 && e >= 0 ? word : 0, e / 2 == 1 ? word : 0, e / 2 == 2 ? word : 0,
                     e / 2 == 3 ? word : 0);
    }
  };
  /// q's sums of a tile's row, of this block's columns; a lane one of two slots' 16 ranks.
  const auto leave = [&](int tile) {
    const auto [warp, lane, g, q, r, upper, right] = Place();
    const int row = tile * kRows + warp;
    const auto* met =
        reinterpret_cast<const float*>(memory + L::kMeetingAt + (tile & 1) * L::kMeeting) +
        warp * kWarp + 2 * (lane / 2 ^ 4 * (warp & 3)) + lane % 2;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) sum += met[i * kRows * kWarp];
    if (row < m.rows)
      m.q_sums[(static_cast<int>(blockIdx.x) * m.rows + row) * kWarp + lane] =
          __float2bfloat16_rn(sum);
  };
  /// d_core of the warp's row, and its part of d_weight.
  const auto scale_row = [&](int tile) {
    const auto [warp, lane, g, q, r, upper, right] = Place();
    const int row = tile * kRows + warp;
    if (row >= m.rows) return;
    const bool inside = col0 + 8 * lane < m.cols;
    const std::byte* list = list_of(tile);
    const int2 e = reinterpret_cast<const int2*>(list + L::kListExperts)[warp];
    const float2 w = reinterpret_cast<const float2*>(list + L::kListWeights)[warp];
    const std::byte* here = memory + L::kRing + (tile & kStages - 1) * L::kStage +
                            warp * L::kRowBytes + 16 * (lane ^ (warp & 7));
    const uint4 d_y = *reinterpret_cast<const uint4*>(here);
    const unsigned gs[4] = {d_y.x, d_y.y, d_y.z, d_y.w};
    float sums[kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const int own = k == 0 ? e.x : e.y;
      const float by = k == 0 ? w.x : w.y;
      const auto* scale = reinterpret_cast<const float4*>(scales) +
                          (own < 0 ? E : own) * (kBlockColumns / 4) + lane;
      const float4 s[2] = {scale[0], scale[kWarp]};
      const uint4 core = *reinterpret_cast<const uint4*>(here + (1 + k) * L::kArray);
      const unsigned cs[4] = {core.x, core.y, core.z, core.w};
      unsigned d[4];
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = cuda::low(gs[i]) * (i % 2 == 0 ? s[i / 2].x : s[i / 2].z),
                    high = cuda::high(gs[i]) * (i % 2 == 0 ? s[i / 2].y : s[i / 2].w);
        sum += low * cuda::low(cs[i]);
        sum += high * cuda::high(cs[i]);
        d[i] = cuda::pack2(by * low, by * high);
      }
      sums[k] = sum;
      if (inside)
        *reinterpret_cast<uint4*>(m.d_core + ((k * m.rows + row) * m.cols + col0 + 8 * lane)) =
            make_uint4(d[0], d[1], d[2], d[3]);
    }
    // Half a warp a slot.
    float sum = right == 0 ? sums[0] : sums[1];
    sum += __shfl_xor_sync(cuda::kAll, right == 0 ? sums[1] : sums[0], kWarp / 2);
#pragma unroll
    for (int step = kWarp / 4; step > 0; step /= 2) sum += __shfl_xor_sync(cuda::kAll, sum, step);
    if (lane % (kWarp / 2) == 0)
      m.weight_sums[(static_cast<int>(blockIdx.x) * m.rows + row) * kSlots + right] = sum;
  };

  // B2 times its scales.
  cuda::fetch_wait<kStages - 1>();
  __syncthreads();
  each_unit([&](int at, int c, int unit) {
    auto& own = *reinterpret_cast<uint4*>(memory + at);
    uint4 words = own;
    const float by = scale_of(unit / 2, c);
    scale_word(words.x, by), scale_word(words.y, by);
    scale_word(words.z, by), scale_word(words.w, by);
    own = words;
  });
  build(begin);

  constexpr int kHalf = E / 2, kQuarter = E / 4;
  float d_b[2][2 * kHalf][4] = {}, d_scale[2][4] = {};
  /// q of a tile, without weights.
  const auto ranks_of = [&](int tile) {
    const std::uint32_t stage = base + u32(L::kRing + (tile & kStages - 1) * L::kStage);
    const auto [warp, lane, g, q, r, upper, right] = Place();
    const int group = warp % kGroups, quarter = warp / kGroups;
    // A place plus 32 n is the place with the bits of 32 n turned over, n < 4.
    const std::uint32_t rows = stage +
                               u32((r + 8 * upper) * L::kRowBytes + 128 * group + 16 * (right ^ r)),
                        factors =
                            base + u32((group * kGroupColumns + r + 8 * upper) * L::kFactorRow +
                                       16 * ((2 * quarter * kQuarter + right) ^ r));
    float sums[kQuarter][2][4] = {};
#pragma unroll
    for (int step = 0; step < kGroupColumns / 16; ++step) {
      unsigned a[4];
      cuda::read_matrices(a, rows ^ u32(32 * step));
#pragma unroll
      for (int i = 0; i < kQuarter; ++i) {
        unsigned b[4];
        cuda::read_matrices_trans(b, (factors ^ u32(32 * i)) + u32(16 * step * L::kFactorRow));
        cuda::mma(sums[i][0], a[0], a[1], a[2], a[3], b[0], b[1]);
        cuda::mma(sums[i][1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
    std::byte* met =
        memory + L::kMeetingAt + (tile & 1) * L::kMeeting + (group * kRows + g) * kWarp * 4;
    const int place = 8 * (q + 4 * (g & 3));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int2 e = reinterpret_cast<const int2*>(list_of(tile) + L::kListExperts)[g + 8 * h];
#pragma unroll
      for (int i = 0; i < kQuarter; ++i) {
        const int own = quarter * kQuarter + i;
        if (e.x != own && e.y != own) continue;
        const int at = e.x == own ? place : place ^ 64;
#pragma unroll
        for (int j = 0; j < 2; ++j)
          *reinterpret_cast<float2*>(met + 8 * h * kWarp * 4 + (at ^ 32 * j)) =
              make_float2(sums[i][j][2 * h], sums[i][j][2 * h + 1]);
      }
    }
  };
  /// What a tile adds to d_B2, without scales, and to d_scale.
  const auto gradients_of = [&](int tile) {
    const std::uint32_t stage = base + u32(L::kRing + (tile & kStages - 1) * L::kStage);
    const auto [warp, lane, g, q, r, upper, right] = Place();
    const int tile32 = warp % kTiles, half = warp / kTiles;
    unsigned g_t[2][4];
    const std::uint32_t rows =
        stage + u32((r + 8 * right) * L::kRowBytes + 16 * ((4 * tile32 + upper) ^ r));
    const auto rows_of = [&](unsigned(&to)[4], int array, int i) {
      cuda::read_matrices_trans(to, (rows ^ u32(32 * i)) + u32(array * L::kArray));
    };
    const std::uint32_t columns = base + u32(L::kColumnsAt + (tile & 1) * L::kColumns),
                        own = columns + u32((r + 8 * upper) * L::kFactorRow +
                                            16 * ((2 * half * kHalf + right) ^ r));
#pragma unroll
    for (int i = 0; i < 2; ++i) rows_of(g_t[i], 0, i);
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      unsigned b[4];
      cuda::read_matrices_trans(b, own ^ u32(32 * j));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        cuda::mma(d_b[i][2 * j], g_t[i][0], g_t[i][1], g_t[i][2], g_t[i][3], b[0], b[1]);
        cuda::mma(d_b[i][2 * j + 1], g_t[i][0], g_t[i][1], g_t[i][2], g_t[i][3], b[2], b[3]);
      }
    }
    unsigned chosen[4];
    cuda::read_matrices_trans(
        chosen, columns + u32(L::kChosen + 32 * (r + 8 * upper) + 16 * (right ^ (r / 4))));
    const unsigned b0 = half == 0 ? chosen[0] : chosen[2], b1 = half == 0 ? chosen[1] : chosen[3];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned c[4];
      rows_of(c, 1 + half, i);
#pragma unroll
      for (int n = 0; n < 4; ++n) c[n] = product2(c[n], g_t[i][n]);
      cuda::mma(d_scale[i], c[0], c[1], c[2], c[3], b0, b1);
    }
  };
  for (int tile = begin; tile < end; ++tile) {
    cuda::fetch_wait<kStages - 2>();
    __syncthreads();
    fetch(tile + kStages - 1);
    if (tile > begin) leave(tile - 1);
    build(tile + 1);
    scale_row(tile);  // first, so that memory has its rows to write while products run
    ranks_of(tile);
    gradients_of(tile);
  }
  cuda::fetch_wait<0>();
  __syncthreads();
  if (begin < end) leave(end - 1);

  const auto [warp, lane, g, q, r, upper, right] = Place();
  const int tile32 = warp % kTiles, half = warp / kTiles;
  int part = split;
  if constexpr (Paired) {
    static_assert((2 * 2 * kHalf + 2) * kTiles * kPiece <= kStages * L::kStage);
    const std::uint32_t mine = base + u32(L::kRing + tile32 * (4 * kHalf + 2) * kPiece + 16 * lane);
    const auto each = [&](auto&& f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kHalf; ++j) f(i * 2 * kHalf + j, d_b[i][j]);
        f(4 * kHalf + i, d_scale[i]);
      }
    };
    part = split / 2;
    cuda::cluster_meet();  // the other one has done with its ring
    if (half != split % 2) {
      const std::uint32_t to = cuda::place_in(1 - split % 2, mine);
      each([&](int n, const float(&x)[4]) {
        cuda::store_there(to + u32(n * kPiece), x[0], x[1], x[2], x[3]);
      });
    }
    cuda::cluster_meet();
    if (half != split % 2) return;
    const std::byte* from = memory + (mine - base);
    each([&](int n, float(&x)[4]) {
      const float4 other = *reinterpret_cast<const float4*>(from + n * kPiece);
      x[0] += other.x, x[1] += other.y, x[2] += other.z, x[3] += other.w;
    });
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = 32 * tile32 + 16 * i + g + 8 * h;
      if (col0 + c >= m.cols) continue;
      float* to = m.d_b_sums + (static_cast<Index>(part) * m.cols + col0 + c) * (E * kRank) + 2 * q;
#pragma unroll
      for (int j = 0; j < 2 * kHalf; ++j) {
        const int e = half * kHalf + j / 2;
        const float by = scale_of(e, c);
        *reinterpret_cast<float2*>(to + e * kRank + 8 * (j % 2)) =
            make_float2(by * d_b[i][j][2 * h], by * d_b[i][j][2 * h + 1]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
        if (2 * q + n < E)
          m.d_scale_sums[(static_cast<Index>(part * kSlots + half) * E + 2 * q + n) * m.cols +
                         col0 + c] = d_scale[i][2 * h + n];
    }
}

/// What the blocks left, in their order: a thread eight numbers of q, then a row's d_weight, then
/// four of d_B2 and of d_scale, which it adds to.
__global__ void slots_b_finish_kernel(const __grid_constant__ Call m) {
  const auto add = [&](float* to, const float* from, Index i, Index count, int parts) {
    const float4 sum = cuda::sum_of_parts(from, i, count, parts);
    cuda::add_to(reinterpret_cast<float4*>(to)[i], sum);
  };
  constexpr int kEights = kSlots * kRank / 8;
  Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index eights = static_cast<Index>(m.rows) * kEights;
  if (i < eights) {
    const auto row = static_cast<int>(i / kEights), eight = static_cast<int>(i % kEights),
               k = eight / (kRank / 8);
    const int e = m.expert[row * kSlots + k];
    if (e < 0) return;
    const float w = m.weight[row * kSlots + k];
    cuda::Eight sum = {};
#pragma unroll 8
    for (int part = 0; part < m.blocks; ++part) {
      const cuda::Eight own = cuda::load8(m.q_sums + 8 * (part * eights + i));
#pragma unroll
      for (int n = 0; n < 8; ++n) sum.v[n] += own.v[n];
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) sum.v[n] *= w;
    cuda::store8(m.q + (static_cast<Index>(k) * m.rows + row) * m.stride_q + e * kRank +
                     eight % (kRank / 8) * 8,
                 sum);
    return;
  }
  i -= eights;
  if (i < m.rows) {
    float2 sum = make_float2(0, 0);
#pragma unroll 8
    for (int part = 0; part < m.blocks; ++part) {
      const float2 own =
          reinterpret_cast<const float2*>(m.weight_sums)[static_cast<Index>(part) * m.rows + i];
      sum.x += own.x, sum.y += own.y;
    }
    reinterpret_cast<float2*>(m.d_weight)[i] = sum;
    return;
  }
  i -= m.rows;
  const Index of_b = static_cast<Index>(m.cols) * m.experts * kRank / 4,
              of_scale = static_cast<Index>(m.cols) * m.experts / 4;
  if (i < of_b)
    add(m.d_b, m.d_b_sums, i, of_b, m.parts);
  else if (i - of_b < of_scale)
    add(m.d_scale, m.d_scale_sums, i - of_b, of_scale, m.parts * kSlots);
}

template <int E, bool Paired> void launch(const Call& m, cudaStream_t stream) {
  auto* const kernel = slots_b_kernel<E, Paired>;
  constexpr int kBytes = Layout<E>::kBytes;
  cuda::admit_shared(reinterpret_cast<const void*>(kernel), kBytes);
  cuda::launch_in_clusters(dim3(1, Paired ? 2 : 1), kernel,
                           dim3(static_cast<unsigned>(m.blocks), static_cast<unsigned>(m.splits)),
                           kThreads, static_cast<std::size_t>(kBytes), stream, "slots_b_backward",
                           m);
}
template <int E> void launch(const Call& m, cudaStream_t stream) {
  m.parts < m.splits ? launch<E, true>(m, stream) : launch<E, false>(m, stream);
}

int shared_of(const Slots& s) {
  return s.experts == SlotUpdate::kMostExperts ? Layout<SlotUpdate::kMostExperts>::kBytes
                                               : Layout<4>::kBytes;
}
bool takes(const Tensor& d_b, const Tensor& q, ConstTensor d_y, ConstTensor z, ConstTensor b,
           const Slots& s, const ScaledSlots& x) {
  const Index rows = d_y.rows(), cols = d_y.cols();
  const auto half = [](const auto& t, Index of_rows, Index of_cols) {
    return t.dtype == DType::bf16 && cuda::by_eights(t) && t.rows() == of_rows &&
           t.cols() == of_cols;
  };
  const auto whole = [](const auto& t, Index count) {
    return t.dtype == DType::f32 && t.contiguous() && t.numel() == count &&
           reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0;
  };
  constexpr Index kMost = Index{1} << 31;  // numbers of a matrix
  return kSlots * rows * cols < kMost && rows * d_y.stride < kMost && rows * z.stride < kMost &&
         half(d_y, rows, cols) && half(x.core, kSlots * rows, cols) && x.core.contiguous() &&
         half(x.d_core, kSlots * rows, cols) && x.d_core.contiguous() &&
         cuda::takes_slots(z, b, s, rows, cols) && half(q, kSlots * rows, s.experts * kRank) &&
         whole(d_b, b.numel()) && whole(x.scale, s.experts * cols) &&
         whole(x.d_scale, s.experts * cols) && whole(x.d_weight, kSlots * rows) &&
         shared_of(s) <= cuda::most_shared();
}

}  // namespace

void CudaBackend::slots_b_backward(Tensor d_b, Tensor q, ConstTensor d_y, ConstTensor z,
                                   ConstTensor b, const Slots& s, const ScaledSlots& x,
                                   Tensor room_for_columns) {
  const Index rows = d_y.rows(), cols = d_y.cols();
  if (rows == 0) return;
  if (!takes(d_b, q, d_y, z, b, s, x))
    return Backend::slots_b_backward(d_b, q, d_y, z, b, s, x, room_for_columns);
  Call m{};
  m.rows = static_cast<int>(rows), m.cols = static_cast<int>(cols);
  m.experts = static_cast<int>(s.experts);
  m.blocks = ceil_div(m.cols, kBlockColumns);
  m.splits = std::clamp(processors_ / m.blocks, 1, std::max(1, ceil_div(m.rows, 4 * kRows)));
  m.parts = m.splits;
  if (m.splits > 1 && cuda::in_clusters(slots_b_kernel<4, true>))
    m.splits -= m.splits % 2, m.parts = m.splits / 2;
  const Index of_rows = m.blocks * rows * kSlots, of_scales = m.parts * kSlots * s.experts * cols,
              of_b = m.parts * b.numel();
  if ((of_rows * (kRank / 2 + 1) + of_scales + of_b) * Index{sizeof(float)} > cuda::kMostSumBytes)
    return Backend::slots_b_backward(d_b, q, d_y, z, b, s, x, room_for_columns);
  Room space = room();
  m.q_sums = space.take<Number>(of_rows * kRank);
  m.weight_sums = space.take<float>(of_rows);
  m.d_b_sums = space.take<float>(of_b);
  m.d_scale_sums = space.take<float>(of_scales);
  m.d_y = cuda::data<Number>(d_y), m.stride_d_y = static_cast<int>(d_y.stride);
  m.core = cuda::data<Number>(x.core);
  m.z = cuda::data<Number>(z), m.stride_z = static_cast<int>(z.stride);
  m.b = cuda::data<Number>(b);
  m.scale = cuda::data<float>(x.scale);
  m.weight = cuda::data<float>(ConstTensor(s.weight));
  m.expert = s.expert.ptr<std::int32_t>();
  m.d_core = cuda::data<Number>(x.d_core);
  m.q = cuda::data<Number>(q), m.stride_q = static_cast<int>(q.stride);
  m.d_weight = cuda::data<float>(x.d_weight);
  m.d_scale = cuda::data<float>(x.d_scale);
  m.d_b = cuda::data<float>(d_b);
  if (s.experts == SlotUpdate::kMostExperts)
    launch<SlotUpdate::kMostExperts>(m, stream_);
  else
    launch<4>(m, stream_);
  constexpr int kFinishThreads = 256;
  const Index units = rows * (kSlots * kRank / 8 + 1) + (b.numel() + s.experts * cols) / 4;
  slots_b_finish_kernel<<<static_cast<unsigned>(ceil_div<Index>(units, kFinishThreads)),
                          kFinishThreads, 0, stream_>>>(m);
  cuda::launched("slots_b_backward");
}

}  // namespace mixlora
