// Dropout and A in one pass over x, forward and backward: the rows that dropout leaves are never in
// memory. Traffic: forward D numbers a row; backward 3 D (x, d_x read and written).
#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
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

/// The call, and its mask: an element is kept when its 16 bits are not below the upper half of
/// `threshold`.
struct Call {
  const Number *x, *weight, *d_a;
  Number* d_x;
  Index stride_x, stride_d_x, stride_d_a;
  int rows, cols, rank;
  const std::int32_t* ids;
  RandomKey key;
  std::uint32_t threshold, layer, site;
  const float *norm_w, *norm_r;  // backward by a norm: what drops is x r w
  float* sums;                   // forward (split, row, rank); backward (split, rank, column)

  __device__ Philox4 bits(int4 id, int block) const {
    return row_bits(key, layer, site, static_cast<std::uint32_t>(id.z),
                    static_cast<std::uint32_t>(id.x), static_cast<std::uint32_t>(id.y),
                    static_cast<std::uint32_t>(block));
  }
};

/// Columns 2i, 2i + 1 of a lane's eight with those dropped zeroed.
__device__ unsigned masked(unsigned pair, const Philox4& bits, int i, std::uint32_t threshold) {
  const unsigned first = cuda::kept(bits, 2 * i, threshold) ? 0xffffU : 0;
  const unsigned second = cuda::kept(bits, 2 * i + 1, threshold) ? 0xffff0000U : 0;
  return pair & (first | second);
}

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
    ids[h] = __ldg(reinterpret_cast<const int4*>(m.ids) + row);
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
      a[h][0] = masked(raw.x, bits[h], 0, m.threshold);
      a[h][1] = masked(raw.y, bits[h], 1, m.threshold);
      a[h][2] = masked(raw.z, bits[h], 2, m.threshold);
      a[h][3] = masked(raw.w, bits[h], 3, m.threshold);
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

/// a = s times the sum over the splits, in their order; two numbers a thread.
__global__ void a_kernel(Number* a, Index stride, const float2* sums, int rows, int rank,
                         int splits, float s) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), half = rank / 2;
  if (i >= rows * half) return;
  float2 sum = make_float2(0, 0);
  for (int k = 0; k < splits; ++k) {
    const float2 part = sums[static_cast<Index>(k) * rows * half + i];
    sum.x += part.x, sum.y += part.y;
  }
  *reinterpret_cast<unsigned*>(a + i / half * stride + i % half * 2) =
      cuda::pack2(s * sum.x, s * sum.y);
}

/// A warp's stage of the backward kernel: x and d_x of rows g and g + 8, the 16 rows' d_a, ids.
template <int C> struct Stage {
  static constexpr int kRanks = 4 * kPiece, kIds = kRanks + C * kPiece;
  static constexpr int kBytes = kIds + kPiece / 2;
};

/// grid (columns / 32, splits): a block has 32 columns and its share of the rows. Through: d_x too;
/// Normed: x is what the norm before A saw.
template <int C, bool Through, bool Normed>
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
  if constexpr (Through) {
    auto* factor = reinterpret_cast<Number*>(memory);
    for (int i = static_cast<int>(threadIdx.x); i < 16 * C * kColumns;
         i += static_cast<int>(blockDim.x)) {
      const int c = i % kColumns, r = i / kColumns, a = c / 8, b = c % 8;
      factor[r / 16 * (kFactorBytes / 2) + (4 * b + a) * 16 + 8 * (r / 8 % 2 ^ (b & 1)) + r % 8] =
          r < rank ? m.weight[static_cast<Index>(r) * m.cols + f0 + c] : Number(0.0F);
    }
    __syncthreads();
  }
  constexpr int kFactor = Through ? C * kFactorBytes : 0;
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
      if constexpr (Through)
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

  float norm_w[Normed ? 8 : 1];
  if constexpr (Normed) {
    const cuda::Eight w = cuda::load8(m.norm_w + col);
#pragma unroll
    for (int i = 0; i < 8; ++i) norm_w[i] = w.v[i];
  }
  /// The numbers 2i, 2i + 1 of a lane's eight as A saw them before dropout.
  const auto seen = [&](unsigned pair, int i, float r) {
    if constexpr (Normed)
      return cuda::pack2(cuda::low(pair) * (r * norm_w[2 * i]),
                         cuda::high(pair) * (r * norm_w[2 * i + 1]));
    else
      return pair;
  };
  float d_weight[2][2 * C][4] = {};
  const int step = warps * kRows;
  int stage = 0;
  if (begin + warp * kRows < end) fetch(0, begin + warp * kRows);
  cuda::fetch_commit();
  for (int first = begin + warp * kRows; first < end; first += step) {
    if (first + step < end) fetch(stage ^ 1, first + step);
    cuda::fetch_commit();
    float r[2] = {};
    if constexpr (Normed)
#pragma unroll
      for (int h = 0; h < 2; ++h) r[h] = __ldg(m.norm_r + min(first + g + 8 * h, end - 1));
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
        x[0][h] =
            cuda::transposed(masked(seen(raw.x, 2 * pair, r[h]), bits[h], 2 * pair, m.threshold));
        x[1][h] = cuda::transposed(
            masked(seen(raw.y, 2 * pair + 1, r[h]), bits[h], 2 * pair + 1, m.threshold));
      }
      float d[2][4] = {};
#pragma unroll
      for (int c = 0; c < C; ++c) {
        unsigned a[4], w[4];
        cuda::read_matrices_trans(a, ranks + static_cast<std::uint32_t>(c * kPiece));
        cuda::mma(d_weight[pair][2 * c], x[0][0], x[1][0], x[0][1], x[1][1], a[0], a[1]);
        cuda::mma(d_weight[pair][2 * c + 1], x[0][0], x[1][0], x[0][1], x[1][1], a[2], a[3]);
        if constexpr (Through) {
          cuda::read_matrices(a, ranks + static_cast<std::uint32_t>(c * kPiece));
          cuda::read_matrices(w,
                              factor + static_cast<std::uint32_t>(c * kFactorBytes + 512 * pair));
          cuda::mma(d[0], a[0], a[1], a[2], a[3], w[0], w[1]);
          cuda::mma(d[1], a[0], a[1], a[2], a[3], w[2], w[3]);
        }
      }
      if constexpr (Through) {
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
    }
    if constexpr (Through)
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
    if (w != warp) continue;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int i = 0; i < 2 * C; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int f = g / 2 * 8 + 2 * (2 * pair + c / 2) + g % 2, r = 8 * i + 2 * q + c % 2;
          float& to = numbers[r * (kColumns + 1) + f];
          to = w == 0 ? d_weight[pair][i][c] : to + d_weight[pair][i][c];
        }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rank * kColumns;
       i += static_cast<int>(blockDim.x))
    out[i / kColumns * static_cast<Index>(m.cols) + i % kColumns] =
        numbers[i / kColumns * (kColumns + 1) + i % kColumns];
}

/// d_weight += keep times the sum over the splits, in their order; four numbers a thread. grid y 1:
/// A turned over, (columns, rank); eight ranks a thread.
__global__ void d_weight_kernel(float4* d_weight, const float4* sums, int count, int splits,
                                float keep, Number* turned, const Number* weight, int cols) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (blockIdx.y == 1) {
    const int col = i % cols, r = i / cols * 8, rank = 4 * count / cols;
    if (r >= rank) return;
    const auto* from = reinterpret_cast<const unsigned short*>(weight) + col;
    unsigned words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      words[k] = static_cast<unsigned>(from[static_cast<Index>(r + 2 * k) * cols]) |
                 static_cast<unsigned>(from[static_cast<Index>(r + 2 * k + 1) * cols]) << 16;
    cuda::write4(turned + static_cast<Index>(col) * rank + r, words);
    return;
  }
  if (i >= count) return;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int k = 0; k < splits; ++k) {
    const float4 part = sums[static_cast<Index>(k) * count + i];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  float4 to = d_weight[i];
  to.x += keep * sum.x, to.y += keep * sum.y, to.z += keep * sum.z, to.w += keep * sum.w;
  d_weight[i] = to;
}

template <class View> bool by_sixteen_bytes(const View& t) {
  return t.dtype == DType::bf16 && cuda::by_eights(t);
}
bool takes(ConstTensor x, ConstTensor weight, const Dropout& d) {
  const Index rank = weight.rows();
  return d.active() && by_sixteen_bytes(x) && by_sixteen_bytes(weight) && weight.contiguous() &&
         x.cols() % kColumns == 0 && rank % 8 == 0 && rank <= 16 * cuda::kRankChunks &&
         x.rows() < (Index{1} << 24);
}
Call call_of(ConstTensor x, ConstTensor weight, const Dropout& d, RowIds ids, float* sums) {
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
  m.sums = sums;
  return m;
}
int splits_of(int blocks, int most) {
  return std::clamp(ceil_div(kWishedBlocks, blocks), 1, std::max(most, 1));
}

/// The passes that lora_a_backward and lora_a_rmsnorm_backward share: d_weight, and d_x when m has
/// one. `turned`, unless null: room for A turned over.
void weight_backward(const Call& m, int splits, Tensor d_weight, float keep, Number* turned,
                     cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(m.cols / kColumns);
  cuda::with_rank_chunks(m.rank, [&](auto chunks) {
    using S = Stage<chunks()>;
    const auto launch = [&](auto through, auto normed) {
      constexpr int kFactor = through() ? chunks() * kFactorBytes : 0;
      // The sums of all warps are laid over the rings.
      static_assert(kFactor + 2 * S::kBytes * cuda::kMostWarps >=
                    16 * chunks() * (kColumns + 1) * 4);
      auto* kernel = backward_kernel<chunks(), through(), normed()>;
      cuda::launch_warps(
          kernel, cuda::fit_of(reinterpret_cast<const void*>(kernel), kFactor, 2 * S::kBytes),
          dim3(blocks, static_cast<unsigned>(splits)), stream, "lora_a_backward", m, keep);
    };
    if (m.norm_r != nullptr)
      launch(std::false_type{}, std::true_type{});
    else if (m.d_x != nullptr)
      launch(std::true_type{}, std::false_type{});
    else
      launch(std::false_type{}, std::false_type{});
  });
  constexpr int kThreads = 256;
  const int count = m.rank * m.cols / 4;
  const dim3 grid(static_cast<unsigned>(ceil_div(count, kThreads)), turned != nullptr ? 2 : 1);
  d_weight_kernel<<<grid, kThreads, 0, stream>>>(
      reinterpret_cast<float4*>(cuda::data<float>(d_weight)),
      reinterpret_cast<const float4*>(m.sums), count, splits, keep, turned, m.weight, m.cols);
  cuda::launched("lora_a_backward");
}
int backward_splits(ConstTensor x) {
  return splits_of(static_cast<int>(x.cols()) / kColumns,
                   static_cast<int>(x.rows()) / (4 * cuda::kMostWarps * kRows));
}

}  // namespace

void CudaBackend::lora_a(Tensor a, ConstTensor x, ConstTensor weight, float s, const Dropout& d,
                         RowIds ids, Tensor room_for_rows) {
  if (x.rows() == 0) return;
  if (!takes(x, weight, d) || a.stride % 2 != 0)
    return Backend::lora_a(a, x, weight, s, d, ids, room_for_rows);
  const int blocks = static_cast<int>(ceil_div<Index>(x.rows(), kForwardRows)),
            cols = static_cast<int>(x.cols());
  int columns = most_columns(static_cast<int>(ceil_div<Index>(weight.rows(), 16)));
  while (columns > 128 && blocks * ceil_div(cols, columns) < processors_ * 3 / 2) columns /= 2;
  const int splits = ceil_div(cols, columns);
  auto* sums = room().take<float>(splits * x.rows() * weight.rows());
  const Call m = call_of(x, weight, d, ids, sums);
  cuda::with_rank_chunks(m.rank, [&](auto chunks) {
    cuda::admit_shared(reinterpret_cast<const void*>(forward_kernel<chunks()>),
                       forward_bytes(chunks(), most_columns(chunks())));
    forward_kernel<chunks()>
        <<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)),
           kForwardWarps * kWarp, static_cast<std::size_t>(forward_bytes(chunks(), columns)),
           stream_>>>(m, columns);
  });
  cuda::launched("lora_a");
  constexpr int kThreads = 256;
  a_kernel<<<static_cast<unsigned>(ceil_div(m.rows * m.rank / 2, kThreads)), kThreads, 0,
             stream_>>>(cuda::data<Number>(a), a.stride, reinterpret_cast<const float2*>(sums),
                        m.rows, m.rank, splits, s * dropout_scale(d.p));
  cuda::launched("lora_a");
}

void CudaBackend::lora_a_backward(Tensor d_weight, Tensor d_x, ConstTensor d_a, ConstTensor x,
                                  ConstTensor weight, const Dropout& d, RowIds ids,
                                  Tensor room_for_rows) {
  if (x.rows() == 0) return;
  if (!takes(x, weight, d) || !by_sixteen_bytes(d_a) || !d_weight.contiguous() ||
      (d_x && !by_sixteen_bytes(d_x)))
    return Backend::lora_a_backward(d_weight, d_x, d_a, x, weight, d, ids, room_for_rows);
  const int splits = backward_splits(x);
  Call m = call_of(x, weight, d, ids, room().take<float>(splits * weight.numel()));
  m.d_a = cuda::data<Number>(d_a);
  m.stride_d_a = d_a.stride;
  if (d_x) m.d_x = cuda::data<Number>(d_x), m.stride_d_x = d_x.stride;
  weight_backward(m, splits, d_weight, dropout_scale(d.p), nullptr, stream_);
}

void CudaBackend::lora_a_rmsnorm_backward(Tensor d_weight, Tensor d_x, Tensor d_y, ConstTensor d_a,
                                          ConstTensor weight, const Dropout& d, RowIds ids,
                                          ConstTensor x, ConstTensor w, ConstTensor r, Tensor y,
                                          Tensor room_for_rows) {
  if (x.rows() == 0) return;
  if (!takes(x, weight, d) || !by_sixteen_bytes(d_a) || !d_weight.contiguous() ||
      !by_sixteen_bytes(d_x) || !by_sixteen_bytes(d_y) || !cuda::by_eights(w) || !r.contiguous() ||
      !cuda::takes_norm_backward(x.cols(), weight.rows()))
    return Backend::lora_a_rmsnorm_backward(d_weight, d_x, d_y, d_a, weight, d, ids, x, w, r, y,
                                            room_for_rows);
  const int splits = backward_splits(x);
  Room space = room();
  Call m = call_of(x, weight, d, ids, space.take<float>(splits * weight.numel()));
  m.d_a = cuda::data<Number>(d_a);
  m.stride_d_a = d_a.stride;
  m.norm_w = cuda::data<float>(w);
  m.norm_r = cuda::data<float>(r);
  const float keep = dropout_scale(d.p);
  auto* turned = space.take<Number>(weight.numel());
  weight_backward(m, splits, d_weight, keep, turned, stream_);
  cuda::norm_backward({cuda::data<Number>(d_x),
                       cuda::data<Number>(ConstTensor(d_y)),
                       m.x,
                       d_x.stride,
                       d_y.stride,
                       m.stride_x,
                       m.norm_w,
                       m.norm_r,
                       m.rows,
                       m.cols,
                       {m.d_a, turned, m.stride_d_a, m.rank},
                       m.ids,
                       m.key,
                       m.threshold,
                       m.layer,
                       m.site,
                       keep},
                      stream_);
}

}  // namespace mixlora
