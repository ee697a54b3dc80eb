// Between memory where a channel's elements are neighbours and vectors whose lanes are channels. As common/simd.h, once
// for each instruction set.
#pragma once

#include "../common/simd.h"

namespace sora {
namespace SORA_ISA {

#define SORA_INLINE inline __attribute__((always_inline))

using VecI32 = int32_t __attribute__((vector_size(SORA_VECTOR_BYTES)));
using VecI64 = int64_t __attribute__((vector_size(SORA_VECTOR_BYTES)));
using HalfI32 = int32_t __attribute__((vector_size(SORA_VECTOR_BYTES / 2)));

template <class Element>
struct Pooled {
  using State = typename Simd<Element>::State;
  using V = typename Simd<Element>::V;
  using Int = std::conditional_t<sizeof(State) == 4, int32_t, int64_t>;
  using I = std::conditional_t<sizeof(State) == 4, VecI32, VecI64>;
  static constexpr int lanes = Simd<Element>::lanes;
};

// Whether any of the values it was shown is NaN.
template <class V>
class NanWatch {
 public:
#if SORA_VECTOR_BYTES == 64
  SORA_INLINE void look(VecF a, VecF b) { seen_ |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  SORA_INLINE void look(VecD a, VecD b) { seen_ |= _mm512_cmp_pd_mask(a, b, _CMP_UNORD_Q); }
  SORA_INLINE bool any() const { return seen_ != 0; }

 private:
  unsigned seen_ = 0;
#else
  SORA_INLINE void look(V a, V b) { seen_ |= (a != a) | (b != b); }
  SORA_INLINE bool any() const {
    typename Lanes<V>::Scalar lane[sizeof(V) / sizeof(typename Lanes<V>::Scalar)];
    const V ones = bit_cast<V>(seen_);  // a lane with all bits set is NaN
    __builtin_memcpy(lane, &ones, sizeof(V));
    bool found = false;
    for (auto value : lane) found |= value != value;
    return found;
  }

 private:
  decltype(V{} != V{}) seen_{};
#endif
};

// As Simd<Element>::store; to 32-bit integers, the integers that the vector's bits are.
template <class Element, class V>
SORA_INLINE void put(Element* p, V v) {
  Simd<Element>::store(p, v);
}
SORA_INLINE void put(int32_t* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }
SORA_INLINE void put(int32_t* p, VecD v) {
  const HalfI32 narrow = __builtin_convertvector(bit_cast<VecI64>(v), HalfI32);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

// The first n lanes.
template <class Element, class V>
SORA_INLINE void put_n(Element* p, int64_t n, V v) {
  constexpr int64_t lanes = sizeof(V) / sizeof(typename Lanes<V>::Scalar);
  if (n >= lanes) return put(p, v);
  Element buffer[lanes];
  put(buffer, v);
  for (int64_t k = 0; k < n; ++k) p[k] = buffer[k];
}

// Up to a vector of elements from each of n channels -> that many vectors. Lanes without a channel repeat the last's.
template <bool whole, class Element, class V>
SORA_INLINE void load_tile(const Element* source, int64_t channel_stride, int64_t n, int64_t count, V* vectors,
                           NanWatch<V>& watch) {
  constexpr int lanes = Pooled<Element>::lanes;
  V rows[lanes];
#pragma GCC unroll 16
  for (int c = 0; c < lanes; ++c) {
    const Element* const from = source + (c < n ? c : n - 1) * channel_stride;
    rows[c] = whole ? Simd<Element>::load(from) : load_n(from, count);
  }
#pragma GCC unroll 8
  for (int c = 0; c < lanes; c += 2) watch.look(rows[c], rows[c + 1]);
  transpose<typename Pooled<Element>::State>(rows);
#pragma GCC unroll 16
  for (int k = 0; k < lanes; ++k)
    if (whole || k < count) vectors[k] = rows[k];
}

// V's bits, whatever was written there.
template <class V>
SORA_INLINE V bits_at(const V* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// The way back.
template <bool whole, class Element, class V>
SORA_INLINE void store_tile(const V* vectors, int64_t count, int64_t n, Element* target, int64_t channel_stride) {
  using State = typename Lanes<V>::Scalar;
  constexpr int lanes = Simd<State>::lanes;
  V rows[lanes];
#pragma GCC unroll 16
  for (int k = 0; k < lanes; ++k) rows[k] = bits_at(vectors + (whole || k < count ? k : 0));
  transpose<State>(rows);
#pragma GCC unroll 16
  for (int c = 0; c < lanes; ++c)
    if (c < n) whole ? put(target + c * channel_stride, rows[c]) : put_n(target + c * channel_stride, count, rows[c]);
}

// `count` elements of each of n channels -> [count] vectors. The last tile covers some of the one before.
template <class Element, class V>
inline void load_tiles(const Element* source, int64_t channel_stride, int64_t n, int64_t count, V* vectors,
                       NanWatch<V>& watch) {
  constexpr int64_t lanes = Pooled<Element>::lanes;
  if (count < lanes) return load_tile<false>(source, channel_stride, n, count, vectors, watch);
  for (int64_t p = 0; p < count; p += lanes) {
    const int64_t at = p + lanes > count ? count - lanes : p;
    load_tile<true>(source + at, channel_stride, n, lanes, vectors + at, watch);
  }
}

template <class Element, class V>
inline void store_tiles(const V* vectors, int64_t count, int64_t n, Element* target, int64_t channel_stride) {
  constexpr int64_t lanes = sizeof(V) / sizeof(typename Lanes<V>::Scalar);
  if (count < lanes) return store_tile<false>(vectors, count, n, target, channel_stride);
  for (int64_t p = 0; p < count; p += lanes) {
    const int64_t at = p + lanes > count ? count - lanes : p;
    store_tile<true>(vectors + at, lanes, n, target + at, channel_stride);
  }
}

// [count] vectors -> element (bin, channel) at bin * bin_stride + c * channel_stride, one of the strides being 1.
template <class Element, class V>
inline void store_bins(const V* vectors, int64_t count, int64_t n, Element* target, int64_t channel_stride,
                       int64_t bin_stride) {
  if (channel_stride != 1) return store_tiles(vectors, count, n, target, channel_stride);
  for (int64_t bin = 0; bin < count; ++bin) put_n(target + bin * bin_stride, n, bits_at(vectors + bin));
}

}  // namespace SORA_ISA
}  // namespace sora
