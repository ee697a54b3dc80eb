// 32-bit words in global memory that CTAs synchronise through.
//
//   store_release<Scope>(p, v), store_relaxed<Scope>(p, v)
//   load_acquire<Scope>(p), load_relaxed<Scope>(p)
//   add_release<Scope>(p, v), add_relaxed<Scope>(p, v)               red: no result
//   fetch_add_acq_rel<Scope>(p, v), fetch_add_relaxed<Scope>(p, v)   atom: the value before
//   wait_until<Scope>(p, value)       spins until *p >= value: acquire; traps after some ten seconds
//   grid_sync(counter, round)         barrier of a cooperative launch. counter: a word, 0 at the launch; round: 0, 1, ..
#pragma once

#include "barrier.cuh"
#include "launch.cuh"
#include "scope.cuh"

namespace sora {

#if defined(SORA_HOST_EMULATION)

template <Scope scope>
SORA_DEVICE void store_release(uint32_t* p, uint32_t value SORA_AND_SITE) {
  emu::atomic_store(p, value, emu::Order::release, scope, site);
}
template <Scope scope>
SORA_DEVICE void store_relaxed(uint32_t* p, uint32_t value SORA_AND_SITE) {
  emu::atomic_store(p, value, emu::Order::relaxed, scope, site);
}
template <Scope scope>
SORA_DEVICE uint32_t load_acquire(const uint32_t* p SORA_AND_SITE) {
  return emu::atomic_load(p, emu::Order::acquire, scope, site);
}
template <Scope scope>
SORA_DEVICE uint32_t load_relaxed(const uint32_t* p SORA_AND_SITE) {
  return emu::atomic_load(p, emu::Order::relaxed, scope, site);
}
template <Scope scope>
SORA_DEVICE void add_release(uint32_t* p, uint32_t value SORA_AND_SITE) {
  emu::atomic_add(p, value, emu::Order::release, scope, site);
}
template <Scope scope>
SORA_DEVICE void add_relaxed(uint32_t* p, uint32_t value SORA_AND_SITE) {
  emu::atomic_add(p, value, emu::Order::relaxed, scope, site);
}
template <Scope scope>
SORA_DEVICE uint32_t fetch_add_acq_rel(uint32_t* p, uint32_t value SORA_AND_SITE) {
  return emu::atomic_add(p, value, emu::Order::acq_rel, scope, site);
}
template <Scope scope>
SORA_DEVICE uint32_t fetch_add_relaxed(uint32_t* p, uint32_t value SORA_AND_SITE) {
  return emu::atomic_add(p, value, emu::Order::relaxed, scope, site);
}

#else

// STATEMENT(scope) with the scope as a string literal.
#define SORA_BY_SCOPE(STATEMENT)              \
  if constexpr (scope == Scope::cta) {        \
    STATEMENT("cta");                         \
  } else if constexpr (scope == Scope::gpu) { \
    STATEMENT("gpu");                         \
  } else {                                    \
    SORA_SM90(STATEMENT("cluster"));          \
  }

#define SORA_DEFINE_STORE(NAME, ORDER)                 \
  template <Scope scope>                               \
  SORA_DEVICE void NAME(uint32_t* p, uint32_t value) { \
    const auto to = __cvta_generic_to_global(p);       \
    SORA_BY_SCOPE(ORDER)                               \
  }
#define SORA_STORE_RELEASE(SCOPE) \
  asm volatile("st.release." SCOPE ".global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory")
#define SORA_STORE_RELAXED(SCOPE) \
  asm volatile("st.relaxed." SCOPE ".global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory")
#define SORA_ADD_RELEASE(SCOPE) \
  asm volatile("red.release." SCOPE ".global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory")
#define SORA_ADD_RELAXED(SCOPE) \
  asm volatile("red.relaxed." SCOPE ".global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory")
SORA_DEFINE_STORE(store_release, SORA_STORE_RELEASE)
SORA_DEFINE_STORE(store_relaxed, SORA_STORE_RELAXED)
SORA_DEFINE_STORE(add_release, SORA_ADD_RELEASE)
SORA_DEFINE_STORE(add_relaxed, SORA_ADD_RELAXED)

#define SORA_LOAD_ACQUIRE(SCOPE)                            \
  asm volatile("ld.acquire." SCOPE ".global.u32 %0, [%1];" \
               : "=r"(value)                                \
               : "l"(__cvta_generic_to_global(p))           \
               : "memory")
#define SORA_LOAD_RELAXED(SCOPE)                            \
  asm volatile("ld.relaxed." SCOPE ".global.u32 %0, [%1];" \
               : "=r"(value)                                \
               : "l"(__cvta_generic_to_global(p))           \
               : "memory")
template <Scope scope>
SORA_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value = 0;
  SORA_BY_SCOPE(SORA_LOAD_ACQUIRE)
  return value;
}
template <Scope scope>
SORA_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t value = 0;
  SORA_BY_SCOPE(SORA_LOAD_RELAXED)
  return value;
}

#define SORA_FETCH_ADD_ACQ_REL(SCOPE)                                \
  asm volatile("atom.acq_rel." SCOPE ".global.add.u32 %0, [%1], %2;" \
               : "=r"(before)                                        \
               : "l"(__cvta_generic_to_global(p)), "r"(value)        \
               : "memory")
#define SORA_FETCH_ADD_RELAXED(SCOPE)                                \
  asm volatile("atom.relaxed." SCOPE ".global.add.u32 %0, [%1], %2;" \
               : "=r"(before)                                        \
               : "l"(__cvta_generic_to_global(p)), "r"(value)        \
               : "memory")
template <Scope scope>
SORA_DEVICE uint32_t fetch_add_acq_rel(uint32_t* p, uint32_t value) {
  uint32_t before = 0;
  SORA_BY_SCOPE(SORA_FETCH_ADD_ACQ_REL)
  return before;
}
template <Scope scope>
SORA_DEVICE uint32_t fetch_add_relaxed(uint32_t* p, uint32_t value) {
  uint32_t before = 0;
  SORA_BY_SCOPE(SORA_FETCH_ADD_RELAXED)
  return before;
}
#undef SORA_FETCH_ADD_ACQ_REL
#undef SORA_FETCH_ADD_RELAXED
#undef SORA_LOAD_ACQUIRE
#undef SORA_LOAD_RELAXED
#undef SORA_STORE_RELEASE
#undef SORA_STORE_RELAXED
#undef SORA_ADD_RELEASE
#undef SORA_ADD_RELAXED
#undef SORA_DEFINE_STORE
#undef SORA_BY_SCOPE

#endif

template <Scope scope>
SORA_DEVICE void wait_until(const uint32_t* p, uint32_t value SORA_AND_SITE) {
  SpinBound bound;
#if defined(SORA_HOST_EMULATION)
  while (load_acquire<scope>(p, site) < value) bound.spin(site);
#else
  while (load_acquire<scope>(p) < value) bound.spin();
#endif
}

SORA_DEVICE void grid_sync(uint32_t* counter, uint32_t round) {
  sync_block();
  if (thread_index().x == 0) {
    add_release<Scope::gpu>(counter, 1);
    wait_until<Scope::gpu>(counter, (round + 1) * grid_size().x * grid_size().y * grid_size().z);
  }
  sync_block();
}

}  // namespace sora
