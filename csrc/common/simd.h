// Vectors of one instruction set, as GCC/Clang vector types. Include with SORA_ISA (a namespace name) and
// SORA_VECTOR_BYTES set: each instruction set is a translation unit of its own, compiled with that set switched on, and
// everything it instantiates lives in its own namespace, so that the linker can never hand AVX-512 code to a machine
// without it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if SORA_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

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
    return bit_cast<VecF>(widened(p) << 16);
  }
  // __builtin_convertvector between widths takes GCC four shuffles, where there is one instruction.
  static inline __attribute__((always_inline)) VecU32 widened(const BFloat16* p) {
#if SORA_VECTOR_BYTES == 64
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bit_cast<VecU32>(_mm512_maskz_cvtepu16_epi32(0xffff, half));  // unmasked ones warn in GCC 12
#elif SORA_VECTOR_BYTES == 32
    return bit_cast<VecU32>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    HalfU16 half;
    __builtin_memcpy(&half, p, sizeof(half));
    return __builtin_convertvector(half, VecU32);
#endif
  }
  static inline __attribute__((always_inline)) VecU32 rounded_bits(V v) {
    const VecU32 bits = bit_cast<VecU32>(v);
    const VecU32 nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    const VecU32 quiet_nan = bits | 0x00400000u;
    return (v == v ? nearest : quiet_nan) >> 16;
  }
  static inline __attribute__((always_inline)) void store(BFloat16* p, V v) {
#if SORA_VECTOR_BYTES == 64
    const __m256i half = _mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(rounded_bits(v)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#else
    const HalfU16 half = __builtin_convertvector(rounded_bits(v), HalfU16);
    __builtin_memcpy(p, &half, sizeof(half));
#endif
  }
  static inline __attribute__((always_inline)) V round(V v) { return bit_cast<VecF>(rounded_bits(v) << 16); }
  static inline State widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
};

// Whole numbers, rounded to nearest by store.
template <>
struct Simd<int8_t> {
  using State = float;
  using V = VecF;
  using Ints = int32_t __attribute__((vector_size(SORA_VECTOR_BYTES)));
  using Bytes = int8_t __attribute__((vector_size(SORA_VECTOR_BYTES / 4)));
  static constexpr int64_t lanes = SORA_VECTOR_BYTES / sizeof(float);
  static inline __attribute__((always_inline)) V load(const int8_t* p) {
#if SORA_VECTOR_BYTES == 64
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m512i ints = _mm512_maskz_cvtepi8_epi32(0xffff, bytes);
    return bit_cast<V>(_mm512_maskz_cvtepi32_ps(0xffff, ints));
#elif SORA_VECTOR_BYTES == 32
    const __m256i ints = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return bit_cast<V>(_mm256_cvtepi32_ps(ints));
#else
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(__builtin_convertvector(bytes, Ints), VecF);
#endif
  }
  static inline __attribute__((always_inline)) void store(int8_t* p, V v) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23 leaves the rounded value in the low bits
    const Bytes bytes = __builtin_convertvector(bit_cast<Ints>(v + magic), Bytes);
    __builtin_memcpy(p, &bytes, sizeof(bytes));
  }
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

// Two vectors whose operations alternate, so that the latency of one's hides behind the other's.
template <class V>
struct Pair {
  V a, b;
};
#define SORA_PAIR_OPERATOR(op)                                                                        \
  template <class V>                                                                                  \
  inline __attribute__((always_inline)) Pair<V> operator op(const Pair<V>& x, const Pair<V>& y) {     \
    return {x.a op y.a, x.b op y.b};                                                                  \
  }                                                                                                   \
  template <class V>                                                                                  \
  inline __attribute__((always_inline)) Pair<V> operator op(const Pair<V>& x,                         \
                                                            typename Lanes<V>::Scalar y) {            \
    return {x.a op y, x.b op y};                                                                      \
  }                                                                                                   \
  template <class V>                                                                                  \
  inline __attribute__((always_inline)) Pair<V> operator op(typename Lanes<V>::Scalar x,              \
                                                            const Pair<V>& y) {                       \
    return {x op y.a, x op y.b};                                                                      \
  }
SORA_PAIR_OPERATOR(+)
SORA_PAIR_OPERATOR(-)
SORA_PAIR_OPERATOR(*)
#undef SORA_PAIR_OPERATOR
template <class V>
inline __attribute__((always_inline)) Pair<V> operator-(const Pair<V>& x) {
  return {-x.a, -x.b};
}
template <class V>
inline __attribute__((always_inline)) Pair<V> clamped(const Pair<V>& x, const Pair<V>& lowest, const Pair<V>& highest) {
  return {sora::clamped(x.a, lowest.a, highest.a), sora::clamped(x.b, lowest.b, highest.b)};
}
template <class V>
inline __attribute__((always_inline)) Pair<V> power_of_two(const Pair<V>& x) {
  return {sora::power_of_two(x.a), sora::power_of_two(x.b)};
}

// low: a0 b0 a1 b1 ... of the first halves; high: of the second.
template <class V, int... I>
inline __attribute__((always_inline)) void interleave(V a, V b, V& low, V& high, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
#if !defined(__clang__) && __GNUC__ < 12
  ((low[I] = (I % 2 ? b : a)[I / 2], high[I] = (I % 2 ? b : a)[n / 2 + I / 2]), ...);
#else
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * n)...);
  high = __builtin_shufflevector(a, b, (n / 2 + I / 2 + I % 2 * n)...);
#endif
}

// Turns rows into columns: as many vectors as a vector has lanes.
template <class State>
inline __attribute__((always_inline)) void transpose(typename Simd<State>::V (&rows)[Simd<State>::lanes]) {
  using V = typename Simd<State>::V;
  constexpr int n = Simd<State>::lanes;
  for (int stage = 1; stage < n; stage *= 2) {
    V next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i)
      interleave(rows[i], rows[i + n / 2], next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, n>());
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

}  // namespace SORA_ISA

template <>
struct Lanes<SORA_ISA::VecF> {
  using Scalar = float;
  using Bits = SORA_ISA::VecU32;
  static SORA_HOST_DEVICE SORA_ISA::VecF quotient(SORA_ISA::VecF a, SORA_ISA::VecF b) {
#if SORA_VECTOR_BYTES == 64
    // A division keeps its port busy for 16 cycles; 14 bits, doubled twice, are as good to the last bit or two.
    const SORA_ISA::VecF r = _mm512_maskz_rcp14_ps(0xffff, b), nearer = r + r * (1.0f - b * r), q = a * nearer;
    return q + nearer * (a - b * q);
#else
    return a / b;
#endif
  }
};
template <>
struct Lanes<SORA_ISA::VecD> {
  using Scalar = double;
  using Bits = SORA_ISA::VecU64;
  static SORA_HOST_DEVICE SORA_ISA::VecD quotient(SORA_ISA::VecD a, SORA_ISA::VecD b) { return a / b; }
};

template <class V>
struct Lanes<SORA_ISA::Pair<V>> {
  using Scalar = typename Lanes<V>::Scalar;
  static SORA_HOST_DEVICE SORA_ISA::Pair<V> quotient(const SORA_ISA::Pair<V>& a, const SORA_ISA::Pair<V>& b) {
    return {Lanes<V>::quotient(a.a, b.a), Lanes<V>::quotient(a.b, b.b)};
  }
};

}  // namespace sora
