// 16-bit and TF32 elements as raw bits, so that the host needs no CUDA header.
//
//   Half, BFloat16                  storage; layouts of __half and __nv_bfloat16
//   to_float(x)                     exact
//   from_float<T>(f)                to nearest, ties to even; T = Half, BFloat16 or float
//   pack<T>(lo, hi), unpack<T>(bits, lo, hi)    two elements in one register, lo in the low half
//   tf32(f)                         f rounded to TF32 (ties away from zero), as an operand of mma_m16n8k8
#pragma once

#include "launch.cuh"

namespace sora {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

SORA_DEVICE uint32_t float_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}
SORA_DEVICE float bits_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

SORA_DEVICE float to_float(float x) { return x; }
SORA_DEVICE float to_float(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }

#if defined(SORA_HOST_EMULATION)

SORA_DEVICE float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, mantissa = x.bits & 1023u;
  if (exponent == 0) {
    const float magnitude = float(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}

SORA_DEVICE Half half_of(float f) {
  const uint32_t bits = float_bits(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 rounds to infinity
  if (magnitude < 0x38800000u) {  // a subnormal: adding 0.5 leaves its multiples of 2^-24 in the low bits, rounded
    return {uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
}
SORA_DEVICE BFloat16 bfloat16_of(float f) {
  const uint32_t bits = float_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
SORA_DEVICE uint32_t tf32(float f) {
  const uint32_t bits = float_bits(f);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0x7fffffu ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

#else

SORA_DEVICE float to_float(Half x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}
SORA_DEVICE Half half_of(float f) {
  Half x;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(f));
  return x;
}
SORA_DEVICE BFloat16 bfloat16_of(float f) {
  BFloat16 x;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x.bits) : "f"(f));
  return x;
}
SORA_DEVICE uint32_t tf32(float f) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(f));
  return bits;
}

#endif

template <class T>
SORA_DEVICE T from_float(float f);
template <>
SORA_DEVICE float from_float<float>(float f) {
  return f;
}
template <>
SORA_DEVICE Half from_float<Half>(float f) {
  return half_of(f);
}
template <>
SORA_DEVICE BFloat16 from_float<BFloat16>(float f) {
  return bfloat16_of(f);
}

template <class T>
SORA_DEVICE uint32_t pack(float lo, float hi);

#if defined(SORA_HOST_EMULATION)
template <>
SORA_DEVICE uint32_t pack<Half>(float lo, float hi) {
  return half_of(lo).bits | uint32_t(half_of(hi).bits) << 16;
}
template <>
SORA_DEVICE uint32_t pack<BFloat16>(float lo, float hi) {
  return bfloat16_of(lo).bits | uint32_t(bfloat16_of(hi).bits) << 16;
}
#else
template <>
SORA_DEVICE uint32_t pack<Half>(float lo, float hi) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}
template <>
SORA_DEVICE uint32_t pack<BFloat16>(float lo, float hi) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}
#endif

template <class T>
SORA_DEVICE void unpack(uint32_t bits, float& lo, float& hi) {
  lo = to_float(T{uint16_t(bits)});
  hi = to_float(T{uint16_t(bits >> 16)});
}

}  // namespace sora
