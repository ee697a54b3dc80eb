// Memory orders and scopes, spinning with a bound, and fences.
//
//   Scope::cta, cluster, gpu          who sees a release or an acquire; two threads synchronise if each lies in the
//                                     other's scope
//   fence_acq_rel<Scope>()            with relaxed flags around it; Scope::gpu is __threadfence
//   fence_proxy_async()               shared memory written by st before it, read or written by cp.async.bulk after it
//   spin_pause()                      the body of a polling loop
//   SpinBound bound; while (!ready) bound.spin();      traps after some ten seconds: an error instead of a hang
#pragma once

#include "launch.cuh"

namespace sora {

#if defined(SORA_HOST_EMULATION)

using emu::Scope;

template <Scope scope>
SORA_DEVICE void fence_acq_rel(SORA_SITE) {
  emu::fence_acq_rel(scope, site);
}
SORA_DEVICE void fence_proxy_async(SORA_SITE) { emu::fence_proxy_async(site); }

struct SpinBound {  // the scheduler itself sees that nobody can go on
  SORA_DEVICE void spin(SORA_SITE) { emu::spin_pause(site); }
};

#else

enum class Scope { cta, cluster, gpu };

template <Scope scope>
SORA_DEVICE void fence_acq_rel() {
  if constexpr (scope == Scope::cta) {
    asm volatile("fence.acq_rel.cta;" ::: "memory");
  } else if constexpr (scope == Scope::cluster) {
    SORA_SM90(asm volatile("fence.acq_rel.cluster;" :: : "memory"));
  } else {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
}
SORA_DEVICE void fence_proxy_async() { SORA_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory")); }

struct SpinBound {
  uint32_t spins = 0;
  SORA_DEVICE void spin() {
    if (++spins == 1u << 24) __trap();
    __nanosleep(32);
  }
};

#endif

}  // namespace sora
