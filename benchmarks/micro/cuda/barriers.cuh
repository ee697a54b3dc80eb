// Barriers of a CTA, a cluster and a grid. kExchange: values go round through them, one neighbour on and one more each
// round, as a step of a recurrence needs it; else the barrier alone.
#pragma once

#include <common/barrier.cuh>
#include <common/cluster.cuh>
#include <common/flags.cuh>
#include <common/launch.cuh>
#include <common/mma.cuh>

#include "stopwatch.cuh"

namespace sora {
namespace micro {

constexpr unsigned kMostBlockThreads = 512;
constexpr unsigned kThreads = 256;  // of a CTA, where several meet

struct BlockShared {
  uint32_t value[2][kMostBlockThreads];
};
// out [threads]: kExchange: the number of a thread `rounds` warps on, plus rounds.
template <bool kExchange>
SORA_KERNEL(kMostBlockThreads, 1)
block_barrier_kernel(int rounds, Buffers to) {
  BlockShared& s = shared_memory<BlockShared>();
  const unsigned i = thread_index().x, threads = block_size().x, next = (i + 32) % threads;
  uint32_t value = i;
  sync_block();
  Stopwatch watch;
  watch.start();
  for (int round = 0; round < rounds; ++round) {
    if (kExchange) s.value[round & 1][i] = value;
    sync_block();
    if (kExchange) value = s.value[round & 1][next] + 1;
  }
  watch.stop(to.stamps);
  to.out[i] = value;
}

struct ClusterShared {
  uint32_t value[2][kThreads];
};
// kRelaxed: without order; a release waits for stores to global memory too, and an acquire empties the L1.
enum class ClusterBarrier { kRelaxed, kOrdered, kExchange };
// out [CTAs, threads]: kExchange: kThreads times the rank `rounds` CTAs back, plus the thread, plus rounds.
template <ClusterBarrier kKind>
SORA_KERNEL(kThreads, 1)
cluster_barrier_kernel(int rounds, Buffers to) {
  constexpr bool kExchange = kKind == ClusterBarrier::kExchange;
  ClusterShared& s = shared_memory<ClusterShared>();
  const unsigned i = thread_index().x, rank = cluster_rank(), next = (rank + 1) % cluster_size();
  const uint32_t there = map_to_rank(shared_address(&s.value[0][i]), next);
  uint32_t value = kThreads * rank + i;
  cluster_sync();  // every CTA has begun
  Stopwatch watch;
  watch.start();
  for (int round = 0; round < rounds; ++round) {
    const unsigned buffer = unsigned(round) & 1u;
    if (kExchange) store_cluster(there + buffer * unsigned(sizeof(s.value[0])), value);
    if (kKind == ClusterBarrier::kRelaxed)
      cluster_arrive_relaxed();
    else
      cluster_arrive();
    cluster_wait();
    if (kExchange) value = s.value[buffer][i] + 1;
  }
  watch.stop(to.stamps);
  to.out[kThreads * block_index().x + i] = value;
}

// scratch [32 + 2 CTAs]: the counter, in a line of its own, and both buffers. out [CTAs]: kExchange: the number of the
// CTA `rounds` further on, plus rounds.
template <bool kExchange>
SORA_KERNEL(kThreads, 1)
grid_barrier_kernel(int rounds, Buffers to) {
  const unsigned n = grid_size().x, me = block_index().x, i = thread_index().x;
  uint32_t* values_ptr = to.scratch + 32;
  uint32_t value = me;
  grid_sync(to.scratch, 0);
  Stopwatch watch;
  watch.start();
  for (int round = 0; round < rounds; ++round) {
    uint32_t* buffer_ptr = values_ptr + (unsigned(round) & 1u) * n;
    if (kExchange && i == 0) buffer_ptr[me] = value;
    grid_sync(to.scratch, uint32_t(round) + 1);
    if (kExchange && i == 0) value = buffer_ptr[(me + 1) % n] + 1;
  }
  watch.stop(to.stamps);
  if (i == 0) to.out[me] = value;
}

}  // namespace micro
}  // namespace sora
