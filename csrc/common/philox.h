// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw ("Parallel random numbers: as easy as
// 1, 2, 3", 2011): 128 bits of counter and 64 of key make 128 random bits, with no state in between. One source for the
// CPU kernels (V = a vector of uint64_t) and the CUDA kernels (V = uint64_t).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SORA_PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define SORA_PHILOX_INLINE inline __attribute__((always_inline))
#endif

namespace sora {

// The product of a lane's low 32 bits with m, in 64 bits.
struct WideProduct {
  SORA_PHILOX_INLINE uint64_t operator()(uint64_t lane, uint32_t m) const { return (lane & 0xffffffffu) * m; }
};

// counter -> random words, in place. Each lane of V is a generator of its own and holds one 32-bit word in its low half;
// upper halves are ignored on the way in and undefined on the way out: the products' high words need no masking.
// product(V, uint32_t): as WideProduct.
template <class V, class Product>
SORA_PHILOX_INLINE void philox4x32_10(V (&words)[4], uint64_t key, const Product& product) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const V p0 = product(words[0], 0xD2511F53u), p1 = product(words[2], 0xCD9E8D57u);
    words[0] = (p1 >> 32) ^ words[1] ^ uint64_t(k0);
    words[1] = p1;
    words[2] = (p0 >> 32) ^ words[3] ^ uint64_t(k1);
    words[3] = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace sora
