// Loads and stores of more than one element, or with a cache hint.
//
//   U32x2, U32x4, F32x2, F32x4      registers .x .y (.z .w)
//   load<V>(p), store(p, v)         one access of sizeof(V) bytes, to global or shared memory; p aligned to it
//   load_once<V>(p)                 global memory that this launch never writes, read once: ld.nc.L1::no_allocate
//   load_read_only<V>(p)            global memory that this launch never writes: ld.global.nc
//   store_global(p, v)              global memory, where the compiler cannot see that it is: st.global
//   store_streaming(p, v)           global memory that nobody reads soon: st.global.cs
//   address_of_row(p, row, bytes)   p + row * bytes by one multiply-add of 32 bits into 64; the compiler makes it three
//   prefetch_l2(p)                  the 128-byte line around p
//   V: any of 4, 8 or 16 bytes, or an element of 2 (all but load and store: these too)
#pragma once

#include "launch.cuh"

namespace sora {

#if defined(SORA_HOST_EMULATION)

struct alignas(8) U32x2 {
  uint32_t x, y;
};
struct alignas(16) U32x4 {
  uint32_t x, y, z, w;
};
struct alignas(8) F32x2 {
  float x, y;
};
struct alignas(16) F32x4 {
  float x, y, z, w;
};

template <class V>
SORA_DEVICE V load(const void* p SORA_AND_SITE) {
  V value;
  emu::load(&value, p, sizeof(V), site);
  return value;
}
template <class V>
SORA_DEVICE void store(void* p, V value SORA_AND_SITE) {
  emu::store(p, &value, sizeof(V), site);
}
template <class V>
SORA_DEVICE V load_once(const void* p SORA_AND_SITE) {
  return load<V>(p, site);
}
template <class V>
SORA_DEVICE V load_read_only(const void* p SORA_AND_SITE) {
  return load<V>(p, site);
}
template <class V>
SORA_DEVICE void store_global(void* p, V value SORA_AND_SITE) {
  store(p, value, site);
}
template <class V>
SORA_DEVICE void store_streaming(void* p, V value SORA_AND_SITE) {
  store(p, value, site);
}
SORA_DEVICE void prefetch_l2(const void*) {}
SORA_DEVICE uintptr_t address_of_row(const void* p, int row, int bytes) {
  return reinterpret_cast<uintptr_t>(p) + intptr_t(row) * bytes;
}

#else

using U32x2 = uint2;
using U32x4 = uint4;
using F32x2 = float2;
using F32x4 = float4;

template <class V>
SORA_DEVICE V load(const void* p) {
  return *static_cast<const V*>(p);
}
template <class V>
SORA_DEVICE void store(void* p, V value) {
  *static_cast<V*>(p) = value;
}

namespace memory_detail {

template <class V>
SORA_DEVICE V from_registers(const uint32_t (&r)[sizeof(V) < 4 ? 1 : sizeof(V) / 4]) {
  V value;
  __builtin_memcpy(&value, r, sizeof(V));
  return value;
}

}  // namespace memory_detail

#define SORA_DEFINE_LOAD(NAME, QUALIFIERS)                                                                   \
  template <class V>                                                                                         \
  SORA_DEVICE V NAME(const void* p) {                                                                        \
    static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "one access");      \
    uint32_t r[sizeof(V) < 4 ? 1 : sizeof(V) / 4];                                                           \
    if constexpr (sizeof(V) == 16) {                                                                         \
      asm volatile("ld.global" QUALIFIERS ".v4.b32 {%0, %1, %2, %3}, [%4];"                                  \
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                          \
                   : "l"(__cvta_generic_to_global(p)));                                                      \
    } else if constexpr (sizeof(V) == 8) {                                                                   \
      asm volatile("ld.global" QUALIFIERS ".v2.b32 {%0, %1}, [%2];"                                          \
                   : "=r"(r[0]), "=r"(r[1])                                                                  \
                   : "l"(__cvta_generic_to_global(p)));                                                      \
    } else if constexpr (sizeof(V) == 4) {                                                                   \
      asm volatile("ld.global" QUALIFIERS ".b32 %0, [%1];" : "=r"(r[0]) : "l"(__cvta_generic_to_global(p))); \
    } else {                                                                                                 \
      uint16_t half;                                                                                         \
      asm volatile("ld.global" QUALIFIERS ".b16 %0, [%1];" : "=h"(half) : "l"(__cvta_generic_to_global(p))); \
      r[0] = half;                                                                                           \
    }                                                                                                        \
    return memory_detail::from_registers<V>(r);                                                              \
  }
SORA_DEFINE_LOAD(load_once, ".nc.L1::no_allocate")
SORA_DEFINE_LOAD(load_read_only, ".nc")
#undef SORA_DEFINE_LOAD

#define SORA_DEFINE_STORE(NAME, QUALIFIERS)                                                                           \
  template <class V>                                                                                                  \
  SORA_DEVICE void NAME(void* p, V value) {                                                                           \
    static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "one access");               \
    uint32_t r[sizeof(V) < 4 ? 1 : sizeof(V) / 4] = {};                                                               \
    __builtin_memcpy(r, &value, sizeof(V));                                                                           \
    if constexpr (sizeof(V) == 16) {                                                                                  \
      asm volatile("st.global" QUALIFIERS ".v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),       \
                   "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])                                                         \
                   : "memory");                                                                                       \
    } else if constexpr (sizeof(V) == 8) {                                                                            \
      asm volatile("st.global" QUALIFIERS ".v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(r[0]),    \
                   "r"(r[1])                                                                                          \
                   : "memory");                                                                                       \
    } else if constexpr (sizeof(V) == 4) {                                                                            \
      asm volatile("st.global" QUALIFIERS ".b32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(r[0]) : "memory"); \
    } else {                                                                                                          \
      asm volatile("st.global" QUALIFIERS ".b16 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "h"(uint16_t(r[0]))    \
                   : "memory");                                                                                       \
    }                                                                                                                 \
  }
SORA_DEFINE_STORE(store_global, "")
SORA_DEFINE_STORE(store_streaming, ".cs")
#undef SORA_DEFINE_STORE

SORA_DEVICE uintptr_t address_of_row(const void* p, int row, int bytes) {
  uint64_t address;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(bytes), "l"(p));
  return address;
}
SORA_DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

#endif

}  // namespace sora
