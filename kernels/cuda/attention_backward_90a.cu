// Attention's backward by warpgroups: one kernel by queries for d_q, one by keys for d_k and d_v.
#include <algorithm>

#include "kernels/cuda/attention_warpgroup.cuh"
#include "kernels/cuda/tiles.cuh"

namespace mixlora::cuda {
namespace {

constexpr int kMet = 64, kStages = 3;  // rows of a tile that passes, and how many are held
constexpr int kOwnTile = tile_bytes(kBlockRows), kMetTile = tile_bytes(kMet);
constexpr int kHelpers = 3;  // warps of the fetching group that do not fetch tiles

struct QueryRoom {
  std::byte queries[2][kOwnTile], d_out[2][kOwnTile], keys[kStages][kMetTile],
      values[kStages][kMetTile];
  float lse[2][kBlockRows], mean[2][kBlockRows];  // lse: to base 2
  Barrier own_here[2], own_free[2], rows_here[2], rows_free[2], met_here[kStages],
      met_free[kStages];
};
struct KeyRoom {
  std::byte keys[2][kOwnTile], values[2][kOwnTile], queries[kStages][kMetTile],
      d_out[kStages][kMetTile];
  float lse[kStages][kMet], mean[kStages][kMet];  // of the queries; lse: infinite where none is
  Barrier own_here[2], own_free[2], met_here[kStages], met_free[kStages];
};
/// Registers of a thread that fetches and of one that multiplies: 65,536 a processor in all.
constexpr int kQueryFetch = 88, kQueryMultiply = 208, kKeyFetch = 24, kKeyMultiply = 240;

/// Arrives for a tile that this group does not need, when it is here.
template <class Room> __device__ void pass(Room& room, Turn<kStages>& met) {
  wait(&room.met_here[met.stage], met.parity);
  warp_arrives(&room.met_free[met.stage]);
  met.next();
}
/// Position, in steps of 64, of a user's rows in their sequence: the tile that they see in part.
__device__ inline int diagonal(const Walk& w, int group) { return kUsers * w.tile + group; }
__device__ inline int warp_row(int group) {
  return group * kGroupRows + static_cast<int>(threadIdx.x) % kGroup / kWarp * 16;
}

/// Positions of the rows that a lane writes in turn_out: its warp's, four apart; asked for before
/// the last products are waited for.
struct Positions {
  int at[4] = {};
  __device__ void ask(const AttentionCall<Number>& m, const Walk& w, int group) {
    if (m.rope == nullptr) return;
    const int first = w.first() + warp_row(group) + lane_now() / 8;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      at[i] = m.ids[4 * static_cast<Index>(w.s.begin + min(first + 4 * i, w.s.length - 1)) + 1];
  }
};

/// Adds up x of the two lanes that differ in bit Step: a lane is left with the half of x that its
/// bit says, in the first Count / 2.
template <int Step, int Count, int N> __device__ void halve(float (&x)[N], int lane) {
  const bool upper = (lane & Step) != 0;
#pragma unroll
  for (int i = 0; i < Count / 2; ++i) {
    const float kept = upper ? x[Count / 2 + i] : x[i], sent = upper ? x[i] : x[Count / 2 + i];
    x[i] = kept + __shfl_xor_sync(kAll, sent, Step);
  }
}

/// Room for f32 in two tiles of 128 rows: chunk c (of 8) of 4 columns in a quarter of 32.
struct WideRows {
  std::byte *left, *right;
  __device__ float4* at(int row, int quarter, int c) const {
    return reinterpret_cast<float4*>((quarter < 2 ? left : right) +
                                     place_in_tile(kBlockRows, row, quarter % 2 * 8 + c));
  }
};

/// Sums by column over a user's rows, which its warps have left in row `which` of their rooms:
/// added in order and written. `column` of qkv's rows.
__device__ inline void leave_sums(const AttentionCall<Number>& m, const Walk& w,
                                  const WideRows& room, int group, int which, Index column) {
  const int c = static_cast<int>(threadIdx.x) % kGroup;
  float sum = 0;
#pragma unroll
  for (int row = which; row < kGroupRows; row += 16)
    sum += reinterpret_cast<const float*>(
        room.at(group * kGroupRows + row, c / 32, c % 32 / 4))[c % 4];
  const Index part = scale_part(w.sequence, w.s.begin) + diagonal(w, group);
  m.scale_sums[part * m.width() + column + c] = sum;
}

/// Writes a user's 64 rows of gradients of q or k times root, turned back by their rotary angles
/// where there are such; a warp takes its 16 rows through their room, as f32, so that angles are
/// read and rows written by whole lines. Scaled: q or k itself is in the left tile; gradients go
/// out times the scale, and their products with q or k, turned back too, are left as sums of the
/// warp's rows in row 0 of its room. `column` of qkv's rows.
template <bool Scaled>
__device__ void turn_out(const AttentionCall<Number>& m, const Walk& w, const Positions& positions,
                         const WideRows& room, int group, Index column, const float (&x)[16][4]) {
  const int lane = lane_now(), first = warp_row(group), chunk = lane % 8;
  float4 cosine[4][2], sine[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
      const float* angles =
          m.rope + static_cast<Index>(positions.at[i]) * kTileColumns + quarter * 32 + chunk * 4;
      cosine[i][quarter] = {1, 1, 1, 1};
      sine[i][quarter] = {};
      if (m.rope == nullptr) continue;
      cosine[i][quarter] = *reinterpret_cast<const float4*>(angles);
      sine[i][quarter] = *reinterpret_cast<const float4*>(angles + kHalfColumns);
    }
  uint2 own[4][2][2];  // q or k: rows, quarters, halves of a row
  float4 by[2][2];
  float sums[2 * 2 * 4] = {};
  if constexpr (Scaled) {
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          own[i][quarter][half] = reinterpret_cast<const uint2*>(
              room.left + place_in_tile(kBlockRows, first + 4 * i + lane / 8,
                                        half * 8 + quarter * 4 + chunk / 2))[chunk % 2];
    __syncwarp();
  }
#pragma unroll
  for (int n = 0; n < 16; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      reinterpret_cast<float2*>(
          room.at(first + lane / 4 + 8 * h, n / 4, n % 4 * 2 + lane % 4 / 2))[lane % 2] =
          make_float2(x[n][2 * h], x[n][2 * h + 1]);
  __syncwarp();
  if constexpr (Scaled)
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        by[quarter][half] = *reinterpret_cast<const float4*>(
            m.scale + column + half * kHalfColumns + quarter * 32 + chunk * 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first + 4 * i + lane / 8;
    Number* to = m.d_qkv + (w.s.begin + w.first() + row) * m.width() + column + chunk * 4;
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {  // columns c, and c + 64 with them
      const float4 a = *room.at(row, quarter, chunk), b = *room.at(row, quarter + 2, chunk),
                   c = cosine[i][quarter], s = sine[i][quarter];
      if (w.first() + row >= w.s.length) continue;
      float g[2][4] = {{(a.x * c.x + b.x * s.x) * m.root, (a.y * c.y + b.y * s.y) * m.root,
                        (a.z * c.z + b.z * s.z) * m.root, (a.w * c.w + b.w * s.w) * m.root},
                       {(b.x * c.x - a.x * s.x) * m.root, (b.y * c.y - a.y * s.y) * m.root,
                        (b.z * c.z - a.z * s.z) * m.root, (b.w * c.w - a.w * s.w) * m.root}};
      if constexpr (Scaled) {
        const uint2 l = own[i][quarter][0], r = own[i][quarter][1];
        const float left[4] = {low(l.x), high(l.x), low(l.y), high(l.y)},
                    right[4] = {low(r.x), high(r.x), low(r.y), high(r.y)},
                    cs[4] = {c.x, c.y, c.z, c.w}, sn[4] = {s.x, s.y, s.z, s.w};
        const float4 f[2] = {by[quarter][0], by[quarter][1]};
        const float factor[2][4] = {{f[0].x, f[0].y, f[0].z, f[0].w},
                                    {f[1].x, f[1].y, f[1].z, f[1].w}};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[8 * quarter + j] += g[0][j] * (left[j] * cs[j] + right[j] * sn[j]);
          sums[8 * quarter + 4 + j] += g[1][j] * (right[j] * cs[j] - left[j] * sn[j]);
          g[0][j] *= factor[0][j];
          g[1][j] *= factor[1][j];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint2*>(to + quarter * 32 + half * kHalfColumns) =
            make_uint2(pack2(g[half][0], g[half][1]), pack2(g[half][2], g[half][3]));
    }
  }
  if constexpr (Scaled) {
    halve<16, 16>(sums, lane);  // a quarter
    halve<8, 8>(sums, lane);    // a half
    __syncwarp();
    *room.at(first, lane / 16 + lane / 8 % 2 * 2, chunk) =
        make_float4(sums[0], sums[1], sums[2], sums[3]);
  }
}

/// Dots of rows g and g + 8 of a warp's sixteen with x, which is in its tile.
__device__ inline void add_dots(float (&dots)[2], const std::byte* tile, int group,
                                const float (&d_x)[16][4], float by) {
  const int lane = lane_now(), row = warp_row(group) + lane % 16;
  float sum[2] = {};
#pragma unroll
  for (int n = 0; n < 16; n += 2) {
    unsigned x[4];
    read_matrices(x, shared_address(tile + place_in_tile(kBlockRows, row, n + lane / 16)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* d = d_x[n + i / 2] + 2 * (i % 2);
      sum[i % 2] += d[0] * low(x[i]) + d[1] * high(x[i]);
    }
    if (n % 8 == 6) __syncwarp();  // or all is loaded at once, into registers that are not there
  }
  dots[0] += by * sum[0];
  dots[1] += by * sum[1];
}
/// What the lanes of four have of them, added up and left.
__device__ inline void leave_dots(const AttentionCall<Number>& m, const Walk& w, int group,
                                  int part, float (&dots)[2]) {
  const int lane = lane_now();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    dots[h] += __shfl_xor_sync(kAll, dots[h], 1);
    dots[h] += __shfl_xor_sync(kAll, dots[h], 2);
    const int at = w.first() + warp_row(group) + lane / 4 + 8 * h;
    if (lane % 4 == 0 && at < w.s.length) m.dot_part(w.s.begin + at, part) = dots[h];
  }
}

/// Scales d_v in its registers, and sums its products with v, in its tile, over the warp's rows.
struct ValueSums {
  float sums[16 * 2] = {};  // in the end four columns' of the lane
  __device__ void take(const AttentionCall<Number>& m, const Walk& w, const std::byte* values,
                       int group, Index column, float (&d_v)[16][4]) {
    const int lane = lane_now(), row = warp_row(group) + lane / 4;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const float2 by = *reinterpret_cast<const float2*>(m.scale + column + 8 * n + lane % 4 * 2);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const unsigned v = reinterpret_cast<const unsigned*>(
            values + place_in_tile(kBlockRows, row + 8 * h, n))[lane % 4];
        if (w.first() + row + 8 * h < w.s.length) {
          sums[2 * n] += d_v[n][2 * h] * low(v);
          sums[2 * n + 1] += d_v[n][2 * h + 1] * high(v);
        }
        d_v[n][2 * h] *= by.x;
        d_v[n][2 * h + 1] *= by.y;
      }
      if (n % 4 == 3) __syncwarp();  // or all is loaded at once, into registers that are not there
    }
    halve<16, 32>(sums, lane);
    halve<8, 16>(sums, lane);
    halve<4, 8>(sums, lane);
  }
  /// Into row 1 of the warp's room.
  __device__ void leave(const WideRows& room, int group) const {
    const int lane = lane_now(), n = lane / 16 * 8 + lane / 8 % 2 * 4 + lane / 4 % 2 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      reinterpret_cast<float2*>(
          room.at(warp_row(group) + 1, (n + i) / 4, (n + i) % 4 * 2 + lane % 4 / 2))[lane % 2] =
          make_float2(sums[2 * i], sums[2 * i + 1]);
  }
};

// ---- d_q -----------------------------------------------------------------------------------

__device__ inline int key_tiles(const Walk& w) {
  return min(kUsers * (w.tile + 1), ceil_div(w.s.length, kMet));
}

__device__ void fetch_for_queries(QueryRoom& room, const CUtensorMap& qkv, const CUtensorMap& d_o,
                                  const AttentionCall<Number>& m, int pairs) {
  Turn<2> own;
  Turn<kStages> met;
  for (Walk w; w.next(m, m.heads, pairs); own.next()) {
    const int row = w.s.begin + w.first(), kv = m.kv_of(w.head);
    Barrier* here = &room.own_here[own.stage];
    wait(&room.own_free[own.stage], own.parity ^ 1);
    arrive_expecting(here, 2 * kOwnTile);
    fetch_tile<kBlockRows>(shared_address(room.queries[own.stage]), qkv, w.head * kTileColumns, row,
                           here);
    fetch_tile<kBlockRows>(shared_address(room.d_out[own.stage]), d_o, w.head * kTileColumns, row,
                           here);
    const int count = key_tiles(w);
    for (int t = 0; t < count; ++t, met.next()) {
      here = &room.met_here[met.stage];
      wait(&room.met_free[met.stage], met.parity ^ 1);
      arrive_expecting(here, 2 * kMetTile);
      fetch_tile<kMet>(shared_address(room.keys[met.stage]), qkv, (m.heads + kv) * kTileColumns,
                       w.s.begin + t * kMet, here);
      fetch_tile<kMet>(shared_address(room.values[met.stage]), qkv,
                       (m.heads + m.kv_heads + kv) * kTileColumns, w.s.begin + t * kMet, here);
    }
  }
}

/// lse and d_o . o of the queries, by the helping warps; 16 lanes a row, many rows on their way.
/// They wait for the users to have read the numbers of two tiles ago, not for this tile's rows.
__device__ void prepare_rows(QueryRoom& room, const AttentionCall<Number>& m, int pairs,
                             int helper) {
  constexpr int kAtOnce = 6, kStep = 2 * kHelpers;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, chunk = lane % 16;
  Turn<2> own;
  for (Walk w; w.next(m, m.heads, pairs); own.next()) {
    const Index at = (w.s.begin + w.first()) * static_cast<Index>(m.heads) + w.head;  // of row 0
    const int rows = min(kBlockRows, w.s.length - w.first());
    wait(&room.rows_free[own.stage], own.parity ^ 1);
    for (int r = 2 * helper + lane / 16; r - lane / 16 < rows; r += kAtOnce * kStep) {
      uint4 o[kAtOnce], g[kAtOnce];
      float lse[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const Index n = at + static_cast<Index>(min(r + i * kStep, rows - 1)) * m.heads;
        o[i] = *reinterpret_cast<const uint4*>(m.o + n * kTileColumns + chunk * 8);
        g[i] = *reinterpret_cast<const uint4*>(m.d_o + n * kTileColumns + chunk * 8);
        lse[i] = m.lse[n];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = r + i * kStep;
        const unsigned x[4] = {o[i].x, o[i].y, o[i].z, o[i].w},
                       y[4] = {g[i].x, g[i].y, g[i].z, g[i].w};
        float sum = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) sum += low(x[c]) * low(y[c]) + high(x[c]) * high(y[c]);
#pragma unroll
        for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
        if (chunk == 0 && row < rows) {
          room.lse[own.stage][row] = lse[i] * kLog2E;
          room.mean[own.stage][row] = sum;
          m.mean[at + static_cast<Index>(row) * m.heads] = sum;
        }
      }
    }
    warp_arrives(&room.rows_here[own.stage]);
  }
}

template <bool Scaled>
__device__ void multiply_for_queries(QueryRoom& room, const AttentionCall<Number>& m, int pairs,
                                     int group) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, row = warp_row(group) + lane / 4;
  const float to_log2 = m.root * kLog2E;
  Turn<2> own;
  Turn<kStages> met;
  for (Walk w; w.next(m, m.heads, pairs); own.next()) {
    const int count = key_tiles(w), last = diagonal(w, group);
    float lse[2], mean[2];
    wait(&room.rows_here[own.stage], own.parity);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      lse[h] = room.lse[own.stage][row + 8 * h];
      mean[h] = room.mean[own.stage][row + 8 * h];
    }
    warp_arrives(&room.rows_free[own.stage]);
    wait(&room.own_here[own.stage], own.parity);
    if (last >= count) {  // no rows of this group
      for (int t = 0; t < count; ++t) pass(room, met);
      warp_arrives(&room.own_free[own.stage]);
      continue;
    }
    const std::uint32_t offset = group * kGroupRows * kRowBytes,
                        queries = shared_address(room.queries[own.stage]) + offset,
                        d_out = shared_address(room.d_out[own.stage]) + offset;
    float d_q[16][4];
    int before = 0;  // the stage that the products under way read
    wait(&room.met_here[met.stage], met.parity);
    for (int t = 0; t <= last; ++t) {
      const int stage = met.stage;
      met.next();
      float score[kMet / 8][4], d_p[kMet / 8][4];
      products_begin();
      multiply_rows<kBlockRows, kMet>(score, queries, shared_address(room.keys[stage]));
      products_commit();
      multiply_rows<kBlockRows, kMet>(d_p, d_out, shared_address(room.values[stage]));
      products_commit();
      products_wait<1>();
      changed(score);
      if (t > 0) warp_arrives(&room.met_free[before]);
      before = stage;
#pragma unroll
      for (int n = 0; n < kMet / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] = power_of_two(score[n][i] * to_log2 - lse[i / 2]);
      changed(score);
      // A branch, or the assembler moves the exponentials behind the wait.
      if (t < last) wait(&room.met_here[met.stage], met.parity);
      products_wait<0>();
      changed(d_p);
      if (t == last) {
#pragma unroll
        for (int n = 0; n < kMet / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (8 * n + lane % 4 * 2 + i % 2 > row - group * kGroupRows + i / 2 * 8)
              score[n][i] = 0;
      }
      unsigned d_s[kMet / 8][2];
#pragma unroll
      for (int n = 0; n < kMet / 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          d_s[n][h] = pack2(score[n][2 * h] * (d_p[n][2 * h] - mean[h]),
                            score[n][2 * h + 1] * (d_p[n][2 * h + 1] - mean[h]));
      products_begin();
      multiply_packed<kMet>(d_q, d_s, shared_address(room.keys[stage]), t > 0);
      products_commit();
    }
    Positions positions;
    positions.ask(m, w, group);
    products_wait<0>();
    changed(d_q);
    warp_arrives(&room.met_free[before]);
    for (int t = last + 1; t < count; ++t) pass(room, met);
    if (m.row_dots != nullptr) {
      float dots[2] = {};
      add_dots(dots, room.queries[own.stage], group, d_q, m.root);
      leave_dots(m, w, group, w.head, dots);
    }

    meet_group(1 + group);  // the group's rows are read: d_q goes out through them
    const WideRows wide{room.queries[own.stage], room.d_out[own.stage]};
    const Index column = w.head * kTileColumns;
    turn_out<Scaled>(m, w, positions, wide, group, column, d_q);
    if constexpr (Scaled) {
      meet_group(1 + group);
      leave_sums(m, w, wide, group, 0, column);
    }
    fence_to_engines();
    warp_arrives(&room.own_free[own.stage]);
  }
}

template <bool Scaled>
__global__ void __launch_bounds__(kBlockThreads, 1)
    warpgroup_d_query(const __grid_constant__ CUtensorMap qkv,
                      const __grid_constant__ CUtensorMap d_o,
                      const __grid_constant__ AttentionCall<Number> m, int pairs) {
  extern __shared__ __align__(1024) std::byte shared[];
  QueryRoom& room = *reinterpret_cast<QueryRoom*>(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&room.own_here[i], 1);
      barrier_init(&room.own_free[i], kUserWarps);
      barrier_init(&room.rows_here[i], kHelpers);
      barrier_init(&room.rows_free[i], kUserWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&room.met_here[i], 1);
      barrier_init(&room.met_free[i], kUserWarps);
    }
    barriers_ready();
  }
  __syncthreads();
  const int group = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kGroup, 0);
  if (group == 0) {
    give_registers<kQueryFetch>();
    const int warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kWarp, 0);
    if (warp > 0)
      prepare_rows(room, m, pairs, warp - 1);
    else if (threadIdx.x == 0)
      fetch_for_queries(room, qkv, d_o, m, pairs);
  } else {
    take_registers<kQueryMultiply>();
    multiply_for_queries<Scaled>(room, m, pairs, group - 1);
  }
}

// ---- d_k, d_v ------------------------------------------------------------------------------

/// d_q's kernel ended with the last sequences: much of them is in L2 still.
__device__ inline Walk from_the_end() {
  Walk w;
  w.backwards = true;
  return w;
}
/// The query tiles that a tile of keys meets: of each query head of its group, those from `from`
/// on.
struct Meeting {
  int from, end, head, head_end, tile;
  __device__ Meeting(const Walk& w, const AttentionCall<Number>& m)
      : from(kUsers * w.tile),
        end(ceil_div(w.s.length, kMet)),
        head(w.head * (m.heads / m.kv_heads)),
        head_end(head + m.heads / m.kv_heads),
        tile(from) {}
  __device__ bool here() const { return head < head_end; }
  __device__ void next() {
    if (++tile < end) return;
    tile = from;
    ++head;
  }
};

__device__ void fetch_for_keys(KeyRoom& room, const CUtensorMap& qkv, const CUtensorMap& d_o,
                               const AttentionCall<Number>& m, int pairs) {
  Turn<2> own;
  Turn<kStages> met;
  for (Walk w = from_the_end(); w.next(m, m.kv_heads, pairs); own.next()) {
    const int row = w.s.begin + w.first();
    Barrier* here = &room.own_here[own.stage];
    wait(&room.own_free[own.stage], own.parity ^ 1);
    arrive_expecting(here, 2 * kOwnTile);
    fetch_tile<kBlockRows>(shared_address(room.keys[own.stage]), qkv,
                           (m.heads + w.head) * kTileColumns, row, here);
    fetch_tile<kBlockRows>(shared_address(room.values[own.stage]), qkv,
                           (m.heads + m.kv_heads + w.head) * kTileColumns, row, here);
    for (Meeting meeting(w, m); meeting.here(); meeting.next(), met.next()) {
      const int column = meeting.head * kTileColumns, query = w.s.begin + meeting.tile * kMet;
      here = &room.met_here[met.stage];
      wait(&room.met_free[met.stage], met.parity ^ 1);
      arrive_expecting(here, 2 * kMetTile);
      fetch_tile<kMet>(shared_address(room.queries[met.stage]), qkv, column, query, here);
      fetch_tile<kMet>(shared_address(room.d_out[met.stage]), d_o, column, query, here);
    }
  }
}

/// lse and d_o . o of the queries of every tile that falls to the helping warp's own stage.
__device__ void fetch_rows(KeyRoom& room, const AttentionCall<Number>& m, int pairs, int helper) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Turn<kStages> met;
  for (Walk w = from_the_end(); w.next(m, m.kv_heads, pairs);) {
    for (Meeting meeting(w, m); meeting.here(); meeting.next(), met.next()) {
      if (met.stage != helper) continue;
      const int i = meeting.tile * kMet, head = meeting.head;
      float lse[2], mean[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = i + half * kWarp + lane;
        const bool there = r < w.s.length;
        const Index n = (w.s.begin + static_cast<Index>(there ? r : i)) * m.heads + head;
        lse[half] = there ? m.lse[n] * kLog2E : INFINITY;
        mean[half] = there ? m.mean[n] : 0.0F;
      }
      wait(&room.met_free[met.stage], met.parity ^ 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        room.lse[met.stage][half * kWarp + lane] = lse[half];
        room.mean[met.stage][half * kWarp + lane] = mean[half];
      }
      warp_arrives(&room.met_here[met.stage]);
    }
  }
}

template <bool Scaled>
__device__ void multiply_for_keys(KeyRoom& room, const AttentionCall<Number>& m, int pairs,
                                  int group) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, row = warp_row(group) + lane / 4;
  const float to_log2 = m.root * kLog2E;
  Turn<2> own;
  Turn<kStages> met;
  for (Walk w = from_the_end(); w.next(m, m.kv_heads, pairs); own.next()) {
    const int heads = m.heads / m.kv_heads, from = kUsers * w.tile,
              end = ceil_div(w.s.length, kMet);
    const int first = diagonal(w, group);  // queries before see none of the group's keys
    wait(&room.own_here[own.stage], own.parity);
    if (first >= end) {  // no rows of this group
      for (int j = 0; j < heads * (end - from); ++j) pass(room, met);
      warp_arrives(&room.own_free[own.stage]);
      continue;
    }
    const std::uint32_t offset = group * kGroupRows * kRowBytes,
                        keys = shared_address(room.keys[own.stage]) + offset,
                        values = shared_address(room.values[own.stage]) + offset;
    float d_k[16][4] = {}, d_v[16][4] = {};
    Positions positions;
    for (int head = 0; head < heads; ++head) {
      for (int tile = from; tile < first; ++tile) pass(room, met);
      int before = 0;  // the stage that the products under way read
      for (int tile = first; tile < end; ++tile) {
        const int stage = met.stage;
        wait(&room.met_here[stage], met.parity);
        met.next();
        const std::uint32_t queries = shared_address(room.queries[stage]),
                            d_out = shared_address(room.d_out[stage]);
        // Rows are keys, columns queries.
        float score[kMet / 8][4], d_p[kMet / 8][4];
        products_begin();
        multiply_rows<kBlockRows, kMet>(score, keys, queries);
        products_commit();
        // The last tile's products with d_s end while these go on: their registers are wanted.
        products_wait<1>();
        if (tile > first) warp_arrives(&room.met_free[before]);
        products_begin();
        multiply_rows<kBlockRows, kMet>(d_p, values, d_out);
        products_commit();
        products_wait<1>();
        changed(score);
        if (tile == first) {
#pragma unroll
          for (int n = 0; n < kMet / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (8 * n + lane % 4 * 2 + i % 2 < row - group * kGroupRows + i / 2 * 8)
                score[n][i] = -INFINITY;
        }
        // Packed at once, and d_s made of the packed: there are not registers for both.
        unsigned p[kMet / 8][2], d_s[kMet / 8][2];
#pragma unroll
        for (int n = 0; n < kMet / 8; ++n) {
          const float2 lse =
              *reinterpret_cast<const float2*>(room.lse[stage] + 8 * n + lane % 4 * 2);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            p[n][h] = pack2(power_of_two(score[n][2 * h] * to_log2 - lse.x),
                            power_of_two(score[n][2 * h + 1] * to_log2 - lse.y));
        }
        products_begin();
        multiply_packed<kMet>(d_v, p, d_out, true);
        products_commit();
        products_wait<1>();
        changed(d_p);
#pragma unroll
        for (int n = 0; n < kMet / 8; ++n) {
          const float2 mean =
              *reinterpret_cast<const float2*>(room.mean[stage] + 8 * n + lane % 4 * 2);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            d_s[n][h] = pack2(low(p[n][h]) * (d_p[n][2 * h] - mean.x),
                              high(p[n][h]) * (d_p[n][2 * h + 1] - mean.y));
        }
        products_begin();
        multiply_packed<kMet>(d_k, d_s, queries, true);
        products_commit();
        before = stage;
      }
      positions.ask(m, w, group);
      products_wait<0>();
      changed(d_k);
      changed(d_v);
      warp_arrives(&room.met_free[before]);
    }
    if (m.row_dots != nullptr) {
      float dots[2] = {};
      add_dots(dots, room.values[own.stage], group, d_v, 1);
      add_dots(dots, room.keys[own.stage], group, d_k, m.root);
      leave_dots(m, w, group, m.heads + w.head, dots);
    }

    meet_group(1 + group);  // the group's keys and values are read: the results go out there
    const WideRows wide{room.keys[own.stage], room.values[own.stage]};
    const Index column = (m.heads + w.head) * kTileColumns,
                values_column = column + m.kv_heads * kTileColumns;
    ValueSums of_values;
    if constexpr (Scaled) {
      of_values.take(m, w, wide.right, group, values_column, d_v);
      __syncwarp();
    }
    stage_rows(wide.right, group, d_v, 1.0F, 1.0F);
    copy_rows_out(m.d_qkv + (w.s.begin + w.first()) * m.width() + values_column, m.width(),
                  wide.right, group, w.s.length - w.first());
    __syncwarp();
    turn_out<Scaled>(m, w, positions, wide, group, column, d_k);
    if constexpr (Scaled) {
      of_values.leave(wide, group);
      meet_group(1 + group);
      leave_sums(m, w, wide, group, 0, column);
      leave_sums(m, w, wide, group, 1, values_column);
    }
    fence_to_engines();
    warp_arrives(&room.own_free[own.stage]);
  }
}

template <bool Scaled>
__global__ void __launch_bounds__(kBlockThreads, 1)
    warpgroup_d_key_value(const __grid_constant__ CUtensorMap qkv,
                          const __grid_constant__ CUtensorMap d_o,
                          const __grid_constant__ AttentionCall<Number> m, int pairs) {
  extern __shared__ __align__(1024) std::byte shared[];
  KeyRoom& room = *reinterpret_cast<KeyRoom*>(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&room.own_here[i], 1);
      barrier_init(&room.own_free[i], kUserWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&room.met_here[i], 2);  // the tiles' bytes, the rows' numbers
      barrier_init(&room.met_free[i], kUserWarps);
    }
    barriers_ready();
  }
  __syncthreads();
  const int group = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kGroup, 0);
  if (group == 0) {
    give_registers<kKeyFetch>();
    const int warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kWarp, 0);
    if (warp > 0)
      fetch_rows(room, m, pairs, warp - 1);
    else if (threadIdx.x == 0)
      fetch_for_keys(room, qkv, d_o, m, pairs);
  } else {
    take_registers<kKeyMultiply>();
    multiply_for_keys<Scaled>(room, m, pairs, group - 1);
  }
}

/// d_scale += scale_sums over scale, of 32 columns: warp w takes sequences w, w + 8, ..., then the
/// warps' sums are added one after another.
constexpr int kSumWarps = 8;
__global__ void __launch_bounds__(kSumWarps* kWarp)
    add_scale_sums(const __grid_constant__ AttentionCall<Number> m) {
  __shared__ float sums[kSumWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const Index column = static_cast<Index>(blockIdx.x) * kWarp + lane;  // 128 a head: no rest
  float sum = 0;
  for (int s = warp; s < m.sequences; s += kSumWarps) {
    const Sequence sequence = sequence_of(m.table, s);
    const float* from = m.scale_sums + scale_part(s, sequence.begin) * m.width() + column;
    const int parts = ceil_div(sequence.length, kScaleRows);
#pragma unroll 8
    for (int part = 0; part < parts; ++part) sum += from[part * m.width()];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < kSumWarps; ++w) sum += sums[w][lane];
  m.d_scale[column] += sum / m.scale[column];
}

/// row_dots of 32 rows: warp w adds the parts w, w + 8, ..., then the warps' sums are added one
/// after another.
__global__ void __launch_bounds__(kSumWarps* kWarp)
    add_dot_parts(const __grid_constant__ AttentionCall<Number> m) {
  __shared__ float sums[kSumWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const Index row = static_cast<Index>(blockIdx.x) * kWarp + lane;
  float sum = 0;
#pragma unroll 8
  for (int part = warp; part < m.heads + m.kv_heads; part += kSumWarps)
    if (row < m.rows) sum += m.dot_part(row, part);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || row >= m.rows) return;
  for (int w = 1; w < kSumWarps; ++w) sum += sums[w][lane];
  m.row_dots[row] = sum;
}

template <bool Scaled>
void launch_both(const AttentionCall<Number>& c, Index rows, Index max_length, int processors,
                 cudaStream_t stream) {
  const int pairs = static_cast<int>(ceil_div<Index>(max_length, 2 * kBlockRows));
  const Index width = static_cast<Index>(c.heads) * kTileColumns;
  const CUtensorMap qkv = map_of(c.qkv, rows, c.width(), c.width()),
                    d_o = map_of(c.d_o, rows, width, width);
  launch_walk(warpgroup_d_query<Scaled>, c, c.heads, pairs, processors,
              static_cast<int>(sizeof(QueryRoom)), stream, qkv, d_o, c, pairs);
  launch_walk(warpgroup_d_key_value<Scaled>, c, c.kv_heads, pairs, processors,
              static_cast<int>(sizeof(KeyRoom)), stream, qkv, d_o, c, pairs);
}

}  // namespace

void warpgroup_backward(const AttentionCall<Number>& c, Index rows, Index max_length,
                        int processors, cudaStream_t stream) {
  if (c.scale == nullptr)
    launch_both<false>(c, rows, max_length, processors, stream);
  else
    launch_both<true>(c, rows, max_length, processors, stream);
  if (c.row_dots != nullptr)
    add_dot_parts<<<static_cast<unsigned>(ceil_div<Index>(c.rows, kWarp)), kSumWarps * kWarp, 0,
                    stream>>>(c);
  if (c.scale != nullptr)
    add_scale_sums<<<static_cast<unsigned>(c.width() / kWarp), kSumWarps * kWarp, 0, stream>>>(c);
}

}  // namespace mixlora::cuda
