// Through the shared memory of a cluster: one word to and fro, and the all-gather of h that a step of a recurrence
// spread over a cluster ends with. By st.async or (kBulk) by cp.async.bulk; both complete on the receiver's mbarrier.
#pragma once

#include <common/async_copy.cuh>
#include <common/barrier.cuh>
#include <common/cluster.cuh>
#include <common/launch.cuh>
#include <common/mbarrier.cuh>
#include <common/memory.cuh>
#include <common/mma.cuh>

#include "stopwatch.cuh"

namespace sora {
namespace micro {

struct PingPongShared {
  alignas(16) uint32_t slot[4];
  alignas(16) uint32_t mine[4];  // what a bulk copy reads
  alignas(8) Mbarrier full;
};
// The first and the last CTA of one cluster. Each adds 1 to what it gets: out [CTAs]: 2 rounds, .., 2 rounds - 1.
template <bool kBulk>
SORA_KERNEL(32, 1)
ping_pong_kernel(int rounds, Buffers to) {
  constexpr unsigned kBytes = kBulk ? 16 : 4;
  PingPongShared& s = shared_memory<PingPongShared>();
  const unsigned rank = cluster_rank(), last = cluster_size() - 1;
  const uint32_t full = shared_address(&s.full);
  if (lane() == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  sync_warp();
  cluster_sync();
  if (lane() == 0 && (rank == 0 || rank == last)) {
    const unsigned peer = rank == 0 ? last : 0;
    const uint32_t there = map_to_rank(shared_address(s.slot), peer), signal = map_to_rank(full, peer);
    uint32_t value = 0;
    Stopwatch watch;
    watch.start();
    for (int round = 0; round < rounds; ++round) {
      mbarrier_arrive_expect_tx(full, kBytes);
      if (rank != 0) {
        mbarrier_wait_shared(full, unsigned(round) & 1u);
        value = s.slot[0] + 1;
      }
      if (kBulk) {
        s.mine[0] = value;
        fence_proxy_async();
        cp_async_bulk_shared_to_cluster(there, shared_address(s.mine), kBytes, signal);
      } else {
        st_async(there, value, signal);
      }
      if (rank == 0) {
        mbarrier_wait_shared(full, unsigned(round) & 1u);
        value = s.slot[0] + 1;
      }
    }
    watch.stop(to.stamps);
    to.out[block_index().x] = value;
  }
  sync_warp();
  cluster_arrive_relaxed();
  cluster_wait();  // a copy may still read this CTA's memory
}

constexpr unsigned kMostGatherThreads = 256;
constexpr unsigned kMostWords = 2048;  // of h: 512 units of 8 rows, 16 bits each
constexpr unsigned kPeersOfThread = 2;
struct AllGatherShared {
  alignas(16) uint32_t h[2][kMostWords];
  alignas(16) uint32_t mine[2][kMostWords / 2];  // a slice
  alignas(8) Mbarrier full[2];
};
constexpr bool all_gather_takes(unsigned size, unsigned slice_bytes, unsigned threads) {
  const unsigned vectors = slice_bytes / 16;
  if (slice_bytes % 16 || vectors == 0 || vectors > threads || threads > kMostGatherThreads) return false;
  if (vectors * 4 > kMostWords / 2 || size * vectors * 4 > kMostWords) return false;
  return size <= kPeersOfThread * (threads / vectors) && size <= kPeersOfThread * (threads / 32);
}
// h is CTAs slices of slice_bytes. Each round a CTA makes its own slice of its neighbour's, every word plus 1, and
// sends it to all. One wait a round: who has all of h knows that every CTA has read the h before. That needs a barrier
// in each CTA between reading h and sending, for a thread sends to some CTAs only: to the others its reads are unknown.
// out [CTAs, CTAs, slice_bytes / 4]: 1000 times the rank `rounds` further on, plus the word, plus rounds.
template <bool kBulk>
SORA_KERNEL(kMostGatherThreads, 1)
all_gather_kernel(int slice_bytes, int rounds, Buffers to) {
  AllGatherShared& s = shared_memory<AllGatherShared>();
  const unsigned i = thread_index().x, threads = block_size().x, rank = cluster_rank(), size = cluster_size();
  const unsigned vectors = unsigned(slice_bytes) / 16, words = 4 * vectors, at_once = threads / vectors;
  const unsigned vector = i % vectors, first_peer = i / vectors;
  if (i == 0) {
    mbarrier_init(shared_address(&s.full[0]), 1);
    mbarrier_init(shared_address(&s.full[1]), 1);
    fence_mbarrier_init();
  }
  for (unsigned w = i; w < size * words; w += threads) s.h[0][w] = 1000 * (w / words) + w % words;
  sync_warp();
  cluster_sync();

  bool sends[kPeersOfThread];
  uint32_t there[kPeersOfThread], signal[kPeersOfThread];
  SORA_UNROLL for (unsigned p = 0; p < kPeersOfThread; ++p) {
    const unsigned peer = kBulk ? warp() + p * (threads / 32) : first_peer + p * at_once;
    sends[p] = peer < size && (kBulk ? lane() == 0 : first_peer < at_once);  // lanes issue bulk copies one by one
    there[p] = map_to_rank(shared_address(&s.h[0][rank * words + (kBulk ? 0 : 4 * vector)]), peer % size);
    signal[p] = map_to_rank(shared_address(&s.full[0]), peer % size);
  }
  Stopwatch watch;
  watch.start();
  for (int round = 0; round < rounds; ++round) {
    const unsigned now = unsigned(round) & 1u, next = now ^ 1u;
    const uint32_t full = shared_address(&s.full[next]);
    if (i == 0) mbarrier_arrive_expect_tx(full, size * words * 4);
    if (i < vectors) {
      const auto h = load<U32x4>(&s.h[now][(rank + 1) % size * words + 4 * i]);
      store(&s.mine[next][4 * i], U32x4{h.x + 1, h.y + 1, h.z + 1, h.w + 1});
      if (kBulk) fence_proxy_async();
    }
    sync_block();
    const unsigned offset = next * unsigned(sizeof(s.h[0])), signal_offset = next * unsigned(sizeof(Mbarrier));
    SORA_UNROLL for (unsigned p = 0; p < kPeersOfThread; ++p) {
      if (!sends[p]) continue;
      if (kBulk)
        cp_async_bulk_shared_to_cluster(there[p] + offset, shared_address(s.mine[next]), words * 4,
                                        signal[p] + signal_offset);
      else
        st_async(there[p] + offset, load<U32x4>(&s.mine[next][4 * vector]), signal[p] + signal_offset);
    }
    mbarrier_wait_shared(full, unsigned(round >> 1) & 1u);
  }
  watch.stop(to.stamps);
  sync_warp();
  cluster_arrive_relaxed();
  cluster_wait();  // a copy may still read this CTA's memory
  for (unsigned w = i; w < size * words; w += threads)
    to.out[block_index().x * size * words + w] = s.h[rounds & 1][w];
}

}  // namespace micro
}  // namespace sora
