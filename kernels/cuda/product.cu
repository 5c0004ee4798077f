// Matrix products by cuBLASLt, and the constants of frozen matrices.
//
// Row-major c = op(a) op(b) is column-major c^T = op(b)^T op(a)^T, so cuBLASLt's first factor is
// our second one.
#include <algorithm>
#include <stdexcept>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/products.h"

namespace mixlora {
namespace {

using cuda::check;
using cuda::Index;

cudaDataType_t type_of(DType t) { return t == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F; }

std::uint32_t alignment(const void* p, std::int64_t stride, DType type) {
  const auto at = reinterpret_cast<std::uintptr_t>(p) |
                  static_cast<std::uintptr_t>(stride) * size_of(type) | std::uintptr_t{256};
  return static_cast<std::uint32_t>(at & (~at + 1));
}

cublasLtMatrixLayout_t layout(DType type, Index rows, Index cols, Index stride) {
  cublasLtMatrixLayout_t l = nullptr;
  check(cublasLtMatrixLayoutCreate(&l, type_of(type), static_cast<std::uint64_t>(rows),
                                   static_cast<std::uint64_t>(cols), stride),
        "a layout");
  return l;
}

template <class T>
__global__ void row_norms_kernel(float* norms, const T* w, Index stride, Index cols) {
  __shared__ float shared[cuda::kWarp];
  const T* row = w + static_cast<Index>(blockIdx.x) * stride;
  float sum = 0;
  for (Index i = threadIdx.x; i < cols; i += blockDim.x) {
    const float x = cuda::to_float(row[i]);
    sum += x * x;
  }
  sum = cuda::block_sum(sum, shared);
  if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

}  // namespace

/// Batches differ in their rows from step to step, and to ask for an algorithm takes longer than a
/// small product: counts of rows up to one multiple of 128 share theirs. Rows are what no stride
/// bounds.
CudaBackend::Products::Key CudaBackend::Products::kind_of(Key key) {
  constexpr Index kRows = 128;
  const auto up = [](Index n) { return n <= kRows ? n : cuda::ceil_div(n, kRows) * kRows; };
  if (!key.transpose_a) key.m = up(key.m);
  if (key.transpose_a && !key.transpose_b) key.k = up(key.k);
  return key;
}

CudaBackend::Products::Products(std::byte* room, cudaStream_t s) : workspace(room), stream(s) {
  check(cublasLtCreate(&handle), "cublasLtCreate");
}
CudaBackend::Products::~Products() {
  for (const auto& [key, p] : plans) release(p);
  cublasLtDestroy(handle);
}

CudaBackend::Products::Plan CudaBackend::Products::describe(const Key& key) {
  Plan p;
  check(cublasLtMatmulDescCreate(&p.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "an operation");
  const cublasOperation_t first = key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                          second = key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  check(cublasLtMatmulDescSetAttribute(p.operation, CUBLASLT_MATMUL_DESC_TRANSA, &first,
                                       sizeof first),
        "transpose");
  check(cublasLtMatmulDescSetAttribute(p.operation, CUBLASLT_MATMUL_DESC_TRANSB, &second,
                                       sizeof second),
        "transpose");
  p.a = key.transpose_b ? layout(key.type, key.k, key.n, key.stride_b)
                        : layout(key.type, key.n, key.k, key.stride_b);
  p.b = key.transpose_a ? layout(key.type, key.m, key.k, key.stride_a)
                        : layout(key.type, key.k, key.m, key.stride_a);
  p.c = layout(key.type_c, key.n, key.m, key.stride_c);
  return p;
}

void CudaBackend::Products::release(const Plan& p) {
  cublasLtMatrixLayoutDestroy(p.a);
  cublasLtMatrixLayoutDestroy(p.b);
  cublasLtMatrixLayoutDestroy(p.c);
  cublasLtMatmulDescDestroy(p.operation);
}

cublasLtMatmulAlgo_t CudaBackend::Products::ask(const Key& key, const Plan& p) const {
  cublasLtMatmulPreference_t wish = nullptr;
  check(cublasLtMatmulPreferenceCreate(&wish), "a preference");
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t what, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(wish, what, &value, sizeof value), "a preference");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::uint64_t{kWorkspaceBytes});
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.align_b);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.align_a);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.align_c);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.align_c);
  // Sums over a split inner dimension in a fixed order only.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE |
                                 CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE));
  cublasLtMatmulHeuristicResult_t result{};
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(handle, p.operation, p.a, p.b, p.c, p.c, wish,
                                                     1, &result, &count);
  cublasLtMatmulPreferenceDestroy(wish);
  check(status, "no algorithm for a product");
  if (count == 0) throw std::runtime_error("cuBLASLt: no algorithm for a product");
  return result.algo;
}

const CudaBackend::Products::Plan& CudaBackend::Products::plan(const Key& key) {
  if (const auto found = plans.find(key); found != plans.end()) return found->second;
  Plan p = describe(key);
  p.algorithm = algorithm(key, p);
  return plans.emplace(key, p).first->second;
}

cublasLtMatmulAlgo_t CudaBackend::Products::algorithm(const Key& key, const Plan& p) {
  const Key kind = kind_of(key);
  auto known = algorithms.find(kind);
  if (known == algorithms.end()) {
    const Plan whole = describe(kind);
    known = algorithms.emplace(kind, ask(kind, whole)).first;
    release(whole);
  }
  cublasLtMatmulHeuristicResult_t result{};
  const bool fits =
      kind == key || (cublasLtMatmulAlgoCheck(handle, p.operation, p.a, p.b, p.c, p.c,
                                              &known->second, &result) == CUBLAS_STATUS_SUCCESS &&
                      result.workspaceSize <= kWorkspaceBytes);
  return fits ? known->second : ask(key, p);
}

void CudaBackend::product(Tensor c, ConstTensor a, bool transpose_a, ConstTensor b,
                          bool transpose_b, float alpha, float beta, ConstTensor onto) {
  if (!onto) onto = c;
  const Index m = c.rows(), n = c.cols(), k = transpose_a ? a.rows() : a.cols();
  if ((transpose_a ? a.cols() : a.rows()) != m || (transpose_b ? b.rows() : b.cols()) != n ||
      (transpose_b ? b.cols() : b.rows()) != k || a.dtype != b.dtype || a.dtype == DType::i32 ||
      onto.rows() != m || onto.cols() != n || onto.dtype != c.dtype ||
      (m > 1 && onto.stride != c.stride))
    throw std::logic_error("product: shapes or types do not meet");
  if (m == 0 || n == 0) return;
  const auto stride = [](const auto& t) { return t.rows() <= 1 ? t.cols() : t.stride; };
  Products::Key key{
      m,
      n,
      k,
      stride(a),
      stride(b),
      stride(c),
      alignment(a.data, stride(a), a.dtype),
      alignment(b.data, stride(b), b.dtype),
      std::min(alignment(c.data, stride(c), c.dtype), alignment(onto.data, stride(c), c.dtype)),
      a.dtype,
      c.dtype,
      transpose_a,
      transpose_b,
      beta != 0};
  const Products::Plan& p = products_->plan(key);
  check(cublasLtMatmul(products_->handle, p.operation, &alpha, b.data, p.a, a.data, p.b, &beta,
                       onto.data, p.c, c.data, p.c, &p.algorithm, products_->workspace,
                       Products::kWorkspaceBytes, stream_),
        "a product");
}

void CudaBackend::gemm(Tensor c, ConstTensor a, bool transpose_a, ConstTensor b, bool transpose_b,
                       float alpha, float beta) {
  product(c, a, transpose_a, b, transpose_b, alpha, beta);
}

std::size_t CudaBackend::matrix_bytes(std::int64_t out, std::int64_t in) const {
  return static_cast<std::size_t>(out * in) * size_of(type_);
}
Tensor CudaBackend::matrix_rows(const FrozenMatrix& w) const {
  return {w.storage.data, {w.out, w.in}, type_, Device::cuda};
}
void CudaBackend::pack_matrix(FrozenMatrix& /*w*/) {}  // the rows are what cuBLASLt reads best

void CudaBackend::linear(Tensor y, ConstTensor x, const FrozenMatrix& w) {
  product(y, x, false, matrix_rows(w), true, 1, 0);
}
void CudaBackend::linear_backward(Tensor d_x, ConstTensor d_y, const FrozenMatrix& w,
                                  bool accumulate) {
  product(d_x, d_y, false, matrix_rows(w), false, 1, accumulate ? 1.0F : 0.0F);
}

void CudaBackend::row_norms_squared(Tensor norms, const FrozenMatrix& w) {
  const ConstTensor rows = matrix_rows(w);
  cuda::with_type(type_, [&](auto number) {
    using T = decltype(number);
    row_norms_kernel<<<static_cast<unsigned>(w.out), 256, 0, stream_>>>(
        cuda::data<float>(norms), cuda::data<T>(rows), rows.stride, rows.cols());
  });
  cuda::launched("row_norms_squared");
}

}  // namespace mixlora
