// The clocks of a GPU, and what a measurement leaves behind.
//
//   clock_cycles()          of this SM
//   clock_nanoseconds()     of the whole GPU; may advance in steps of a microsecond
//   Stopwatch watch; watch.start(); ...; watch.stop(to.stamps);      by all lanes of a warp, or by lane 0 alone
//
// Emulated, a clock counts how often it was read.
#pragma once

#include <common/launch.cuh>

namespace sora {
namespace micro {

// What every kernel of this folder writes.
struct Buffers {
  uint64_t* stamps;   // [CTAs, warps, 4]: cycles and nanoseconds at the start, the same at the end
  uint32_t* out;      // what was exchanged: each kernel says which
  uint32_t* scratch;  // zero at the launch
};

#if defined(SORA_HOST_EMULATION)

inline uint64_t clock_readings = 0;
SORA_DEVICE uint64_t clock_cycles() { return ++clock_readings; }
SORA_DEVICE uint64_t clock_nanoseconds() { return ++clock_readings; }

#else

SORA_DEVICE uint64_t clock_cycles() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}
SORA_DEVICE uint64_t clock_nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

#endif

struct Stopwatch {
  uint64_t cycles, nanoseconds;

  SORA_DEVICE void start() {
    nanoseconds = clock_nanoseconds();
    cycles = clock_cycles();
  }
  SORA_DEVICE void stop(uint64_t* stamps_ptr) {
    const uint64_t end_cycles = clock_cycles(), end_nanoseconds = clock_nanoseconds();
    if (lane() != 0) return;
    stamps_ptr += 4 * (block_index().x * (block_size().x / 32) + warp());
    stamps_ptr[0] = cycles;
    stamps_ptr[1] = nanoseconds;
    stamps_ptr[2] = end_cycles;
    stamps_ptr[3] = end_nanoseconds;
  }
};

}  // namespace micro
}  // namespace sora
