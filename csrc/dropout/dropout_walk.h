// The loop over elements, for the instruction set that SORA_ISA and SORA_VECTOR_BYTES name (see common/simd.h). On
// x86-64 the includer has seen <immintrin.h>.
#include "../common/philox.h"
#include "../common/simd.h"
#include "dropout_kernels.h"

namespace sora {
namespace SORA_ISA {

// _mm*_mul_epu32: compilers do not find it in a 64-bit product of masked lanes.
struct VectorProduct {
  inline __attribute__((always_inline)) VecU64 operator()(VecU64 lanes, uint32_t m) const {
#if defined(__x86_64__) && SORA_VECTOR_BYTES == 64
    return (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)lanes, _mm512_set1_epi64(m));  // unmasked, GCC 12 warns
#elif defined(__x86_64__) && SORA_VECTOR_BYTES == 32
    return (VecU64)_mm256_mul_epu32((__m256i)lanes, _mm256_set1_epi64x(m));
#elif defined(__x86_64__)
    return (VecU64)_mm_mul_epu32((__m128i)lanes, _mm_set1_epi64x(m));
#else
    return (lanes & 0xffffffffu) * m;
#endif
  }
};

constexpr int64_t kCounters = SORA_VECTOR_BYTES / 8;  // of one vector
constexpr int64_t kWords = 4 * kCounters;

// The counters of the lanes and their words: lanes take the counters in the order in which interleave() needs them.
#if SORA_VECTOR_BYTES == 64
constexpr VecU64 kLane = {0, 4, 1, 5, 2, 6, 3, 7};
#elif SORA_VECTOR_BYTES == 32
constexpr VecU64 kLane = {0, 2, 1, 3};
#else
constexpr VecU64 kLane = {0, 1};
#endif

// Lanes (a, b) -> words in order: even lanes' a, b, a, b, ... in `first`, odd lanes' in `second`.
inline __attribute__((always_inline)) void interleave(VecU64 a, VecU64 b, VecU32& first, VecU32& second) {
#if SORA_VECTOR_BYTES == 64
  first = (VecU32)__builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
  second = (VecU32)__builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#elif SORA_VECTOR_BYTES == 32
  first = (VecU32)__builtin_shufflevector(a, b, 0, 4, 2, 6);
  second = (VecU32)__builtin_shufflevector(a, b, 1, 5, 3, 7);
#else
  first = (VecU32)__builtin_shufflevector(a, b, 0, 2);
  second = (VecU32)__builtin_shufflevector(a, b, 1, 3);
#endif
}

// Words number kWords * block .. + kWords - 1, in order.
inline __attribute__((always_inline)) void random_words(uint64_t seed, int64_t block, VecU32 (&words)[2]) {
  VecU64 lanes[4] = {kLane + uint64_t(block * kCounters), {}, {}, {}};
  lanes[1] = lanes[0] >> 32;
  philox4x32_10(lanes, seed, VectorProduct{});
  const VecU64 low = VecU64{} + 0xffffffffu;
  interleave((lanes[0] & low) | (lanes[1] << 32), (lanes[2] & low) | (lanes[3] << 32), words[0], words[1]);
}

// One vector of factors for each vector of elements: as many words as a state has lanes, or twice as many.
inline __attribute__((always_inline)) void factors(VecU32 words, uint32_t threshold, VecF scale, VecF* out) {
  out[0] = bit_cast<VecF>((VecU32)(words >= threshold) & bit_cast<VecU32>(scale));
}

inline __attribute__((always_inline)) void factors(VecU32 words, uint32_t threshold, VecD scale, VecD* out) {
  using Half = uint32_t __attribute__((vector_size(SORA_VECTOR_BYTES / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &words, sizeof(words));
  for (int k = 0; k < 2; ++k) {
    const VecU64 wide = __builtin_convertvector(halves[k], VecU64);
    out[k] = bit_cast<VecD>((VecU64)(wide >= uint64_t(threshold)) & bit_cast<VecU64>(scale));
  }
}

template <class Element>
void walk(const Dropout& args, DropoutFactor factor, int64_t begin, int64_t end) {
  using S = Simd<Element>;
  using V = typename S::V;
  constexpr int64_t vectors = kWords / S::lanes;
  static_assert(kDropoutGrain % kWords == 0, "a part begins at a whole vector");
  const auto* x = static_cast<const Element*>(args.x);
  auto* y = static_cast<Element*>(args.y);
  const auto seed = static_cast<uint64_t>(*args.seed);
  const V scale = V{} + typename S::State(factor.scale);
  int64_t e = begin;
  for (; e < end; e += kWords) {
    VecU32 words[2];
    V f[vectors];
    random_words(seed, e / kWords, words);
    factors(words[0], factor.threshold, scale, f);
    factors(words[1], factor.threshold, scale, f + vectors / 2);
    if (e + kWords <= end) {
      for (int64_t k = 0; k < vectors; ++k) S::store(y + e + k * S::lanes, S::load(x + e + k * S::lanes) * f[k]);
    } else {
      for (int64_t k = 0; k < vectors && e + k * S::lanes < end; ++k) {
        const int64_t at = e + k * S::lanes;
        store_n(y + at, end - at, load_n(x + at, end - at) * f[k]);
      }
    }
  }
}

inline DropoutWalk walk_for(DType dtype) {
  switch (dtype) {
    case DType::float32: return walk<float>;
    case DType::float64: return walk<double>;
    case DType::bfloat16: return walk<BFloat16>;
    case DType::float16: break;
  }
  return nullptr;
}

}  // namespace SORA_ISA
}  // namespace sora
