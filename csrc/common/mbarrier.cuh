// mbarriers: barriers in shared memory that count arrivals and the bytes of asynchronous copies.
//
//   struct Shared { alignas(8) Mbarrier full[2]; ... };     uint32_t full = shared_address(&s.full[i]);
//   mbarrier_init(b, arrivals)             by one thread; then a barrier before anybody's use, and before that barrier
//                                          fence_mbarrier_init() if copies or other CTAs will signal it
//   mbarrier_arrive(b)                     an arrival at this CTA's own barrier: release, Scope::cta
//   mbarrier_arrive_expect_tx(b, bytes)    the same, and the phase waits for `bytes` more
//   mbarrier_expect_tx(b, bytes)           no arrival, no order
//   mbarrier_arrive_cluster(b)             b = map_to_rank(...): release, Scope::cluster
//   mbarrier_arrive_cluster_relaxed(b)     no order
//   mbarrier_wait<Scope>(b, parity)        until the phase of this parity (0, 1, 0, ..) is complete: acquire. Traps after
//                                          some ten seconds. Scope::cluster where other CTAs arrive or copies come in
//   mbarrier_try_wait<Scope>(b, parity)    once
//   mbarrier_wait_shared(b, parity)        as Scope::cluster, but it orders shared memory only: a wait in cluster scope
//   mbarrier_arrive_cluster_shared(b)      invalidates the L1 (CCTL.IVALL), a release there waits for global stores
//                                          (MEMBAR.GPU); these two do neither
// sm_90 and newer, but for init, arrive and wait<Scope::cta>, which sm_80 has.
#pragma once

#include "launch.cuh"
#include "scope.cuh"

namespace sora {

using Mbarrier = uint64_t;

#if defined(SORA_HOST_EMULATION)

SORA_DEVICE void mbarrier_init(uint32_t mbarrier, unsigned arrivals SORA_AND_SITE) {
  emu::mbarrier_init(mbarrier, arrivals, site);
}
SORA_DEVICE void fence_mbarrier_init(SORA_SITE) { emu::fence_mbarrier_init(site); }
SORA_DEVICE void mbarrier_arrive(uint32_t mbarrier SORA_AND_SITE) {
  emu::mbarrier_arrive(mbarrier, 0, false, emu::Order::release, Scope::cta, emu::Memory::all, site);
}
SORA_DEVICE void mbarrier_arrive_expect_tx(uint32_t mbarrier, unsigned bytes SORA_AND_SITE) {
  emu::mbarrier_arrive(mbarrier, bytes, false, emu::Order::release, Scope::cta, emu::Memory::all, site);
}
SORA_DEVICE void mbarrier_expect_tx(uint32_t mbarrier, unsigned bytes SORA_AND_SITE) {
  emu::mbarrier_expect_tx(mbarrier, bytes, site);
}
SORA_DEVICE void mbarrier_arrive_cluster(uint32_t mbarrier SORA_AND_SITE) {
  emu::mbarrier_arrive(mbarrier, 0, true, emu::Order::release, Scope::cluster, emu::Memory::all, site);
}
SORA_DEVICE void mbarrier_arrive_cluster_relaxed(uint32_t mbarrier SORA_AND_SITE) {
  emu::mbarrier_arrive(mbarrier, 0, true, emu::Order::relaxed, Scope::cluster, emu::Memory::all, site);
}
template <Scope scope = Scope::cta>
SORA_DEVICE bool mbarrier_try_wait(uint32_t mbarrier, unsigned parity SORA_AND_SITE) {
  return emu::mbarrier_try_wait(mbarrier, parity, scope, emu::Memory::all, site);
}
template <Scope scope = Scope::cta>
SORA_DEVICE void mbarrier_wait(uint32_t mbarrier, unsigned parity SORA_AND_SITE) {
  emu::mbarrier_wait(mbarrier, parity, scope, emu::Memory::all, site);
}
SORA_DEVICE void mbarrier_arrive_cluster_shared(uint32_t mbarrier SORA_AND_SITE) {
  emu::mbarrier_arrive(mbarrier, 0, true, emu::Order::release, Scope::cluster, emu::Memory::shared, site);
}
SORA_DEVICE void mbarrier_wait_shared(uint32_t mbarrier, unsigned parity SORA_AND_SITE) {
  emu::mbarrier_wait(mbarrier, parity, Scope::cluster, emu::Memory::shared, site);
}

#else

SORA_DEVICE void mbarrier_init(uint32_t mbarrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}
SORA_DEVICE void fence_mbarrier_init() {
  SORA_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}
SORA_DEVICE void mbarrier_arrive(uint32_t mbarrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(mbarrier) : "memory");
}
SORA_DEVICE void mbarrier_arrive_expect_tx(uint32_t mbarrier, unsigned bytes) {
  SORA_SM90(asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier),
                         "r"(bytes) : "memory"));
}
SORA_DEVICE void mbarrier_expect_tx(uint32_t mbarrier, unsigned bytes) {
  SORA_SM90(
      asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory"));
}
SORA_DEVICE void mbarrier_arrive_cluster(uint32_t mbarrier) {
  SORA_SM90(asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mbarrier) : "memory"));
}
SORA_DEVICE void mbarrier_arrive_cluster_relaxed(uint32_t mbarrier) {
  SORA_SM90(asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(mbarrier) : "memory"));
}

template <Scope scope = Scope::cta>
SORA_DEVICE bool mbarrier_try_wait(uint32_t mbarrier, unsigned parity) {
  uint32_t done = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (scope == Scope::cta) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(mbarrier), "r"(parity)
        : "memory");
  } else {
    static_assert(scope != Scope::gpu, "an mbarrier is seen by one cluster");
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(mbarrier), "r"(parity)
        : "memory");
  }
#else
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(mbarrier), "r"(parity)
               : "memory");
#endif
  return done != 0;
}
template <Scope scope = Scope::cta>
SORA_DEVICE void mbarrier_wait(uint32_t mbarrier, unsigned parity) {
  uint32_t tries = 0;  // a try suspends the thread for up to some microseconds
  while (!mbarrier_try_wait<scope>(mbarrier, parity)) {
    if (++tries == 1u << 23) __trap();
  }
}
SORA_DEVICE void mbarrier_arrive_cluster_shared(uint32_t mbarrier) {
  SORA_SM90(asm volatile("fence.release.sync_restrict::shared::cta.cluster;" :: : "memory"));
  mbarrier_arrive_cluster_relaxed(mbarrier);
}
SORA_DEVICE void mbarrier_wait_shared(uint32_t mbarrier, unsigned parity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t tries = 0;
  for (;;) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(mbarrier), "r"(parity)
        : "memory");
    if (done) break;
    if (++tries == 1u << 23) __trap();
  }
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#else
  __trap();
#endif
}

#endif

}  // namespace sora
