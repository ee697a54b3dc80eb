// Asynchronous copies.
//
// cp.async (sm_80): global -> shared, complete after a wait of the thread that issued it; others need a barrier then.
//   cp_async<bytes>(to, from)                bytes 4, 8 or 16; to: shared address; both aligned to bytes
//   cp_async<bytes>(to, from, from_bytes)    reads from_bytes, writes zeros after them (0: from is not read)
//   cp_async_commit()                        closes a group; cp_async_wait<n>(): all but the last n groups are complete
//   cp_async_mbarrier_arrive(b)              an arrival at b when this thread's copies so far are complete (noinc)
//
// sm_90: complete on an mbarrier of the CTA that receives, by bytes (complete_tx). Addresses in a cluster: map_to_rank.
//   st_async(to, value, b)                                     a value of 4, 8 or 16 bytes into a CTA of the cluster
//   cp_async_bulk_shared_to_cluster(to, from, bytes, b)        shared memory of this CTA -> of a CTA of the cluster
//   cp_async_bulk_global_to_shared(to, from, bytes, b)         bytes: a multiple of 16; addresses aligned to 16
//   cp_async_bulk_global_to_shared_multicast(to, from, bytes, b, ranks)    to the same offset in each CTA of the mask,
//                                            complete on the barrier at b's offset there
// Bulk copies go through the async proxy: fence_proxy_async() between a store to shared memory and a bulk copy that
// reads or overwrites it. The source must stay as it is, and its CTA must not exit, until the copy is complete.
#pragma once

#include "launch.cuh"
#include "memory.cuh"
#include "scope.cuh"

namespace sora {

#if defined(SORA_HOST_EMULATION)

template <int bytes>
SORA_DEVICE void cp_async(uint32_t to, const void* from SORA_AND_SITE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emu::cp_async(to, from, bytes, bytes, site);
}
template <int bytes>
SORA_DEVICE void cp_async(uint32_t to, const void* from, unsigned from_bytes SORA_AND_SITE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emu::cp_async(to, from, bytes, from_bytes, site);
}
SORA_DEVICE void cp_async_commit(SORA_SITE) { emu::cp_async_commit(site); }
template <int pending>
SORA_DEVICE void cp_async_wait(SORA_SITE) {
  emu::cp_async_wait(pending, site);
}
SORA_DEVICE void cp_async_mbarrier_arrive(uint32_t mbarrier SORA_AND_SITE) {
  emu::cp_async_mbarrier_arrive(mbarrier, site);
}
template <class V>
SORA_DEVICE void st_async(uint32_t to, V value, uint32_t mbarrier SORA_AND_SITE) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "st.async stores 4, 8 or 16 bytes");
  emu::st_async(to, &value, sizeof(V), mbarrier, site);
}
SORA_DEVICE void cp_async_bulk_shared_to_cluster(uint32_t to, uint32_t from, unsigned bytes,
                                                 uint32_t mbarrier SORA_AND_SITE) {
  emu::bulk_shared_to_cluster(to, from, bytes, mbarrier, site);
}
SORA_DEVICE void cp_async_bulk_global_to_shared(uint32_t to, const void* from, unsigned bytes,
                                                uint32_t mbarrier SORA_AND_SITE) {
  emu::bulk_global_to_shared(to, from, bytes, mbarrier, 0, site);
}
SORA_DEVICE void cp_async_bulk_global_to_shared_multicast(uint32_t to, const void* from, unsigned bytes,
                                                          uint32_t mbarrier, uint16_t ranks SORA_AND_SITE) {
  emu::bulk_global_to_shared(to, from, bytes, mbarrier, ranks, site);
}

#else

template <int bytes>
SORA_DEVICE void cp_async(uint32_t to, const void* from) {
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
  } else {
    static_assert(bytes == 4 || bytes == 8, "cp.async copies 4, 8 or 16 bytes");
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "n"(bytes)
                 : "memory");
  }
}
template <int bytes>
SORA_DEVICE void cp_async(uint32_t to, const void* from, unsigned from_bytes) {
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "r"(from_bytes)
                 : "memory");
  } else {
    static_assert(bytes == 4 || bytes == 8, "cp.async copies 4, 8 or 16 bytes");
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "n"(bytes), "r"(from_bytes)
                 : "memory");
  }
}
SORA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
SORA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
SORA_DEVICE void cp_async_mbarrier_arrive(uint32_t mbarrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(mbarrier) : "memory");
}
template <class V>
SORA_DEVICE void st_async(uint32_t to, V value, uint32_t mbarrier) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "st.async stores 4, 8 or 16 bytes");
  uint32_t r[sizeof(V) / 4];
  __builtin_memcpy(r, &value, sizeof(V));
  if constexpr (sizeof(V) == 16) {
    SORA_SM90(asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
        "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(mbarrier) : "memory"));
  } else if constexpr (sizeof(V) == 8) {
    SORA_SM90(asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to), "r"(r[0]),
        "r"(r[1]), "r"(mbarrier) : "memory"));
  } else {
    SORA_SM90(asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                           "r"(r[0]), "r"(mbarrier) : "memory"));
  }
}
SORA_DEVICE void cp_async_bulk_shared_to_cluster(uint32_t to, uint32_t from, unsigned bytes, uint32_t mbarrier) {
  SORA_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(mbarrier) : "memory"));
}
SORA_DEVICE void cp_async_bulk_global_to_shared(uint32_t to, const void* from, unsigned bytes, uint32_t mbarrier) {
  SORA_SM90(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                   "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(mbarrier) : "memory"));
}
SORA_DEVICE void cp_async_bulk_global_to_shared_multicast(uint32_t to, const void* from, unsigned bytes,
                                                          uint32_t mbarrier, uint16_t ranks) {
  SORA_SM90(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], "
                   "%2, [%3], %4;" ::"r"(to),
                   "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(mbarrier), "h"(ranks) : "memory"));
}

#endif

}  // namespace sora
