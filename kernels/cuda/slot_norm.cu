// The residual sum behind a mixture, and RMSNorm: the experts' low-rank updates join the sum, and
// with DoRA what scales and sums the slots.
#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/slot_update.cuh"

namespace mixlora {
namespace {

using cuda::Index;
using cuda::kPiece;
using cuda::kRows;
using cuda::kWarp;
using cuda::Number;
using cuda::SlotUpdate;

constexpr int kSlots = SlotUpdate::kSlots, kTiles = SlotUpdate::kTiles, kTile = cuda::kColumns;
constexpr int kRowBytes = SlotUpdate::kBlockColumns * 2, kStages = 3;
constexpr int kOwn = 8;  // columns of a lane

struct Call {
  Number* sum;
  const Number *x, *delta, *z, *b;
  const float* weight;         // (N, 2)
  const std::int32_t* expert;  // (N, 2)
  float* squares;              // (N, blocks of columns)
  Index stride_sum, stride_x, stride_delta, stride_z;
  int rows, cols;
  // DoRA's slots, in place of delta:
  Number* core;        // (2, N, D)
  const float* scale;  // (E, D)
};

/// The tensor core's sums of a lane: fragments of two pairs of tiles; columns 2j and 2j + 1 of its
/// eight in row g + 8i are at(j, i, 0) and at(j, i, 1).
struct Sums {
  float v[2][2][4];
  __device__ float& at(int j, int i, int c) { return v[j / 2][j % 2][2 * i + c]; }
  __device__ void set(int i, uint4 words) {
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < kOwn / 2; ++j)
      at(j, i, 0) = cuda::low(word[j]), at(j, i, 1) = cuda::high(word[j]);
  }
  __device__ void add(int i, uint4 words) {
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < kOwn / 2; ++j)
      at(j, i, 0) += cuda::low(word[j]), at(j, i, 1) += cuda::high(word[j]);
  }
  __device__ uint4 packed(int i) {
    return make_uint4(cuda::pack2(at(0, i, 0), at(0, i, 1)), cuda::pack2(at(1, i, 0), at(1, i, 1)),
                      cuda::pack2(at(2, i, 0), at(2, i, 1)), cuda::pack2(at(3, i, 0), at(3, i, 1)));
  }
};

/// A stage: of each sixteen of rows x and delta, or x and both slots of core, by rows; the slots'
/// ranks; their experts and weights.
template <bool Apart> struct Stage {
  static constexpr int kArrays = Apart ? 1 + kSlots : 2;
  static constexpr int kArray = kRows * kRowBytes, kRanks = kArrays * kArray,
                       kExperts = kRanks + kSlots * kPiece,
                       kWeights = kExperts + kRows * kSlots * 4,
                       kBytes = kWeights + kRows * kSlots * 4;
};
/// Of a block of `halves` sixteens of rows: B2, the ring, two steps' squares by warp.
template <int E, bool Apart> constexpr int shared_of(int halves) {
  return SlotUpdate::kBytes<E> + halves * (kStages * Stage<Apart>::kBytes + 2 * kTiles * kRows * 4);
}
constexpr int kMostHalves = 2;

/// sum = x + delta + sum_k w_k z_k B_e^T or, Apart, core_k += z_k B_e^T and sum = x + sum_k w_k
/// scale_e core_k; and, by block of columns, each row's squares of it.
///
/// grid (columns / 256, walkers): a block keeps B2 of its columns and walks down the rows, 16 or 32
/// at a time, its warps side by side, so that memory is asked for 512 bytes of a row at once; the
/// next two steps' rows are on their way. A lane has eight columns of rows g and g + 8.
template <int E, bool Apart>
__global__ void __launch_bounds__(kMostHalves* kTiles* kWarp, 1)
    slots_kernel(const __grid_constant__ Call m) {
  using S = Stage<Apart>;
  extern __shared__ __align__(16) std::byte memory[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int halves = static_cast<int>(blockDim.x) / (kTiles * kWarp), half = warp / kTiles,
            tile = warp % kTiles;
  const int col0 = static_cast<int>(blockIdx.x) * SlotUpdate::kBlockColumns,
            col = col0 + tile * kTile + kOwn * q;
  const bool inside = col < m.cols;  // cols is a multiple of a tile's
  const int rows = halves * kRows, step = static_cast<int>(gridDim.y) * rows;
  const std::uint32_t b0 = cuda::shared_address(memory), ring = b0 + SlotUpdate::kBytes<E>;
  std::byte* const ring_bytes = memory + SlotUpdate::kBytes<E>;
  auto* const squares =
      reinterpret_cast<float*>(ring_bytes + kStages * halves * S::kBytes);  // (2, warps, 16)

  SlotUpdate::fetch<E>(b0, m.b, col0, min(kTiles, (m.cols - col0) / kTile));
  const auto last = [&](int row) { return static_cast<Index>(min(row, m.rows - 1)); };
  const auto fetch = [&](int stage, int first) {
    if (first < m.rows) {
      const std::uint32_t at = ring + static_cast<std::uint32_t>(stage * halves * S::kBytes);
      const bool there = col0 + kOwn * lane < m.cols;
      const int from = there ? col0 + kOwn * lane : 0;
#pragma unroll
      for (int i = 0; i < kRows / kTiles; ++i) {
        // Rows of a half are fetched by its own warps.
        const int r = kRows / kTiles * tile + i;
        const Index row = last(first + half * kRows + r);
        const std::uint32_t to = at + static_cast<std::uint32_t>(half * S::kBytes + r * kRowBytes +
                                                                 16 * (lane ^ 4 * (r & 1)));
        const auto one = [&](int array, const Number* p) {
          cuda::fetch16(to + static_cast<std::uint32_t>(array * S::kArray), p + from, there);
        };
        one(0, m.x + row * m.stride_x);
        if constexpr (Apart)
          for (int k = 0; k < kSlots; ++k)
            one(1 + k, m.core + (static_cast<Index>(k) * m.rows + row) * m.cols);
        else
          one(1, m.delta + row * m.stride_delta);
      }
      if (tile == 0) {
        const std::uint32_t own = at + static_cast<std::uint32_t>(half * S::kBytes);
        const int row0 = first + half * kRows;
        cuda::fetch_ranks<kSlots>(own + S::kRanks, m.z + last(row0 + lane / 2) * m.stride_z,
                                  kSlots * SlotUpdate::kRank, lane);
        const Index slot = last(row0 + lane / kSlots) * kSlots + lane % kSlots;
        cuda::fetch4(own + static_cast<std::uint32_t>(S::kExperts + 4 * lane), m.expert + slot,
                     true);
        cuda::fetch4(own + static_cast<std::uint32_t>(S::kWeights + 4 * lane), m.weight + slot,
                     true);
      }
    }
    cuda::fetch_commit();
  };
  /// The squares of a step's rows, the warps' in their order.
  const auto leave = [&](int turn, int first) {
    const int own = static_cast<int>(threadIdx.x), row = first + own;
    if (own >= rows || row >= m.rows) return;
    float sum = 0;
    for (int w = 0; w < kTiles; ++w)
      sum += squares[(turn * halves * kTiles + own / kRows * kTiles + w) * kRows + own % kRows];
    m.squares[static_cast<Index>(row) * gridDim.x + blockIdx.x] = sum;
  };

  int first = static_cast<int>(blockIdx.y) * rows, stage = 0, turn = 0;
  const int begin = first;
#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) fetch(i, first + i * step);
  for (; first < m.rows; first += step) {
    cuda::fetch_wait<kStages - 2>();
    __syncthreads();
    if (first > begin) leave(turn ^ 1, first - step);
    fetch((stage + kStages - 1) % kStages, first + (kStages - 1) * step);
    const int at = (stage * halves + half) * S::kBytes;
    const std::byte* const here = ring_bytes + at;
    const auto row_of = [&](int i) { return first + half * kRows + g + 8 * i; };
    /// This lane's columns of row g + 8i of an array.
    const auto own = [&](int array, int i) {
      return *reinterpret_cast<const uint4*>(here + array * S::kArray + (g + 8 * i) * kRowBytes +
                                             16 * ((4 * tile + q) ^ 4 * (g & 1)));
    };
    unsigned z[kSlots][4];
    int expert[2][kSlots];
    float weight[2][kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
      cuda::read_matrices(z[k], ring + static_cast<std::uint32_t>(at + S::kRanks + k * kPiece) +
                                    cuda::rank_row(lane));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto e = reinterpret_cast<const int2*>(here + S::kExperts)[g + 8 * i];
      const auto w = reinterpret_cast<const float2*>(here + S::kWeights)[g + 8 * i];
      expert[i][0] = e.x, expert[i][1] = e.y, weight[i][0] = w.x, weight[i][1] = w.y;
    }
    /// Expert e's columns, as the tensor core wants two of its tiles.
    const auto factor = [&](unsigned(&b)[4], int e, int pair) {
      cuda::read_matrices(b, b0 + cuda::factor_row(lane) +
                                 static_cast<std::uint32_t>(tile * SlotUpdate::kTileBytes<E> +
                                                            e * cuda::kFactorBytes + 512 * pair));
    };
    Sums total;
    if constexpr (Apart) {
      Sums sums[kSlots];
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) sums[k].set(i, own(1 + k, i));
#pragma unroll
      for (int e = 0; e < E; ++e) {
        unsigned a[kSlots][4];
#pragma unroll
        for (int k = 0; k < kSlots; ++k)
#pragma unroll
          for (int n = 0; n < 4; ++n) a[k][n] = expert[n % 2][k] == e ? z[k][n] : 0;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          unsigned b[4];
          factor(b, e, pair);
#pragma unroll
          for (int k = 0; k < kSlots; ++k) {
            cuda::mma(sums[k].v[pair][0], a[k][0], a[k][1], a[k][2], a[k][3], b[0], b[1]);
            cuda::mma(sums[k].v[pair][1], a[k][0], a[k][1], a[k][2], a[k][3], b[2], b[3]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) total.set(i, own(0, i));
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (inside && row_of(i) < m.rows)
            *reinterpret_cast<uint4*>(m.core +
                                      (static_cast<Index>(k) * m.rows + row_of(i)) * m.cols + col) =
                sums[k].packed(i);
          const float w = weight[i][k];
          if (w == 0 || !inside) continue;
          cuda::Eight by = {{1, 1, 1, 1, 1, 1, 1, 1}};
          if (expert[i][k] >= 0)
            by = cuda::load8(m.scale + static_cast<Index>(expert[i][k]) * m.cols + col);
#pragma unroll
          for (int n = 0; n < kOwn; ++n)
            total.at(n / 2, i, n % 2) += w * by.v[n] * sums[k].at(n / 2, i, n % 2);
        }
    } else {
      // A row chooses an expert once: one step of the tensor core an expert has both slots.
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float w = weight[n % 2][k];
          z[k][n] = cuda::pack2(w * cuda::low(z[k][n]), w * cuda::high(z[k][n]));
        }
#pragma unroll
      for (int i = 0; i < 2; ++i) total.set(i, own(0, i)), total.add(i, own(1, i));
#pragma unroll
      for (int e = 0; e < E; ++e) {
        unsigned a[4];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          a[n] = expert[n % 2][1] == e ? z[1][n] : expert[n % 2][0] == e ? z[0][n] : 0;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          unsigned b[4];
          factor(b, e, pair);
          cuda::mma(total.v[pair][0], a[0], a[1], a[2], a[3], b[0], b[1]);
          cuda::mma(total.v[pair][1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
    }
    // Squares are those of what is stored, in bf16.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 words = total.packed(i);
      const unsigned word[4] = {words.x, words.y, words.z, words.w};
      float square = 0;
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j) {
        const float low = cuda::low(word[j]), high = cuda::high(word[j]);
        square += low * low + high * high;
      }
      if (!inside) square = 0;
      square += __shfl_xor_sync(cuda::kAll, square, 1);
      square += __shfl_xor_sync(cuda::kAll, square, 2);
      if (q == 0) squares[(turn * halves * kTiles + warp) * kRows + g + 8 * i] = square;
      if (inside && row_of(i) < m.rows)
        *reinterpret_cast<uint4*>(m.sum + row_of(i) * m.stride_sum + col) = words;
    }
    stage = (stage + 1) % kStages;
    turn ^= 1;
  }
  cuda::fetch_wait<0>();
  __syncthreads();
  if (first > begin) leave(turn ^ 1, first - step);
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

template <int E, bool Apart>
void launch(const Call& m, int walkers, int halves, cudaStream_t stream) {
  auto* const kernel = slots_kernel<E, Apart>;
  cuda::admit_shared(reinterpret_cast<const void*>(kernel), shared_of<E, Apart>(halves));
  const dim3 grid(static_cast<unsigned>(cuda::ceil_div(m.cols, SlotUpdate::kBlockColumns)),
                  static_cast<unsigned>(walkers));
  kernel<<<grid, static_cast<unsigned>(halves * kTiles * kWarp),
           static_cast<std::size_t>(shared_of<E, Apart>(halves)), stream>>>(m);
  cuda::launched("the sum behind a mixture");
}

int shared_of(const Slots& s, bool apart, int halves) {
  constexpr int kMost = SlotUpdate::kMostExperts;
  if (s.experts == kMost)
    return apart ? shared_of<kMost, true>(halves) : shared_of<kMost, false>(halves);
  return apart ? shared_of<4, true>(halves) : shared_of<4, false>(halves);
}
/// What both operations share: the call but for delta or core (`apart`), whether it can be taken.
bool takes(ConstTensor sum, ConstTensor y, ConstTensor r, ConstTensor x, ConstTensor z,
           ConstTensor b, const Slots& s, ConstTensor w, bool apart) {
  const auto fits = [&](const auto& t) {
    return t.dtype == DType::bf16 && cuda::by_eights(t) && t.rows() == x.rows() &&
           t.cols() == x.cols();
  };
  return shared_of(s, apart, 1) <= cuda::most_shared() && fits(sum) && fits(y) && fits(x) &&
         cuda::by_eights(w) && w.numel() == x.cols() && r.numel() == x.rows() && r.contiguous() &&
         cuda::takes_slots(z, b, s, x.rows(), x.cols());
}

}  // namespace

void CudaBackend::slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, ConstTensor delta,
                                Tensor core, ConstTensor z, ConstTensor b, ConstTensor scale,
                                const Slots& s, ConstTensor w, float eps) {
  const Index rows = x.rows(), cols = x.cols();
  if (rows == 0) return;
  const int parts = static_cast<int>(cuda::ceil_div<Index>(cols, SlotUpdate::kBlockColumns));
  const int wanted = shared_of(s, static_cast<bool>(core), kMostHalves),
            halves = wanted <= cuda::most_shared() ? kMostHalves : 1;
  const Index groups = cuda::ceil_div<Index>(rows, halves * kRows);
  // A block a processor, each with as many rows as the next.
  const Index turns = cuda::ceil_div<Index>(groups * parts, processors_);
  const int walkers = static_cast<int>(cuda::ceil_div(groups, turns));
  auto* squares = room().take<float>(rows * parts);
  const Call m{cuda::data<Number>(sum),
               cuda::data<Number>(x),
               delta ? cuda::data<Number>(delta) : nullptr,
               cuda::data<Number>(z),
               cuda::data<Number>(b),
               cuda::data<float>(ConstTensor(s.weight)),
               s.expert.ptr<std::int32_t>(),
               squares,
               sum.stride,
               x.stride,
               delta ? delta.stride : 0,
               z.stride,
               static_cast<int>(rows),
               static_cast<int>(cols),
               core ? cuda::data<Number>(core) : nullptr,
               scale ? cuda::data<float>(scale) : nullptr};
  constexpr int kMost = SlotUpdate::kMostExperts;
  if (s.experts == kMost)
    core ? launch<kMost, true>(m, walkers, halves, stream_)
         : launch<kMost, false>(m, walkers, halves, stream_);
  else
    core ? launch<4, true>(m, walkers, halves, stream_)
         : launch<4, false>(m, walkers, halves, stream_);
  cuda::each_chunk(stream_, "the norm behind a mixture", rows, cols, true,
                   Finish{cuda::rows_of<Number>(y), cuda::rows_of<Number>(ConstTensor(sum)),
                          cuda::data<float>(w), squares, cuda::data<float>(r), parts,
                          1.0F / static_cast<float>(cols), eps});
}

void CudaBackend::add_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                    ConstTensor z, ConstTensor b, const Slots& s, ConstTensor w,
                                    float eps, Tensor room_for_columns) {
  if (takes(sum, y, r, x, z, b, s, w, false) && delta.dtype == DType::bf16 &&
      cuda::by_eights(delta) && delta.rows() == x.rows() && delta.cols() == x.cols())
    slots_rmsnorm(sum, y, r, x, delta, {}, z, b, {}, s, w, eps);
  else
    Backend::add_slots_rmsnorm(sum, y, r, x, delta, z, b, s, w, eps, room_for_columns);
}

void CudaBackend::combine_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                        Tensor core, ConstTensor z, ConstTensor b,
                                        ConstTensor scale, const Slots& s, ConstTensor w, float eps,
                                        Tensor room_for_columns) {
  if (takes(sum, y, r, x, z, b, s, w, true) && core.dtype == DType::bf16 && cuda::by_eights(core) &&
      core.contiguous() && core.numel() == SlotUpdate::kSlots * x.rows() * x.cols() &&
      cuda::by_eights(scale) && scale.contiguous() && scale.rows() == s.experts &&
      scale.cols() == x.cols())
    slots_rmsnorm(sum, y, r, x, {}, core, z, b, scale, s, w, eps);
  else
    Backend::combine_slots_rmsnorm(sum, y, r, x, delta, core, z, b, scale, s, w, eps,
                                   room_for_columns);
}

}  // namespace mixlora
