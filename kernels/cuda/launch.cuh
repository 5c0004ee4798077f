// What every kernel of this folder stands on: launches, numbers of two types, sums of fixed order.
#pragma once
#include <cstdint>
#include <set>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>

#include "kernels/cuda/handles.h"
#include "kernels/tensor.h"

namespace mixlora::cuda {

using Index = std::int64_t;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffU;

template <class T> constexpr __host__ __device__ T ceil_div(T a, T b) { return (a + b - 1) / b; }

/// A view's data under the device's type (Bf16 is the host's name of its bits); throws
/// std::logic_error when the view holds another.
template <class T> const T* data(const ConstTensor& t) {
  using Host = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, Bf16, T>;
  return reinterpret_cast<const T*>(t.ptr<Host>());
}
template <class T> T* data(const Tensor& t) {
  using Host = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, Bf16, T>;
  return reinterpret_cast<T*>(t.ptr<Host>());
}

/// Calls f(T{}) with the device's type of `type`, f32 or bf16.
template <class F> void with_type(DType type, F&& f) {
  if (type == DType::f32)
    std::forward<F>(f)(float{});
  else if (type == DType::bf16)
    std::forward<F>(f)(__nv_bfloat16{});
  else
    throw std::logic_error("cuda: a tensor of integers where numbers are wanted");
}

/// Says that a kernel's launch failed, where it was launched.
inline void launched(const char* kernel) { check(cudaGetLastError(), kernel); }

/// Bytes of shared memory that a block may take here.
inline int most_shared() {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "the device");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory");
  return most;
}
/// Lets a kernel take up to `bytes` of shared memory a block, always the same for one kernel; asked
/// of the driver once for each kernel and device.
inline void admit_shared(const void* kernel, int bytes) {
  thread_local std::set<std::pair<const void*, int>> known;
  int device = 0;
  check(cudaGetDevice(&device), "the device");
  if (!known.emplace(kernel, device).second) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "shared memory");
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Eight neighbouring numbers: one 16-byte access of bf16, two of f32. The address is aligned to
/// 8 elements.
struct Eight {
  float v[8];
};
/// Eight numbers as they lie in memory: in bf16 half the registers of Eight.
template <class T> struct Packed { uint4 word[sizeof(T) / 2]; };
__device__ inline Eight unpacked(const Packed<float>& p) {
  Eight e;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    e.v[4 * i] = __uint_as_float(p.word[i].x), e.v[4 * i + 1] = __uint_as_float(p.word[i].y);
    e.v[4 * i + 2] = __uint_as_float(p.word[i].z), e.v[4 * i + 3] = __uint_as_float(p.word[i].w);
  }
  return e;
}
__device__ inline Eight unpacked(const Packed<__nv_bfloat16>& p) {
  const unsigned word[4] = {p.word[0].x, p.word[0].y, p.word[0].z, p.word[0].w};
  Eight e;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    e.v[2 * i] = __uint_as_float(word[i] << 16);
    e.v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000U);
  }
  return e;
}
template <class T> __device__ Packed<T> load_packed(const T* p) {
  Packed<T> x;
#pragma unroll
  for (std::size_t i = 0; i < sizeof(T) / 2; ++i) x.word[i] = reinterpret_cast<const uint4*>(p)[i];
  return x;
}
template <class T> __device__ Eight load8(const T* p) { return unpacked(load_packed(p)); }
__device__ inline void store8(float* p, const Eight& e) {
  *reinterpret_cast<float4*>(p) = make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
  *reinterpret_cast<float4*>(p + 4) = make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
}
/// Two floats as two bf16, the first in the low half.
__device__ inline unsigned pack2(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ inline void store8(__nv_bfloat16* p, const Eight& e) {
  *reinterpret_cast<uint4*>(p) = make_uint4(pack2(e.v[0], e.v[1]), pack2(e.v[2], e.v[3]),
                                            pack2(e.v[4], e.v[5]), pack2(e.v[6], e.v[7]));
}

__device__ inline Packed<float> packed(const Eight& e, float /*type*/) {
  Packed<float> p;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    p.word[i] = make_uint4(__float_as_uint(e.v[4 * i]), __float_as_uint(e.v[4 * i + 1]),
                           __float_as_uint(e.v[4 * i + 2]), __float_as_uint(e.v[4 * i + 3]));
  return p;
}
__device__ inline Packed<__nv_bfloat16> packed(const Eight& e, __nv_bfloat16 /*type*/) {
  return {{make_uint4(pack2(e.v[0], e.v[1]), pack2(e.v[2], e.v[3]), pack2(e.v[4], e.v[5]),
                      pack2(e.v[6], e.v[7]))}};
}

/// Sums over a warp; every lane gets the result. The order is fixed.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}
/// Sums over a block of whole warps (at most 32); every thread gets the result. `shared` has 32
/// floats and may be used again after the next __syncthreads().
__device__ inline float block_sum(float x, float* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? shared[lane] : 0.0F);
}
__device__ inline float block_max(float x, float* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_max(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return warp_max(shared[lane < warps ? lane : 0]);
}

__device__ inline void add_to(float4& sum, float4 x) {
  sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}
/// Numbers 4i to 4i + 3 of every part, each `apart` fours behind the one before, summed in their
/// order.
__device__ inline float4 sum_of_parts(const float* parts, Index i, Index apart, int count) {
  const auto* at = reinterpret_cast<const float4*>(parts) + i;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int k = 0; k < count; ++k) add_to(sum, at[k * apart]);
  return sum;
}
/// What kernels that leave sums take of a call's working memory at most; others are taken beyond.
constexpr Index kMostSumBytes = Index{128} << 20;

/// This thread's place in its block, asked anew where it is used: what follows from it is not kept
/// in registers over a loop.
__device__ inline int thread_anew() {
  unsigned thread;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(thread));
  return static_cast<int>(thread);
}

/// True when every row of the view starts at a multiple of eight elements and has a multiple of
/// eight columns: load8 and store8 may walk it.
template <class View> bool by_eights(const View& t) {
  return t.cols() % 8 == 0 && (t.stride % 8 == 0 || t.rows() <= 1) &&
         reinterpret_cast<std::uintptr_t>(t.data) % (8 * size_of(t.dtype)) == 0;
}

}  // namespace mixlora::cuda
