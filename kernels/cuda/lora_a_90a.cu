// A of many ranks by warpgroups: x is dropped in shared memory on its way to the tensor core, so
// that one mask serves all ranks, and what a router has to do with x is done on the way.
//
// Two warpgroups multiply, a third has the copy engine fetch and gives its registers. A block of
// the two sums over x has 128 rows (of d_weight: columns) of x beside 128 or 256 ranks, 64 of them
// a warpgroup. Operands come in steps of 64 through a ring; while the tensor core multiplies a
// step, each warp draws and drops its own sixteen rows (columns) of the next. Sums are left in
// parts, as lora_a.cuh says.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/lora_a.cuh"
#include "kernels/cuda/warpgroup.cuh"

namespace mixlora::cuda {
namespace {

constexpr int kGroups = 2, kUsers = kGroups * kGroup, kUserWarps = kUsers / kWarp,
              kThreads = kUsers + kGroup;
constexpr int kFetchRegisters = 40, kUserRegisters = 232;
constexpr int kTile = kDroppedTile, kStep = kWarpgroupStep, kStages = 4;
constexpr int kBox = kBoxRows * kRowBytes;
/// Floats from one expert's 64 numbers of Wg to the next's: eight experts in different banks.
constexpr int kExpertStride = kStep + 8;

/// A step's x: two boxes, the groups'; the ranks beside it, 64 a box; what a router has.
template <int Halves> struct Ring {
  static constexpr int kRanks = 2 * kBox, kRouter = kRanks + 2 * Halves * kBox,
                       kStage = kRouter + 3 * 1024, kBarriers = kStages * kStage,
                       kBytes = kBarriers + 2 * kStages * static_cast<int>(sizeof(Barrier));
  static_assert(kRoutedExperts * kExpertStride * 4 <= 3 * 1024);
};
/// Bytes from the start of a box to piece `unit` of row `row`.
__device__ std::uint32_t place(int row, int unit) {
  return static_cast<std::uint32_t>(row * kRowBytes + 16 * (unit ^ (row % 8)));
}

struct Barriers {
  Barrier full[kStages], free[kStages];
};
__device__ void set_up(Barriers& b) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&b.full[i], 1);
      barrier_init(&b.free[i], kUserWarps);
    }
    barriers_ready();
  }
  __syncthreads();
}
__device__ void meet_users() {
  asm volatile("bar.sync %0, %1;" ::"n"(kGroups + 1), "n"(kUsers) : "memory");
}
__device__ void warp_arrives(Barrier* b) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) arrive(b);
}

/// What the fetching thread does: `fetch(step, stage, full)` announces and sends a step.
template <class Fetch> __device__ void send_steps(Barriers& b, int begin, int end, Fetch fetch) {
  Turn<kStages> turn;
  for (int step = begin; step < end; ++step, turn.next()) {
    wait(&b.free[turn.stage], turn.parity ^ 1);
    fetch(step, turn.stage, &b.full[turn.stage]);
  }
}
/// What a group does: `draw(step)` needs nothing of the ring, `drop(step, stage)` drops what is the
/// warp's, `multiply(stage, add)` begins the group's products.
template <class Draw, class Drop, class Multiply>
__device__ void use_steps(Barriers& b, int group, int begin, int end, Draw draw, Drop drop,
                          Multiply multiply) {
  Turn<kStages> turn;  // of the step that is dropped next
  const auto take = [&](int step) {
    wait(&b.full[turn.stage], turn.parity);
    drop(step, turn.stage);
  };
  draw(begin);
  take(begin);
  int before = 0;
  for (int step = begin; step < end; ++step) {
    const int stage = turn.stage;
    fence_to_engines();
    meet_group(1 + group);
    products_begin();
    multiply(stage, step > begin);
    products_commit();
    turn.next();
    if (step + 1 < end) draw(step + 1);
    products_wait<1>();
    if (step > begin) warp_arrives(&b.free[before]);
    before = stage;
    if (step + 1 < end) take(step + 1);
  }
  products_wait<0>();
}

// ---- x A^T ---------------------------------------------------------------------------------

/// A float as three bf16 that sum to it.
struct InThree {
  unsigned near, next, last;
  __device__ explicit InThree(float2 x) {
    near = pack2(x.x, x.y);
    x.x -= low(near), x.y -= high(near);
    next = pack2(x.x, x.y);
    last = pack2(x.x - low(next), x.y - high(next));
  }
};

/// grid (rows / 128, splits, ranks / 128 Halves): x~ A^T and x Wg^T over a split's columns.
template <int Halves, bool Drops>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_forward_a(const __grid_constant__ CUtensorMap x,
                        const __grid_constant__ CUtensorMap weight,
                        const __grid_constant__ DroppedA m, const __grid_constant__ Routed router) {
  extern __shared__ __align__(1024) std::byte shared[];
  using R = Ring<Halves>;
  constexpr int kRanks = 128 * Halves;
  auto& barriers = *reinterpret_cast<Barriers*>(shared + R::kBarriers);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp,
            group = thread / kGroup, g = lane / 4, q = lane % 4;
  const int row0 = static_cast<int>(blockIdx.x) * kTile,
            rank0 = static_cast<int>(blockIdx.z) * kRanks, split = static_cast<int>(blockIdx.y),
            splits = static_cast<int>(gridDim.y);
  const int steps = ceil_div(m.cols, kStep), begin = steps * split / splits,
            end = steps * (split + 1) / splits;
  const std::uint32_t base = shared_address(shared);
  const bool routed = router.logits != nullptr && blockIdx.z == 0;
  set_up(barriers);

  if (group == kGroups) {
    give_registers<kFetchRegisters>();
    if (thread == kUsers)
      send_steps(barriers, begin, end, [&](int step, int stage, Barrier* full) {
        const std::uint32_t at = base + static_cast<std::uint32_t>(stage * R::kStage);
        const int col = step * kStep, bytes = min(kStep, m.cols - col) * 4;
        arrive_expecting(full, R::kRouter + (routed ? router.experts * bytes : 0));
#pragma unroll
        for (int i = 0; i < kGroups; ++i) fetch_box(at + i * kBox, x, col, row0 + 64 * i, full);
#pragma unroll
        for (int i = 0; i < 2 * Halves; ++i)
          fetch_box(at + R::kRanks + i * kBox, weight, col, rank0 + 64 * i, full);
        if (routed)
          for (int e = 0; e < router.experts; ++e)
            fetch_bytes(at + R::kRouter + e * kExpertStride * 4,
                        router.wg + e * router.stride_wg + col, bytes, full);
      });
    return;
  }
  take_registers<kUserRegisters>();

  float sums[Halves][16][4];
  float logits[4] = {};  // rows g, g + 8 of the warp's, experts 2 q, 2 q + 1
  // A lane's pieces: unit lane % 8 of every fourth row of the warp's.
  const int first = warp % 4 * 16, line = lane / 8, unit = lane % 8;
  int4 ids[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    ids[i] = m.id(min(row0 + 64 * group + first + 4 * i + line, m.rows - 1));
  unsigned bits = 0;  // of the pieces, a byte each
  const auto draw = [&](int step) {
    bits = 0;
    if constexpr (Drops)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        bits |= kept_bits(m.bits(ids[i], step * (kStep / 8) + unit), m.threshold) << (8 * i);
  };
  const auto route = [&](int step, int stage) {
    const std::uint32_t box = base + static_cast<std::uint32_t>(stage * R::kStage + group * kBox);
    const auto* wg = reinterpret_cast<const float*>(shared + stage * R::kStage + R::kRouter) +
                     g * kExpertStride + 2 * q;
    float part[3][4] = {};
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      if (step * kStep + 16 * k >= m.cols) break;
      unsigned a[4];
      read_matrices(a, box + place(first + lane % 16, 2 * k + lane / 16));
      const InThree left(*reinterpret_cast<const float2*>(wg + 16 * k)),
          right(*reinterpret_cast<const float2*>(wg + 16 * k + 8));
      mma(part[0], a[0], a[1], a[2], a[3], left.near, right.near);
      mma(part[1], a[0], a[1], a[2], a[3], left.next, right.next);
      mma(part[2], a[0], a[1], a[2], a[3], left.last, right.last);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[i] += part[0][i] + (part[1][i] + part[2][i]);
    __syncwarp();
  };
  const auto drop = [&](int step, int stage) {
    if (routed) route(step, stage);
    std::byte* box = shared + stage * R::kStage + group * kBox;
    if constexpr (Drops)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        drop_piece(box + place(first + 4 * i + line, unit), bits >> (8 * i) & 255);
  };
  const auto multiply = [&](int stage, bool add) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * R::kStage);
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k)
#pragma unroll
      for (int h = 0; h < Halves; ++h)
        multiply_shared(sums[h], operand_at(at + group * kBox + 32 * k, 16),
                        operand_at(at + R::kRanks + 2 * h * kBox + 32 * k, 16), add || k > 0);
  };
  use_steps(barriers, group, begin, end, draw, drop, multiply);
#pragma unroll
  for (int h = 0; h < Halves; ++h) changed(sums[h]);

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row0 + 16 * warp + g + 8 * i;
    if (row >= m.rows) continue;
    float* own =
        m.sums + (static_cast<Index>(split) * m.rows + row) * (m.rank + router.more_forward());
#pragma unroll
    for (int h = 0; h < Halves; ++h)
#pragma unroll
      for (int j = 0; j < 16; ++j)
        if (const int r = rank0 + 128 * h + 8 * j + 2 * q; r < m.rank)
          *reinterpret_cast<float2*>(own + r) =
              make_float2(sums[h][j][2 * i], sums[h][j][2 * i + 1]);
    if (routed)
      *reinterpret_cast<float2*>(own + m.rank + 2 * q) =
          make_float2(logits[2 * i], logits[2 * i + 1]);
  }
}

// ---- d_a^T x -------------------------------------------------------------------------------

/// grid (columns / 128, splits, ranks / 128 Halves): d_a^T x~ and d_logits^T x over a split's rows.
template <int Halves>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_weight_a(const __grid_constant__ CUtensorMap x,
                       const __grid_constant__ CUtensorMap d_a, const __grid_constant__ DroppedA m,
                       const __grid_constant__ Routed router) {
  extern __shared__ __align__(1024) std::byte shared[];
  using R = Ring<Halves>;
  constexpr int kRanks = 128 * Halves;
  auto& barriers = *reinterpret_cast<Barriers*>(shared + R::kBarriers);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp,
            group = thread / kGroup, g = lane / 4, q = lane % 4;
  const int col0 = static_cast<int>(blockIdx.x) * kTile,
            rank0 = static_cast<int>(blockIdx.z) * kRanks, split = static_cast<int>(blockIdx.y),
            splits = static_cast<int>(gridDim.y);
  const int steps = ceil_div(m.rows, kStep), begin = steps * split / splits,
            end = steps * (split + 1) / splits;
  const std::uint32_t base = shared_address(shared);
  const bool routed = router.d_wg != nullptr && blockIdx.z == 0;
  set_up(barriers);

  if (group == kGroups) {
    give_registers<kFetchRegisters>();
    if (thread == kUsers)
      send_steps(barriers, begin, end, [&](int step, int stage, Barrier* full) {
        const std::uint32_t at = base + static_cast<std::uint32_t>(stage * R::kStage);
        const int row = step * kStep, bytes = min(kStep, m.rows - row) * router.experts * 4;
        arrive_expecting(full, R::kRouter + (routed ? bytes : 0));
#pragma unroll
        for (int i = 0; i < kGroups; ++i) fetch_box(at + i * kBox, x, col0 + 64 * i, row, full);
#pragma unroll
        for (int i = 0; i < 2 * Halves; ++i)
          fetch_box(at + R::kRanks + i * kBox, d_a, rank0 + 64 * i, row, full);
        if (routed)
          fetch_bytes(at + R::kRouter, router.d_logits + static_cast<Index>(row) * router.experts,
                      bytes, full);
      });
    return;
  }
  take_registers<kUserRegisters>();

  float sums[Halves][16][4];
  float d_wg[2][4] = {};  // the warp's sixteen columns by eights: near and left of expert g
  // A lane's pieces: one unit of every sixteenth row.
  const int line = lane % 16, unit = warp % 4 * 2 + lane / 16,
            own_col = min(col0 + 64 * group + 8 * unit, m.cols - 8);
  const bool normed = m.norm_r != nullptr;
  Eight w = {};
  if (normed) w = load8(m.norm_w + own_col);
  unsigned bits[4], next_bits[4];  // of the step that drops next, and of the one behind it
  float r[4] = {}, next_r[4] = {};
  const auto load = [&](int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = min(step * kStep + 16 * i + line, m.rows - 1);
      next_bits[i] = __ldg(m.masks + static_cast<Index>(row) * (m.cols / 8) + own_col / 8);
      if (normed) next_r[i] = __ldg(m.norm_r + row);
    }
  };
  load(begin);
  const auto draw = [&](int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = next_bits[i], r[i] = next_r[i];
    load(step + 1);
  };
  const auto route = [&](int step, int stage) {
    __syncwarp();
    const std::uint32_t box = base + static_cast<std::uint32_t>(stage * R::kStage + group * kBox);
    const auto* d = reinterpret_cast<const float*>(shared + stage * R::kStage + R::kRouter);
    const int left = m.rows - step * kStep;
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      const auto of = [&](int row) {
        return row < left && g < router.experts ? d[row * router.experts + g] : 0.0F;
      };
      const int at = 16 * k + 2 * q;
      const uint2 a = in_two(of(at), of(at + 1)), b = in_two(of(at + 8), of(at + 9));
      unsigned y[4];
      read_matrices_trans(y, box + place(16 * k + lane % 16, warp % 4 * 2 + lane / 16));
      mma(d_wg[0], a.x, a.y, b.x, b.y, y[0], y[1]);
      mma(d_wg[1], a.x, a.y, b.x, b.y, y[2], y[3]);
    }
    __syncwarp();
  };
  const auto drop = [&](int step, int stage) {
    std::byte* own = shared + stage * R::kStage + group * kBox + place(line, unit);
    if (normed) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        auto* piece = reinterpret_cast<uint4*>(own + 16 * i * kRowBytes);
        const uint4 raw = *piece;
        unsigned y[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int k = 0; k < 4; ++k)
          y[k] = pack2(low(y[k]) * (r[i] * w.v[2 * k]), high(y[k]) * (r[i] * w.v[2 * k + 1]));
        *piece = make_uint4(y[0], y[1], y[2], y[3]);
      }
    }
    if (routed) route(step, stage);
#pragma unroll
    for (int i = 0; i < 4; ++i) drop_piece(own + 16 * i * kRowBytes, bits[i]);
  };
  const auto multiply = [&](int stage, bool add) {
    const std::uint32_t at = base + static_cast<std::uint32_t>(stage * R::kStage);
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k)
#pragma unroll
      for (int h = 0; h < Halves; ++h)
        multiply_columns(sums[h], operand_at(at + group * kBox + 16 * k * kRowBytes, kBox),
                         operand_at(at + R::kRanks + 2 * h * kBox + 16 * k * kRowBytes, kBox),
                         add || k > 0);
  };
  use_steps(barriers, group, begin, end, draw, drop, multiply);
#pragma unroll
  for (int h = 0; h < Halves; ++h) changed(sums[h]);

  // All sums into shared memory, turned over, where the ring was.
  constexpr int kStride = kTile + 4;
  static_assert((kRanks + kRoutedExperts) * kStride * 4 <= R::kBarriers);
  auto* numbers = reinterpret_cast<float*>(shared);
  float* routes = numbers + kRanks * kStride;
  meet_users();
#pragma unroll
  for (int h = 0; h < Halves; ++h)
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        numbers[(128 * h + 8 * j + 2 * q + c % 2) * kStride + 16 * warp + g + c / 2 * 8] =
            sums[h][j][c];
#pragma unroll
  for (int j = 0; j < 2; ++j)
    *reinterpret_cast<float2*>(routes + g * kStride + 16 * warp + 8 * j + 2 * q) =
        make_float2(d_wg[j][0] + d_wg[j][2], d_wg[j][1] + d_wg[j][3]);
  meet_users();
  const int own = thread % kWarp * 4, col = col0 + own;
  if (col >= m.cols) return;
  float* to = m.sums + static_cast<Index>(split) * (m.rank + router.more()) * m.cols + col;
  const auto write = [&](int r, const float* from) {
    *reinterpret_cast<float4*>(to + static_cast<Index>(r) * m.cols) =
        *reinterpret_cast<const float4*>(from + own);
  };
#pragma unroll 4
  for (int r = warp; r < kRanks; r += kUserWarps)
    if (rank0 + r < m.rank) write(rank0 + r, numbers + r * kStride);
  if (routed && warp < router.experts) write(m.rank + warp, routes + warp * kStride);
}

// ---- d_a A ---------------------------------------------------------------------------------

/// Bytes from one pair of experts' columns of Wg to the next's: 64 bits of each of 1024 columns.
constexpr int kPairStride = 8 * kMostInputColumns + 64;

struct InputBarriers {
  Barrier factor[3], factor_free[3], old[8], old_free[8];
};
/// A's columns of some steps, then tiles, the groups' boxes each: of d_x, or with a norm of d_y, x
/// and d_x.
template <int Halves, bool Norm> struct InputRoom {
  static constexpr int kFactorStages = Norm ? 2 : 3, kTiles = Norm ? 8 : 5, kOfStep = Norm ? 3 : 1;
  static constexpr int kFactor = 2 * Halves * kBox, kOld = kFactorStages * kFactor,
                       kRouter = kOld + kTiles * kGroups * kBox,
                       kBarriers = kRouter + 4 * kPairStride,
                       kBytes = kBarriers + static_cast<int>(sizeof(InputBarriers));
};

/// grid (rows / 128, splits): d_x += keep mask (d_a A), and d_logits Wg with a router, 64 columns a
/// step. d_a stays in registers; d_x's numbers come and go by the copy engine. Norm: the sum, of
/// d_y, goes through the norm on its way into d_x.
template <int Halves, bool Norm>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_input_a(const __grid_constant__ CUtensorMap weight,
                      const __grid_constant__ CUtensorMap d_x,
                      const __grid_constant__ CUtensorMap d_y,
                      const __grid_constant__ CUtensorMap x, const __grid_constant__ DroppedA m,
                      const __grid_constant__ Routed router,
                      const __grid_constant__ ThroughNorm norm, float keep) {
  extern __shared__ __align__(1024) std::byte shared[];
  using R = InputRoom<Halves, Norm>;
  auto& b = *reinterpret_cast<InputBarriers*>(shared + R::kBarriers);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp,
            group = thread / kGroup, g = lane / 4, q = lane % 4;
  const int row0 = static_cast<int>(blockIdx.x) * kTile, split = static_cast<int>(blockIdx.y),
            splits = static_cast<int>(gridDim.y);
  const int steps = ceil_div(m.cols, kStep), begin = steps * split / splits,
            end = steps * (split + 1) / splits;
  const std::uint32_t base = shared_address(shared);
  if (thread == 0) {
    for (int i = 0; i < R::kFactorStages; ++i) {
      barrier_init(&b.factor[i], 1);
      barrier_init(&b.factor_free[i], kUserWarps);
    }
    for (int i = 0; i < R::kTiles; ++i) {
      barrier_init(&b.old[i], 1);
      barrier_init(&b.old_free[i], kGroups);
    }
    barriers_ready();
  }
  __syncthreads();

  if (group == kGroups) {
    give_registers<kFetchRegisters>();
    if (thread != kUsers) return;
    Turn<R::kFactorStages> factor;
    Turn<R::kTiles> old;
    for (int step = begin; step < end; ++step, factor.next()) {
      const int col = step * kStep;
      const auto fetch = [&](const CUtensorMap& from) {
        wait(&b.old_free[old.stage], old.parity ^ 1);
        arrive_expecting(&b.old[old.stage], kGroups * kBox);
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
          fetch_box(base + R::kOld + (old.stage * kGroups + i) * kBox, from, col, row0 + 64 * i,
                    &b.old[old.stage]);
        old.next();
      };
      if constexpr (Norm) {
        fetch(d_y);
        fetch(x);
      }
      fetch(d_x);
      wait(&b.factor_free[factor.stage], factor.parity ^ 1);
      arrive_expecting(&b.factor[factor.stage], R::kFactor);
#pragma unroll
      for (int i = 0; i < 2 * Halves; ++i)
        fetch_box(base + factor.stage * R::kFactor + i * kBox, weight, col, 64 * i,
                  &b.factor[factor.stage]);
    }
    return;
  }

  take_registers<kUserRegisters>();
  int rows[2];  // that the lane has, or others that are there
#pragma unroll
  for (int h = 0; h < 2; ++h) rows[h] = min(row0 + 16 * warp + g + 8 * h, m.rows - 1);
  unsigned d_a[8 * Halves][4];
#pragma unroll
  for (int k = 0; k < 8 * Halves; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 16 * k + i / 2 * 8 + 2 * q;
      d_a[k][i] = r < m.rank ? load_pair(m.d_a + rows[i % 2] * m.stride_d_a + r) : 0;
    }
  const bool routed = router.d_logits != nullptr;
  if (routed) {
    const int columns = (end - begin) * kStep;
#pragma unroll 8
    for (int i = thread; i < 4 * columns; i += kUsers) {
      const int pair = i / columns, c = i % columns, col = begin * kStep + c;
      float two[2];
#pragma unroll
      for (int e = 0; e < 2; ++e)
        two[e] = col < m.cols && 2 * pair + e < router.experts
                     ? __ldg(router.wg + (2 * pair + e) * router.stride_wg + col)
                     : 0.0F;
      *reinterpret_cast<uint2*>(shared + R::kRouter + pair * kPairStride + 8 * c) =
          in_two(two[0], two[1]);
    }
  }
  uint2 d_logits[2] = {};
  if (routed)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto of = [&](int e) {
        return e < router.experts
                   ? router.d_logits[static_cast<Index>(rows[h]) * router.experts + e]
                   : 0.0F;
      };
      d_logits[h] = in_two(of(2 * q), of(2 * q + 1));
    }
  float inverse[2], k_of[2];
  if constexpr (Norm)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inverse[h] = m.norm_r[rows[h]];
      float dot = 0;
      for (int e = 2 * q; routed && e < min(2 * q + 2, router.experts); ++e) {
        const Index at = static_cast<Index>(rows[h]) * router.experts + e;
        dot += norm.logits[at] * router.d_logits[at];
      }
      dot += __shfl_xor_sync(kAll, dot, 1);
      dot += __shfl_xor_sync(kAll, dot, 2);
      k_of[h] = inverse[h] * inverse[h] * (norm.dots[rows[h]] + dot) / static_cast<float>(m.cols);
    }
  unsigned next[2][2];  // masks of the next step's columns by 32
  const auto take_masks = [&](int step) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        next[h][i] =
            __ldg(reinterpret_cast<const unsigned*>(m.masks) +
                  static_cast<Index>(rows[h]) * (m.cols / 32) + min(step * 2 + i, m.cols / 32 - 1));
  };
  take_masks(begin);

  meet_users();

  Turn<R::kFactorStages> factor;
  Turn<R::kTiles> old;
  int before = 0;  // the tile that went out last
  for (int step = begin; step < end; ++step) {
    float sums[8][4];
    const std::uint32_t at = base + static_cast<std::uint32_t>(factor.stage * R::kFactor);
    wait(&b.factor[factor.stage], factor.parity);
    products_begin();
#pragma unroll
    for (int k = 0; k < 8 * Halves; ++k)
      multiply_registers(sums, d_a[k], operand_at(at + k / 4 * kBox + k % 4 * 16 * kRowBytes, kBox),
                         k > 0);
    products_commit();
    unsigned masks[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) masks[h][i] = next[h][i] >> (2 * q);
    take_masks(step + 1);
    float2 w[Norm ? 8 : 1];
    if constexpr (Norm)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        w[j] = __ldg(reinterpret_cast<const float2*>(
            m.norm_w + min(step * kStep + 8 * j + 2 * q, m.cols - 2)));
    products_wait<0>();
    changed(sums);
    warp_arrives(&b.factor_free[factor.stage]);
    factor.next();

    // Tile j's columns 2 q, 2 q + 1 of rows g and g + 8.
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sums[j][c] =
            (masks[c / 2][j / 4] >> (8 * (j % 4) + c % 2) & 1) != 0 ? keep * sums[j][c] : 0.0F;
    if (routed) {
      // Eight experts: the inner dimension's lower half their near numbers, its upper half the
      // rest.
      const std::byte* wg =
          shared + R::kRouter + q * kPairStride + 8 * ((step - begin) * kStep + g);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint2 w = *reinterpret_cast<const uint2*>(wg + 64 * j);
        mma(sums[j], d_logits[0].x, d_logits[1].x, d_logits[0].y, d_logits[1].y, w.x, w.x);
        mma(sums[j], d_logits[0].x, d_logits[1].x, 0, 0, w.y, 0);
      }
    }
    int tiles[R::kOfStep], boxes[R::kOfStep];
#pragma unroll
    for (int i = 0; i < R::kOfStep; ++i) {
      tiles[i] = old.stage;
      boxes[i] = R::kOld + (old.stage * kGroups + group) * kBox;
      wait(&b.old[old.stage], old.parity);
      old.next();
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto at = [&](int i) {
          return reinterpret_cast<unsigned*>(shared + boxes[i] +
                                             place(warp % 4 * 16 + g + 8 * h, j) + 4 * q);
        };
        unsigned& pair = *at(0);
        const float sum[2] = {low(pair) + sums[j][2 * h], high(pair) + sums[j][2 * h + 1]};
        if constexpr (Norm) {
          const unsigned from = *at(1);
          unsigned& to = *at(2);
          to = pack2(low(to) + inverse[h] * (w[j].x * sum[0]) - low(from) * k_of[h],
                     high(to) + inverse[h] * (w[j].y * sum[1]) - high(from) * k_of[h]);
        } else {
          pair = pack2(sum[0], sum[1]);
        }
      }
    fence_to_engines();
    meet_group(1 + group);
    if (thread % kGroup == 0) {
      constexpr int kOut = R::kOfStep - 1;
#pragma unroll
      for (int i = 0; i < kOut; ++i) arrive(&b.old_free[tiles[i]]);
      store_box(d_x, base + static_cast<std::uint32_t>(boxes[kOut]), step * kStep,
                row0 + 64 * group);
      stores_read<1>();
      if (step > begin) arrive(&b.old_free[before]);
      before = tiles[kOut];
    }
  }
  if (thread % kGroup == 0) stores_written();
}

/// The map of a view's rows.
CUtensorMap map_of_rows(const Number* x, Index rows, Index columns, Index stride) {
  return map_of(x, rows, columns, rows > 1 ? stride : columns);
}
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int bytes, cudaStream_t stream,
            const char* name, const Arguments&... arguments) {
  admit_shared(reinterpret_cast<const void*>(kernel), bytes);
  kernel<<<grid, kThreads, static_cast<std::size_t>(bytes), stream>>>(arguments...);
  launched(name);
}
dim3 grid_of(const DroppedA& m, int size, int splits) {
  return {static_cast<unsigned>(ceil_div(size, kTile)), static_cast<unsigned>(splits),
          static_cast<unsigned>(ceil_div(m.rank, m.rank > 128 ? 256 : 128))};
}

}  // namespace

void warpgroup_forward(const DroppedA& m, const Routed& router, int splits, cudaStream_t stream) {
  const auto run = [&](auto kernel, int bytes) {
    launch(kernel, grid_of(m, m.rows, splits), bytes, stream, "lora_a",
           map_of_rows(m.x, m.rows, m.cols, m.stride_x),
           map_of_rows(m.weight, m.rank, m.cols, m.cols), m, router);
  };
  const bool drops = m.threshold != 0;
  if (m.rank > 128)
    run(drops ? warpgroup_forward_a<2, true> : warpgroup_forward_a<2, false>, Ring<2>::kBytes);
  else
    run(drops ? warpgroup_forward_a<1, true> : warpgroup_forward_a<1, false>, Ring<1>::kBytes);
}
void warpgroup_weight(const DroppedA& m, const Routed& router, int splits, cudaStream_t stream) {
  const auto run = [&](auto kernel, int bytes) {
    launch(kernel, grid_of(m, m.cols, splits), bytes, stream, "lora_a_backward",
           map_of_rows(m.x, m.rows, m.cols, m.stride_x),
           map_of_rows(m.d_a, m.rows, m.rank, m.stride_d_a), m, router);
  };
  if (m.rank > 128)
    run(warpgroup_weight_a<2>, Ring<2>::kBytes);
  else
    run(warpgroup_weight_a<1>, Ring<1>::kBytes);
}
void warpgroup_input(DroppedA m, Routed router, const ThroughNorm& norm, float keep, int splits,
                     cudaStream_t stream) {
  const auto run = [&](auto kernel, int bytes) {
    const CUtensorMap own = map_of_rows(m.d_x, m.rows, m.cols, m.stride_d_x);
    const bool through = norm.d_input != nullptr;
    launch(kernel,
           dim3(static_cast<unsigned>(ceil_div(m.rows, kTile)), static_cast<unsigned>(splits)),
           bytes, stream, "lora_a_backward", map_of_rows(m.weight, m.rank, m.cols, m.cols),
           through ? map_of_rows(norm.d_input, m.rows, m.cols, norm.stride) : own, own,
           through ? map_of_rows(m.x, m.rows, m.cols, m.stride_x) : own, m, router, norm, keep);
  };
  const auto run_of = [&](auto halves) {
    if (norm.d_input != nullptr)
      run(warpgroup_input_a<halves(), true>, InputRoom<halves(), true>::kBytes);
    else
      run(warpgroup_input_a<halves(), false>, InputRoom<halves(), false>::kBytes);
  };
  for (int left = m.rank; left > 0; left -= m.rank) {
    m.rank = std::min(left, kInputRanks);
    if (m.rank > kInputRanks / 2)
      run_of(std::integral_constant<int, 2>{});
    else
      run_of(std::integral_constant<int, 1>{});
    router = {};
    m.weight += static_cast<Index>(m.rank) * m.cols;
    m.d_a += m.rank;
  }
}

}  // namespace mixlora::cuda
