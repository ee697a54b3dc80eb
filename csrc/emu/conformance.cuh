// One small kernel for each wrapper of csrc/common/*.cuh. They run under the emulation and on a GPU with the same
// expected results (tests/native/test_conformance.py), so that a twin and its instruction are held to each other.
//
// Fragments come in and go out as raw registers: the layouts are computed by the test, from another source.
#pragma once

#include "../common/async_copy.cuh"
#include "../common/barrier.cuh"
#include "../common/cluster.cuh"
#include "../common/element.cuh"
#include "../common/fast_math.cuh"
#include "../common/flags.cuh"
#include "../common/launch.cuh"
#include "../common/mbarrier.cuh"
#include "../common/memory.cuh"
#include "../common/mma.cuh"

namespace sora {

// a [32, 4], b [32, 2]: registers of each lane; d [32, 4]: accumulators, in and out. T: Half, BFloat16, float for TF32.
template <class T>
SORA_KERNEL(32, 1)
conformance_mma_kernel(const uint32_t* a_ptr, const uint32_t* b_ptr, float* d_ptr) {
  const unsigned i = lane();
  const uint32_t a[4] = {a_ptr[4 * i], a_ptr[4 * i + 1], a_ptr[4 * i + 2], a_ptr[4 * i + 3]};
  const uint32_t b[2] = {b_ptr[2 * i], b_ptr[2 * i + 1]};
  float d[4] = {d_ptr[4 * i], d_ptr[4 * i + 1], d_ptr[4 * i + 2], d_ptr[4 * i + 3]};
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16<T>(d, a, b);
  } else {
    mma_m16n8k8_tf32(d, a, b);
  }
  for (int r = 0; r < 4; ++r) d_ptr[4 * i + r] = d[r];
}

struct LdmatrixShared {
  alignas(16) uint16_t rows[64][8];
};
// rows [64, 8]; row_of [32]: the row whose address a lane gives; fragments [32, count].
template <int count, bool transposed>
SORA_KERNEL(32, 1)
conformance_ldmatrix_kernel(const uint16_t* rows_ptr, const int* row_of_ptr, uint32_t* fragments_ptr) {
  LdmatrixShared& s = shared_memory<LdmatrixShared>();
  const unsigned i = lane();
  for (unsigned e = i; e < 64 * 8; e += 32) s.rows[e / 8][e % 8] = rows_ptr[e];
  sync_warp();
  const uint32_t address = shared_address(s.rows[row_of_ptr[i]]);
  uint32_t r[count];
  if constexpr (count == 1) {
    ldmatrix_x1(r, address);
  } else if constexpr (count == 2) {
    if constexpr (transposed)
      ldmatrix_x2_trans(r, address);
    else
      ldmatrix_x2(r, address);
  } else {
    if constexpr (transposed)
      ldmatrix_x4_trans(r, address);
    else
      ldmatrix_x4(r, address);
  }
  for (int k = 0; k < count; ++k) fragments_ptr[count * i + k] = r[k];
}

// x [32] -> out [7, 32]: shuffles from lane (5 i + 3) % 32, i ^ 9, i + 3, i - 2; ballot, any, all of x > 0.
SORA_KERNEL(32, 1) conformance_warp_kernel(const float* x_ptr, float* out_ptr) {
  const unsigned i = lane();
  const float x = x_ptr[i];
  out_ptr[i] = shuffle(x, int(5 * i + 3) % 32);
  out_ptr[32 + i] = shuffle_xor(x, 9);
  out_ptr[64 + i] = shuffle_down(x, 3);
  out_ptr[96 + i] = shuffle_up(x, 2);
  out_ptr[128 + i] = bits_float(warp_ballot(x > 0.0f));
  out_ptr[160 + i] = float(warp_any(x > 0.0f));
  out_ptr[192 + i] = float(warp_all(x > 0.0f));
}

struct BlockShared {
  float x[128];
};
// x [128] -> out [4, 128]: x reversed, then or, and, count of x > 0.
SORA_KERNEL(128, 1) conformance_block_kernel(const float* x_ptr, float* out_ptr) {
  BlockShared& s = shared_memory<BlockShared>();
  const unsigned i = thread_index().x;
  s.x[i] = x_ptr[i];
  sync_block();
  out_ptr[i] = s.x[127 - i];
  out_ptr[128 + i] = float(sync_block_or(x_ptr[i] > 0.0f) != 0);
  out_ptr[256 + i] = float(sync_block_and(x_ptr[i] > 0.0f) != 0);
  out_ptr[384 + i] = float(sync_block_count(x_ptr[i] > 0.0f));
}

// Three warps produce, one consumes: out [rounds] = sum over i < 96 of (i + round).
SORA_KERNEL(128, 1) conformance_named_barrier_kernel(float* out_ptr, int rounds) {
  constexpr int kFree = 1, kFull = 2;
  BlockShared& s = shared_memory<BlockShared>();
  for (int round = 0; round < rounds; ++round) {
    if (warp() < 3) {
      barrier_sync(kFree, 128);
      s.x[thread_index().x] = float(thread_index().x + unsigned(round));
      barrier_arrive(kFull, 128);
    } else {
      barrier_arrive(kFree, 128);
      barrier_sync(kFull, 128);
      float sum = s.x[lane()] + s.x[32 + lane()] + s.x[64 + lane()];
      for (int bits = 16; bits > 0; bits /= 2) sum += shuffle_xor(sum, bits);
      if (lane() == 0) out_ptr[round] = sum;
    }
  }
}

struct CopyShared {
  alignas(16) unsigned char x[32][16];
};
// x [32, 16] bytes -> out: bytes of a lane's cp.async<size>, of which the first from_bytes[lane] are read.
template <int size>
SORA_KERNEL(32, 1)
conformance_cp_async_kernel(const unsigned char* x_ptr, const int* from_bytes_ptr, unsigned char* out_ptr) {
  CopyShared& s = shared_memory<CopyShared>();
  const unsigned i = lane();
  cp_async<size>(shared_address(s.x[31 - i]), x_ptr + 16 * i, unsigned(from_bytes_ptr[i]));
  cp_async_commit();
  cp_async_wait<0>();
  sync_warp();
  for (int k = 0; k < size; ++k) out_ptr[size * i + k] = s.x[i][k];
}

// x [32, 4] -> out [5, 32, 4]: by vectors of 16, 8 and 4 bytes with each kind of load and store.
SORA_KERNEL(32, 1) conformance_memory_kernel(const uint32_t* x_ptr, uint32_t* out_ptr) {
  const unsigned i = 4 * lane();
  prefetch_l2(x_ptr + i);
  store(out_ptr + i, load<U32x4>(x_ptr + i));
  store_streaming(out_ptr + 128 + i, load_once<U32x4>(x_ptr + i));
  store(out_ptr + 256 + i, load_read_only<U32x2>(x_ptr + i));
  store_streaming(out_ptr + 256 + i + 2, load_once<U32x2>(x_ptr + i + 2));
  for (unsigned k = 0; k < 4; ++k) store_streaming(out_ptr + 384 + i + k, load_read_only<uint32_t>(x_ptr + i + k));
  for (unsigned k = 0; k < 8; ++k) {
    const auto* halves = reinterpret_cast<const Half*>(x_ptr + i);
    store_streaming(reinterpret_cast<Half*>(out_ptr + 512 + i) + k, load_once<Half>(halves + k));
  }
}

// x [n] -> out [8, n]: bits of half, bfloat16, TF32, pack<Half>(x, -x), pack<BFloat16>(x, -x), 2^x, 1 / x, tanh x.
SORA_KERNEL(128, 1) conformance_math_kernel(const float* x_ptr, uint32_t* out_ptr, int n) {
  const int i = int(block_index().x * block_size().x + thread_index().x);
  if (i >= n) return;
  const float x = x_ptr[i];
  out_ptr[i] = from_float<Half>(x).bits;
  out_ptr[n + i] = from_float<BFloat16>(x).bits;
  out_ptr[2 * n + i] = tf32(x);
  out_ptr[3 * n + i] = pack<Half>(x, -x);
  out_ptr[4 * n + i] = pack<BFloat16>(x, -x);
  out_ptr[5 * n + i] = float_bits(ex2_approx(x));
  out_ptr[6 * n + i] = float_bits(rcp_approx(x));
  out_ptr[7 * n + i] = float_bits(tanh_approx(x));
}

struct MbarrierShared {
  alignas(16) uint32_t x[2][32];
  alignas(8) Mbarrier full[2], empty[2];
};
// Warp 0 copies rows of x [rounds, 32] in, warp 1 adds them up: out [32]. Two buffers, each with two mbarriers.
SORA_KERNEL(64, 1) conformance_mbarrier_kernel(const uint32_t* x_ptr, uint32_t* out_ptr, int rounds) {
  MbarrierShared& s = shared_memory<MbarrierShared>();
  if (thread_index().x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared_address(&s.full[i]), 32);
      mbarrier_init(shared_address(&s.empty[i]), 32);
    }
  }
  sync_block();
  uint32_t sum = 0;
  for (int round = 0; round < rounds; ++round) {
    const int buffer = round & 1;
    const unsigned parity = unsigned(round >> 1) & 1u;
    if (warp() == 0) {
      if (round >= 2) mbarrier_wait(shared_address(&s.empty[buffer]), parity ^ 1u);
      cp_async<4>(shared_address(&s.x[buffer][lane()]), x_ptr + 32 * round + lane());
      cp_async_mbarrier_arrive(shared_address(&s.full[buffer]));
    } else {
      mbarrier_wait(shared_address(&s.full[buffer]), parity);
      sum += s.x[buffer][31 - lane()];
      mbarrier_arrive(shared_address(&s.empty[buffer]));
    }
  }
  cp_async_wait<0>();
  if (warp() == 1) out_ptr[lane()] = sum;
}

struct ClusterShared {
  alignas(16) uint32_t mine[64], gathered[4][64];
  alignas(16) uint32_t slot[32];
  alignas(8) Mbarrier full, read;
};
// Each of 4 CTAs has x [64] = 100 rank + i. out [4, 3, 64] of a CTA: a remote store and load around the ring; ranks
// gathered by st.async; by bulk copies.
SORA_KERNEL(64, 1) conformance_cluster_kernel(uint32_t* out_ptr) {
  ClusterShared& s = shared_memory<ClusterShared>();
  const unsigned i = thread_index().x, rank = cluster_rank(), size = cluster_size(), next = (rank + 1) % size;
  const uint32_t full = shared_address(&s.full);
  if (i == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  s.mine[i] = 100 * rank + i;
  sync_warp();
  cluster_sync();
  uint32_t* out = out_ptr + block_index().x * 3 * 64;
  if (i < 32) store_cluster(map_to_rank(shared_address(&s.slot[i]), next), 100 * rank + i);
  sync_warp();
  cluster_sync();
  out[i] = i < 32 ? s.slot[i] : load_cluster<uint32_t>(map_to_rank(shared_address(&s.mine[i]), next));

  for (unsigned round = 0; round < 2; ++round) {
    if (i == 0) mbarrier_arrive_expect_tx(full, size * 64 * 4);
    fence_proxy_async();
    sync_warp();
    cluster_sync();  // nobody reads gathered any more; every barrier expects its bytes
    for (unsigned peer = 0; peer < size; ++peer) {
      const uint32_t to = map_to_rank(shared_address(&s.gathered[rank][4 * (i % 16)]), peer);
      if (round == 0 && i < 16) st_async(to, load<U32x4>(&s.mine[4 * i]), map_to_rank(full, peer));
      if (round == 1 && i == 0)
        cp_async_bulk_shared_to_cluster(to, shared_address(s.mine), 64 * 4, map_to_rank(full, peer));
    }
    mbarrier_wait<Scope::cluster>(full, round);
    uint32_t sum = 0;
    for (unsigned peer = 0; peer < size; ++peer) sum += s.gathered[peer][63 - i];
    out[64 * (1 + round) + i] = sum;
  }
  sync_warp();
  cluster_sync();  // a bulk copy reads its sender's memory
}

// x [64] -> out [CTAs, 64]: rank 0 copies x to all CTAs of the cluster at once; the others tell it when they have read.
SORA_KERNEL(64, 1) conformance_multicast_kernel(const uint32_t* x_ptr, uint32_t* out_ptr) {
  ClusterShared& s = shared_memory<ClusterShared>();
  const unsigned i = thread_index().x, rank = cluster_rank(), size = cluster_size();
  const uint32_t full = shared_address(&s.full);
  if (i == 0) {
    mbarrier_init(full, 1);
    mbarrier_arrive_expect_tx(full, 64 * 4);
    mbarrier_init(shared_address(&s.read), size);
    fence_mbarrier_init();
  }
  if (i < 32) s.slot[i] = rank;
  cluster_sync();
  if (rank == 0 && i == 0)
    cp_async_bulk_global_to_shared_multicast(shared_address(s.mine), x_ptr, 64 * 4, full, uint16_t((1u << size) - 1));
  mbarrier_wait_shared(full, 0);
  out_ptr[64 * block_index().x + i] = s.mine[63 - i];
  if (i == 0) {
    store_cluster(map_to_rank(shared_address(&s.slot[rank]), 0), 10 + rank);
    mbarrier_arrive_cluster_shared(map_to_rank(shared_address(&s.read), 0));
  }
  if (rank == 0) {
    mbarrier_wait_shared(shared_address(&s.read), 0);
    if (i < size) out_ptr[64 * block_index().x + i] += s.slot[i];
  }
}

// values [2, CTAs]: each round a CTA adds its neighbour's value of the round before, behind a barrier of the grid.
SORA_KERNEL(64, 1) conformance_grid_kernel(uint32_t* values_ptr, uint32_t* counter_ptr, int rounds) {
  const unsigned n = grid_size().x, me = block_index().x;
  for (int round = 0; round < rounds; ++round) {
    const uint32_t* from = values_ptr + unsigned(round) % 2 * n;
    if (thread_index().x == 0) values_ptr[unsigned(round + 1) % 2 * n + me] = from[me] + from[(me + 1) % n];
    grid_sync(counter_ptr, uint32_t(round));
  }
}

// CTA k hands x [64] on to CTA k + 1 by a flag, adding 1: out [CTAs, 64]. flags [CTAs + 1], zero. variant 0: release
// and acquire; 1: relaxed, with fences; 2: read-modify-write.
SORA_KERNEL(64, 1)
conformance_flags_kernel(const uint32_t* x_ptr, uint32_t* out_ptr, uint32_t* flags_ptr, int variant) {
  const unsigned i = thread_index().x, me = block_index().x;
  if (me > 0 && i == 0) {
    if (variant == 1) {
      SpinBound bound;
      while (load_relaxed<Scope::gpu>(&flags_ptr[me]) == 0) bound.spin();
      fence_acq_rel<Scope::gpu>();
    } else {
      wait_until<Scope::gpu>(&flags_ptr[me], 1);
    }
  }
  sync_block();
  out_ptr[64 * me + i] = 1 + (me > 0 ? out_ptr[64 * (me - 1) + 63 - i] : x_ptr[i]);
  sync_block();
  if (i > 0) return;
  if (variant == 0) store_release<Scope::gpu>(&flags_ptr[me + 1], 1);
  if (variant == 1) {
    fence_acq_rel<Scope::gpu>();
    store_relaxed<Scope::gpu>(&flags_ptr[me + 1], 1);
  }
  if (variant == 2) fetch_add_acq_rel<Scope::gpu>(&flags_ptr[me + 1], 1);
}

}  // namespace sora
