// Threads of one CTA that wait for each other, and the lanes of one warp.
//
//   sync_block()                    __syncthreads: orders memory in the CTA
//   sync_block_or(p), _and, _count  the same, and a reduction of p over the CTA
//   barrier_sync(id, threads)       named barrier 1..15; threads: a multiple of 32, of those that arrive or wait
//   barrier_arrive(id, threads)     arrives and goes on: a producer's half
//   sync_warp(mask)                 __syncwarp: orders memory between the lanes of mask
//   shuffle(value, lane), shuffle_xor(value, bits), shuffle_down(value, lanes), shuffle_up(value, lanes)
//   warp_ballot(p), warp_any(p), warp_all(p)
//
// Shuffles and votes do not order memory. The barriers are .aligned: all threads of a warp at the same call.
#pragma once

#include "launch.cuh"

namespace sora {

#if defined(SORA_HOST_EMULATION)

SORA_DEVICE void sync_block(SORA_SITE) { emu::barrier(0, -1, true, site); }
SORA_DEVICE int sync_block_or(int p SORA_AND_SITE) { return emu::barrier_reduce(p, 0, site); }
SORA_DEVICE int sync_block_and(int p SORA_AND_SITE) { return emu::barrier_reduce(p, 1, site); }
SORA_DEVICE int sync_block_count(int p SORA_AND_SITE) { return emu::barrier_reduce(p, 2, site); }
SORA_DEVICE void barrier_sync(int id, int threads SORA_AND_SITE) { emu::barrier(id, threads, true, site); }
SORA_DEVICE void barrier_arrive(int id, int threads SORA_AND_SITE) { emu::barrier(id, threads, false, site); }
SORA_DEVICE void sync_warp(uint32_t mask = kFullWarp SORA_AND_SITE) { emu::sync_warp(mask, site); }
SORA_DEVICE uint32_t warp_ballot(bool p, uint32_t mask = kFullWarp SORA_AND_SITE) { return emu::ballot(mask, p, site); }
SORA_DEVICE bool warp_any(bool p, uint32_t mask = kFullWarp SORA_AND_SITE) { return emu::ballot(mask, p, site) != 0; }
SORA_DEVICE bool warp_all(bool p, uint32_t mask = kFullWarp SORA_AND_SITE) {
  return emu::ballot(mask, p, site) == mask;
}
template <class T>
SORA_DEVICE T shuffle(T value, int source_lane, uint32_t mask = kFullWarp SORA_AND_SITE) {
  static_assert(sizeof(T) == 4, "one register");
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits = emu::shuffle(mask, bits, source_lane & 31, site);
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
template <class T>
SORA_DEVICE T shuffle_xor(T value, int bits, uint32_t mask = kFullWarp SORA_AND_SITE) {
  return shuffle(value, int(lane()) ^ bits, mask, site);
}
template <class T>
SORA_DEVICE T shuffle_down(T value, int lanes, uint32_t mask = kFullWarp SORA_AND_SITE) {
  const int from = int(lane()) + lanes;
  return shuffle(value, from < 32 ? from : int(lane()), mask, site);
}
template <class T>
SORA_DEVICE T shuffle_up(T value, int lanes, uint32_t mask = kFullWarp SORA_AND_SITE) {
  const int from = int(lane()) - lanes;
  return shuffle(value, from >= 0 ? from : int(lane()), mask, site);
}

#else

SORA_DEVICE void sync_block() { __syncthreads(); }
SORA_DEVICE int sync_block_or(int p) { return __syncthreads_or(p); }
SORA_DEVICE int sync_block_and(int p) { return __syncthreads_and(p); }
SORA_DEVICE int sync_block_count(int p) { return __syncthreads_count(p); }
SORA_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SORA_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SORA_DEVICE void sync_warp(uint32_t mask = kFullWarp) { __syncwarp(mask); }
SORA_DEVICE uint32_t warp_ballot(bool p, uint32_t mask = kFullWarp) { return __ballot_sync(mask, p); }
SORA_DEVICE bool warp_any(bool p, uint32_t mask = kFullWarp) { return __any_sync(mask, p); }
SORA_DEVICE bool warp_all(bool p, uint32_t mask = kFullWarp) { return __all_sync(mask, p); }
template <class T>
SORA_DEVICE T shuffle(T value, int source_lane, uint32_t mask = kFullWarp) {
  return __shfl_sync(mask, value, source_lane);
}
template <class T>
SORA_DEVICE T shuffle_xor(T value, int bits, uint32_t mask = kFullWarp) {
  return __shfl_xor_sync(mask, value, bits);
}
template <class T>
SORA_DEVICE T shuffle_down(T value, int lanes, uint32_t mask = kFullWarp) {
  return __shfl_down_sync(mask, value, lanes);
}
template <class T>
SORA_DEVICE T shuffle_up(T value, int lanes, uint32_t mask = kFullWarp) {
  return __shfl_up_sync(mask, value, lanes);
}

#endif

}  // namespace sora
