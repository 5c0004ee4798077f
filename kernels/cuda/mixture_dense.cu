// One expert of many ranks without a choice: LoRA, DoRA. Every row meets the same factors, so
// cuBLASLt multiplies, range of rows by range of rows, and one pass over the columns stands between
// its products: a range's u and v, and what dropout leaves of h, are in working memory as bf16.
#include <algorithm>

#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/mixture.cuh"
#include "kernels/cuda/rank_tiles.cuh"

namespace mixlora {
namespace {

using cuda::ceil_div;
using cuda::Eight;
using cuda::Index;
using cuda::kChunk;
using cuda::kWarp;
using cuda::Number;
using cuda::Rows;
using Call = cuda::TileCall;

/// Up to so many ranks the kernels of mixture_tiles.cu are faster.
constexpr Index kFewRanks = 32;
constexpr Index kRangeStep = 128;  // rows of a range are a multiple
constexpr int kWarps = 8;          // of a block of gradients_kernel
constexpr int kBlockRows = 64;     // of its rows

/// `outs`: the other views of F columns that the pass over them walks.
template <class... View> bool takes(const Mixture& m, const View&... outs) {
  const Slots& s = m.slots;
  return m.gate_up.dtype == DType::bf16 && s.experts == 1 && s.count == 1 && !s.expert &&
         !s.weight && s.rank > kFewRanks && m.gate_up.cols() % (2 * kChunk) == 0 &&
         cuda::aligned(m.gate_up, m.weights.gate_scale, m.weights.up_scale, outs...);
}
/// Rows of working memory.
template <class Room> Tensor taken(Room& space, Index rows, Index columns) {
  return {space.template take<Number>(rows * columns), {rows, columns}, DType::bf16, Device::cuda};
}

/// A call's factors as matrices: B1, B3 (F, R), A2 (R, F).
ConstTensor matrix(ConstTensor t) { return t ? t.reshaped({t.rows(), t.cols()}) : t; }
Tensor matrix(Tensor t) { return t ? t.reshaped({t.rows(), t.cols()}) : t; }

/// Rows of a range, so that what `per_row` says fits `bytes`, beside what cuts of it are rounded up
/// to, and ranges are alike.
Index range_of(Index rows, std::size_t per_row, std::size_t bytes) {
  bytes -= 4096;
  const auto most =
      std::max(kRangeStep, static_cast<Index>(bytes / std::max<std::size_t>(per_row, 1)) /
                               kRangeStep * kRangeStep);
  const Index ranges = ceil_div(rows, most);
  return ceil_div(ceil_div(rows, ranges), kRangeStep) * kRangeStep;
}

/// Eight columns of a row of c + B a by DoRA's scale, if there is one.
__device__ Eight scaled(Eight x, const float* scale, Index col) {
  if (scale == nullptr) return x;
  const Eight s = cuda::load8(scale + col);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x.v[i] *= s.v[i];
  return x;
}
/// Bit i: column i of the eight is kept.
__device__ unsigned kept(const Call& m, Index row, Index col) {
  if (m.threshold == 0) return 0xffU;
  return cuda::kept_bits(m.bits(m.id_of(row), 0, col / kChunk), m.threshold << 16);
}
__device__ Eight masked(Eight x, unsigned kept) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if ((kept >> i & 1) == 0) x.v[i] = 0;
  return x;
}

/// h of a range's rows from u and v, and what dropout leaves of it.
struct Hidden {
  Call m;
  Rows<const Number> gate, up;
  Rows<Number> out, left;  // left: may be absent
  template <bool Aligned> __device__ void at(Index row, Index col, int /*count*/) const {
    const Eight u = scaled(cuda::load8(gate.at(row, col)), m.gate_scale, col),
                v = scaled(cuda::load8(up.at(row, col)), m.up_scale, col);
    Eight h;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) h.v[i] = cuda::activate(m.activation, u.v[i]).value * v.v[i];
    cuda::store8(out.at(row, col), h);
    if (left.data != nullptr) cuda::store8(left.at(row, col), masked(h, kept(m, row, col)));
  }
};

/// Of a range's rows. `left` holds q A2 and gets what dropout leaves of h; absent without A2.
struct Gradients {
  Call m;
  Rows<const Number> gate, up, d_out;
  Rows<Number> left, d_gate_up;
  float *gate_parts, *up_parts;  // (blocks of rows, F): sums of DoRA's scales
  Index rows;
};

/// A block 256 columns of kBlockRows rows, a warp every eighth of them.
template <bool Scaled>
__global__ void __launch_bounds__(kWarps* kWarp) gradients_kernel(const Gradients g) {
  const Call& m = g.m;
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const Index col = (static_cast<Index>(blockIdx.x) * kWarp + lane) * kChunk,
              begin = static_cast<Index>(blockIdx.y) * kBlockRows,
              end = min(begin + kBlockRows, g.rows);
  const bool live = col < m.width;
  Eight scale[2], sums[2] = {};  // of gate, of up
  if constexpr (Scaled)
    if (live) scale[0] = cuda::load8(m.gate_scale + col), scale[1] = cuda::load8(m.up_scale + col);
  for (Index row = begin + warp; live && row < end; row += kWarps) {
    const Eight u = cuda::load8(g.gate.at(row, col)), v = cuda::load8(g.up.at(row, col)),
                from = cuda::load8(g.d_out.at(row, col));
    Eight back = {}, h, d_gate, d_up;
    unsigned own = 0;
    if (g.left.data != nullptr) {
      own = kept(m, row, col);
      back = masked(cuda::load8<Number>(g.left.at(row, col)), own);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float d_h = from.v[i] + m.scale * m.keep * back.v[i];
      const float gate_scale = Scaled ? scale[0].v[i] : 1, up_scale = Scaled ? scale[1].v[i] : 1;
      const auto act = cuda::activate(m.activation, gate_scale * u.v[i]);
      const float up = up_scale * v.v[i], d_u = d_h * up * act.slope, d_v = d_h * act.value;
      h.v[i] = act.value * up;
      d_gate.v[i] = gate_scale * d_u;
      d_up.v[i] = up_scale * d_v;
      if constexpr (Scaled) {
        sums[0].v[i] += d_u * u.v[i];
        sums[1].v[i] += d_v * v.v[i];
      }
    }
    cuda::store8(g.d_gate_up.at(row, col), d_gate);
    cuda::store8(g.d_gate_up.at(row, m.width + col), d_up);
    if (g.left.data != nullptr) cuda::store8(g.left.at(row, col), masked(h, own));
  }
  if constexpr (Scaled) {
    __shared__ float shared[2][kWarps][kWarp * kChunk];
#pragma unroll
    for (int side = 0; side < 2; ++side)
      cuda::store8(&shared[side][warp][lane * kChunk], sums[side]);
    __syncthreads();
    const int c = static_cast<int>(threadIdx.x);  // a column of the block's
    const Index at = static_cast<Index>(blockIdx.x) * kWarp * kChunk + c;
    if (at >= m.width) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared[side][w][c];
      (side == 0 ? g.gate_parts : g.up_parts)[blockIdx.y * m.width + at] = sum;
    }
  }
}

/// The gate's or the up projection's half of rows of both.
template <class View> View half(const View& t, bool up) {
  const Index width = t.cols() / 2;
  return up ? t.col_range(width, 2 * width) : t.col_range(0, width);
}

}  // namespace

ConstTensor CudaBackend::updated_half(const Mixture& m, bool up, Index begin, Index end,
                                      Tensor sums) {
  const ConstTensor core = half(m.gate_up.row_range(begin, end), up),
                    b = up ? m.weights.up_b : m.weights.gate_b;
  if (!b || !m.a) return core;
  const Tensor to = half(sums.row_range(0, end - begin), up);
  product(to, half(m.a.row_range(begin, end), up), false, matrix(b), true, 1, 1, core);
  return to;
}

bool CudaBackend::dense_mixture(Tensor out, Tensor z, const Mixture& m) {
  if (!takes(m, out)) return false;
  const Call c = cuda::call_of<Number>(m);
  const Index rows = c.rows, width = c.width;
  const bool down = z && m.weights.down_a, masks = down && c.threshold != 0,
             factors = m.a && (m.weights.gate_b || m.weights.up_b);
  Room space = room();
  const std::size_t per_row =
      static_cast<std::size_t>(width) * sizeof(Number) * ((factors ? 2 : 0) + (masks ? 1 : 0));
  const Index length = range_of(rows, per_row, space.left());
  const Tensor sums = factors ? taken(space, length, 2 * width) : Tensor(),
               left = masks ? taken(space, length, width) : Tensor();
  const Tensor all = out.reshaped({rows, width});
  for (Index begin = 0; begin < rows; begin += length) {
    const Index end = std::min(rows, begin + length);
    const auto own = [&](const auto& t) { return t.row_range(begin, end); };
    const ConstTensor gate = updated_half(m, false, begin, end, sums),
                      up = updated_half(m, true, begin, end, sums);
    Call range = c;
    range.ids += 4 * begin;
    cuda::each_chunk(stream_, "mixture", end - begin, width, true,
                     Hidden{range, cuda::rows_of<Number>(gate), cuda::rows_of<Number>(up),
                            cuda::rows_of<Number>(own(all)), cuda::rows_of<Number>(left)});
    if (down)
      product(own(z), masks ? left.row_range(0, end - begin) : own(all), false,
              matrix(m.weights.down_a), true, c.scale * c.keep, 0);
  }
  return true;
}

bool CudaBackend::dense_mixture_backward(Tensor d_gate_up, Tensor d_weight, Tensor p,
                                         const MixtureGrads& grads, ConstTensor d_out,
                                         ConstTensor q, const Mixture& m) {
  const MixtureWeights& w = m.weights;
  if (!takes(m, d_out, d_gate_up) || (d_weight && !m.per_slot) || !w.gate_scale != !w.up_scale)
    return false;
  const Call c = cuda::call_of<Number>(m);
  const Index rows = c.rows, width = c.width;
  const bool down = q && w.down_a, factors = m.a && (w.gate_b || w.up_b),
             scales = static_cast<bool>(w.gate_scale);
  Room space = room();
  const std::size_t blocks_bytes = static_cast<std::size_t>(width) * 2 * sizeof(float),
                    per_row = static_cast<std::size_t>(width) * sizeof(Number) *
                                  ((factors ? 2 : 0) + (down ? 1 : 0)) +
                              blocks_bytes / kBlockRows;
  const Index length = range_of(rows, per_row, space.left() - blocks_bytes),
              blocks = ceil_div<Index>(length, kBlockRows);
  const Tensor sums = factors ? taken(space, length, 2 * width) : Tensor(),
               left = down ? taken(space, length, width) : Tensor();
  float* parts = scales ? space.take<float>(2 * blocks * width) : nullptr;
  const ConstTensor from = d_out.reshaped({rows, width});
  for (Index begin = 0; begin < rows; begin += length) {
    const Index end = std::min(rows, begin + length), count = end - begin;
    const auto own = [&](const auto& t) { return t.row_range(begin, end); };
    const ConstTensor gate = updated_half(m, false, begin, end, sums),
                      up = updated_half(m, true, begin, end, sums);
    const Tensor back = down ? left.row_range(0, count) : Tensor();
    if (down) product(back, own(q), false, matrix(w.down_a), false, 1, 0);
    Gradients g{c,
                cuda::rows_of<Number>(gate),
                cuda::rows_of<Number>(up),
                cuda::rows_of<Number>(own(from)),
                cuda::rows_of<Number>(back),
                cuda::rows_of<Number>(own(d_gate_up)),
                parts,
                scales ? parts + blocks * width : nullptr,
                count};
    g.m.ids += 4 * begin;
    const dim3 grid(static_cast<unsigned>(ceil_div<Index>(width, kWarp * kChunk)),
                    static_cast<unsigned>(ceil_div<Index>(count, kBlockRows)));
    (scales ? gradients_kernel<true>
            : gradients_kernel<false>)<<<grid, kWarps * kWarp, 0, stream_>>>(g);
    cuda::launched("mixture_backward");
    if (scales)
      for (const bool is_up : {false, true})
        if (const Tensor to = is_up ? grads.up_scale : grads.gate_scale)
          cuda::add_partials(stream_, "mixture_backward", cuda::data<float>(to),
                             is_up ? g.up_parts : g.gate_parts, grid.y, width);
    if (down && grads.down_a)
      product(matrix(grads.down_a), own(q), true, back, false, c.scale * c.keep, 1);
  }
  if (p && (!w.gate_b || !w.up_b)) zero(p);
  for (const bool up : {false, true}) {
    const ConstTensor b = up ? w.up_b : w.gate_b, d = half(ConstTensor(d_gate_up), up);
    const Tensor d_b = up ? grads.up_b : grads.gate_b;
    if (p && b) product(half(p, up), d, false, matrix(b), false, c.scale, 0);
    if (m.a && d_b) product(matrix(d_b), d, true, half(m.a, up), false, 1, 1);
  }
  return true;
}

}  // namespace mixlora
