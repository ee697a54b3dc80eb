// Thread-block clusters (sm_90): CTAs that read and write each other's shared memory.
//
//   cluster_rank(), cluster_size()
//   map_to_rank(address, rank)      the same place in the shared memory of another CTA, as a cluster address
//   store_cluster(address, v), load_cluster<V>(address)     4 bytes there, as plain accesses
//   cluster_arrive(), cluster_wait()                        a barrier of all threads: release, acquire
//   cluster_arrive_relaxed()                                the same without order
//   cluster_sync()                                          both
// A CTA may exit only when nobody will touch its shared memory any more.
#pragma once

#include "element.cuh"
#include "launch.cuh"

namespace sora {

#if defined(SORA_HOST_EMULATION)

SORA_DEVICE unsigned cluster_rank() { return emu::cluster_rank(); }
SORA_DEVICE unsigned cluster_size() { return emu::cluster_size(); }
SORA_DEVICE uint32_t map_to_rank(uint32_t address, unsigned rank SORA_AND_SITE) {
  return emu::map_to_rank(address, rank, site);
}
template <class V>
SORA_DEVICE void store_cluster(uint32_t address, V value SORA_AND_SITE) {
  static_assert(sizeof(V) == 4, "one register");
  emu::store_cluster(address, &value, 4, site);
}
template <class V>
SORA_DEVICE V load_cluster(uint32_t address SORA_AND_SITE) {
  static_assert(sizeof(V) == 4, "one register");
  V value;
  emu::load_cluster(&value, address, 4, site);
  return value;
}
SORA_DEVICE void cluster_arrive(SORA_SITE) { emu::cluster_arrive(true, site); }
SORA_DEVICE void cluster_arrive_relaxed(SORA_SITE) { emu::cluster_arrive(false, site); }
SORA_DEVICE void cluster_wait(SORA_SITE) { emu::cluster_wait(site); }
SORA_DEVICE void cluster_sync(SORA_SITE) {
  emu::cluster_arrive(true, site);
  emu::cluster_wait(site);
}

#else

SORA_DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
  SORA_SM90(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return rank;
}
SORA_DEVICE unsigned cluster_size() {
  unsigned size = 1;
  SORA_SM90(asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size)));
  return size;
}
SORA_DEVICE uint32_t map_to_rank(uint32_t address, unsigned rank) {
  uint32_t there = address;
  SORA_SM90(asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank)));
  return there;
}
template <class V>
SORA_DEVICE void store_cluster(uint32_t address, V value) {
  static_assert(sizeof(V) == 4, "one register");
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  SORA_SM90(asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(bits) : "memory"));
}
template <class V>
SORA_DEVICE V load_cluster(uint32_t address) {
  static_assert(sizeof(V) == 4, "one register");
  uint32_t bits = 0;
  SORA_SM90(asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(bits) : "r"(address) : "memory"));
  V value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
SORA_DEVICE void cluster_arrive() { SORA_SM90(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory")); }
SORA_DEVICE void cluster_arrive_relaxed() {
  SORA_SM90(asm volatile("barrier.cluster.arrive.relaxed.aligned;" :: : "memory"));
}
SORA_DEVICE void cluster_wait() { SORA_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory")); }
SORA_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

#endif

}  // namespace sora
