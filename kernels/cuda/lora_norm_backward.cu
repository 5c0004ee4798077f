// RMSNorm's backward with A behind it, by columns: d_weight and d_x in one pass over x, d_y and
// d_x, with masks drawn once.
//
// The norm needs a row's <y, d_y + drop(d_a A)>. What made d_y may have left it (Backend's row
// dots); else it is <y, d_y> + <d_a, A drop(y)>, and forward kept A drop(y) as a / s, so that
// dots_kernel has it without A and masks. What is left is by columns.
#include <algorithm>

#include "kernels/cuda/lora_a.cuh"
#include "kernels/cuda/low_rank.cuh"

namespace mixlora {
namespace {

using cuda::BehindNorm;
using cuda::ceil_div;
using cuda::DroppedA;
using cuda::Index;
using cuda::kColumns;
using cuda::kFactorBytes;
using cuda::kPiece;
using cuda::kRows;
using cuda::kWarp;
using cuda::Number;

// Warps side by side make a group, with tiles of its own; groups of a block share A's columns.
constexpr int kWarps = 4, kThreads = kWarps * kWarp, kWide = kWarps * kColumns;
constexpr int kGroups = cuda::kNormGroups, kStages = 4;
static_assert(kWide == cuda::kDroppedTile);

__device__ uint4 load_past_near(const Number* p) {
  return __ldcg(reinterpret_cast<const uint4*>(p));
}

/// grid (rows): n.room. The first rows come last, so that backward_kernel finds them in L2.
__global__ void __launch_bounds__(kThreads) dots_kernel(const DroppedA m, const BehindNorm n) {
  __shared__ float shared[kWarp];
  const int row = static_cast<int>(gridDim.x - 1 - blockIdx.x),
            first = 8 * static_cast<int>(threadIdx.x);
  const Number *x = m.x + row * m.stride_x, *d_y = n.d_y + row * n.stride_d_y;
  float own = 0;
#pragma unroll 4
  for (int col = first; col < m.cols; col += 8 * kThreads) {
    const uint4 a = load_past_near(x + col), b = load_past_near(d_y + col);
    const cuda::Eight w = cuda::load8(n.w + col);
    const unsigned from[4] = {a.x, a.y, a.z, a.w}, slope[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      own += cuda::low(from[i]) * (w.v[2 * i] * cuda::low(slope[i])) +
             cuda::high(from[i]) * (w.v[2 * i + 1] * cuda::high(slope[i]));
  }
  own *= n.r[row];
  if (first < m.rank) {
    const cuda::Eight a = cuda::load8(n.a + row * n.stride_a + first),
                      d_a = cuda::load8(m.d_a + row * m.stride_d_a + first);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += a.v[i] * d_a.v[i];
    own += n.inverse_s * sum;
  }
  const float dot = cuda::block_sum(own, shared);
  if (threadIdx.x == 0) n.room[row] = dot;
}

/// A tile of 16 rows in shared memory: x, d_y and d_x as each lane of each warp fetched its own,
/// then what all warps read: d_a, the rows' ids, r and dots. Behind the groups' rings are A's
/// columns; over them, at the end, d_weight as each warp's rows of 32 columns.
template <int C> struct Stage {
  static constexpr int kOwn = 6 * kPiece, kRanks = kWarps * kOwn, kIds = kRanks + C * kPiece,
                       kNumbers = kIds + 16 * kRows, kBytes = kNumbers + 8 * kRows;
  static constexpr int kRing = kStages * kBytes, kFactor = C * kFactorBytes,
                       kMemory = kGroups * kRing + kWarps * kFactor;
  static constexpr int kSums = 16 * C * (kColumns + 1);
  static_assert(kWarps * kSums * 4 <= kMemory);
};

/// Meets the threads of one group.
__device__ void meet(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kThreads) : "memory");
}

/// grid (columns / 128, splits): d_x += r w d - x k of d = d_y + drop(d_a A), and d_a^T drop(y) of
/// the split's tiles. Neighbouring tiles are different groups', so that all blocks go down the rows
/// together. A warp has 32 columns.
template <int C>
__global__ void __launch_bounds__(kGroups* kThreads, 1)
    backward_kernel(const DroppedA m, const BehindNorm n) {
  extern __shared__ __align__(128) std::byte memory[];
  using S = Stage<C>;
  const int group = static_cast<int>(threadIdx.x) / kThreads,
            warp = static_cast<int>(threadIdx.x) / kWarp % kWarps,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int col0 = static_cast<int>(blockIdx.x) * kWide + warp * kColumns;
  const bool there = col0 < m.cols;  // else the warp only fetches for the others
  const int col = (there ? col0 : 0) + 8 * q;
  const int tiles = ceil_div(m.rows, kRows), step = static_cast<int>(gridDim.y) * kGroups;
  std::byte* const ring = memory + group * S::kRing;
  const std::uint32_t base = cuda::shared_address(ring);

  // A rank's 32 columns in 64 bytes, in the order of the product tiles (rank_tiles.cuh); pieces
  // turned so that eight ranks' of one tile lie in different banks.
  const std::uint32_t own_a = cuda::shared_address(memory) +
                              static_cast<std::uint32_t>(kGroups * S::kRing + warp * S::kFactor);
  for (int i = group * kWarp + lane; i < 16 * C * kColumns / 2; i += kGroups * kWarp) {
    const int rank = i / (kColumns / 2), pair = i % (kColumns / 2);
    const bool have = there && rank < m.rank;
    cuda::fetch4(own_a + static_cast<std::uint32_t>(rank * 2 * kColumns +
                                                    16 * (pair % 4 ^ rank / 2 % 4) + pair / 4 * 4),
                 have ? m.weight + static_cast<Index>(rank) * m.cols + col0 + 2 * pair : m.weight,
                 have);
  }
  cuda::fetch_commit();
  const std::uint32_t factor = own_a + static_cast<std::uint32_t>(lane % 16 * 2 * kColumns +
                                                                  16 * (lane / 16 ^ lane % 8 / 2));
  const std::uint32_t own_ranks = static_cast<std::uint32_t>(S::kRanks) + cuda::rank_row(lane);
  std::byte* own = ring + warp * S::kOwn + 16 * lane;

  const auto fetch = [&](int tile, int stage) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * S::kBytes);
    const int first = tile * kRows;
    if (there) {
      const std::uint32_t to = at + static_cast<std::uint32_t>(warp * S::kOwn + 16 * lane);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Index row = min(first + g + 8 * h, m.rows - 1);
        cuda::fetch16_wide(to + h * kPiece, m.x + row * m.stride_x + col);
        cuda::fetch16_wide(to + (2 + h) * kPiece, n.d_y + row * n.stride_d_y + col);
        cuda::fetch16_wide(to + (4 + h) * kPiece, m.d_x + row * m.stride_d_x + col);
      }
    }
    if (warp < C) {  // Rows that are not there have no gradient.
      const int row = first + lane / 2;
      const bool live = row < m.rows;
      cuda::fetch_ranks<1>(at + static_cast<std::uint32_t>(S::kRanks + warp * kPiece),
                           m.d_a + (live ? row : m.rows - 1) * m.stride_d_a + 16 * warp,
                           live ? m.rank - 16 * warp : 0, lane);
    }
    if (warp == kWarps - 1) {
      const int row = min(first + lane % kRows, m.rows - 1);
      if (lane < kRows)
        cuda::fetch16(at + static_cast<std::uint32_t>(S::kIds + 16 * lane),
                      m.ids + 4 * static_cast<Index>(row));
      cuda::fetch4(at + static_cast<std::uint32_t>(S::kNumbers + 4 * lane),
                   (lane < kRows ? n.r : n.dots) + row, true);
    }
  };
  const auto send = [&](int tile, int stage) {
    if (tile < tiles) fetch(tile, stage);
    cuda::fetch_commit();
  };
  const int begin = static_cast<int>(blockIdx.y) * kGroups + group;
#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) send(begin + i * step, i);
  const cuda::Eight w = cuda::load8(n.w + col);

  cuda::fetch_wait<kStages - 1>();  // A's columns
  __syncthreads();

  float d_weight[2][2 * C][4] = {};
  int stage = 0;
  // As many rounds for every group: racecheck takes groups that met less often for unordered.
  for (int tile = begin; tile - group < tiles; tile += step) {
    cuda::fetch_wait<kStages - 2>();
    meet(group);
    send(tile + (kStages - 1) * step, (stage + kStages - 1) % kStages);
    const std::byte *here = ring + stage * S::kBytes, *mine = own + stage * S::kBytes;
    const std::uint32_t ranks = base + static_cast<std::uint32_t>(stage * S::kBytes) + own_ranks;
    stage = (stage + 1) % kStages;
    if (!there || tile >= tiles) continue;

    Philox4 bits[2];
    float r[2];
    unsigned y[4][2];  // tile, rows g and g + 8; turned over: columns, then rows
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      bits[h] = m.bits(*reinterpret_cast<const int4*>(here + S::kIds + 16 * (g + 8 * h)), col / 8);
      r[h] = reinterpret_cast<const float*>(here + S::kNumbers)[g + 8 * h];
      unsigned x[4];
      cuda::load_words<8>(x, reinterpret_cast<const Number*>(mine + h * kPiece));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        y[j][h] =
            cuda::transposed(cuda::masked(cuda::pack2(cuda::low(x[j]) * (r[h] * w.v[2 * j]),
                                                      cuda::high(x[j]) * (r[h] * w.v[2 * j + 1])),
                                          bits[h], j, m.threshold));
    }
    float d[4][4] = {};
#pragma unroll
    for (int c = 0; c < C; ++c) {
      unsigned a[4];
      cuda::read_matrices_trans(a, ranks + static_cast<std::uint32_t>(c * kPiece));
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          cuda::mma(d_weight[pair][2 * c + i], y[2 * pair][0], y[2 * pair + 1][0], y[2 * pair][1],
                    y[2 * pair + 1][1], a[2 * i], a[2 * i + 1]);
      cuda::read_matrices(a, ranks + static_cast<std::uint32_t>(c * kPiece));
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        unsigned b[4];
        cuda::read_matrices_trans(b, (factor ^ static_cast<std::uint32_t>(32 * pair)) +
                                         static_cast<std::uint32_t>(c * kFactorBytes));
        cuda::mma(d[2 * pair], a[0], a[1], a[2], a[3], b[0], b[1]);
        cuda::mma(d[2 * pair + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float k = r[h] * r[h] *
                      reinterpret_cast<const float*>(here + S::kNumbers)[kRows + g + 8 * h] /
                      static_cast<float>(m.cols);
      unsigned x[4], d_y[4], d_x[4];
      cuda::load_words<8>(x, reinterpret_cast<const Number*>(mine + h * kPiece));
      cuda::load_words<8>(d_y, reinterpret_cast<const Number*>(mine + (2 + h) * kPiece));
      cuda::load_words<8>(d_x, reinterpret_cast<const Number*>(mine + (4 + h) * kPiece));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float from[2] = {cuda::low(x[j]), cuda::high(x[j])},
              slope[2] = {cuda::low(d_y[j]), cuda::high(d_y[j])},
              to[2] = {cuda::low(d_x[j]), cuda::high(d_x[j])};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (cuda::kept(bits[h], 2 * j + e, m.threshold)) slope[e] += n.keep * d[j][2 * h + e];
          to[e] += r[h] * (w.v[2 * j + e] * slope[e]) - from[e] * k;
        }
        d_x[j] = cuda::pack2(to[0], to[1]);
      }
      if (const int row = (tile * kRows) + g + 8 * h; row < m.rows)
        cuda::write4(m.d_x + row * m.stride_d_x + col, d_x);
    }
  }
  cuda::fetch_wait<0>();

  // The groups' sums, in their order.
  float* sums = reinterpret_cast<float*>(memory) + warp * S::kSums;
  for (int k = 0; k < kGroups; ++k) {
    __syncthreads();
    if (k == group) cuda::add_in_turn<C>(sums, d_weight, k == 0, g, q);
  }
  __syncthreads();
  if (!there) return;
  float* out = m.sums + static_cast<Index>(blockIdx.y) * m.rank * m.cols + col0 + lane;
  for (int rank = group; rank < m.rank; rank += kGroups)
    out[static_cast<Index>(rank) * m.cols] = sums[rank * (kColumns + 1) + lane];
}

}  // namespace

namespace cuda {

void norm_backward(const DroppedA& m, BehindNorm n, int splits, cudaStream_t stream) {
  if (n.dots == nullptr) {
    dots_kernel<<<static_cast<unsigned>(m.rows), kThreads, 0, stream>>>(m, n);
    launched("lora_a_rmsnorm_backward");
    n.dots = n.room;
  }
  with_rank_chunks(m.rank, [&](auto chunks) {
    auto* kernel = backward_kernel<chunks()>;
    constexpr int kBytes = Stage<chunks()>::kMemory;
    admit_shared(reinterpret_cast<const void*>(kernel), kBytes);
    kernel<<<dim3(static_cast<unsigned>(ceil_div(m.cols, kWide)), static_cast<unsigned>(splits)),
             kGroups * kThreads, static_cast<std::size_t>(kBytes), stream>>>(m, n);
    launched("lora_a_rmsnorm_backward");
  });
}

}  // namespace cuda
}  // namespace mixlora
