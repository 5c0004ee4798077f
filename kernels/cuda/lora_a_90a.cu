// A's two sums over x, of many ranks, by warpgroups: x is dropped in shared memory on its way to
// the tensor core, so that one mask serves all ranks.
//
// A block of two warpgroups has 128 rows (of d_weight: columns) beside 128 or 256 ranks. Operands
// come in steps of 64 through a ring of four. While the tensor core multiplies a step, the threads
// drop the pieces of x that they fetched themselves for the next.
#include "kernels/cuda/lora_a.cuh"
#include "kernels/cuda/warpgroup.cuh"

namespace mixlora::cuda {
namespace {

constexpr int kGroups = 2, kThreads = kGroups * kGroup, kTile = kDroppedTile,
              kStep = kWarpgroupStep, kStages = 4;
constexpr int kHalf = 64 * kRowBytes;  // bytes of 64 rows of 64 numbers

/// x, then Halves times 128 ranks.
template <int Halves> struct Ring {
  static constexpr int kX = 2 * kHalf, kStage = kX + 2 * Halves * kHalf, kBytes = kStages * kStage;
};
/// Bytes from the start of rows of 64 numbers to piece `unit` of row `row`.
__device__ std::uint32_t place(int row, int unit) {
  return static_cast<std::uint32_t>(row * kRowBytes + 16 * (unit ^ (row % 8)));
}
/// The same in rows of several times 64 numbers, each of these 64 rows together.
__device__ std::uint32_t place_across(int row, int unit) {
  return static_cast<std::uint32_t>(unit / 8 * kHalf) + place(row, unit % 8);
}

/// Steps [begin, end): `fetch(step, stage)` sends what a thread copies on its way, `drop(step,
/// stage)` drops its own pieces, `multiply(stage, add)` begins the products of all threads' pieces.
template <class Fetch, class Drop, class Multiply>
__device__ void walk(int begin, int end, Fetch fetch, Drop drop, Multiply multiply) {
  const auto send = [&](int step) {
    if (step < end) fetch(step, (step - begin) % kStages);
    fetch_commit();
  };
  send(begin);
  send(begin + 1);
  fetch_wait<1>();
  drop(begin, 0);
  for (int step = begin; step < end; ++step) {
    fence_to_engines();
    __syncthreads();
    products_begin();
    multiply((step - begin) % kStages, step > begin);
    products_commit();
    send(step + 2);  // where step - 2 was, which all groups have left
    fetch_wait<1>();
    if (step + 1 < end) drop(step + 1, (step + 1 - begin) % kStages);
    products_wait<1>();
  }
  products_wait<0>();
  fetch_wait<0>();
}

/// grid (rows / 128, splits, ranks / 128 Halves): x~ A^T over a split's columns.
template <int Halves>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_forward_a(const __grid_constant__ DroppedA m) {
  extern __shared__ __align__(1024) std::byte shared[];
  using R = Ring<Halves>;
  const int thread = static_cast<int>(threadIdx.x), group = thread / kGroup;
  const int row0 = static_cast<int>(blockIdx.x) * kTile,
            rank0 = static_cast<int>(blockIdx.z) * 128 * Halves,
            split = static_cast<int>(blockIdx.y), splits = static_cast<int>(gridDim.y);
  const int steps = ceil_div(m.cols, kStep), begin = steps * split / splits,
            end = steps * (split + 1) / splits;
  const std::uint32_t base = shared_address(shared);

  // A thread's pieces: of every 32nd row of x and of A.
  const int line = thread / 8, unit = thread % 8;
  const std::uint32_t own = place(line, unit);  // 32 lines on, the same place in theirs
  constexpr int kApart = 32 * kRowBytes;
  int4 ids[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) ids[i] = m.id(min(row0 + line + 32 * i, m.rows - 1));
  const auto fetch = [&](int step, int stage) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * R::kStage) + own;
    const int col = step * kStep + 8 * unit;
    const bool column = col < m.cols;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = min(row0 + line + 32 * i, m.rows - 1);
      fetch16(at + static_cast<std::uint32_t>(i * kApart),
              column ? m.x + row * m.stride_x + col : m.x, column);
    }
#pragma unroll
    for (int i = 0; i < 4 * Halves; ++i) {
      const int rank = rank0 + line + 32 * i;
      const bool there = column && rank < m.rank;
      fetch16(at + static_cast<std::uint32_t>(R::kX + i * kApart),
              there ? m.weight + static_cast<Index>(rank) * m.cols + col : m.weight, there);
    }
  };
  const auto drop = [&](int step, int stage) {
    std::byte* at = shared + stage * R::kStage + own;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      drop_piece(at + i * kApart, m.bits(ids[i], step * (kStep / 8) + unit), m.threshold);
  };
  float sums[Halves][16][4];
  const auto multiply = [&](int stage, bool add) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * R::kStage);
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k)
#pragma unroll
      for (int h = 0; h < Halves; ++h)
        multiply_shared(sums[h], operand_at(at + group * kHalf + 32 * k, 16),
                        operand_at(at + R::kX + 2 * h * kHalf + 32 * k, 16), add || k > 0);
  };
  walk(begin, end, fetch, drop, multiply);
#pragma unroll
  for (int h = 0; h < Halves; ++h) changed(sums[h]);

  const int lane = thread % kWarp, q = lane % 4,
            first = row0 + 64 * group + thread % kGroup / kWarp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + 8 * i;
    if (row >= m.rows) continue;
    float* to = m.sums + (static_cast<Index>(split) * m.rows + row) * m.rank;
#pragma unroll
    for (int h = 0; h < Halves; ++h)
#pragma unroll
      for (int j = 0; j < 16; ++j)
        if (const int r = rank0 + 128 * h + 8 * j + 2 * q; r < m.rank)
          *reinterpret_cast<float2*>(to + r) =
              make_float2(sums[h][j][2 * i], sums[h][j][2 * i + 1]);
  }
}

/// grid (columns / 128, splits, ranks / 128 Halves): d_a^T x~ over a split's rows.
template <int Halves>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_weight_a(const __grid_constant__ DroppedA m) {
  extern __shared__ __align__(1024) std::byte shared[];
  using R = Ring<Halves>;
  const int thread = static_cast<int>(threadIdx.x), group = thread / kGroup;
  const int col0 = static_cast<int>(blockIdx.x) * kTile,
            rank0 = static_cast<int>(blockIdx.z) * 128 * Halves,
            split = static_cast<int>(blockIdx.y), splits = static_cast<int>(gridDim.y);
  const int steps = ceil_div(m.rows, kStep), begin = steps * split / splits,
            end = steps * (split + 1) / splits;
  const std::uint32_t base = shared_address(shared);

  // A thread's pieces: of every 16th row of x, and of d_a as they come.
  const int line = thread / 16, unit = thread % 16;
  const bool column = col0 + 8 * unit < m.cols;
  const std::uint32_t own = place_across(line, unit);  // 16 rows on, the same place in theirs
  constexpr int kApart = 16 * kRowBytes, kUnits = 16 * Halves;
  const Number* x = m.x + (column ? col0 + 8 * unit : 0);
  // Rows that are not there add nothing.
  const auto fetch = [&](int step, int stage) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * R::kStage);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = step * kStep + line + 16 * i;
      fetch16(at + own + static_cast<std::uint32_t>(i * kApart),
              x + min(row, m.rows - 1) * m.stride_x, column && row < m.rows);
    }
#pragma unroll
    for (int i = 0; i < 4 * Halves; ++i) {
      const int piece = thread + kThreads * i, r = piece / kUnits, u = piece % kUnits,
                row = step * kStep + r;
      const bool there = row < m.rows && rank0 + 8 * u < m.rank;
      fetch16(at + R::kX + place_across(r, u),
              there ? m.d_a + row * m.stride_d_a + rank0 + 8 * u : m.d_a, there);
    }
  };
  unsigned bits[4];  // of the step that drops next
  const int bytes = m.cols / 8;
  const std::uint8_t* masks = m.masks + min(col0 / 8 + unit, bytes - 1);
  const auto take_bits = [&](int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      bits[i] =
          __ldg(masks + static_cast<Index>(min(step * kStep + line + 16 * i, m.rows - 1)) * bytes);
  };
  take_bits(begin);
  const auto drop = [&](int step, int stage) {
    std::byte* at = shared + stage * R::kStage + own;
#pragma unroll
    for (int i = 0; i < 4; ++i) drop_piece(at + i * kApart, bits[i]);
    take_bits(step + 1);
  };
  float sums[Halves][16][4];
  const auto multiply = [&](int stage, bool add) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * R::kStage);
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k)
#pragma unroll
      for (int h = 0; h < Halves; ++h)
        multiply_columns(
            sums[h],
            operand_at(at + R::kX + (Halves * group + h) * kHalf + 16 * k * kRowBytes, kHalf),
            operand_at(at + 16 * k * kRowBytes, kHalf), add || k > 0);
  };
  walk(begin, end, fetch, drop, multiply);
#pragma unroll
  for (int h = 0; h < Halves; ++h) changed(sums[h]);

  const int lane = thread % kWarp, q = lane % 4;
#pragma unroll
  for (int h = 0; h < Halves; ++h)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r =
          rank0 + 64 * (Halves * group + h) + thread % kGroup / kWarp * 16 + lane / 4 + 8 * i;
      if (r >= m.rank) continue;
      float* to = m.sums + (static_cast<Index>(split) * m.rank + r) * m.cols;
#pragma unroll
      for (int j = 0; j < 16; ++j)
        if (const int col = col0 + 8 * j + 2 * q; col < m.cols)
          *reinterpret_cast<float2*>(to + col) =
              make_float2(sums[h][j][2 * i], sums[h][j][2 * i + 1]);
    }
}

template <int Halves>
void launch(void (*kernel)(DroppedA), const DroppedA& m, int blocks, int splits,
            cudaStream_t stream, const char* name) {
  admit_shared(reinterpret_cast<const void*>(kernel), Ring<Halves>::kBytes);
  kernel<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits),
                static_cast<unsigned>(ceil_div(m.rank, 128 * Halves))),
           kThreads, Ring<Halves>::kBytes, stream>>>(m);
  launched(name);
}

}  // namespace

void warpgroup_forward(const DroppedA& m, int splits, cudaStream_t stream) {
  const int blocks = ceil_div(m.rows, kTile);
  if (m.rank > 128)
    launch<2>(warpgroup_forward_a<2>, m, blocks, splits, stream, "lora_a");
  else
    launch<1>(warpgroup_forward_a<1>, m, blocks, splits, stream, "lora_a");
}
void warpgroup_weight(const DroppedA& m, int splits, cudaStream_t stream) {
  const int blocks = ceil_div(m.cols, kTile);
  if (m.rank > 128)
    launch<2>(warpgroup_weight_a<2>, m, blocks, splits, stream, "lora_a_backward");
  else
    launch<1>(warpgroup_weight_a<1>, m, blocks, splits, stream, "lora_a_backward");
}

}  // namespace mixlora::cuda
