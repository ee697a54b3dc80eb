// The special function unit, and the activations made of it. Saturating: no NaN for any finite argument.
//
//   ex2_approx(x)     2^x, 2 ulp, subnormals to 0      rcp_approx(x)    1 / x, 1 ulp, subnormals to 0
//   tanh_approx(x)    relative error up to 2^-11: for 16-bit results
//   sigmoid_approx(x)                by tanh_approx: one special function, absolute error up to 2^-12
//   sigmoid_ex2(x), tanh_ex2(x)      by ex2 and rcp, absolute error some 1e-7: for fp32 results
//
// The host twins round ex2 and rcp to nearest, and cut tanh's result to 11 bits after the leading one: an error as
// large as the manual admits, but not the GPU's own bits.
#pragma once

#include "element.cuh"
#include "launch.cuh"

#if defined(SORA_HOST_EMULATION)
#include <cmath>
#endif

namespace sora {

#if defined(SORA_HOST_EMULATION)

SORA_DEVICE float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
SORA_DEVICE float ex2_approx(float x) { return flush_subnormal(float(std::exp2(double(flush_subnormal(x))))); }
SORA_DEVICE float rcp_approx(float x) { return flush_subnormal(1.0f / flush_subnormal(x)); }
SORA_DEVICE float tanh_approx(float x) {
  const float y = float(std::tanh(double(x)));
  return y != y ? y : bits_float(float_bits(y) & ~0xfffu);
}
SORA_DEVICE float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

#else

SORA_DEVICE float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SORA_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SORA_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SORA_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

#endif

SORA_DEVICE float sigmoid_approx(float x) { return fused_multiply_add(tanh_approx(0.5f * x), 0.5f, 0.5f); }
// 2^-x log2(e) overflows to infinity, whose reciprocal is 0.
SORA_DEVICE float sigmoid_ex2(float x) { return rcp_approx(1.0f + ex2_approx(-1.4426950408889634f * x)); }
SORA_DEVICE float tanh_ex2(float x) {
  return fused_multiply_add(-2.0f, rcp_approx(1.0f + ex2_approx(2.8853900817779268f * x)), 1.0f);
}

}  // namespace sora
