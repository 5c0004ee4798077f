// a B^T added in passes that read and write y anyway: rope's, and the sum's before an RMSNorm.
//
// A warp takes 8 rows. B's columns are the tensor core's 16 rows and the 8 rows its columns, so
// that a lane has eight neighbouring columns of two rows, 2q and 2q + 1, and the ranks' order is
// its own: lane q takes four neighbours of a sixteen.
#include <algorithm>
#include <array>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/tensor_core.cuh"

namespace mixlora {
namespace {

using cuda::Index;
using cuda::kWarp;
using Number = __nv_bfloat16;

constexpr int kRows = 8, kWarps = 8;  // rows of a warp; warps of a block
constexpr int kMostChunks = 4;        // sixteens of ranks that these kernels take
constexpr int kTile = 64;             // columns that a warp of the norm takes at a time

/// An update as kernels see it; `a` is null where there is none.
struct Update {
  const Number *a, *b;
  Index stride_a;
  int rank;
  /// This lane's four ranks of chunk c, of one row of a or of B.
  __device__ uint2 ranks(const Number* row, int c, int q) const {
    const int at = 16 * c + 4 * q;
    return at < rank ? __ldg(reinterpret_cast<const uint2*>(row + at)) : make_uint2(0, 0);
  }
};

/// y += a B^T for columns `column` (of this lane's first rows) and `column` + 1 of 8 rows:
/// sums[0], [1] are rows 2q, 2q + 1 of the first, [2], [3] of the second.
template <int C>
__device__ void add_update(float (&sums)[4], const Update& u, const uint2 (&a)[C], int column,
                           int q) {
  const Number* b = u.b + static_cast<Index>(column) * u.rank;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const uint2 first = u.ranks(b, c, q), second = u.ranks(b + u.rank, c, q);
    cuda::mma(sums, first.x, second.x, first.y, second.y, a[c].x, a[c].y);
  }
}

/// Words of N neighbouring numbers, in one access.
template <int N> __device__ void load_words(unsigned (&to)[N / 2], const Number* p) {
  if constexpr (N == 8) {
    const uint4 x = *reinterpret_cast<const uint4*>(p);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
    static_assert(N == 4);
    const uint2 x = *reinterpret_cast<const uint2*>(p);
    to[0] = x.x, to[1] = x.y;
  }
}
template <int N> __device__ void store_words(Number* p, const unsigned (&x)[N / 2]) {
  if constexpr (N == 8)
    *reinterpret_cast<uint4*>(p) = make_uint4(x[0], x[1], x[2], x[3]);
  else
    *reinterpret_cast<uint2*>(p) = make_uint2(x[0], x[1]);
}

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
/// half of a head, so that a pair of rope's is in one lane.
template <int D, int C>
__global__ void __launch_bounds__(kWarps* kWarp) rope_kernel(const __grid_constant__ RopeCall m) {
  constexpr int kOwn = D / 16, kHalf = D / 2;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int row0 = (static_cast<int>(blockIdx.x) * kWarps + warp) * kRows;
  if (row0 >= m.rows) return;
  const auto row_of = [&](int i) { return min(row0 + i, m.rows - 1); };
  float cosine[2][kOwn], sine[2][kOwn];
  Number* y[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row_of(2 * q + i);
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
  const int begin = static_cast<int>(blockIdx.y) * m.heads_a_block,
            end = min(m.heads, begin + m.heads_a_block);
  uint2 a[C] = {};
  int part = -1;
  for (int head = begin; head < end; ++head) {
    const int own = head >= m.first[2] ? 2 : head >= m.first[1] ? 1 : 0;
    const Update& u = m.updates[own];
    if (own != part && u.a != nullptr)
#pragma unroll
      for (int c = 0; c < C; ++c) a[c] = u.ranks(u.a + row_of(g) * u.stride_a, c, q);
    part = own;

    unsigned words[2][2][kOwn / 2];  // half, row
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i) load_words<kOwn>(words[half][i], y[i] + head * D + half * kHalf);
    float sums[2][kOwn / 2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[half][j][i] = cuda::low(words[half][i][j]);
          sums[half][j][2 + i] = cuda::high(words[half][i][j]);
        }
        if (u.a != nullptr)
          add_update<C>(sums[half][j], u, a,
                        (head - m.first[own]) * D + half * kHalf + kOwn * g + 2 * j, q);
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn / 2; ++j) {
        float left[2], right[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          left[e] = sums[0][j][2 * e + i], right[e] = sums[1][j][2 * e + i];
          if (head >= m.turned) continue;
          const float c = cosine[i][2 * j + e], s = sine[i][2 * j + e], l = left[e];
          left[e] = l * c - right[e] * s;
          right[e] = right[e] * c + l * s;
        }
        words[0][i][j] = cuda::pack2(left[0], left[1]);
        words[1][i][j] = cuda::pack2(right[0], right[1]);
      }
      if (row0 + 2 * q + i >= m.rows) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_words<kOwn>(y[i] + head * D + half * kHalf, words[half][i]);
    }
  }
}

struct NormCall {
  Number *sum, *y;
  const Number *x, *delta;
  Index stride_sum, stride_y, stride_x, stride_delta;
  const float* w;
  float* r;
  int rows, cols;
  float eps;
  Update update;
};

/// grid (rows / 8): sum = x + delta + a B^T, y = sum r w. Two rows read, two written; the sums wait
/// in shared memory, each lane's own.
template <int C>
__global__ void __launch_bounds__(kWarps* kWarp, 3)
    norm_kernel(const __grid_constant__ NormCall m) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ float squares[kWarps][kRows];
  auto* kept = reinterpret_cast<uint4*>(memory);
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int row0 = static_cast<int>(blockIdx.x) * kRows;
  const auto row_of = [&](int i) { return static_cast<Index>(min(row0 + i, m.rows - 1)); };
  const Index rows[2] = {row_of(2 * q), row_of(2 * q + 1)};
  const bool live[2] = {row0 + 2 * q < m.rows, row0 + 2 * q + 1 < m.rows};
  uint2 a[C];
#pragma unroll
  for (int c = 0; c < C; ++c)
    a[c] = m.update.ranks(m.update.a + row_of(g) * m.update.stride_a, c, q);

  unsigned x[2][4], delta[2][4];
  const auto load = [&](int col) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_words<8>(x[i], m.x + rows[i] * m.stride_x + col);
      load_words<8>(delta[i], m.delta + rows[i] * m.stride_delta + col);
    }
  };
  const int first = warp * kTile + 8 * g, step = kWarps * kTile;
  if (first < m.cols) load(first);
  float own[2] = {};
  for (int col = first, at = threadIdx.x; col < m.cols; col += step, at += 2 * kWarps * kWarp) {
    float sums[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[j][i] = cuda::low(x[i][j]) + cuda::low(delta[i][j]);
        sums[j][2 + i] = cuda::high(x[i][j]) + cuda::high(delta[i][j]);
      }
    if (col + step < m.cols) load(col + step);
#pragma unroll
    for (int j = 0; j < 4; ++j) add_update<C>(sums[j], m.update, a, col + 2 * j, q);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = cuda::pack2(sums[j][i], sums[j][2 + i]);
        const float low = cuda::low(words[j]), high = cuda::high(words[j]);
        own[i] += low * low + high * high;  // as it is stored, so that rmsnorm(sum) gives the same
      }
      kept[at + i * kWarps * kWarp] = make_uint4(words[0], words[1], words[2], words[3]);
      if (live[i]) store_words<8>(m.sum + rows[i] * m.stride_sum + col, words);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int apart = 4; apart < kWarp; apart *= 2)
      own[i] += __shfl_xor_sync(cuda::kAll, own[i], apart);
    if (g == 0) squares[warp][2 * q + i] = own[i];
  }
  __syncthreads();
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += squares[w][2 * q + i];
    inverse[i] = 1.0F / sqrtf(sum / static_cast<float>(m.cols) + m.eps);
    if (warp == 0 && g == 0 && live[i]) m.r[rows[i]] = inverse[i];
  }
  for (int col = first, at = threadIdx.x; col < m.cols; col += step, at += 2 * kWarps * kWarp) {
    const cuda::Eight w = cuda::load8(m.w + col);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 raw = kept[at + i * kWarps * kWarp];
      const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
      unsigned out[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        out[j] = cuda::pack2(cuda::low(words[j]) * inverse[i] * w.v[2 * j],
                             cuda::high(words[j]) * inverse[i] * w.v[2 * j + 1]);
      if (live[i]) store_words<8>(m.y + rows[i] * m.stride_y + col, out);
    }
  }
}

bool takes(const LowRank& u, Index rows, Index cols) {
  const Index rank = u.a.cols();
  return u.a.dtype == DType::bf16 && u.b.dtype == DType::bf16 && u.a.rows() == rows &&
         u.b.rows() == cols && u.b.cols() == rank && u.b.contiguous() && rank % 8 == 0 &&
         rank <= 16 * kMostChunks && cuda::by_eights(u.a) && cuda::by_eights(u.b);
}
Update update_of(const LowRank& u) {
  if (!u.a) return {};
  return {cuda::data<Number>(u.a), cuda::data<Number>(u.b), u.a.stride,
          static_cast<int>(u.a.cols())};
}
template <class F> void with_chunks(Index rank, F&& f) {
  switch (cuda::ceil_div<Index>(rank, 16)) {
    case 0:
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, kMostChunks>{});
  }
}

}  // namespace

void CudaBackend::lora_rope(Tensor y, const std::array<LowRank, 3>& updates, ConstTensor table,
                            RowIds ids, Heads h) {
  const Index width[3] = {h.heads * h.head_dim, h.kv_heads * h.head_dim, h.kv_heads * h.head_dim};
  Index rank = 0;
  bool fits = y.dtype == DType::bf16 && cuda::by_eights(y) &&
              (h.head_dim == 64 || h.head_dim == 128) && table.contiguous() &&
              table.cols() == h.head_dim && ids.contiguous() &&
              y.cols() == width[0] + width[1] + width[2] && y.rows() < (Index{1} << 24);
  for (std::size_t i = 0; i < 3; ++i) {
    if (!updates[i].a) continue;
    fits = fits && takes(updates[i], y.rows(), width[i]);
    rank = std::max(rank, updates[i].a.cols());
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
  for (std::size_t i = 0; i < 3; ++i) m.updates[i] = update_of(updates[i]);
  // Few heads a block where rows are few; the rows' angles are read by every block of theirs.
  const int blocks = cuda::ceil_div(m.rows, kWarps * kRows);
  m.heads_a_block = 8;
  while (m.heads_a_block > 1 && blocks * cuda::ceil_div(m.heads, m.heads_a_block) < 4 * processors_)
    m.heads_a_block /= 2;
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(cuda::ceil_div(m.heads, m.heads_a_block)));
  with_chunks(rank, [&](auto chunks) {
    if (h.head_dim == 64)
      rope_kernel<64, chunks()><<<grid, kWarps * kWarp, 0, stream_>>>(m);
    else
      rope_kernel<128, chunks()><<<grid, kWarps * kWarp, 0, stream_>>>(m);
  });
  cuda::launched("lora_rope");
}

void CudaBackend::add_lora_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                   const LowRank& update, ConstTensor w, float eps) {
  constexpr int kMostBytes = 96 << 10;  // of shared memory: every device from 8.0 on has them
  const Index shared = cuda::ceil_div<Index>(x.cols(), kWarps * kTile) * kWarps * kTile * kRows * 2;
  const auto even = [&x](const auto& t) {
    return t.dtype == DType::bf16 && cuda::by_eights(t) && t.rows() == x.rows() &&
           t.cols() == x.cols();
  };
  if (!update.a || !takes(update, x.rows(), x.cols()) || x.cols() % kTile != 0 ||
      shared > kMostBytes || !even(x) || !even(delta) || !even(sum) || !even(y) ||
      !cuda::by_eights(w) || w.numel() != x.cols() || r.numel() != x.rows() || !r.contiguous() ||
      x.rows() >= (Index{1} << 24))
    return Backend::add_lora_rmsnorm(sum, y, r, x, delta, update, w, eps);
  if (x.rows() == 0) return;
  const NormCall m{cuda::data<Number>(sum),
                   cuda::data<Number>(y),
                   cuda::data<Number>(x),
                   cuda::data<Number>(ConstTensor(delta)),
                   sum.stride,
                   y.stride,
                   x.stride,
                   delta.stride,
                   cuda::data<float>(w),
                   cuda::data<float>(r),
                   static_cast<int>(x.rows()),
                   static_cast<int>(x.cols()),
                   eps,
                   update_of(update)};
  with_chunks(update.a.cols(), [&](auto chunks) {
    auto* kernel = norm_kernel<chunks()>;
    cuda::admit_shared(reinterpret_cast<const void*>(kernel), kMostBytes);
    kernel<<<static_cast<unsigned>(cuda::ceil_div(m.rows, kRows)), kWarps * kWarp,
             static_cast<std::size_t>(shared), stream_>>>(m);
  });
  cuda::launched("add_lora_rmsnorm");
}

}  // namespace mixlora
