// d_weight of a few ranks by tiles of 128 columns on the tensor cores, and masks as bits.
//
// Operands come in steps of 32 through a ring of four. A thread drops the pieces of x that it
// fetched itself, while the step before them is multiplied.
#include <algorithm>

#include "kernels/cuda/lora_a.cuh"
#include "kernels/cuda/low_rank.cuh"

namespace mixlora {
namespace {

using cuda::ceil_div;
using cuda::DroppedA;
using cuda::Index;
using cuda::kWarp;
using cuda::Number;

constexpr int kThreads = 256, kTile = cuda::kDroppedTile, kStep = cuda::kFewStep, kStages = 4;

/// Where piece `unit` (eight numbers) of a row of Columns numbers lies: eight neighbouring rows'
/// pieces of one unit are in different banks.
template <int Columns> __device__ std::uint32_t place(int row, int unit) {
  return static_cast<std::uint32_t>(row * Columns * 2 + 16 * (unit ^ (row % 8)));
}

/// The ring: steps [begin, end), `fetch(step, stage)` sends what a thread copies on its way,
/// `drop(step, stage)` drops its own pieces, `multiply(stage)` sees all threads' pieces.
template <class Fetch, class Drop, class Multiply>
__device__ void walk(int begin, int end, Fetch fetch, Drop drop, Multiply multiply) {
  const auto send = [&](int step) {
    if (step < end) fetch(step, (step - begin) % kStages);
    cuda::fetch_commit();
  };
  for (int i = 0; i + 1 < kStages; ++i) send(begin + i);
  cuda::fetch_wait<kStages - 2>();
  if (begin < end) drop(begin, 0);
  for (int step = begin; step < end; ++step) {
    cuda::fetch_wait<kStages - 3>();
    __syncthreads();
    send(step + kStages - 1);
    if (step + 1 < end) drop(step + 1, (step + 1 - begin) % kStages);
    multiply((step - begin) % kStages);
  }
  cuda::fetch_wait<0>();
}

/// A few ranks, C sixteens: eight warps with 16 columns each, beside all ranks.
template <int C> struct Few {
  static constexpr int kX = kStep * kTile * 2, kStage = kX + kStep * C * 32;
  /// Where sixteen bytes of a row of 16 C ranks lie, as `place`.
  static __device__ std::uint32_t place(int row, int unit) {
    const int turn = C == 4 ? row % 8 : C == 2 ? row / 2 % 4 : row / 4 % 2;
    return static_cast<std::uint32_t>(row * C * 32 + 16 * (unit ^ turn));
  }
};
/// grid (columns / 128, splits): d_a^T x~ over a split's rows.
template <int C>
__global__ void __launch_bounds__(kThreads, cuda::kFewTogether)
    few_weight_kernel(const DroppedA m) {
  extern __shared__ __align__(128) std::byte memory[];
  using F = Few<C>;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int col0 = static_cast<int>(blockIdx.x) * kTile, split = static_cast<int>(blockIdx.y),
            splits = static_cast<int>(gridDim.y);
  const int steps = ceil_div(m.rows, kStep), begin = steps * split / splits,
            end = steps * (split + 1) / splits;
  const std::uint32_t base = cuda::shared_address(memory);

  // A thread's pieces: of rows `line` and `line` + 16 of x, and of one row of d_a.
  const int line = thread / 16, unit = thread % 16;
  const bool column = col0 + 8 * unit < m.cols;
  const int col = column ? col0 + 8 * unit : 0;
  const std::uint32_t own = place<kTile>(line, unit);  // 16 rows on, the same place in theirs
  const int d_line = thread / (2 * C), d_unit = thread % (2 * C);
  // Rows that are not there add nothing.
  const auto fetch = [&](int step, int stage) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * F::kStage);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = step * kStep + line + 16 * h;
      cuda::fetch16(at + own + static_cast<std::uint32_t>(h * 16 * kTile * 2),
                    m.x + min(row, m.rows - 1) * m.stride_x + col, column && row < m.rows);
    }
    if (d_line < kStep) {
      const int row = step * kStep + d_line;
      const bool there = row < m.rows && 8 * d_unit < m.rank;
      cuda::fetch16(at + F::kX + F::place(d_line, d_unit),
                    there ? m.d_a + row * m.stride_d_a + 8 * d_unit : m.d_a, there);
    }
  };
  int4 ids[2];  // of the step that drops next
  const auto take_rows = [&](int step) {
#pragma unroll
    for (int h = 0; h < 2; ++h) ids[h] = m.id(min(step * kStep + line + 16 * h, m.rows - 1));
  };
  take_rows(begin);
  const auto drop = [&](int step, int stage) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      cuda::drop_piece(memory + stage * F::kStage + own + h * 16 * kTile * 2,
                       m.bits(ids[h], col0 / 8 + unit), m.threshold);
    take_rows(step + 1);
  };

  const int a_row = lane % 8 + lane / 16 * 8, b_row = lane % 16;
  float sums[C][2][4] = {};
  const auto multiply = [&](int stage) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * F::kStage);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      unsigned b[4];
      cuda::read_matrices_trans(b, at + place<kTile>(16 * k + b_row, 2 * warp + lane / 16));
#pragma unroll
      for (int c = 0; c < C; ++c) {
        unsigned a[4];
        cuda::read_matrices_trans(a, at + F::kX + F::place(16 * k + a_row, 2 * c + lane / 8 % 2));
        cuda::mma(sums[c][0], a[0], a[1], a[2], a[3], b[0], b[1]);
        cuda::mma(sums[c][1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
  };
  walk(begin, end, fetch, drop, multiply);

  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int rank = 16 * c + g + 8 * h;
      if (rank >= m.rank) continue;
      float* to = m.sums + (static_cast<Index>(split) * m.rank + rank) * m.cols;
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (const int own_col = col0 + 16 * warp + 8 * j + 2 * q; own_col < m.cols)
          *reinterpret_cast<float2*>(to + own_col) =
              make_float2(sums[c][j][2 * h], sums[c][j][2 * h + 1]);
    }
}

/// grid (words / 256): four calls of Philox a word of 32 columns.
__global__ void masks_kernel(const DroppedA m) {
  const int words = m.cols / 32;
  const Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x, row = i / words;
  if (row >= m.rows) return;
  const int word = static_cast<int>(i % words);
  const int4 id = m.id(row);
  unsigned own = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    own |= cuda::kept_bits(m.bits(id, 4 * word + k), m.threshold) << (8 * k);
  reinterpret_cast<unsigned*>(m.masks)[i] = own;
}

template <class Kernel, class... Arguments>
void launch(Kernel* kernel, int bytes, dim3 grid, cudaStream_t stream, const char* name,
            const Arguments&... arguments) {
  cuda::admit_shared(reinterpret_cast<const void*>(kernel), bytes);
  kernel<<<grid, kThreads, static_cast<std::size_t>(bytes), stream>>>(arguments...);
  cuda::launched(name);
}

}  // namespace

namespace cuda {

void few_ranks_weight(const DroppedA& m, int splits, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(m.cols, kTile)), static_cast<unsigned>(splits));
  with_rank_chunks(m.rank, [&](auto chunks) {
    constexpr int kBytes = kStages * Few<chunks()>::kStage;
    launch(few_weight_kernel<chunks()>, kBytes, grid, stream, "lora_a_backward", m);
  });
}
void draw_masks(const DroppedA& m, cudaStream_t stream) {
  const auto words = static_cast<Index>(m.rows) * (m.cols / 32);
  launch(masks_kernel, 0, static_cast<unsigned>(ceil_div<Index>(words, kThreads)), stream, "lora_a",
         m);
}

}  // namespace cuda
}  // namespace mixlora
