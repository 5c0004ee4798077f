// Dropout and A in one pass over x, forward and backward: the rows that dropout leaves are never in
// memory. Traffic: forward D numbers a row; backward 3 D (x, d_x read and written). The kernels
// here are for a few ranks, d_weight by tiles in lora_a_tiles.cu; lora_a_90a.cu has many.
#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/lora_a.cuh"
#include "kernels/cuda/low_rank.cuh"

namespace mixlora {
namespace {

using cuda::ceil_div;
using cuda::Index;
using cuda::kAll;
using cuda::kColumns;
using cuda::kFactorBytes;
using cuda::kPiece;
using cuda::kRows;
using cuda::kWarp;
using cuda::Number;

constexpr int kForwardWarps = 8, kForwardRows = kForwardWarps * kRows;
constexpr int kStages = 4;  // of x's way into the forward kernel
constexpr int kWishedBlocks = 512;
// Of many ranks: floats of a part of the sums, numbers that a mask is for.
constexpr Index kMostSums = Index{1} << 23, kMostMasked = Index{1} << 28;

using Call = cuda::DroppedA;

/// Bytes of one rank's columns in the forward kernel: four lanes read 64 neighbouring bytes, and
/// the next rank's lie in the other banks.
__host__ __device__ constexpr int rank_bytes(int columns) {
  return ceil_div(columns * 2, 128) * 128 + 64;
}

/// Columns of a split at most, and the forward kernel's shared memory.
__host__ __device__ constexpr int most_columns(int chunks) { return chunks > 3 ? 256 : 512; }
__host__ __device__ constexpr int forward_bytes(int chunks, int columns) {
  return 16 * chunks * rank_bytes(columns) + kForwardWarps * kStages * 2 * kPiece;
}

/// grid (rows / 128, splits): x~ A^T over `columns` columns, a warp 16 rows. A's columns lie in
/// shared memory; each lane's x is fetched ahead, kStages chunks of 32 columns.
template <int C>
__global__ void __launch_bounds__(kForwardWarps* kWarp, 2)
    forward_kernel(const Call m, int columns) {
  extern __shared__ __align__(16) std::byte memory[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int row0 = (static_cast<int>(blockIdx.x) * kForwardWarps + warp) * kRows;
  const int begin = static_cast<int>(blockIdx.y) * columns, end = min(m.cols, begin + columns);
  const int stride = rank_bytes(columns), pieces = (end - begin) / 8;
  const std::uint32_t a_address = cuda::shared_address(memory);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * C * pieces; i += kForwardWarps * kWarp) {
    const int r = i / pieces, piece = i % pieces;
    const bool there = r < m.rank;
    cuda::fetch16(a_address + static_cast<std::uint32_t>(r * stride + 16 * piece),
                  m.weight + static_cast<Index>(there ? r : 0) * m.cols + begin + 8 * piece, there);
  }
  cuda::fetch_commit();

  int4 ids[2];
  const Number* x[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = min(row0 + g + 8 * h, m.rows - 1);
    ids[h] = m.id(row);
    x[h] = m.x + row * m.stride_x + 8 * q;
  }
  std::byte* ring = memory + 16 * C * stride + warp * kStages * 2 * kPiece + 16 * lane;
  const std::uint32_t ring_address = cuda::shared_address(ring);
  const auto fetch = [&](int stage, int f0) {
    if (f0 < end)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        cuda::fetch16(ring_address + static_cast<std::uint32_t>((2 * stage + h) * kPiece),
                      x[h] + f0);
    cuda::fetch_commit();
  };
#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) fetch(i, begin + i * kColumns);
  cuda::fetch_wait<kStages - 1>();
  __syncthreads();

  float sums[2 * C][4] = {};
  int stage = 0;
  for (int f0 = begin; f0 < end; f0 += kColumns) {
    fetch((stage + kStages - 1) % kStages, f0 + (kStages - 1) * kColumns);
    unsigned a[2][4];
    Philox4 bits[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) bits[h] = m.bits(ids[h], (f0 + 8 * q) / 8);
    cuda::fetch_wait<kStages - 1>();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 raw = *reinterpret_cast<const uint4*>(ring + (2 * stage + h) * kPiece);
      a[h][0] = cuda::masked(raw.x, bits[h], 0, m.threshold);
      a[h][1] = cuda::masked(raw.y, bits[h], 1, m.threshold);
      a[h][2] = cuda::masked(raw.z, bits[h], 2, m.threshold);
      a[h][3] = cuda::masked(raw.w, bits[h], 3, m.threshold);
    }
    const std::byte* weight = memory + g * stride + (f0 - begin + 8 * q) * 2;
#pragma unroll
    for (int i = 0; i < 2 * C; ++i) {
      const uint4 b = *reinterpret_cast<const uint4*>(weight + 8 * i * stride);
      cuda::mma(sums[i], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
      cuda::mma(sums[i], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
    }
    stage = (stage + 1) % kStages;
  }
#pragma unroll
  for (int i = 0; i < 2 * C; ++i) {
    const int r = 8 * i + 2 * q;
    if (r >= m.rank) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + g + 8 * h;
      if (row < m.rows)
        *reinterpret_cast<float2*>(m.sums +
                                   (static_cast<Index>(blockIdx.y) * m.rows + row) * m.rank + r) =
            make_float2(sums[i][2 * h], sums[i][2 * h + 1]);
    }
  }
}

/// a = s times the sum over the splits, in their order, and a router's logits; two numbers a
/// thread.
__global__ void a_kernel(Number* a, Index stride, const float2* sums, int rows, int rank,
                         int splits, float s, const cuda::Routed router) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x),
            pairs = (rank + router.more_forward()) / 2;
  if (i >= rows * pairs) return;
  float2 sum = make_float2(0, 0);
#pragma unroll 4
  for (int k = 0; k < splits; ++k) {
    const float2 part = sums[static_cast<Index>(k) * rows * pairs + i];
    sum.x += part.x, sum.y += part.y;
  }
  const int row = i / pairs, r = i % pairs * 2, e = r - rank;
  if (e < 0) {
    *reinterpret_cast<unsigned*>(a + row * stride + r) = cuda::pack2(s * sum.x, s * sum.y);
  } else if (e < router.experts) {
    float* to = router.logits + row * router.stride_logits + e;
    to[0] = sum.x, to[1] = sum.y;
  }
}

/// A warp's stage of the backward kernel: x and d_x of rows g and g + 8, the 16 rows' d_a, ids.
template <int C> struct Stage {
  static constexpr int kRanks = 4 * kPiece, kIds = kRanks + C * kPiece;
  static constexpr int kBytes = kIds + kPiece / 2;
};

/// grid (columns / 32, splits): a block has 32 columns and its share of the rows, for d_weight and
/// d_x.
template <int C>
__global__ void __launch_bounds__(cuda::kMostWarps* kWarp, C > 2 ? 3 : 4)
    backward_kernel(const Call m, float keep) {
  extern __shared__ __align__(16) std::byte memory[];
  using S = Stage<C>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp,
            warps = static_cast<int>(blockDim.x) / kWarp;
  const int g = lane / 4, q = lane % 4, rank = m.rank;
  const int f0 = static_cast<int>(blockIdx.x) * kColumns, col = f0 + 8 * q;
  const int tiles = ceil_div(m.rows, kRows), splits = static_cast<int>(gridDim.y),
            split = static_cast<int>(blockIdx.y);
  const int begin = tiles * split / splits * kRows,
            end = min(m.rows, tiles * (split + 1) / splits * kRows);

  // A's 32 columns as fetch_factor lays a factor: a column's ranks together.
  auto* columns = reinterpret_cast<Number*>(memory);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * C * kColumns;
       i += static_cast<int>(blockDim.x)) {
    const int c = i % kColumns, r = i / kColumns, a = c / 8, b = c % 8;
    columns[r / 16 * (kFactorBytes / 2) + (4 * b + a) * 16 + 8 * (r / 8 % 2 ^ (b & 1)) + r % 8] =
        r < rank ? m.weight[static_cast<Index>(r) * m.cols + f0 + c] : Number(0.0F);
  }
  __syncthreads();
  constexpr int kFactor = C * kFactorBytes;
  const std::uint32_t factor = cuda::shared_address(memory) + cuda::factor_row(lane);
  std::byte* ring = memory + kFactor + warp * 2 * S::kBytes;
  const std::uint32_t ring_address = cuda::shared_address(ring), own_ranks = cuda::rank_row(lane);

  const auto fetch = [&](int stage, int first) {
    const std::uint32_t at = ring_address + static_cast<std::uint32_t>(stage * S::kBytes);
    const std::uint32_t piece = at + static_cast<std::uint32_t>(16 * lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Index row = min(first + g + 8 * h, end - 1);
      cuda::fetch16(piece + static_cast<std::uint32_t>(h * kPiece), m.x + row * m.stride_x + col);
      cuda::fetch16(piece + static_cast<std::uint32_t>((2 + h) * kPiece),
                    m.d_x + row * m.stride_d_x + col);
    }
    // Rows that are not there have no gradient.
    const int row = first + lane / 2;
    const bool live = row < end;
    cuda::fetch_ranks<C>(at + S::kRanks, m.d_a + (live ? row : end - 1) * m.stride_d_a,
                         live ? rank : 0, lane);
    if (lane < kRows)
      cuda::fetch16(at + static_cast<std::uint32_t>(S::kIds + 16 * lane),
                    m.ids + 4 * static_cast<Index>(min(first + lane, end - 1)));
  };

  float d_weight[2][2 * C][4] = {};
  const int step = warps * kRows;
  int stage = 0;
  if (begin + warp * kRows < end) fetch(0, begin + warp * kRows);
  cuda::fetch_commit();
  for (int first = begin + warp * kRows; first < end; first += step) {
    if (first + step < end) fetch(stage ^ 1, first + step);
    cuda::fetch_commit();
    cuda::fetch_wait<1>();
    __syncwarp();
    std::byte* here = ring + stage * S::kBytes;
    const std::uint32_t ranks =
        ring_address + static_cast<std::uint32_t>(stage * S::kBytes + S::kRanks) + own_ranks;
    Philox4 bits[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      bits[h] = m.bits(*reinterpret_cast<const int4*>(here + S::kIds + 16 * (g + 8 * h)), col / 8);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      unsigned x[2][2];  // tile, rows g and g + 8; turned over: columns, then rows
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint2 raw = cuda::read_piece(here, h, pair, lane);
        x[0][h] = cuda::transposed(cuda::masked(raw.x, bits[h], 2 * pair, m.threshold));
        x[1][h] = cuda::transposed(cuda::masked(raw.y, bits[h], 2 * pair + 1, m.threshold));
      }
      float d[2][4] = {};
#pragma unroll
      for (int c = 0; c < C; ++c) {
        unsigned a[4], w[4];
        cuda::read_matrices_trans(a, ranks + static_cast<std::uint32_t>(c * kPiece));
        cuda::mma(d_weight[pair][2 * c], x[0][0], x[1][0], x[0][1], x[1][1], a[0], a[1]);
        cuda::mma(d_weight[pair][2 * c + 1], x[0][0], x[1][0], x[0][1], x[1][1], a[2], a[3]);
        cuda::read_matrices(a, ranks + static_cast<std::uint32_t>(c * kPiece));
        cuda::read_matrices(w, factor + static_cast<std::uint32_t>(c * kFactorBytes + 512 * pair));
        cuda::mma(d[0], a[0], a[1], a[2], a[3], w[0], w[1]);
        cuda::mma(d[1], a[0], a[1], a[2], a[3], w[2], w[3]);
      }
      float old[2][4];
      cuda::start(old, cuda::read_piece(here, 2, pair, lane),
                  cuda::read_piece(here, 3, pair, lane));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (cuda::kept(bits[h], 4 * pair + i, m.threshold))
            old[i / 2][2 * h + i % 2] += keep * d[i / 2][2 * h + i % 2];
        auto* to = reinterpret_cast<uint2*>(here + (2 + h) * kPiece + 16 * lane + 8 * pair);
        *to = make_uint2(cuda::pack2(old[0][2 * h], old[0][2 * h + 1]),
                         cuda::pack2(old[1][2 * h], old[1][2 * h + 1]));
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (first + g + 8 * h < end)
        *reinterpret_cast<uint4*>(m.d_x + static_cast<Index>(first + g + 8 * h) * m.stride_d_x +
                                  col) =
            *reinterpret_cast<const uint4*>(here + (2 + h) * kPiece + 16 * lane);
    __syncwarp();
    stage ^= 1;
  }
  cuda::fetch_wait<0>();

  // The warps' sums, in their order, as rows of 32 columns.
  auto* numbers = reinterpret_cast<float*>(memory);
  float* out = m.sums + static_cast<Index>(split) * rank * m.cols + f0;
  for (int w = 0; w < warps; ++w) {
    __syncthreads();
    if (w == warp) cuda::add_in_turn<C>(numbers, d_weight, w == 0, g, q);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rank * kColumns;
       i += static_cast<int>(blockDim.x))
    out[i / kColumns * static_cast<Index>(m.cols) + i % kColumns] =
        numbers[i / kColumns * (kColumns + 1) + i % kColumns];
}

/// d_weight += keep times the sum over the splits, in their order, and d_wg, `more` of the sums
/// behind; four numbers a thread.
__global__ void d_weight_kernel(float4* d_weight, float4* d_wg, const float4* sums, int count,
                                int more, int splits, float keep) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count + more) return;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int k = 0; k < splits; ++k) {
    cuda::add_to(sum, sums[static_cast<Index>(k) * (count + more) + i]);
  }
  float4* at = i < count ? d_weight + i : d_wg + (i - count);
  if (i >= count) keep = 1;
  float4 to = *at;
  to.x += keep * sum.x, to.y += keep * sum.y, to.z += keep * sum.z, to.w += keep * sum.w;
  *at = to;
}

template <class View> bool by_sixteen_bytes(const View& t) {
  return t.dtype == DType::bf16 && cuda::by_eights(t);
}
bool few(Index rank) { return rank <= 16 * cuda::kRankChunks; }
/// Whether the kernels of lora_a_90a.cu run here.
bool warpgroups([[maybe_unused]] int device) {
#ifdef MIXLORA_WARPGROUPS
  int major = 0, minor = 0;
  cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
              "attributes");
  cuda::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
              "attributes");
  return major == 9 && minor == 0;
#else
  return false;
#endif
}
/// More than a few ranks only where there are warpgroups.
bool takes(int device, ConstTensor x, ConstTensor weight, RowIds ids) {
  const Index rank = weight.rows();
  return ids && by_sixteen_bytes(x) && by_sixteen_bytes(weight) && weight.contiguous() &&
         x.cols() % kColumns == 0 && rank % 8 == 0 && x.rows() < (Index{1} << 24) &&
         (few(rank) || (warpgroups(device) && std::max(x.rows(), x.cols()) * rank <= kMostSums &&
                        x.rows() * x.cols() <= kMostMasked));
}
bool takes_backward(int device, ConstTensor d_weight, ConstTensor d_x, ConstTensor d_a,
                    ConstTensor x, ConstTensor weight, RowIds ids) {
  return takes(device, x, weight, ids) && by_sixteen_bytes(d_a) && d_weight.contiguous() &&
         (!d_x || by_sixteen_bytes(d_x));
}
Call call_of(ConstTensor x, ConstTensor weight, const Dropout& d, RowIds ids) {
  Call m{};
  m.x = cuda::data<Number>(x);
  m.weight = cuda::data<Number>(weight);
  m.stride_x = x.stride;
  m.rows = static_cast<int>(x.rows());
  m.cols = static_cast<int>(x.cols());
  m.rank = static_cast<int>(weight.rows());
  m.ids = ids.ptr<std::int32_t>();
  m.key = random_key(d.seed, Purpose::dropout);
  m.threshold = dropout_threshold(d.p) << 16;
  m.layer = static_cast<std::uint32_t>(d.layer);
  m.site = d.site;
  return m;
}
/// As many parts as the device takes blocks at a time, of at least `least` steps each.
int splits_of(int blocks, int together, int steps, int least) {
  return std::clamp(together / blocks, 1, std::max(1, steps / least));
}

/// The sums' parts into d_weight, and d_wg of a router.
void add_weight(const Call& m, int splits, Tensor d_weight, float keep, cudaStream_t stream,
                const cuda::Routed& router = {}) {
  constexpr int kThreads = 256;
  const int count = m.rank * m.cols / 4, more = router.more() * m.cols / 4;
  d_weight_kernel<<<static_cast<unsigned>(ceil_div(count + more, kThreads)), kThreads, 0, stream>>>(
      reinterpret_cast<float4*>(cuda::data<float>(d_weight)),
      reinterpret_cast<float4*>(router.d_wg), reinterpret_cast<const float4*>(m.sums), count, more,
      splits, keep);
  cuda::launched("lora_a_backward");
}
/// The sums' parts into a, and a router's logits.
void add_a(const Call& m, int splits, Tensor a, float s, cudaStream_t stream,
           const cuda::Routed& router = {}) {
  constexpr int kThreads = 256;
  const int pairs = m.rows * (m.rank + router.more_forward()) / 2;
  a_kernel<<<static_cast<unsigned>(ceil_div(pairs, kThreads)), kThreads, 0, stream>>>(
      cuda::data<Number>(a), a.stride, reinterpret_cast<const float2*>(m.sums), m.rows, m.rank,
      splits, s, router);
  cuda::launched("lora_a");
}
/// d_weight and d_x of a few ranks.
template <class Room>
void few_backward(Call m, Room space, Tensor d_weight, float keep, cudaStream_t stream) {
  const int blocks = m.cols / kColumns,
            splits = std::clamp(ceil_div(kWishedBlocks, blocks), 1,
                                std::max(1, m.rows / (4 * cuda::kMostWarps * kRows)));
  m.sums = space.template take<float>(static_cast<Index>(splits) * m.rank * m.cols);
  cuda::with_rank_chunks(m.rank, [&](auto chunks) {
    using S = Stage<chunks()>;
    constexpr int kFactor = chunks() * kFactorBytes;
    // The sums of all warps are laid over the rings.
    static_assert(kFactor + 2 * S::kBytes * cuda::kMostWarps >= 16 * chunks() * (kColumns + 1) * 4);
    auto* kernel = backward_kernel<chunks()>;
    cuda::launch_warps(kernel,
                       cuda::fit_of(reinterpret_cast<const void*>(kernel), kFactor, 2 * S::kBytes),
                       dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)), stream,
                       "lora_a_backward", m, keep);
  });
  add_weight(m, splits, d_weight, keep, stream);
}
/// d_weight of a few ranks alone.
template <class Room>
void few_weight(Call m, Room space, int processors, Tensor d_weight, float keep,
                cudaStream_t stream) {
  const int splits = splits_of(ceil_div(m.cols, cuda::kDroppedTile),
                               cuda::kFewTogether * processors, m.rows / cuda::kFewStep, 4);
  m.sums = space.template take<float>(static_cast<Index>(splits) * m.rank * m.cols);
  cuda::few_ranks_weight(m, splits, stream);
  add_weight(m, splits, d_weight, keep, stream);
}
#ifdef MIXLORA_WARPGROUPS
constexpr int kLeastSteps = 6;  // of a block
/// Parts of a sum over `inner` numbers, `size` sums of each rank.
int parts_of(const Call& m, int size, int inner, int processors) {
  return splits_of(ceil_div(size, cuda::kDroppedTile) * ceil_div(m.rank, m.rank > 128 ? 256 : 128),
                   processors, inner / cuda::kWarpgroupStep, kLeastSteps);
}
#endif
/// a of many ranks, and a router's logits.
template <class Room>
void many_forward([[maybe_unused]] Call m, [[maybe_unused]] Room space,
                  [[maybe_unused]] int processors, [[maybe_unused]] Tensor a,
                  [[maybe_unused]] float s, [[maybe_unused]] const cuda::Routed& router,
                  [[maybe_unused]] cudaStream_t stream) {
#ifdef MIXLORA_WARPGROUPS
  const int splits = parts_of(m, m.rows, m.cols, processors);
  m.sums = space.template take<float>(static_cast<Index>(splits) * m.rows *
                                      (m.rank + router.more_forward()));
  cuda::warpgroup_forward(m, router, splits, stream);
  add_a(m, splits, a, s, stream, router);
#endif
}
/// d_weight of many ranks, and d_x when m has one, with what a router gets and sends back.
template <class Room>
void many_backward([[maybe_unused]] Call m, [[maybe_unused]] Room space,
                   [[maybe_unused]] int processors, [[maybe_unused]] Tensor d_weight,
                   [[maybe_unused]] float keep, [[maybe_unused]] const cuda::Routed& router,
                   [[maybe_unused]] const cuda::ThroughNorm& norm,
                   [[maybe_unused]] cudaStream_t stream) {
#ifdef MIXLORA_WARPGROUPS
  const int splits = parts_of(m, m.cols, m.rows, processors);
  m.sums =
      space.template take<float>(static_cast<Index>(splits) * m.cols * (m.rank + router.more()));
  m.masks = space.template take<std::uint8_t>(static_cast<Index>(m.rows) * (m.cols / 8));
  cuda::draw_masks(m, stream);
  cuda::warpgroup_weight(m, router, splits, stream);
  add_weight(m, splits, d_weight, keep, stream, router);
  if (m.d_x == nullptr) return;
  const int blocks = ceil_div(m.rows, cuda::kDroppedTile),
            least = ceil_div(m.cols, cuda::kMostInputColumns);
  cuda::warpgroup_input(
      m, router, norm, keep,
      std::max(least, splits_of(blocks, processors, m.cols / cuda::kWarpgroupStep, kLeastSteps)),
      stream);
#endif
}
/// A router beside A as the kernels of many ranks take it.
bool takes_router(ConstTensor wg) {
  return wg.rows() <= cuda::kRoutedExperts && wg.rows() % 4 == 0 && wg.stride % 4 == 0 &&
         reinterpret_cast<std::uintptr_t>(wg.data) % 16 == 0;
}
}  // namespace

void CudaBackend::lora_a(Tensor a, ConstTensor x, ConstTensor weight, float s, const Dropout& d,
                         RowIds ids, Tensor room_for_rows) {
  if (x.rows() == 0) return;
  // Nothing dropped, few ranks: cuBLASLt's product is the faster one.
  if ((few(weight.rows()) && !d.active()) || !takes(device_, x, weight, ids) || a.stride % 2 != 0)
    return Backend::lora_a(a, x, weight, s, d, ids, room_for_rows);
  Call m = call_of(x, weight, d, ids);
  const float scale = s * dropout_scale(d.p);
  if (!few(m.rank)) {
    many_forward(m, room(), processors_, a, scale, {}, stream_);
    return;
  }
  const int blocks = ceil_div(m.rows, kForwardRows);
  int columns = most_columns(ceil_div(m.rank, 16));
  while (columns > 128 && blocks * ceil_div(m.cols, columns) < processors_ * 3 / 2) columns /= 2;
  const int splits = ceil_div(m.cols, columns);
  const Index sums = splits * x.rows() * weight.rows();
  if (sums * Index{sizeof(float)} > cuda::kMostSumBytes) {
    const Index half = x.rows() / 2;
    for (const auto& [begin, end] : {std::pair<Index, Index>(0, half), {half, x.rows()}})
      lora_a(a.row_range(begin, end), x.row_range(begin, end), weight, s, d,
             ids.row_range(begin, end), {});
    return;
  }
  m.sums = room().take<float>(sums);
  cuda::with_rank_chunks(m.rank, [&](auto chunks) {
    auto* kernel = forward_kernel<chunks()>;
    cuda::admit_shared(reinterpret_cast<const void*>(kernel),
                       forward_bytes(chunks(), most_columns(chunks())));
    kernel<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)),
             kForwardWarps * kWarp, static_cast<std::size_t>(forward_bytes(chunks(), columns)),
             stream_>>>(m, columns);
  });
  cuda::launched("lora_a");
  add_a(m, splits, a, scale, stream_);
}

void CudaBackend::lora_a_router(Tensor a, Tensor logits, ConstTensor x, ConstTensor weight,
                                ConstTensor wg, float s, const Dropout& d, RowIds ids,
                                Tensor room_for_rows) {
  if (x.rows() == 0) return;
  if (few(weight.rows()) || !takes_router(wg) || !takes(device_, x, weight, ids) ||
      a.stride % 2 != 0)
    return Backend::lora_a_router(a, logits, x, weight, wg, s, d, ids, room_for_rows);
  many_forward(call_of(x, weight, d, ids), room(), processors_, a, s * dropout_scale(d.p),
               {cuda::data<float>(logits), nullptr, cuda::data<float>(wg), nullptr, logits.stride,
                wg.stride, static_cast<int>(wg.rows())},
               stream_);
}

void CudaBackend::lora_a_backward(Tensor d_weight, Tensor d_x, ConstTensor d_a, ConstTensor x,
                                  ConstTensor weight, const Dropout& d, RowIds ids,
                                  Tensor room_for_rows) {
  if (x.rows() == 0) return;
  if (!takes_backward(device_, d_weight, d_x, d_a, x, weight, ids))
    return Backend::lora_a_backward(d_weight, d_x, d_a, x, weight, d, ids, room_for_rows);
  Call m = call_of(x, weight, d, ids);
  m.d_a = cuda::data<Number>(d_a), m.stride_d_a = d_a.stride;
  if (d_x) m.d_x = cuda::data<Number>(d_x), m.stride_d_x = d_x.stride;
  const float keep = dropout_scale(d.p);
  Room space = room();
  if (!few(m.rank))
    many_backward(m, space, processors_, d_weight, keep, {}, {}, stream_);
  else if (d_x)
    few_backward(m, space, d_weight, keep, stream_);
  else
    few_weight(m, space, processors_, d_weight, keep, stream_);
}

void CudaBackend::lora_a_router_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, ConstTensor d_a,
                                         ConstTensor d_logits, ConstTensor x, ConstTensor weight,
                                         ConstTensor wg, const Dropout& d, RowIds ids,
                                         Tensor room_for_rows) {
  if (!with_router(d_weight, d_wg, d_x, d_a, d_logits, x, weight, wg, d, ids, {}, {}, {}, {}, {}))
    Backend::lora_a_router_backward(d_weight, d_wg, d_x, d_a, d_logits, x, weight, wg, d, ids,
                                    room_for_rows);
}

void CudaBackend::lora_a_router_rmsnorm_backward(
    Tensor d_weight, Tensor d_wg, Tensor d_x, Tensor d_y, ConstTensor d_a, ConstTensor d_logits,
    ConstTensor weight, ConstTensor wg, const Dropout& d, RowIds ids, ConstTensor x, ConstTensor w,
    ConstTensor r, ConstTensor row_dots, ConstTensor logits, Tensor y, Tensor room_for_rows) {
  const bool joined = row_dots && row_dots.contiguous() && logits && logits.contiguous() &&
                      weight.rows() <= cuda::kInputRanks && by_sixteen_bytes(d_x);
  if (!cuda::by_eights(w) || !r.contiguous() ||
      !with_router(d_weight, d_wg, d_y, d_a, d_logits, x, weight, wg, d, ids, w, r,
                   joined ? d_x : Tensor(), row_dots, logits))
    Backend::lora_a_router_rmsnorm_backward(d_weight, d_wg, d_x, d_y, d_a, d_logits, weight, wg, d,
                                            ids, x, w, r, row_dots, logits, y, room_for_rows);
  else if (!joined)
    rmsnorm_backward(d_x, d_y, x, w, r);
}

bool CudaBackend::with_router(Tensor d_weight, Tensor d_wg, Tensor d_x, ConstTensor d_a,
                              ConstTensor d_logits, ConstTensor x, ConstTensor weight,
                              ConstTensor wg, const Dropout& d, RowIds ids, ConstTensor w,
                              ConstTensor r, Tensor d_input, ConstTensor row_dots,
                              ConstTensor logits) {
  if (x.rows() == 0) return true;
  if (few(weight.rows()) || !takes_router(wg) || !d_wg.contiguous() || !d_logits.contiguous() ||
      reinterpret_cast<std::uintptr_t>(d_logits.data) % 16 != 0 || !d_x ||
      !takes_backward(device_, d_weight, d_x, d_a, x, weight, ids))
    return false;
  Call m = call_of(x, weight, d, ids);
  m.d_a = cuda::data<Number>(d_a), m.stride_d_a = d_a.stride;
  m.d_x = cuda::data<Number>(d_x), m.stride_d_x = d_x.stride;
  if (r) m.norm_w = cuda::data<float>(w), m.norm_r = cuda::data<float>(r);
  many_backward(m, room(), processors_, d_weight, dropout_scale(d.p),
                {nullptr, cuda::data<float>(d_logits), cuda::data<float>(wg),
                 cuda::data<float>(d_wg), 0, wg.stride, static_cast<int>(wg.rows())},
                {cuda::data<Number>(d_input), d_input.stride, cuda::data<float>(row_dots),
                 cuda::data<float>(logits)},
                stream_);
  return true;
}

void CudaBackend::lora_a_rmsnorm_backward(Tensor d_weight, Tensor d_x, Tensor d_y, ConstTensor d_a,
                                          ConstTensor weight, ConstTensor a, float s,
                                          const Dropout& d, RowIds ids, ConstTensor x,
                                          ConstTensor w, ConstTensor r, ConstTensor row_dots,
                                          Tensor y, Tensor room_for_rows) {
  if (x.rows() == 0) return;
  if (!few(weight.rows()) || !takes_backward(device_, d_weight, d_x, d_a, x, weight, ids) ||
      !by_sixteen_bytes(d_y) || !by_sixteen_bytes(a) || !cuda::by_eights(w) || !r.contiguous() ||
      (row_dots && !row_dots.contiguous()))
    return Backend::lora_a_rmsnorm_backward(d_weight, d_x, d_y, d_a, weight, a, s, d, ids, x, w, r,
                                            row_dots, y, room_for_rows);
  Room space = room();
  Call m = call_of(x, weight, d, ids);
  m.d_a = cuda::data<Number>(d_a), m.stride_d_a = d_a.stride;
  m.d_x = cuda::data<Number>(d_x), m.stride_d_x = d_x.stride;
  const float keep = dropout_scale(d.p);
  const int splits =
      splits_of(ceil_div(m.cols, cuda::kDroppedTile), processors_, m.rows / cuda::kNormStep, 2);
  m.sums = space.take<float>(static_cast<Index>(splits) * m.rank * m.cols);
  cuda::norm_backward(m,
                      {cuda::data<Number>(ConstTensor(d_y)), cuda::data<Number>(a), d_y.stride,
                       a.stride, cuda::data<float>(w), cuda::data<float>(r), s == 0 ? 0 : 1 / s,
                       keep, cuda::data<float>(row_dots), space.take<float>(m.rows)},
                      splits, stream_);
  add_weight(m, splits, d_weight, keep, stream_);
}

}  // namespace mixlora
