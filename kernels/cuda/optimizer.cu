// AdamW and SGD on flat parameters, the copy in the compute type written on the way.
#include <cmath>

#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/cuda_backend.h"

namespace mixlora {
namespace {

using cuda::Eight;
using cuda::Index;
using cuda::kChunk;

/// min(1, max_norm / (norm + 1e-6)), 1 when max_norm is 0            [Pascanu et al. 2013, alg. 1]
__device__ float clip_factor(const float* numbers, const float* norm_squared) {
  const float most = numbers[7];
  return most > 0 ? fminf(1.0F, most / (sqrtf(*norm_squared) + 1e-6F)) : 1.0F;
}

template <bool Aligned, class T>
__device__ void write(float* w, T* compute, const Eight& e, Index at, int count) {
  cuda::put<Aligned>(w + at, e, count);
  if (compute != nullptr) cuda::put<Aligned>(compute + at, e, count);
}

/// 16 bytes read and 12 written a parameter, and 2 of the bf16 copy.
template <class T> struct AdamW {
  float* w;
  T* compute;
  const float* g;
  float *m, *v;
  const float *numbers, *norm_squared;
  template <bool Aligned> __device__ void at(Index /*row*/, Index at, int count) const {
    const float lr = numbers[0], keep = 1 - lr * numbers[1], beta1 = numbers[2], beta2 = numbers[3],
                eps = numbers[4], rate = lr / numbers[5], root = 1 / sqrtf(numbers[6]);
    const float clip = clip_factor(numbers, norm_squared);
    Eight x = cuda::take<Aligned>(w + at, count), first = cuda::take<Aligned>(m + at, count),
          second = cuda::take<Aligned>(v + at, count);
    const Eight grad = cuda::take<Aligned>(g + at, count);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float d = clip * grad.v[i];
      first.v[i] = beta1 * first.v[i] + (1 - beta1) * d;
      second.v[i] = beta2 * second.v[i] + (1 - beta2) * d * d;
      x.v[i] = keep * x.v[i] - rate * (first.v[i] / (sqrtf(second.v[i]) * root + eps));
    }
    cuda::put<Aligned>(m + at, first, count);
    cuda::put<Aligned>(v + at, second, count);
    write<Aligned>(w, compute, x, at, count);
  }
};

/// 8 bytes read and 4 written a parameter, 8 more with momentum, and 2 of the bf16 copy.
template <class T> struct Sgd {
  float* w;
  T* compute;
  const float* g;
  float* v;
  const float *numbers, *norm_squared;
  template <bool Aligned> __device__ void at(Index /*row*/, Index at, int count) const {
    const float clip = clip_factor(numbers, norm_squared);
    Eight x = cuda::take<Aligned>(w + at, count), step = cuda::take<Aligned>(g + at, count);
    Eight old = {};
    if (v != nullptr) old = cuda::take<Aligned>(v + at, count);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      step.v[i] = numbers[2] * old.v[i] + (clip * step.v[i] + numbers[1] * x.v[i]);
      x.v[i] -= numbers[0] * step.v[i];
    }
    if (v != nullptr) cuda::put<Aligned>(v + at, step, count);
    write<Aligned>(w, compute, x, at, count);
  }
};

/// True when the present ones of `views` are lists of `count` numbers.
template <class... View> bool are_lists(Index count, const View&... views) {
  return ((!views || (views.numel() == count && views.contiguous())) && ...);
}

/// f(T{}) with the type of the compute copy.
template <class F> void with_copy(const Tensor& compute, F&& f) {
  cuda::with_type(compute ? compute.dtype : DType::f32, std::forward<F>(f));
}

}  // namespace

void CudaBackend::adamw(Tensor w, Tensor compute, ConstTensor g, Tensor m, Tensor v,
                        StepNumbers numbers, ConstTensor norm_squared) {
  const Index count = w.numel();
  cuda::expect(w && g && m && v && numbers.numel() == 8 && norm_squared.numel() == 1 &&
                   are_lists(count, w, compute, g, m, v),
               "adamw");
  with_copy(compute, [&](auto number) {
    using T = decltype(number);
    const auto list = [&](const auto& t) { return t ? t.reshaped({count}) : t; };
    cuda::each_chunk(stream_, "adamw", 1, count,
                     cuda::aligned(list(w), list(compute), list(g), list(m), list(v)),
                     AdamW<T>{cuda::data<float>(w), cuda::data<T>(compute), cuda::data<float>(g),
                              cuda::data<float>(m), cuda::data<float>(v),
                              cuda::data<float>(numbers), cuda::data<float>(norm_squared)});
  });
}

void CudaBackend::sgd(Tensor w, Tensor compute, ConstTensor g, Tensor v, StepNumbers numbers,
                      ConstTensor norm_squared) {
  const Index count = w.numel();
  cuda::expect(w && g && numbers.numel() == 8 && norm_squared.numel() == 1 &&
                   are_lists(count, w, compute, g, v),
               "sgd");
  with_copy(compute, [&](auto number) {
    using T = decltype(number);
    const auto list = [&](const auto& t) { return t ? t.reshaped({count}) : t; };
    cuda::each_chunk(
        stream_, "sgd", 1, count, cuda::aligned(list(w), list(compute), list(g), list(v)),
        Sgd<T>{cuda::data<float>(w), cuda::data<T>(compute), cuda::data<float>(g),
               cuda::data<float>(v), cuda::data<float>(numbers), cuda::data<float>(norm_squared)});
  });
}

}  // namespace mixlora
