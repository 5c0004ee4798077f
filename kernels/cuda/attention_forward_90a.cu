// Attention's forward by warpgroups, in the manner of FlashAttention-3 [Shah et al. 2024]: the
// scores of the next keys are under way while a tile's softmax is taken.
#include <algorithm>

#include "kernels/cuda/attention_warpgroup.cuh"
#include "kernels/cuda/tiles.cuh"

namespace mixlora::cuda {
namespace {

constexpr int kKeys = 128, kStages = 2;
constexpr int kTile = tile_bytes(128);
/// Registers of a thread that fetches and of one that multiplies: 65,536 a processor in all.
constexpr int kFetchRegisters = 24, kMultiplyRegisters = 240;

struct Room {
  std::byte queries[2][kTile], keys[kStages][kTile], values[kStages][kTile];
  Barrier queries_here[2], queries_free[2], keys_here[kStages], keys_free[kStages],
      values_here[kStages], values_free[kStages];
};

__device__ void fetch(Room& room, const CUtensorMap& qkv, const AttentionCall<Number>& m,
                      int pairs) {
  Turn<2> item;
  Turn<kStages> key, value;
  for (Walk w; w.next(m, m.heads, pairs); item.next()) {
    const int kv = m.kv_of(w.head);
    wait(&room.queries_free[item.stage], item.parity ^ 1);
    arrive_expecting(&room.queries_here[item.stage], kTile);
    fetch_tile<kBlockRows>(shared_address(room.queries[item.stage]), qkv, w.head * kTileColumns,
                           w.s.begin + w.first(), &room.queries_here[item.stage]);
    for (int t = w.tile; t >= 0; --t) {
      const int row = w.s.begin + t * kKeys;
      wait(&room.keys_free[key.stage], key.parity ^ 1);
      arrive_expecting(&room.keys_here[key.stage], kTile);
      fetch_tile<kKeys>(shared_address(room.keys[key.stage]), qkv, (m.heads + kv) * kTileColumns,
                        row, &room.keys_here[key.stage]);
      key.next();
      wait(&room.values_free[value.stage], value.parity ^ 1);
      arrive_expecting(&room.values_here[value.stage], kTile);
      fetch_tile<kKeys>(shared_address(room.values[value.stage]), qkv,
                        (m.heads + m.kv_heads + kv) * kTileColumns, row,
                        &room.values_here[value.stage]);
      value.next();
    }
  }
}

/// Exponentials of scores in place, their sums and maxima by row; `shrink` is what was before by.
__device__ inline void soft(float (&score)[kKeys / 8][4], float (&top)[2], float (&total)[2],
                            float (&shrink)[2], float to_log2) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float next = top[h];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      next = fmaxf(next, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
    next = quad_max(next);
    const float base = next * to_log2;
    shrink[h] = power_of_two(top[h] * to_log2 - base);
    top[h] = next;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float x0 = power_of_two(score[n][2 * h] * to_log2 - base),
                  x1 = power_of_two(score[n][2 * h + 1] * to_log2 - base);
      sum += x0 + x1;
      score[n][2 * h] = x0;
      score[n][2 * h + 1] = x1;
    }
    total[h] = total[h] * shrink[h] + sum;  // this lane's keys alone
  }
}
__device__ inline void pack(unsigned (&p)[kKeys / 8][2], const float (&score)[kKeys / 8][4]) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) p[n][h] = pack2(score[n][2 * h], score[n][2 * h + 1]);
}

/// One user's part: rows [64 group, ...) of every tile.
__device__ void multiply(Room& room, const AttentionCall<Number>& m, int pairs, int group) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp_row = group * kGroupRows + static_cast<int>(threadIdx.x) % kGroup / kWarp * 16,
            row = warp_row + lane / 4;  // of this lane, and row + 8
  const float to_log2 = m.root * kLog2E;
  Turn<2> item;
  Turn<kStages> key, value;
  for (Walk w; w.next(m, m.heads, pairs); item.next()) {
    std::byte* own = room.queries[item.stage];
    const std::uint32_t queries = shared_address(own) + group * kGroupRows * kRowBytes;
    float o[16][4], score[kKeys / 8][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {}, shrink[2];
    unsigned p[kKeys / 8][2];

    // The tile of the queries' own keys first: no other hides a key from them.
    wait(&room.queries_here[item.stage], item.parity);
    wait(&room.keys_here[key.stage], key.parity);
    products_begin();
    multiply_rows<kBlockRows, kKeys>(score, queries, shared_address(room.keys[key.stage]));
    products_commit();
    products_wait<0>();
    changed(score);
    warp_arrives(&room.keys_free[key.stage]);
    key.next();
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * n + lane % 4 * 2 + i % 2 > row + i / 2 * 8) score[n][i] = -INFINITY;
    soft(score, top, total, shrink, to_log2);
    pack(p, score);

    if (w.tile > 0) wait(&room.keys_here[key.stage], key.parity);
    for (int t = w.tile - 1; t >= 0; --t) {
      products_begin();
      multiply_rows<kBlockRows, kKeys>(score, queries, shared_address(room.keys[key.stage]));
      products_commit();
      wait(&room.values_here[value.stage], value.parity);
      multiply_packed<kKeys>(o, p, shared_address(room.values[value.stage]), t != w.tile - 1);
      products_commit();
      products_wait<1>();
      changed(score);
      warp_arrives(&room.keys_free[key.stage]);
      key.next();
      soft(score, top, total, shrink, to_log2);
      // The exponentials belong here, while the products with values go on: the assembler moves the
      // wait before them unless a branch is between.
      changed(score);
      if (t > 0) wait(&room.keys_here[key.stage], key.parity);
      products_wait<0>();
      changed(o);
      warp_arrives(&room.values_free[value.stage]);
      value.next();
#pragma unroll
      for (auto& tile : o)
#pragma unroll
        for (int i = 0; i < 4; ++i) tile[i] *= shrink[i / 2];
      pack(p, score);
    }
    wait(&room.values_here[value.stage], value.parity);
    products_begin();
    multiply_packed<kKeys>(o, p, shared_address(room.values[value.stage]), w.tile > 0);
    products_commit();

    float inverse[2];
    const Index at = (w.s.begin + w.first()) * static_cast<Index>(m.heads) + w.head;  // of row 0
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(total[h]);
      inverse[h] = 1.0F / sum;
      const int r = row + 8 * h;
      if (lane % 4 == 0 && w.first() + r < w.s.length)
        m.lse[at + static_cast<Index>(r) * m.heads] = top[h] * m.root + logf(sum);
    }
    products_wait<0>();
    changed(o);
    warp_arrives(&room.values_free[value.stage]);
    value.next();
    meet_group(1 + group);  // the group's queries are read: o goes out through their rows
    stage_rows(own, group, o, inverse[0], inverse[1]);
    copy_rows_out(m.out + at * kTileColumns, static_cast<Index>(m.heads) * kTileColumns, own, group,
                  w.s.length - w.first());
    fence_to_engines();
    warp_arrives(&room.queries_free[item.stage]);
  }
}

__global__ void __launch_bounds__(kBlockThreads, 1)
    warpgroup_forward_kernel(const __grid_constant__ CUtensorMap qkv,
                             const __grid_constant__ AttentionCall<Number> m, int pairs) {
  extern __shared__ __align__(1024) std::byte shared[];
  Room& room = *reinterpret_cast<Room*>(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&room.queries_here[i], 1);
      barrier_init(&room.queries_free[i], kUserWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&room.keys_here[i], 1);
      barrier_init(&room.keys_free[i], kUserWarps);
      barrier_init(&room.values_here[i], 1);
      barrier_init(&room.values_free[i], kUserWarps);
    }
    barriers_ready();
  }
  __syncthreads();
  const int group = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kGroup, 0);
  if (group == 0) {
    give_registers<kFetchRegisters>();
    if (threadIdx.x == 0) fetch(room, qkv, m, pairs);
  } else {
    take_registers<kMultiplyRegisters>();
    multiply(room, m, pairs, group - 1);
  }
}

}  // namespace

CUtensorMap map_of(const __nv_bfloat16* x, Index rows, Index columns, Index stride) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (found == nullptr) throw std::runtime_error("CUDA: the driver has no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  const cuuint64_t extents[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                   strides[1] = {static_cast<cuuint64_t>(stride) * sizeof(*x)};
  const cuuint32_t box[2] = {kHalfColumns, kBoxRows}, steps[2] = {1, 1};
  if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<__nv_bfloat16*>(x), extents,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    throw std::runtime_error("CUDA: no tensor map of these rows");
  return map;
}

void warpgroup_forward(const AttentionCall<Number>& c, Index rows, Index max_length, int processors,
                       cudaStream_t stream) {
  const int pairs = static_cast<int>(ceil_div<Index>(max_length, 2 * kBlockRows));
  launch_walk(warpgroup_forward_kernel, c, c.heads, pairs, processors,
              static_cast<int>(sizeof(Room)), stream, map_of(c.qkv, rows, c.width(), c.width()), c,
              pairs);
}

}  // namespace mixlora::cuda
