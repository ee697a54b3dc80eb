// CTAs that meet through words in the L2: each sets its flag by a release, and its threads poll those of all by
// acquires. kExchange: each CTA also hands over 128 bytes (of h: 8 units of 8 rows, 16 bits) and reads those of all.
#pragma once

#include <common/barrier.cuh>
#include <common/flags.cuh>
#include <common/launch.cuh>
#include <common/memory.cuh>

#include "stopwatch.cuh"

namespace sora {
namespace micro {

constexpr unsigned kFlagThreads = 256;  // and the most CTAs
constexpr unsigned kWords = 32;         // that a CTA hands over

// As SpinBound, without its pause: what the pause costs is one of the questions.
struct TightSpinBound {
#if defined(SORA_HOST_EMULATION)
  SORA_DEVICE void spin(SORA_SITE) { emu::spin_pause(site); }
#else
  uint32_t spins = 0;
  SORA_DEVICE void spin() {
    if (++spins == 1u << 24) __trap();
  }
#endif
};

template <class Bound>
SORA_DEVICE void meet(uint32_t* flags_ptr, uint32_t stamp) {
  const unsigned i = thread_index().x;
  sync_block();
  if (i == 0) store_release<Scope::gpu>(&flags_ptr[block_index().x], stamp);
  if (i < grid_size().x) {
    Bound bound;
    while (load_acquire<Scope::gpu>(&flags_ptr[i]) < stamp) bound.spin();
  }
  sync_block();
}

// scratch [256 + 2 CTAs kWords]: flags, both buffers. out [CTAs, kWords + 256]: kWords of the CTA `rounds` further on,
// plus rounds; and of each thread the sum of all that it has read.
template <bool kExchange, class Bound>
SORA_KERNEL(kFlagThreads, 1)
l2_flags_kernel(int rounds, Buffers to) {
  const unsigned n = grid_size().x, me = block_index().x, i = thread_index().x;
  uint32_t* words_ptr = to.scratch + kFlagThreads;
  uint32_t value = kWords * me + i, sum = 0;
  meet<Bound>(to.scratch, 1);
  Stopwatch watch;
  watch.start();
  for (int round = 0; round < rounds; ++round) {
    uint32_t* buffer_ptr = words_ptr + (unsigned(round) & 1u) * n * kWords;
    if (kExchange && i < kWords) store(buffer_ptr + kWords * me + i, value);
    meet<Bound>(to.scratch, uint32_t(round) + 2);
    if (kExchange) {
      if (i < kWords) value = load<uint32_t>(buffer_ptr + kWords * ((me + 1) % n) + i) + 1;
      for (unsigned v = i; v < n * kWords / 4; v += kFlagThreads) {
        const auto x = load<U32x4>(buffer_ptr + 4 * v);
        sum += x.x + x.y + x.z + x.w;
      }
      keep(sum);
    }
  }
  watch.stop(to.stamps);
  uint32_t* out_ptr = to.out + me * (kWords + kFlagThreads);
  if (i < kWords) out_ptr[i] = value;
  out_ptr[kWords + i] = sum;
}

}  // namespace micro
}  // namespace sora
