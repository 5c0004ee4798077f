// The tensor core's 16x8x16 bf16 step, and the register shapes around it.
//
// Lane l holds, with g = l / 4 and q = l % 4:
//   A (16 x 16): a[0] row g, columns 2q, 2q+1; a[1] row g+8; a[2], a[3] the same at columns + 8
//   B (16 x 8):  b0 rows 2q, 2q+1 of column g; b1 rows + 8
//   C (16 x 8):  c[0], c[1] row g, columns 2q, 2q+1; c[2], c[3] row g+8
#pragma once
#include "kernels/cuda/launch.cuh"

namespace mixlora::cuda {

/// c += a b
__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/// An 8 x 8 matrix of bf16, row g columns 2q, 2q+1 a lane, turned over.
__device__ inline unsigned transposed(unsigned x) {
  unsigned y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ inline float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000U); }
/// Two numbers as two bf16 each: the nearest, and what is left.
__device__ inline uint2 in_two(float x, float y) {
  const unsigned near = pack2(x, y);
  return make_uint2(near, pack2(x - low(near), y - high(near)));
}

__device__ inline unsigned load_pair(const __nv_bfloat16* p) {
  return *reinterpret_cast<const unsigned*>(p);
}
__device__ inline uint2 load_pairs2(const __nv_bfloat16* p) {
  return *reinterpret_cast<const uint2*>(p);
}
__device__ inline void load_pairs4(unsigned (&to)[4], const __nv_bfloat16* p) {
  const uint4 x = *reinterpret_cast<const uint4*>(p);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

}  // namespace mixlora::cuda
