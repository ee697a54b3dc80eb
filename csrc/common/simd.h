// Vectors of one instruction set, as GCC/Clang vector types. Include with SORA_ISA (a namespace name) and
// SORA_VECTOR_BYTES set: each instruction set is a translation unit of its own, compiled with that set switched on, and
// everything it instantiates lives in its own namespace, so that the linker can never hand AVX-512 code to a machine
// without it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activations.h"

namespace sora {
namespace SORA_ISA {

using VecF = float __attribute__((vector_size(SORA_VECTOR_BYTES)));
using VecD = double __attribute__((vector_size(SORA_VECTOR_BYTES)));
using VecU32 = uint32_t __attribute__((vector_size(SORA_VECTOR_BYTES)));
using VecU64 = uint64_t __attribute__((vector_size(SORA_VECTOR_BYTES)));
using HalfU16 = uint16_t __attribute__((vector_size(SORA_VECTOR_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};

// Element: as stored in memory. State: as computed with. load and store convert; store rounds to nearest even, and
// round gives what a store followed by a load would.
template <class Element>
struct Simd {
  using State = Element;
  using V = std::conditional_t<sizeof(Element) == 4, VecF, VecD>;
  static constexpr int64_t lanes = SORA_VECTOR_BYTES / sizeof(State);
  static inline __attribute__((always_inline)) V load(const Element* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static inline __attribute__((always_inline)) void store(Element* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static inline __attribute__((always_inline)) V round(V v) { return v; }
  static inline State widen(Element x) { return x; }
};

template <>
struct Simd<BFloat16> {
  using State = float;
  using V = VecF;
  static constexpr int64_t lanes = SORA_VECTOR_BYTES / sizeof(float);
  static inline __attribute__((always_inline)) V load(const BFloat16* p) {
    HalfU16 half;
    __builtin_memcpy(&half, p, sizeof(half));
    return bit_cast<VecF>(__builtin_convertvector(half, VecU32) << 16);
  }
  static inline __attribute__((always_inline)) VecU32 rounded_bits(V v) {
    const VecU32 bits = bit_cast<VecU32>(v);
    const VecU32 nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    const VecU32 quiet_nan = bits | 0x00400000u;
    return (v == v ? nearest : quiet_nan) >> 16;
  }
  static inline __attribute__((always_inline)) void store(BFloat16* p, V v) {
    const HalfU16 half = __builtin_convertvector(rounded_bits(v), HalfU16);
    __builtin_memcpy(p, &half, sizeof(half));
  }
  static inline __attribute__((always_inline)) V round(V v) { return bit_cast<VecF>(rounded_bits(v) << 16); }
  static inline State widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
};

// The first `n` lanes; the others read as zero and are not written.
template <class Element>
inline __attribute__((always_inline)) typename Simd<Element>::V load_n(const Element* p, int64_t n) {
  if (n >= Simd<Element>::lanes) return Simd<Element>::load(p);
  Element lanes[Simd<Element>::lanes] = {};
  __builtin_memcpy(lanes, p, n * sizeof(Element));
  return Simd<Element>::load(lanes);
}

template <class Element>
inline __attribute__((always_inline)) void store_n(Element* p, int64_t n, typename Simd<Element>::V v) {
  if (n >= Simd<Element>::lanes) return Simd<Element>::store(p, v);
  Element lanes[Simd<Element>::lanes];
  Simd<Element>::store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(Element));
}

}  // namespace SORA_ISA

template <>
struct Lanes<SORA_ISA::VecF> {
  using Scalar = float;
  using Bits = SORA_ISA::VecU32;
};
template <>
struct Lanes<SORA_ISA::VecD> {
  using Scalar = double;
  using Bits = SORA_ISA::VecU64;
};

}  // namespace sora
