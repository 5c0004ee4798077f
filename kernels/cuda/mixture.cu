// The gated feed-forward mixture: which kernels take a call, and the plain ones for every shape.
//
// The plain kernels recompute a column of a slot wherever they need it. They are the parity mode
// (f32) and serve odd shapes; mixture_tiles.cu has the fast ones.
#include <algorithm>
#include <stdexcept>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/mixture.cuh"

namespace mixlora {
namespace {

using cuda::Index;
using cuda::MixtureCall;
using cuda::to_float;

constexpr int kThreads = 256;
constexpr int kRanks = 8;  // ranks of one pass over the columns

template <class T> __device__ float dot(const T* x, const T* y, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += to_float(x[i]) * to_float(y[i]);
  return sum;
}

/// mask s of column f of row n for expert e: 0 where dropped.
template <class T> __device__ float keep(const MixtureCall<T>& m, Index n, int e, Index f) {
  if (m.threshold == 0) return m.scale;
  const Philox4 bits = m.bits(m.id_of(n), e, f / 8);
  const std::uint32_t own = (bits.v[f % 8 / 2] >> (16 * (f % 2))) & 0xffffU;
  return own < m.threshold ? 0.0F : m.scale * m.keep;
}

struct Column {
  float gate_sum, up_sum, gate_scale, up_scale, up, h;
  cuda::Activated gate;
};
template <class T> __device__ Column column(const MixtureCall<T>& m, Index n, int e, Index f) {
  Column c{to_float(m.gate_up[n * 2 * m.width + f]),
           to_float(m.gate_up[n * 2 * m.width + m.width + f]),
           1,
           1,
           0,
           0,
           {}};
  if (e >= 0) {
    const Index at = e * m.width + f;
    if (m.a != nullptr) {
      const T* a1 = m.a + n * 2 * m.experts * m.rank + e * m.rank;
      if (m.gate_b != nullptr) c.gate_sum += dot(m.gate_b + at * m.rank, a1, m.rank);
      if (m.up_b != nullptr) c.up_sum += dot(m.up_b + at * m.rank, a1 + m.experts * m.rank, m.rank);
    }
    if (m.gate_scale != nullptr) c.gate_scale = m.gate_scale[at];
    if (m.up_scale != nullptr) c.up_scale = m.up_scale[at];
  }
  c.gate = cuda::activate(m.activation, c.gate_scale * c.gate_sum);
  c.up = c.up_scale * c.up_sum;
  c.h = c.gate.value * c.up;
  return c;
}

/// The gradient of one column of one slot: of c + B a after DoRA's scales, and before them.
struct ColumnGradient {
  float d_u, d_v, d_gate, d_up;
};
template <class T>
__device__ ColumnGradient gradient(const MixtureCall<T>& m, const Column& c, Index n, int k, int e,
                                   Index f) {
  const Index slot_row = (m.per_slot ? k * m.rows : 0) + n;
  float d_h = to_float(m.d_out[slot_row * m.width + f]);
  if (m.q != nullptr && m.down_a != nullptr && e >= 0) {
    const T* q = m.q + (slot_row * m.experts + e) * m.rank;
    float sum = 0;
    for (int r = 0; r < m.rank; ++r)
      sum += to_float(m.down_a[(e * m.rank + r) * m.width + f]) * to_float(q[r]);
    d_h += keep(m, n, e, f) * sum;
  }
  if (!m.per_slot) d_h *= m.weight_of(n, k);
  const float d_u = d_h * c.up * c.gate.slope, d_v = d_h * c.gate.value;
  return {d_u, d_v, d_u * c.gate_scale, d_v * c.up_scale};
}

template <class T> __device__ bool empty(const MixtureCall<T>& m, Index n, int k) {
  return m.expert_of(n, k) < 0 && m.weight_of(n, k) == 0;
}

/// A thread a column of a row: `out`.
template <class T> __global__ void out_kernel(const MixtureCall<T> m) {
  const Index f = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x, n = blockIdx.y;
  if (f >= m.width) return;
  float sum = 0;
  for (int k = 0; k < m.slots; ++k) {
    const float h = empty(m, n, k) ? 0.0F : column(m, n, m.expert_of(n, k), f).h;
    if (m.per_slot)
      m.out[(k * m.rows + n) * m.width + f] = cuda::from_float<T>(h);
    else
      sum += m.weight_of(n, k) * h;
  }
  if (!m.per_slot) m.out[n * m.width + f] = cuda::from_float<T>(sum);
}

/// A block a slot: z_k, kRanks ranks in a pass.
template <class T> __global__ void z_kernel(const MixtureCall<T> m) {
  __shared__ float shared[cuda::kWarp];
  const Index n = blockIdx.x;
  const int k = static_cast<int>(blockIdx.y), e = m.expert_of(n, k);
  T* z = m.z + (n * m.slots + k) * m.rank;
  for (int r0 = 0; r0 < m.rank; r0 += kRanks) {
    float sums[kRanks] = {};
    if (e >= 0)
      for (Index f = threadIdx.x; f < m.width; f += blockDim.x) {
        const float h = keep(m, n, e, f) * column(m, n, e, f).h;
        for (int i = 0; i < kRanks && r0 + i < m.rank; ++i)
          sums[i] += to_float(m.down_a[(e * m.rank + r0 + i) * m.width + f]) * h;
      }
    for (int i = 0; i < kRanks; ++i) {
      const float sum = cuda::block_sum(sums[i], shared);
      __syncthreads();
      if (threadIdx.x == 0 && r0 + i < m.rank) z[r0 + i] = cuda::from_float<T>(sum);
    }
  }
}

/// A thread a column of a row: d_gate_up.
template <class T> __global__ void d_gate_up_kernel(const MixtureCall<T> m) {
  const Index f = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x, n = blockIdx.y;
  if (f >= m.width) return;
  float d_gate = 0, d_up = 0;
  for (int k = 0; k < m.slots; ++k) {
    if (empty(m, n, k)) continue;
    const int e = m.expert_of(n, k);
    const auto g = gradient(m, column(m, n, e, f), n, k, e, f);
    d_gate += g.d_gate;
    d_up += g.d_up;
  }
  m.d_gate_up[n * 2 * m.width + f] = cuda::from_float<T>(d_gate);
  m.d_gate_up[n * 2 * m.width + m.width + f] = cuda::from_float<T>(d_up);
}

/// A block a slot: d_weight and the slot's part of p (p is zeroed before).
template <class T> __global__ void slot_kernel(const MixtureCall<T> m) {
  __shared__ float shared[cuda::kWarp];
  const Index n = blockIdx.x;
  const int k = static_cast<int>(blockIdx.y), e = m.expert_of(n, k);
  const bool skip = empty(m, n, k);
  if (m.d_weight != nullptr) {
    float sum = 0;
    for (Index f = threadIdx.x; !skip && f < m.width; f += blockDim.x)
      sum += column(m, n, e, f).h * to_float(m.d_out[n * m.width + f]);
    sum = cuda::block_sum(sum, shared);
    __syncthreads();
    if (threadIdx.x == 0) {
      if (!skip && e >= 0 && m.q != nullptr && m.down_a != nullptr)
        sum += dot(m.z_in + (n * m.slots + k) * m.rank, m.q + (n * m.experts + e) * m.rank, m.rank);
      m.d_weight[n * m.slots + k] = sum;
    }
  }
  if (m.p == nullptr || e < 0 || skip) return;
  T* p1 = m.p + n * 2 * m.experts * m.rank + e * m.rank;
  for (int r0 = 0; r0 < m.rank; r0 += kRanks) {
    float gate[kRanks] = {}, up[kRanks] = {};
    for (Index f = threadIdx.x; f < m.width; f += blockDim.x) {
      const auto g = gradient(m, column(m, n, e, f), n, k, e, f);
      const Index at = (e * m.width + f) * m.rank + r0;
      for (int i = 0; i < kRanks && r0 + i < m.rank; ++i) {
        if (m.gate_b != nullptr) gate[i] += to_float(m.gate_b[at + i]) * g.d_gate;
        if (m.up_b != nullptr) up[i] += to_float(m.up_b[at + i]) * g.d_up;
      }
    }
    for (int i = 0; i < kRanks; ++i) {
      const float s1 = cuda::block_sum(gate[i], shared);
      __syncthreads();
      const float s3 = cuda::block_sum(up[i], shared);
      __syncthreads();
      if (threadIdx.x != 0 || r0 + i >= m.rank) continue;
      p1[r0 + i] = cuda::from_float<T>(m.scale * s1);
      p1[m.experts * m.rank + r0 + i] = cuda::from_float<T>(m.scale * s3);
    }
  }
}

/// A thread a column of an expert, kRanks ranks: adds its rows to the factors' gradients.
template <class T> __global__ void factors_kernel(const MixtureCall<T> m) {
  const Index f = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int e = static_cast<int>(blockIdx.y), r0 = static_cast<int>(blockIdx.z) * kRanks;
  if (f >= m.width) return;
  const int ranks = min(kRanks, m.rank - r0);
  float gate[kRanks] = {}, up[kRanks] = {}, down[kRanks] = {}, gate_scale = 0, up_scale = 0;
  for (Index n = 0; n < m.rows; ++n)
    for (int k = 0; k < m.slots; ++k) {
      if (m.expert_of(n, k) != e) continue;
      const Column c = column(m, n, e, f);
      const auto g = gradient(m, c, n, k, e, f);
      gate_scale += g.d_u * c.gate_sum;
      up_scale += g.d_v * c.up_sum;
      const T* a1 = m.a == nullptr ? nullptr : m.a + n * 2 * m.experts * m.rank + e * m.rank + r0;
      const bool down_too = m.d_down_a != nullptr && m.q != nullptr;
      const Index slot_row = (m.per_slot ? k * m.rows : 0) + n;
      const float h =
          down_too ? (m.per_slot ? 1.0F : m.weight_of(n, k)) * keep(m, n, e, f) * c.h : 0.0F;
      for (int i = 0; i < ranks; ++i) {
        if (a1 != nullptr) {
          gate[i] += g.d_gate * to_float(a1[i]);
          up[i] += g.d_up * to_float(a1[m.experts * m.rank + i]);
        }
        if (down_too) down[i] += h * to_float(m.q[(slot_row * m.experts + e) * m.rank + r0 + i]);
      }
    }
  const Index at = e * m.width + f;
  for (int i = 0; i < ranks; ++i) {
    if (m.d_gate_b != nullptr) m.d_gate_b[at * m.rank + r0 + i] += gate[i];
    if (m.d_up_b != nullptr) m.d_up_b[at * m.rank + r0 + i] += up[i];
    if (m.d_down_a != nullptr) m.d_down_a[(e * m.rank + r0 + i) * m.width + f] += down[i];
  }
  if (r0 == 0 && m.d_gate_scale != nullptr) m.d_gate_scale[at] += gate_scale;
  if (r0 == 0 && m.d_up_scale != nullptr) m.d_up_scale[at] += up_scale;
}

}  // namespace

template <class T> MixtureCall<T> cuda::call_of(const Mixture& m) {
  for (const ConstTensor& t : {m.gate_up, m.a, m.weights.gate_b, m.weights.up_b, m.weights.down_a})
    if (t && !t.contiguous()) throw std::logic_error("mixture: a strided view");
  MixtureCall<T> c{};
  c.gate_up = cuda::data<T>(m.gate_up);
  c.a = cuda::data<T>(m.a);
  c.gate_b = cuda::data<T>(m.weights.gate_b);
  c.up_b = cuda::data<T>(m.weights.up_b);
  c.down_a = cuda::data<T>(m.weights.down_a);
  c.gate_scale = cuda::data<float>(m.weights.gate_scale);
  c.up_scale = cuda::data<float>(m.weights.up_scale);
  c.expert = cuda::data<std::int32_t>(ConstTensor(m.slots.expert));
  c.weight = cuda::data<float>(ConstTensor(m.slots.weight));
  c.ids = cuda::data<std::int32_t>(m.ids);
  c.rows = m.gate_up.rows();
  c.width = m.gate_up.cols() / 2;
  c.experts = static_cast<int>(m.slots.experts);
  c.slots = static_cast<int>(m.slots.count);
  c.rank = static_cast<int>(m.slots.rank);
  c.activation = m.activation;
  c.scale = m.scale;
  c.per_slot = m.per_slot;
  c.keep = 1;
  if (m.dropout.active()) {
    c.key = random_key(m.dropout.seed, Purpose::dropout);
    c.threshold = dropout_threshold(m.dropout.p);
    c.keep = dropout_scale(m.dropout.p);
    c.layer = static_cast<std::uint32_t>(m.dropout.layer);
    c.site = m.dropout.site;
  }
  return c;
}

template MixtureCall<__nv_bfloat16> cuda::call_of<__nv_bfloat16>(const Mixture&);

namespace {

template <class T> bool in_tiles(const MixtureCall<T>& c) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return cuda::tiles_take(c);
  return false;
}
unsigned blocks_of(Index n) { return static_cast<unsigned>(cuda::ceil_div<Index>(n, kThreads)); }

}  // namespace

void CudaBackend::mixture(Tensor out, Tensor z, const Mixture& m) {
  if (m.gate_up.rows() == 0) return;
  if (!out.contiguous() || (z && !z.contiguous()))
    throw std::logic_error("mixture: a strided output");
  if (dense_mixture(out, z, m)) return;
  cuda::with_type(out.dtype, [&](auto number) {
    using T = decltype(number);
    auto c = cuda::call_of<T>(m);
    c.out = cuda::data<T>(out);
    c.z = cuda::data<T>(z);
    if (in_tiles(c)) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>)
        cuda::tiles_forward(c, room().take<std::byte>(static_cast<Index>(cuda::tiles_bytes(c))),
                            stream_);
      return;
    }
    const auto rows = static_cast<unsigned>(c.rows);
    out_kernel<<<dim3(blocks_of(c.width), rows), kThreads, 0, stream_>>>(c);
    if (z && c.down_a != nullptr)
      z_kernel<<<dim3(rows, static_cast<unsigned>(c.slots)), kThreads, 0, stream_>>>(c);
    cuda::launched("mixture");
  });
}

bool CudaBackend::mixture_backward(Tensor d_gate_up, Tensor d_weight, Tensor p, Tensor row_dots,
                                   const MixtureGrads& grads, ConstTensor d_out, ConstTensor q,
                                   ConstTensor z, const Mixture& m) {
  if (m.gate_up.rows() == 0) return false;
  if (!d_gate_up.contiguous() || (row_dots && !row_dots.contiguous()) || !d_out.contiguous() ||
      (q && !q.contiguous()))
    throw std::logic_error("mixture_backward: a strided view");
  if (dense_mixture_backward(d_gate_up, d_weight, p, grads, d_out, q, m)) return false;
  bool left = false;  // row_dots
  cuda::with_type(d_gate_up.dtype, [&](auto number) {
    using T = decltype(number);
    auto c = cuda::call_of<T>(m);
    c.d_out = cuda::data<T>(d_out);
    c.q = cuda::data<T>(q);
    c.z_in = cuda::data<T>(z);
    c.d_gate_up = cuda::data<T>(d_gate_up);
    c.p = cuda::data<T>(p);
    c.d_weight = m.per_slot ? nullptr : cuda::data<float>(d_weight);
    c.row_dots = cuda::data<float>(row_dots);
    c.d_gate_b = cuda::data<float>(grads.gate_b);
    c.d_up_b = cuda::data<float>(grads.up_b);
    c.d_down_a = cuda::data<float>(grads.down_a);
    c.d_gate_scale = cuda::data<float>(grads.gate_scale);
    c.d_up_scale = cuda::data<float>(grads.up_scale);
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      if (in_tiles(c) && cuda::single_takes(c)) {
        left = cuda::single_backward(
            c, room().take<std::byte>(static_cast<Index>(cuda::single_bytes(c))), stream_);
        return;
      }
    if (in_tiles(c)) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>)
        left = cuda::tiles_backward(
            c, room().take<std::byte>(static_cast<Index>(cuda::tiles_bytes(c))), stream_);
      return;
    }
    if (p) zero(p);
    const auto rows = static_cast<unsigned>(c.rows);
    d_gate_up_kernel<<<dim3(blocks_of(c.width), rows), kThreads, 0, stream_>>>(c);
    if (c.d_weight != nullptr || c.p != nullptr)
      slot_kernel<<<dim3(rows, static_cast<unsigned>(c.slots)), kThreads, 0, stream_>>>(c);
    if (c.d_gate_b != nullptr || c.d_up_b != nullptr || c.d_down_a != nullptr ||
        c.d_gate_scale != nullptr || c.d_up_scale != nullptr)
      factors_kernel<<<dim3(blocks_of(c.width), static_cast<unsigned>(c.experts),
                            static_cast<unsigned>(std::max(1, cuda::ceil_div(c.rank, kRanks)))),
                       kThreads, 0, stream_>>>(c);
    cuda::launched("mixture_backward");
  });
  return left;
}

}  // namespace mixlora
