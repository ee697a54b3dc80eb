// Demonstration: CTAs of a cluster exchange what they have computed by one wait for an mbarrier a step. Each step, a
// CTA adds up all ranks' values of the step before and sends the sum plus its rank to all. out [size, steps].
#pragma once

#include <common/async_copy.cuh>
#include <common/barrier.cuh>
#include <common/cluster.cuh>
#include <common/launch.cuh>
#include <common/mbarrier.cuh>
#include <common/memory.cuh>
#include <common/mma.cuh>

namespace sora {

constexpr int kMaxCluster = 8;

struct AllGatherShared {
  alignas(16) uint32_t value[2][kMaxCluster][4];  // 16 bytes from each rank
  alignas(16) uint32_t mine[2][4];                // what a bulk copy reads
  alignas(8) Mbarrier full[2];
};

template <bool bulk>
SORA_KERNEL(32, 1)
all_gather_kernel(uint32_t* out_ptr, int steps) {
  AllGatherShared& s = shared_memory<AllGatherShared>();
  const unsigned i = lane(), rank = cluster_rank(), size = cluster_size();
  if (i == 0) {
    mbarrier_init(shared_address(&s.full[0]), 1);
    mbarrier_init(shared_address(&s.full[1]), 1);
    fence_mbarrier_init();
  }
  if (i < size) s.value[0][i][0] = i;
  cluster_sync();  // the barriers of all CTAs are ready
  for (int step = 0; step < steps; ++step) {
    const int next = (step + 1) & 1;
    const uint32_t full = shared_address(&s.full[next]);
    const bool more = step + 1 < steps;
    if (more && i == 0) mbarrier_arrive_expect_tx(full, 16 * size);
    uint32_t sum = rank;
    for (unsigned peer = 0; peer < size; ++peer) sum += s.value[step & 1][peer][0];
    if (i == 0) out_ptr[rank * unsigned(steps) + unsigned(step)] = sum;
    if (!more) break;
    if (bulk) {
      if (i == 0) s.mine[next][0] = sum;
      fence_proxy_async();
    }
    sync_warp();  // this CTA has read the values of this step
    if (i < size) {
      const uint32_t to = map_to_rank(shared_address(s.value[next][rank]), i), signal = map_to_rank(full, i);
      if (bulk)
        cp_async_bulk_shared_to_cluster(to, shared_address(s.mine[next]), 16, signal);
      else
        st_async(to, U32x4{sum, 0, 0, 0}, signal);
    }
    mbarrier_wait_shared(full, unsigned(step >> 1) & 1u);
  }
  if (bulk) {  // a copy may still read this CTA's memory: nobody exits before all have received
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

}  // namespace sora
