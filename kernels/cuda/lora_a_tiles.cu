// A's gradients by tiles of 128 columns on the tensor cores: d_weight of a few ranks, d_x of any.
//
// Operands come in steps of 32 through a ring of four. In few_weight_kernel a thread drops the
// pieces of x that it fetched itself, while the step before them is multiplied.
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

/// Where piece `unit` (eight numbers) of a row of 32 numbers lies: eight neighbouring rows' pieces
/// of one unit are in different banks.
__device__ std::uint32_t narrow_place(int row, int unit) {
  return static_cast<std::uint32_t>(row * 64 + 16 * (unit ^ (row / 2 % 4)));
}
/// The same for the rows that input_kernel meets together: 8 i and 8 i + 1, i up to 3.
__device__ std::uint32_t spread_place(int row, int unit) {
  return static_cast<std::uint32_t>(row * 64 + 16 * (unit ^ (row / 8 % 4)));
}
/// The same of a row of Columns numbers.
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

constexpr int kInputStage = 2 * kTile * kStep * 2;  // d_a's rows, A's columns
constexpr int kInputBytes = kStages * kInputStage + 8 * kThreads * 16;
/// Two numbers as two bf16 each: the nearest, and what is left.
__device__ uint2 in_two(float x, float y) {
  const unsigned near = cuda::pack2(x, y);
  return make_uint2(near, cuda::pack2(x - cuda::low(near), y - cuda::high(near)));
}

/// grid (columns / 128, rows / 128): d_x += keep mask (d_a A), and d_logits Wg with a router.
/// Warps, two rows of four: 64 rows by 32 columns each; of these a lane has the eight neighbouring
/// ones 8 q .. 8 q + 7, whose old numbers come first.
template <bool WithRouter>
__global__ void __launch_bounds__(kThreads, 2)
    input_kernel(const DroppedA m, const Number* turned, float keep, const cuda::Routed router) {
  extern __shared__ __align__(128) std::byte memory[];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp,
            g = lane / 4, q = lane % 4;
  const int col0 = static_cast<int>(blockIdx.x) * kTile,
            row0 = static_cast<int>(blockIdx.y) * kTile;
  const int across = warp % 4, down = warp / 4;
  const std::uint32_t base = cuda::shared_address(memory);

  const int col = col0 + 32 * across + 8 * q, first = row0 + 64 * down + g;
  const auto live = [&](int i) { return first + 8 * i < m.rows && col < m.cols; };
  std::byte* old = memory + kStages * kInputStage + 16 * thread;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    cuda::fetch16(cuda::shared_address(old + i * kThreads * 16),
                  live(i) ? m.d_x + (first + 8 * i) * m.stride_d_x + col : m.d_x, live(i));

  unsigned bits[2] = {};  // of the lane's eight rows, a byte each
#pragma unroll
  for (int i = 0; i < 8; ++i)
    bits[i / 4] |=
        __ldg(m.masks + static_cast<Index>(min(first + 8 * i, m.rows - 1)) * (m.cols / 8) +
              min(col, m.cols - 8) / 8)
        << (8 * (i % 4));

  const int line = thread / 4, unit = thread % 4;
  const auto fetch = [&](int step, int stage) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * kInputStage);
    const int r = step * kStep + 8 * unit;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(row0 + line + 64 * h, m.rows - 1), c = col0 + line + 64 * h;
      const bool there = r < m.rank, both = there && c < m.cols;
      cuda::fetch16(at + narrow_place(line + 64 * h, unit),
                    there ? m.d_a + row * m.stride_d_a + r : m.d_a, there);
      cuda::fetch16(at + kTile * kStep * 2 + spread_place(line + 64 * h, unit),
                    both ? turned + static_cast<Index>(c) * m.rank + r : turned, both);
    }
  };
  // Tile j of a lane's 32 columns has column 8 q + 2 j + i as its column 2 q + i.
  const int n = lane % 8, a_row = 64 * down + lane % 16,
            b_row = 32 * across + n / 2 * 8 + lane / 16 * 2 + n % 2;
  float sums[4][4][4] = {};
  const auto multiply = [&](int stage) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * kInputStage);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      unsigned b[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        cuda::read_matrices(
            b[j], at + kTile * kStep * 2 + spread_place(b_row + 4 * j, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned a[4];
        cuda::read_matrices(a, at + narrow_place(a_row + 16 * i, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < 4; ++j)
          cuda::mma(sums[i][j], a[0], a[1], a[2], a[3], b[j / 2][2 * (j % 2)],
                    b[j / 2][2 * (j % 2) + 1]);
      }
    }
  };
  walk(
      0, ceil_div(m.rank, kStep), fetch, [](int, int) {}, multiply);

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    unsigned mask[4];
    cuda::spread_bits(mask, bits[i / 4] >> (8 * (i % 4)));
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = sums[i / 2][j][2 * (i % 2) + e];
        const unsigned own = cuda::permuted(mask[j], e == 0 ? 0x1010 : 0x3232);
        x = keep * __uint_as_float(__float_as_uint(x) & own);
      }
  }
  // Eight experts: the inner dimension's lower half their near numbers, its upper half the rest.
  if constexpr (WithRouter) {
    uint2 w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = col0 + 32 * across + g / 2 * 8 + 2 * j + g % 2;
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e)
        pair[e] = c < m.cols && 2 * q + e < router.experts
                      ? router.wg[(2 * q + e) * router.stride_wg + c]
                      : 0.0F;
      w[j] = in_two(pair[0], pair[1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint2 d[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first + 16 * i + 8 * h;
        const auto of = [&](int e) {
          return row < m.rows && e < router.experts
                     ? router.d_logits[row * router.stride_d_logits + e]
                     : 0.0F;
        };
        d[h] = in_two(of(2 * q), of(2 * q + 1));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        cuda::mma(sums[i][j], d[0].x, d[1].x, d[0].y, d[1].y, w[j].x, w[j].x);
        cuda::mma(sums[i][j], d[0].x, d[1].x, 0, 0, w[j].y, 0);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!live(i)) continue;
    const uint4 raw = *reinterpret_cast<const uint4*>(old + i * kThreads * 16);
    unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      words[j] = cuda::pack2(cuda::low(words[j]) + sums[i / 2][j][2 * (i % 2)],
                             cuda::high(words[j]) + sums[i / 2][j][2 * (i % 2) + 1]);
    cuda::write4(m.d_x + (first + 8 * i) * m.stride_d_x + col, words);
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
  for (int k = 0; k < 4; ++k) {
    const Philox4 bits = m.bits(id, 4 * word + k);
#pragma unroll
    for (int c = 0; c < 8; ++c) own |= cuda::kept(bits, c, m.threshold) ? 1U << (8 * k + c) : 0U;
  }
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
void input_backward(const DroppedA& m, const Number* turned, float keep, const Routed& router,
                    cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(m.cols, kTile)),
                  static_cast<unsigned>(ceil_div(m.rows, kTile)));
  launch(router.wg != nullptr ? input_kernel<true> : input_kernel<false>, kInputBytes, grid, stream,
         "lora_a_backward", m, turned, keep, router);
}

}  // namespace cuda
}  // namespace mixlora
