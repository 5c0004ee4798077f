// Rope with the low-rank updates of q, k and v in the same pass.
#include <algorithm>
#include <array>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/low_rank.cuh"

namespace mixlora {
namespace {

using cuda::Index;
using cuda::kWarp;
using cuda::Update;
using Number = __nv_bfloat16;

constexpr int kRows = cuda::kUpdateRows, kWarps = cuda::kUpdateWarps;

struct RopeCall {
  Number* y;
  Index stride;
  const float* table;
  const std::int32_t* ids;
  int rows, heads, turned;  // heads to walk; those of q and k
  int heads_a_block;
  int first[3];  // head of q, k, v
  Update updates[3];
};

/// grid (rows / 64, heads): a row of q, k, v read and written. A lane has D / 16 columns of each
/// half of a head, so that a pair of rope's is in one lane. B of the block's heads comes first.
/// Scaled: some update has a scale.
template <int D, int C, bool Scaled>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    rope_kernel(const __grid_constant__ RopeCall m) {
  extern __shared__ __align__(16) std::byte memory[];
  constexpr int kOwn = D / 16, kHalf = D / 2;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int row0 = (static_cast<int>(blockIdx.x) * kWarps + warp) * kRows;
  const int begin = static_cast<int>(blockIdx.y) * m.heads_a_block,
            end = min(m.heads, begin + m.heads_a_block);
  const auto part_of = [&](int head) {
    return head >= m.first[2] ? 2 : head >= m.first[1] ? 1 : 0;
  };
  const std::uint32_t tiles = cuda::shared_address(memory);
  constexpr int kTile = C * cuda::kUpdateTile<kOwn>;  // of half a head
  for (int head = begin; head < end; ++head) {
    const int part = part_of(head);
    const Update& u = m.updates[part];
    if (u.a == nullptr) continue;
    for (int half = 0; half < 2; ++half)
      cuda::fetch_update<kOwn, C>(
          tiles + static_cast<std::uint32_t>((2 * (head - begin) + half) * kTile),
          u.b + static_cast<Index>((head - m.first[part]) * D + half * kHalf) * u.rank, u.rank,
          static_cast<int>(threadIdx.x), kWarps * kWarp);
  }
  cuda::fetch_commit();

  const auto row_of = [&](int i) { return static_cast<Index>(min(row0 + i, m.rows - 1)); };
  float cosine[2][kOwn], sine[2][kOwn];
  Number* y[2];
  bool live[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Index row = row_of(2 * q + i);
    live[i] = row0 + 2 * q + i < m.rows;
    y[i] = m.y + row * m.stride + kOwn * g;
    const float* angles = m.table + static_cast<Index>(m.ids[4 * row + 1]) * D + kOwn * g;
#pragma unroll
    for (int j = 0; j < kOwn; j += 4) {
      const float4 c = __ldg(reinterpret_cast<const float4*>(angles + j)),
                   s = __ldg(reinterpret_cast<const float4*>(angles + kHalf + j));
      cosine[i][j] = c.x, cosine[i][j + 1] = c.y, cosine[i][j + 2] = c.z, cosine[i][j + 3] = c.w;
      sine[i][j] = s.x, sine[i][j + 1] = s.y, sine[i][j + 2] = s.z, sine[i][j + 3] = s.w;
    }
  }
  unsigned words[2][2][kOwn / 2];  // half, row; of the head to come
  const auto load = [&](int head) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        cuda::load_words<kOwn>(words[half][i], y[i] + head * D + half * kHalf);
  };
  load(begin);
  cuda::fetch_wait<0>();
  __syncthreads();

  uint2 a[C] = {};
  int last = -1;
  for (int head = begin; head < end; ++head) {
    const int part = part_of(head);
    const Update& u = m.updates[part];
    const bool adds = u.a != nullptr;
    if (part != last && adds)
#pragma unroll
      for (int c = 0; c < C; ++c) a[c] = u.ranks(row_of(g), c, q);
    last = part;
    float sums[2][kOwn / 2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[half][j][i] = cuda::low(words[half][i][j]);
          sums[half][j][2 + i] = cuda::high(words[half][i][j]);
        }
    if (head + 1 < end) load(head + 1);
    if (adds)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kOwn / 2; ++j)
          cuda::add_update<kOwn, C>(
              sums[half][j],
              tiles + static_cast<std::uint32_t>((2 * (head - begin) + half) * kTile), a, j, lane);
    if (Scaled && adds && u.scale != nullptr)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kOwn / 2; ++j) {
          const float2 by = __ldg(reinterpret_cast<const float2*>(
              u.scale + (head - m.first[part]) * D + half * kHalf + kOwn * g + 2 * j));
#pragma unroll
          for (int i = 0; i < 2; ++i) sums[half][j][i] *= by.x, sums[half][j][2 + i] *= by.y;
        }
    const bool turned = head < m.turned;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned out[2][kOwn / 2];
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j) {
        float left[2], right[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          left[e] = sums[0][j][2 * e + i], right[e] = sums[1][j][2 * e + i];
          if (!turned) continue;
          const float c = cosine[i][2 * j + e], s = sine[i][2 * j + e], l = left[e];
          left[e] = l * c - right[e] * s;
          right[e] = right[e] * c + l * s;
        }
        out[0][j] = cuda::pack2(left[0], left[1]);
        out[1][j] = cuda::pack2(right[0], right[1]);
      }
      if (!live[i]) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        cuda::store_words<kOwn>(y[i] + head * D + half * kHalf, out[half]);
    }
  }
}

}  // namespace

void CudaBackend::lora_rope(Tensor y, const std::array<LowRank, 3>& updates, ConstTensor table,
                            RowIds ids, Heads h) {
  const Index width[3] = {h.heads * h.head_dim, h.kv_heads * h.head_dim, h.kv_heads * h.head_dim};
  Index rank = 0;
  bool scaled = false;
  bool fits = y.dtype == DType::bf16 && cuda::by_eights(y) &&
              (h.head_dim == 64 || h.head_dim == 128) && table.contiguous() &&
              table.cols() == h.head_dim && ids.contiguous() &&
              y.cols() == width[0] + width[1] + width[2] && y.rows() < (Index{1} << 24);
  for (std::size_t i = 0; i < 3; ++i) {
    if (!updates[i].a) continue;
    fits = fits && cuda::takes_update(updates[i], y.rows(), width[i]);
    rank = std::max(rank, updates[i].a.cols());
    scaled = scaled || updates[i].scale;
  }
  if (!fits || rank == 0) return Backend::lora_rope(y, updates, table, ids, h);
  if (y.rows() == 0) return;
  RopeCall m{};
  m.y = cuda::data<Number>(y);
  m.stride = y.stride;
  m.table = cuda::data<float>(table);
  m.ids = ids.ptr<std::int32_t>();
  m.rows = static_cast<int>(y.rows());
  m.turned = static_cast<int>(h.heads + h.kv_heads);
  m.heads = m.turned + (updates[2].a ? static_cast<int>(h.kv_heads) : 0);
  m.first[1] = static_cast<int>(h.heads);
  m.first[2] = m.turned;
  for (std::size_t i = 0; i < 3; ++i) m.updates[i] = cuda::update_of(updates[i]);
  // Few heads a block where rows are few; the rows' angles are read by every block of theirs.
  const int blocks = cuda::ceil_div(m.rows, kWarps * kRows);
  m.heads_a_block = rank > 32 ? 2 : rank > 16 ? 4 : 8;
  while (m.heads_a_block > 1 && blocks * cuda::ceil_div(m.heads, m.heads_a_block) < 4 * processors_)
    m.heads_a_block /= 2;
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(cuda::ceil_div(m.heads, m.heads_a_block)));
  cuda::with_rank_chunks(rank, [&](auto chunks) {
    const auto shared = static_cast<std::size_t>(m.heads_a_block * chunks() * h.head_dim * 32);
    const auto run = [&](auto kernel) { kernel<<<grid, kWarps * kWarp, shared, stream_>>>(m); };
    if (h.head_dim == 64)
      run(scaled ? rope_kernel<64, chunks(), true> : rope_kernel<64, chunks(), false>);
    else
      run(scaled ? rope_kernel<128, chunks(), true> : rope_kernel<128, chunks(), false>);
  });
  cuda::launched("lora_rope");
}

}  // namespace mixlora
