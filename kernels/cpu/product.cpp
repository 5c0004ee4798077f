// Matrix products of the CPU backend: oneDNN where it was found, else a blocked loop.
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include <omp.h>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/shapes.h"

#ifdef MIXLORA_HAS_ONEDNN
#include <dnnl.hpp>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 sees its own undefined operands
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#endif

namespace mixlora {

#ifdef MIXLORA_HAS_ONEDNN
/// bf16 products of frozen matrices: one primitive a shape, weights packed in the layout it asked
/// for.
struct CpuBackend::Products {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  struct Packed {
    dnnl::memory forward, backward;  // weights as (I, O) for y = x W^T, as (O, I) for d_x = d_y W
  };
  std::vector<std::unique_ptr<Packed>> packed;
  std::map<std::array<std::int64_t, 4>, dnnl::matmul>
      primitives;  // (rows, inner, outer, accumulate)

  /// The layout oneDNN likes for a (k, n) weight. Rows are not known yet: 512 stands for "many".
  dnnl::matmul::primitive_desc describe(std::int64_t m, std::int64_t k, std::int64_t n,
                                        const dnnl::memory::desc* w, bool accumulate) const {
    using dt = dnnl::memory::data_type;
    using tag = dnnl::memory::format_tag;
    const dnnl::memory::desc x({m, k}, dt::bf16, tag::ab), y({m, n}, dt::f32, tag::ab);
    const dnnl::memory::desc any({k, n}, dt::bf16, tag::any);
    dnnl::primitive_attr attr;
    if (accumulate) {
      dnnl::post_ops ops;
      ops.append_sum(1.0F);
      attr.set_post_ops(ops);
    }
    return {dnnl::matmul::desc(x, w != nullptr ? *w : any, y), attr, engine};
  }
  std::size_t packed_bytes(std::int64_t k, std::int64_t n) const {
    return (describe(512, k, n, nullptr, false).weights_desc().get_size() + 63) / 64 * 64;
  }
  /// Packs into `room`, which has packed_bytes(k, n).
  dnnl::memory pack(ConstTensor rows, std::int64_t k, std::int64_t n, bool transposed, void* room) {
    using dt = dnnl::memory::data_type;
    const dnnl::memory::desc plain =
        transposed ? dnnl::memory::desc({k, n}, dt::bf16, dnnl::memory::dims{1, k})
                   : dnnl::memory::desc({k, n}, dt::bf16, dnnl::memory::dims{n, 1});
    dnnl::memory source(plain, engine,
                        const_cast<void*>(rows.data));  // NOLINT: oneDNN has no const memory
    dnnl::memory target(describe(512, k, n, nullptr, false).weights_desc(), engine, room);
    dnnl::reorder(source, target).execute(stream, source, target);
    stream.wait();
    return target;
  }
  void run(const dnnl::memory& w, Tensor y, const std::uint16_t* x, std::int64_t k,
           bool accumulate) {
    using dt = dnnl::memory::data_type;
    using tag = dnnl::memory::format_tag;
    const std::int64_t m = y.rows(), n = y.cols();
    auto& primitive = primitives[{m, k, n, accumulate ? 1 : 0}];
    const auto layout = w.get_desc();
    if (!primitive) primitive = dnnl::matmul(describe(m, k, n, &layout, accumulate));
    const dnnl::memory source({{m, k}, dt::bf16, tag::ab}, engine,
                              const_cast<std::uint16_t*>(x));  // NOLINT
    const dnnl::memory target({{m, n}, dt::f32, tag::ab}, engine, y.data);
    primitive.execute(stream,
                      {{DNNL_ARG_SRC, source}, {DNNL_ARG_WEIGHTS, w}, {DNNL_ARG_DST, target}});
    stream.wait();
  }
};
#else
struct CpuBackend::Products {};
#endif

namespace {
bool has_fast_bf16() {
#ifdef MIXLORA_HAS_ONEDNN
  const auto isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
#else
  return false;
#endif
}
#ifdef MIXLORA_HAS_ONEDNN
void round_to_bf16(std::uint16_t* y, const float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const auto u = std::bit_cast<std::uint32_t>(x[i]);
    y[i] = static_cast<std::uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
  }
}
#if defined(__x86_64__)
/// Only called where has_fast_bf16(): the instruction rounds as the loop does.
__attribute__((target("avx512f,avx512bf16"))) void to_bf16(std::uint16_t* y, const float* x,
                                                           std::int64_t n) {
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    _mm512_storeu_si512(y + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
                                   _mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i))));
  round_to_bf16(y + i, x + i, n - i);
}
#else
void to_bf16(std::uint16_t* y, const float* x, std::int64_t n) { round_to_bf16(y, x, n); }
#endif
#endif
}  // namespace

CpuBackend::CpuBackend(Precision precision, int threads) : products_(std::make_unique<Products>()) {
  if (precision == Precision::bf16 && !has_fast_bf16())
    throw std::runtime_error(
        "precision bf16: this CPU or build has no fast bf16 products; use \"auto\" or \"fp32\"");
  bf16_ = precision != Precision::fp32 && has_fast_bf16();
  threads_ = threads > 0 ? threads : omp_get_max_threads();
  omp_set_num_threads(threads_);
  room_ = allocate(workspace_bytes());
}
CpuBackend::~CpuBackend() = default;

std::string CpuBackend::description() const {
#ifdef MIXLORA_HAS_ONEDNN
  const auto* v = dnnl::version();
  const std::string library = "oneDNN " + std::to_string(v->major) + "." + std::to_string(v->minor);
#else
  const std::string library = "own loops";
#endif
  return "CPU, " + std::to_string(threads_) + " threads, products by " + library +
         (bf16_ ? " in bf16" : " in fp32");
}

std::size_t CpuBackend::workspace_bytes() const {
  return cpu::kGemmRoom * sizeof(float) +
         (bf16_ ? static_cast<std::size_t>(kBf16Room) * sizeof(std::uint16_t) : 0);
}
float* CpuBackend::gemm_room() { return static_cast<float*>(room_->data()); }
void* CpuBackend::bf16_room() { return gemm_room() + cpu::kGemmRoom; }

std::size_t CpuBackend::matrix_bytes(std::int64_t out, std::int64_t in) const {
  const auto numbers = static_cast<std::size_t>(out * in);
#ifdef MIXLORA_HAS_ONEDNN
  // bf16: plain rows (for row look-ups), then what oneDNN packs for either direction.
  if (bf16_)
    return (numbers * 2 + 63) / 64 * 64 + products_->packed_bytes(in, out) +
           products_->packed_bytes(out, in);
#endif
  return numbers * 4;
}
Tensor CpuBackend::matrix_rows(const FrozenMatrix& w) const {
  return {w.storage.data, {w.out, w.in}, matrix_type(), Device::cpu};
}

void CpuBackend::pack_matrix(FrozenMatrix& w) {
#ifdef MIXLORA_HAS_ONEDNN
  if (!bf16_) return;
  auto packed = std::make_unique<Products::Packed>();
  auto* room = static_cast<std::byte*>(w.storage.data) +
               (static_cast<std::size_t>(w.out * w.in) * 2 + 63) / 64 * 64;
  packed->forward = products_->pack(matrix_rows(w), w.in, w.out, true, room);
  packed->backward = products_->pack(matrix_rows(w), w.out, w.in, false,
                                     room + products_->packed_bytes(w.in, w.out));
  w.packed = packed.get();
  products_->packed.push_back(std::move(packed));
#else
  (void)w;
#endif
}

void CpuBackend::linear(Tensor y, ConstTensor x, const FrozenMatrix& w) {
  cpu::expect_rows("linear", "x", x, x.rows(), w.in);
  cpu::expect_rows("linear", "y", y, x.rows(), w.out);
  if (y.rows() == 0) return;
  if (!bf16_) {
    cpu::gemm(y.ptr<float>(), y.stride, {x.ptr<float>(), x.stride, false},
              {matrix_rows(w).ptr<float>(), w.in, true}, y.rows(), w.out, w.in, 1, 0, gemm_room());
    return;
  }
  multiply_frozen(y, x, w, true, false);
}

void CpuBackend::linear_backward(Tensor d_x, ConstTensor d_y, const FrozenMatrix& w,
                                 bool accumulate) {
  cpu::expect_rows("linear_backward", "d_y", d_y, d_y.rows(), w.out);
  cpu::expect_rows("linear_backward", "d_x", d_x, d_y.rows(), w.in);
  if (d_y.rows() == 0) return;
  if (!bf16_) {
    cpu::gemm(d_x.ptr<float>(), d_x.stride, {d_y.ptr<float>(), d_y.stride, false},
              {matrix_rows(w).ptr<float>(), w.in, false}, d_x.rows(), w.in, w.out, 1,
              accumulate ? 1.0F : 0.0F, gemm_room());
    return;
  }
  multiply_frozen(d_x, d_y, w, false, accumulate);
}

/// y = x times the packed matrix in bf16, in runs of rows whose bf16 copies fit the room for them.
void CpuBackend::multiply_frozen(Tensor y, ConstTensor x, const FrozenMatrix& w, bool forward,
                                 bool accumulate) {
#ifdef MIXLORA_HAS_ONEDNN
  if (!y.contiguous()) throw std::logic_error("linear: the output must be contiguous");
  const auto* packed = static_cast<const Products::Packed*>(w.packed);
  auto* half = reinterpret_cast<std::uint16_t*>(bf16_room());  // NOLINT: raw memory
  const std::int64_t inner = x.cols(),
                     most = std::max<std::int64_t>(kBf16Room / inner / 16 * 16, 1);
  for (std::int64_t from = 0; from < x.rows(); from += most) {
    const std::int64_t rows = std::min(most, x.rows() - from);
    cpu::parallel_for(
        rows, [&](std::int64_t i) { to_bf16(half + i * inner, x.row<float>(from + i), inner); });
    products_->run(forward ? packed->forward : packed->backward, y.row_range(from, from + rows),
                   half, inner, accumulate);
  }
#else
  (void)y, (void)x, (void)w, (void)forward, (void)accumulate;
#endif
}

void CpuBackend::row_norms_squared(Tensor norms, const FrozenMatrix& w) {
  const Tensor rows = matrix_rows(w);
  cpu::parallel_for(w.out, [&](std::int64_t o) {
    double sum = 0;
    for (std::int64_t i = 0; i < w.in; ++i) {
      const double v = bf16_ ? static_cast<double>(static_cast<float>(rows.row<Bf16>(o)[i]))
                             : static_cast<double>(rows.row<float>(o)[i]);
      sum += v * v;
    }
    norms.ptr<float>()[o] = static_cast<float>(sum);
  });
}

void CpuBackend::gemm(Tensor c, ConstTensor a, bool transpose_a, ConstTensor b, bool transpose_b,
                      float alpha, float beta) {
  const std::int64_t m = transpose_a ? a.cols() : a.rows(), k = transpose_a ? a.rows() : a.cols();
  const std::int64_t n = transpose_b ? b.rows() : b.cols(),
                     inner = transpose_b ? b.cols() : b.rows();
  if (k != inner || c.rows() != m || c.cols() != n)
    throw std::logic_error("gemm: (" + std::to_string(m) + ", " + std::to_string(k) + ") x (" +
                           std::to_string(inner) + ", " + std::to_string(n) + ") into (" +
                           std::to_string(c.rows()) + ", " + std::to_string(c.cols()) + ")");
  cpu::gemm(c.ptr<float>(), c.stride, {a.ptr<float>(), a.stride, transpose_a},
            {b.ptr<float>(), b.stride, transpose_b}, m, n, k, alpha, beta, gemm_room());
}

}  // namespace mixlora
