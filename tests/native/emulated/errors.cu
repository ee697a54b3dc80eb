// Kernels that are wrong, one mistake each: what the emulation must report, and where. test_emulation.py finds the line
// of a case by its comment.
#include <cstring>

#include <common/async_copy.cuh>
#include <common/barrier.cuh>
#include <common/cluster.cuh>
#include <common/flags.cuh>
#include <common/launch.cuh>
#include <common/mbarrier.cuh>
#include <common/memory.cuh>
#include <common/mma.cuh>

namespace sora {
namespace {

struct Shared {
  alignas(16) uint32_t x[256];
  alignas(8) Mbarrier full;
};

SORA_DEVICE Shared& s() { return shared_memory<Shared>(); }
SORA_DEVICE unsigned i() { return thread_index().x; }
SORA_DEVICE uint32_t full() { return shared_address(&s().full); }

// misuse

SORA_KERNEL(64) shared_write_past_the_end(uint32_t*, int n) {
  s().x[i() * unsigned(n)] = i();  // shared_write_past_the_end
}
SORA_KERNEL(64) ldmatrix_past_the_end(uint32_t*, int n) {
  uint32_t r[4];
  ldmatrix_x4(r, shared_address(s().x) + 16 * lane() * unsigned(n));  // ldmatrix_past_the_end
}
SORA_KERNEL(64) global_read_past_the_end(uint32_t* data, int n) {
  s().x[i()] = data[i() * unsigned(n)];  // global_read_past_the_end
}
SORA_KERNEL(64) global_write_far_past_the_end(uint32_t* data, int n) {
  data[i() * unsigned(n) * 1000] = 1;  // global_write_far_past_the_end
}
SORA_KERNEL(64) write_one_word_past_the_end(uint32_t* data, int n) {
  if (i() == 0) data[n == 16 ? 253 : 0] = 1;  // write_one_word_past_the_end
}
SORA_KERNEL(64) vector_load_past_the_end(uint32_t* data, int) {
  data[0] = load<U32x4>(data + 252).x;  // vector_load_past_the_end
}
SORA_KERNEL(64) cp_async_past_the_end(uint32_t* data, int n) {
  cp_async<16>(shared_address(&s().x[4 * i()]), data + i() * unsigned(n));  // cp_async_past_the_end
}
SORA_KERNEL(64) null_pointer(uint32_t* data, int) {
  data = data[0] == 12345 ? data : nullptr;
  data[i()] = 3;  // null_pointer
}
SORA_KERNEL(64) misaligned_vector(uint32_t* data, int) {
  data[0] = load<U32x4>(data + 2).x;  // misaligned_vector
}
SORA_KERNEL(64) exit_before_a_barrier(uint32_t* data, int n) {
  if (i() >= 4 * unsigned(n) - 1) return;
  sync_block();  // exit_before_a_barrier
  data[i()] = i();
}
SORA_KERNEL(64) barrier_in_a_branch(uint32_t*, int) {
  if (lane() < 16)
    sync_block();
  else
    sync_block();  // barrier_in_a_branch
}
SORA_KERNEL(64) half_a_warp_multiplies(uint32_t*, int) {
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (lane() < 16) mma_m16n8k16<Half>(d, a, b);  // half_a_warp_multiplies
}
SORA_KERNEL(64) two_ways_through_a_warp(uint32_t*, int) {
  if (lane() < 16)
    sync_warp();
  else
    shuffle(1u, 0);  // two_ways_through_a_warp
}
SORA_KERNEL(64) shuffle_from_outside_the_mask(uint32_t*, int) {
  if (lane() < 16) shuffle(1u, 20, 0xffff);  // shuffle_from_outside_the_mask
}
SORA_KERNEL(64) wrong_count_of_a_barrier(uint32_t*, int) {
  barrier_sync(1, warp() == 0 ? 64 : 32);  // wrong_count_of_a_barrier
}
SORA_KERNEL(64) barrier_that_nobody_joins(uint32_t*, int) {
  if (warp() == 0) barrier_sync(1, 64);  // barrier_that_nobody_joins
}
SORA_KERNEL(64) uninitialised_mbarrier(uint32_t*, int) {
  mbarrier_arrive(full());  // uninitialised_mbarrier
}
SORA_KERNEL(64) too_many_arrivals(uint32_t*, int) {
  if (i() > 0) return;
  mbarrier_init(full(), 1);
  mbarrier_expect_tx(full(), 16);
  mbarrier_arrive(full());
  mbarrier_arrive(full());  // too_many_arrivals
}
SORA_KERNEL(64) bytes_that_never_come(uint32_t*, int) {
  if (i() > 0) return;
  mbarrier_init(full(), 1);
  mbarrier_arrive_expect_tx(full(), 16);
  mbarrier_wait(full(), 0);  // bytes_that_never_come
}
SORA_KERNEL(64) parity_of_the_phase_before(uint32_t*, int) {
  if (i() > 0) return;
  mbarrier_init(full(), 1);
  mbarrier_arrive(full());
  mbarrier_wait(full(), 1);  // parity_of_the_phase_before
}
SORA_KERNEL(64) overwritten_mbarrier(uint32_t*, int) {
  if (i() > 0) return;
  mbarrier_init(full(), 1);
  store(&s().full, 7ull);
  mbarrier_arrive(full());  // overwritten_mbarrier
}
SORA_KERNEL(64) flag_that_nobody_sets(uint32_t* data, int) {
  if (i() == 0) wait_until<Scope::gpu>(data, 1000);  // flag_that_nobody_sets
}
SORA_KERNEL(64) data_and_mbarrier_apart(uint32_t*, int) {
  if (i() == 0) {
    mbarrier_init(full(), 1);
    fence_mbarrier_init();
  }
  sync_warp();
  cluster_sync();
  if (i() == 0 && cluster_rank() == 0) st_async(map_to_rank(shared_address(s().x), 1), 1u, full());  // data_and_mbarrier_apart
  cluster_sync();
}
SORA_KERNEL(64) store_to_an_exited_cta(uint32_t*, int) {
  cluster_sync();
  if (cluster_rank() == 1) return;
  for (int k = 0; k < 2000; ++k) store_cluster(map_to_rank(shared_address(&s().x[i()]), 1), i());  // store_to_an_exited_cta
}
SORA_KERNEL(64) struct_larger_than_the_launch(uint32_t*, int) {
  shared_memory<unsigned char[4096]>()[i()] = 1;  // struct_larger_than_the_launch
}
SORA_KERNEL(64) stack_overflow(uint32_t* data, int n) {
  volatile uint32_t big[64 * 1024];
  for (int k = 64 * 1024 - 1; k >= 0; --k) big[k] = uint32_t(n);  // stack_overflow
  data[i()] = big[n];
}

// races: both accesses are marked

SORA_KERNEL(64) no_barrier(uint32_t* data, int) {
  s().x[i()] = i();         // no_barrier
  data[i()] = s().x[63 - i()];  // no_barrier
}
SORA_KERNEL(64) no_sync_warp(uint32_t* data, int) {
  s().x[i()] = i();        // no_sync_warp
  shuffle(1u, 0);          // a shuffle orders nothing
  data[i()] = s().x[i() ^ 1];  // no_sync_warp
}
SORA_KERNEL(64) no_barrier_before_overwriting(uint32_t* data, int) {
  s().x[i()] = i();
  sync_block();
  data[i()] = s().x[63 - i()];  // no_barrier_before_overwriting
  s().x[i()] = 0;               // no_barrier_before_overwriting
}
SORA_KERNEL(64) ldmatrix_without_a_barrier(uint32_t* data, int) {
  s().x[i()] = i();  // ldmatrix_without_a_barrier
  uint32_t r[1];
  ldmatrix_x1(r, shared_address(&s().x[4 * (lane() % 8)]));  // ldmatrix_without_a_barrier
  data[i()] = r[0];
}
SORA_KERNEL(64) no_cp_async_wait(uint32_t* data, int) {
  cp_async<4>(shared_address(&s().x[i()]), data + i());  // no_cp_async_wait
  cp_async_commit();
  sync_block();
  data[64 + i()] = s().x[i()];  // no_cp_async_wait
}
SORA_KERNEL(64) cp_async_wait_of_one_group_too_few(uint32_t* data, int) {
  cp_async<4>(shared_address(&s().x[i()]), data + i());
  cp_async_commit();
  cp_async<4>(shared_address(&s().x[64 + i()]), data + 64 + i());  // cp_async_wait_of_one_group_too_few
  cp_async_commit();
  cp_async_wait<1>();
  data[128 + i()] = s().x[i()];
  data[128 + i()] = s().x[64 + i()];  // cp_async_wait_of_one_group_too_few
}
SORA_KERNEL(64) cp_async_of_another_thread(uint32_t* data, int) {
  cp_async<4>(shared_address(&s().x[i()]), data + i());  // cp_async_of_another_thread
  cp_async_commit();
  sync_block();
  cp_async_wait<0>();
  data[64 + i()] = s().x[63 - i()];  // cp_async_of_another_thread
}
SORA_KERNEL(64) source_overwritten_under_cp_async(uint32_t* data, int) {
  cp_async<4>(shared_address(&s().x[i()]), data + i());  // source_overwritten_under_cp_async
  data[i()] = 5;                                         // source_overwritten_under_cp_async
}
SORA_KERNEL(64) two_ctas_write_one_word(uint32_t* data, int) {
  data[i()] = block_index().x;  // two_ctas_write_one_word
}
SORA_KERNEL(64) relaxed_flag(uint32_t* data, int) {
  if (i() > 0) return;
  if (block_index().x == 0) {
    data[1] = 7;  // relaxed_flag
    store_relaxed<Scope::gpu>(data, 1000);
  } else {
    wait_until<Scope::gpu>(data, 1000);
    data[2] = data[1];  // relaxed_flag
  }
}
SORA_KERNEL(64) relaxed_poll(uint32_t* data, int) {
  if (i() > 0) return;
  if (block_index().x == 0) {
    data[1] = 7;  // relaxed_poll
    store_release<Scope::gpu>(data, 1000);
  } else {
    SpinBound bound;
    while (load_relaxed<Scope::gpu>(data) < 1000) bound.spin();
    data[2] = data[1];  // relaxed_poll
  }
}
SORA_KERNEL(64) scope_too_narrow(uint32_t* data, int) {
  if (i() > 0) return;
  if (block_index().x == 0) {
    data[1] = 7;  // scope_too_narrow
    store_release<Scope::cta>(data, 1000);
  } else {
    wait_until<Scope::gpu>(data, 1000);
    data[2] = data[1];  // scope_too_narrow
  }
}
SORA_KERNEL(64) release_by_one_thread_only(uint32_t* data, int) {
  if (block_index().x == 0) {
    data[64 + i()] = 7;  // release_by_one_thread_only
    if (i() == 0) store_release<Scope::gpu>(data, 1000);
  } else {
    if (i() == 0) wait_until<Scope::gpu>(data, 1000);
    sync_block();
    data[128 + i()] = data[64 + i()];  // release_by_one_thread_only
  }
}
SORA_KERNEL(64) plain_read_of_a_flag(uint32_t* data, int) {
  if (i() > 0) return;
  if (block_index().x == 0)
    store_release<Scope::gpu>(data, 1);  // plain_read_of_a_flag
  else
    data[1] = data[0];  // plain_read_of_a_flag
}
SORA_KERNEL(64) arrive_is_no_acquire(uint32_t* data, int) {
  if (warp() == 0) {
    s().x[i()] = i();  // arrive_is_no_acquire
    barrier_sync(1, 64);
  } else {
    barrier_arrive(1, 64);
    data[i()] = s().x[i() - 32];  // arrive_is_no_acquire
  }
}
SORA_KERNEL(64) mbarrier_used_before_it_is_known(uint32_t*, int) {
  if (i() == 0) mbarrier_init(full(), 63);  // mbarrier_used_before_it_is_known
  shuffle(1u, 0);
  if (i() == 1) mbarrier_arrive(full());  // mbarrier_used_before_it_is_known
}
SORA_KERNEL(64) no_fence_after_init(uint32_t*, int) {
  if (i() == 0) mbarrier_init(full(), 1);  // no_fence_after_init
  cluster_sync();
  if (i() == 0 && cluster_rank() == 0) mbarrier_arrive_cluster(map_to_rank(full(), 1));  // no_fence_after_init
  cluster_sync();
}
SORA_KERNEL(64) relaxed_cluster_barrier(uint32_t* data, int) {
  s().x[i()] = i();  // relaxed_cluster_barrier
  cluster_arrive_relaxed();
  cluster_wait();
  data[64 * block_index().x + i()] = load_cluster<uint32_t>(map_to_rank(shared_address(&s().x[i()]), cluster_rank() ^ 1));  // relaxed_cluster_barrier
  cluster_sync();
}
SORA_KERNEL(64) remote_arrival_seen_in_cta_scope(uint32_t*, int) {
  if (i() == 0) {
    mbarrier_init(full(), 1);
    fence_mbarrier_init();
  }
  sync_warp();
  cluster_sync();
  if (i() == 0 && cluster_rank() == 0) {
    store_cluster(map_to_rank(shared_address(s().x), 1), 5u);  // remote_arrival_seen_in_cta_scope
    mbarrier_arrive_cluster(map_to_rank(full(), 1));
  }
  if (i() == 0 && cluster_rank() == 1) {
    mbarrier_wait<Scope::cta>(full(), 0);
    s().x[1] = s().x[0];  // remote_arrival_seen_in_cta_scope
  }
  sync_warp();
  cluster_sync();
}
SORA_KERNEL(64) global_data_behind_a_shared_wait(uint32_t* data, int) {
  if (i() == 0) {
    mbarrier_init(full(), 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  if (i() == 0 && cluster_rank() == 0) {
    data[7] = 5;  // global_data_behind_a_shared_wait
    mbarrier_arrive_cluster(map_to_rank(full(), 1));
  }
  if (i() == 0 && cluster_rank() == 1) {
    mbarrier_wait_shared(full(), 0);
    data[8] = data[7];  // global_data_behind_a_shared_wait
  }
  cluster_sync();
}
SORA_KERNEL(64) global_data_behind_a_shared_arrival(uint32_t* data, int) {
  if (i() == 0) {
    mbarrier_init(full(), 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  if (i() == 0 && cluster_rank() == 0) {
    data[7] = 5;  // global_data_behind_a_shared_arrival
    mbarrier_arrive_cluster_shared(map_to_rank(full(), 1));
  }
  if (i() == 0 && cluster_rank() == 1) {
    mbarrier_wait<Scope::cluster>(full(), 0);
    data[8] = data[7];  // global_data_behind_a_shared_arrival
  }
  cluster_sync();
}
SORA_KERNEL(64) no_proxy_fence(uint32_t* data, int) {
  if (i() == 0) {
    mbarrier_init(full(), 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full(), 64);
  }
  if (i() < 16) s().x[i()] = i();  // no_proxy_fence
  sync_block();
  if (i() == 0) cp_async_bulk_shared_to_cluster(shared_address(&s().x[64]), shared_address(s().x), 64, full());  // no_proxy_fence
  mbarrier_wait<Scope::cluster>(full(), 0);
  data[i()] = s().x[64 + i() % 16];
}
SORA_KERNEL(64) source_overwritten_under_a_bulk_copy(uint32_t* data, int) {
  if (i() == 0) {
    mbarrier_init(full(), 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full(), 64);
  }
  if (i() < 16) s().x[i()] = i();
  fence_proxy_async();
  sync_block();
  if (i() == 0) cp_async_bulk_shared_to_cluster(shared_address(&s().x[64]), shared_address(s().x), 64, full());  // source_overwritten_under_a_bulk_copy
  if (i() == 0) s().x[3] = 9;  // source_overwritten_under_a_bulk_copy
  mbarrier_wait<Scope::cluster>(full(), 0);
  data[i()] = s().x[64 + i() % 16];
}

struct Case {
  const char* name;
  void (*kernel)(uint32_t*, int);
  unsigned ctas, cluster;
  bool cooperative;
};
#define SORA_CASE(NAME, ...) {#NAME, NAME, __VA_ARGS__}
const Case kCases[] = {
    SORA_CASE(shared_write_past_the_end, 1, 1, false),
    SORA_CASE(ldmatrix_past_the_end, 1, 1, false),
    SORA_CASE(global_read_past_the_end, 1, 1, false),
    SORA_CASE(global_write_far_past_the_end, 1, 1, false),
    SORA_CASE(write_one_word_past_the_end, 1, 1, false),
    SORA_CASE(vector_load_past_the_end, 1, 1, false),
    SORA_CASE(cp_async_past_the_end, 1, 1, false),
    SORA_CASE(null_pointer, 1, 1, false),
    SORA_CASE(misaligned_vector, 1, 1, false),
    SORA_CASE(exit_before_a_barrier, 1, 1, false),
    SORA_CASE(barrier_in_a_branch, 1, 1, false),
    SORA_CASE(half_a_warp_multiplies, 1, 1, false),
    SORA_CASE(two_ways_through_a_warp, 1, 1, false),
    SORA_CASE(shuffle_from_outside_the_mask, 1, 1, false),
    SORA_CASE(wrong_count_of_a_barrier, 1, 1, false),
    SORA_CASE(barrier_that_nobody_joins, 1, 1, false),
    SORA_CASE(uninitialised_mbarrier, 1, 1, false),
    SORA_CASE(too_many_arrivals, 1, 1, false),
    SORA_CASE(bytes_that_never_come, 1, 1, false),
    SORA_CASE(parity_of_the_phase_before, 1, 1, false),
    SORA_CASE(overwritten_mbarrier, 1, 1, false),
    SORA_CASE(flag_that_nobody_sets, 1, 1, false),
    SORA_CASE(data_and_mbarrier_apart, 2, 2, false),
    SORA_CASE(store_to_an_exited_cta, 2, 2, false),
    SORA_CASE(struct_larger_than_the_launch, 1, 1, false),
    SORA_CASE(stack_overflow, 1, 1, false),
    SORA_CASE(no_barrier, 1, 1, false),
    SORA_CASE(no_sync_warp, 1, 1, false),
    SORA_CASE(no_barrier_before_overwriting, 1, 1, false),
    SORA_CASE(ldmatrix_without_a_barrier, 1, 1, false),
    SORA_CASE(no_cp_async_wait, 1, 1, false),
    SORA_CASE(cp_async_wait_of_one_group_too_few, 1, 1, false),
    SORA_CASE(cp_async_of_another_thread, 1, 1, false),
    SORA_CASE(source_overwritten_under_cp_async, 1, 1, false),
    SORA_CASE(two_ctas_write_one_word, 2, 1, false),
    SORA_CASE(relaxed_flag, 2, 1, true),
    SORA_CASE(relaxed_poll, 2, 1, true),
    SORA_CASE(scope_too_narrow, 2, 1, true),
    SORA_CASE(release_by_one_thread_only, 2, 1, true),
    SORA_CASE(plain_read_of_a_flag, 2, 1, true),
    SORA_CASE(arrive_is_no_acquire, 1, 1, false),
    SORA_CASE(mbarrier_used_before_it_is_known, 1, 1, false),
    SORA_CASE(no_fence_after_init, 2, 2, false),
    SORA_CASE(relaxed_cluster_barrier, 2, 2, false),
    SORA_CASE(remote_arrival_seen_in_cta_scope, 2, 2, false),
    SORA_CASE(global_data_behind_a_shared_wait, 2, 2, false),
    SORA_CASE(global_data_behind_a_shared_arrival, 2, 2, false),
    SORA_CASE(no_proxy_fence, 1, 1, false),
    SORA_CASE(source_overwritten_under_a_bulk_copy, 1, 1, false),
};

}  // namespace
}  // namespace sora

extern "C" int run_case(const char* name, uint32_t* data, int n, void* stream) {
  for (const sora::Case& c : sora::kCases) {
    if (std::strcmp(c.name, name) != 0) continue;
    sora::LaunchConfig config{{c.ctas}, {64}, sizeof(sora::Shared)};
    config.cluster = c.cluster;
    config.cooperative = c.cooperative;
    return sora::launch_kernel(c.kernel, config, stream, data, n);
  }
  return -1;
}
