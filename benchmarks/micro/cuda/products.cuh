// The rate of mma at N = 8 with A in registers: the inner loop of a recurrent kernel that holds its weights there.
#pragma once

#include <common/barrier.cuh>
#include <common/element.cuh>
#include <common/launch.cuh>
#include <common/memory.cuh>
#include <common/mma.cuh>

#include "stopwatch.cuh"

namespace sora {
namespace micro {

// Two elements of one value in a register (TF32: one).
template <class Element>
SORA_DEVICE uint32_t operand(unsigned value) {
  if constexpr (sizeof(Element) == 2)
    return pack<Element>(float(value), float(value));
  else
    return tf32(float(value));
}

template <int kTiles>
struct ProductsShared {
  alignas(16) uint32_t a[kTiles][4], b[kTiles / 4][2];
};

// kTiles products a round from as many tiles of A, four for each fragment of B (the gates of a unit); product k goes on
// to sum k % kChains, so that kChains products do not wait for each other. 32 tiles with 4 chains: a step with the
// weights of 16 units in a warp's registers. All elements of tile k of A are 1 + k % 3, of fragment j of B 1 + j % 2.
// out [threads, kChains, 4]: the sums.
template <class Element, int kChains, int kTiles, int kMostThreads>
SORA_KERNEL(kMostThreads, 1)
products_kernel(int rounds, Buffers to) {
  // From memory: of constants the compiler would hold a few registers and make the others anew each round.
  auto& s = shared_memory<ProductsShared<kTiles>>();
  for (unsigned w = thread_index().x; w < 4 * kTiles; w += block_size().x)
    s.a[w / 4][w % 4] = operand<Element>(1 + w / 4 % 3);
  if (thread_index().x < kTiles / 2)
    s.b[thread_index().x / 2][thread_index().x % 2] = operand<Element>(1 + thread_index().x / 2 % 2);
  sync_block();
  uint32_t a[kTiles][4], b[kTiles / 4][2];
  SORA_UNROLL for (int k = 0; k < kTiles; ++k) {
    const auto x = load<U32x4>(s.a[k]);
    a[k][0] = x.x, a[k][1] = x.y, a[k][2] = x.z, a[k][3] = x.w;
  }
  SORA_UNROLL for (int j = 0; j < kTiles / 4; ++j) {
    const auto x = load<U32x2>(s.b[j]);
    b[j][0] = x.x, b[j][1] = x.y;
  }
  float d[kChains][4];
  SORA_UNROLL for (int c = 0; c < kChains; ++c) {
    SORA_UNROLL for (int r = 0; r < 4; ++r) d[c][r] = 0.0f;
  }
  sync_block();
  Stopwatch watch;
  watch.start();
  for (int round = 0; round < rounds; ++round) {
    SORA_UNROLL for (int k = 0; k < kTiles; ++k) {
      if constexpr (sizeof(Element) == 2)
        mma_m16n8k16<Element>(d[k % kChains], a[k], b[k / 4]);
      else
        mma_m16n8k8_tf32(d[k % kChains], a[k], b[k / 4]);
    }
    // Not past the clock: mma is not volatile.
    SORA_UNROLL for (int c = 0; c < kChains; ++c) keep(d[c][0]);
  }
  watch.stop(to.stamps);
  float* out_ptr = reinterpret_cast<float*>(to.out) + thread_index().x * kChains * 4;
  SORA_UNROLL for (int c = 0; c < kChains; ++c) {
    SORA_UNROLL for (int r = 0; r < 4; ++r) out_ptr[4 * c + r] = d[c][r];
  }
}

}  // namespace micro
}  // namespace sora
