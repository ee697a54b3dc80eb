// Launches of the kernels for ctypes: 0, or a cudaError_t. Compiled by nvcc (build.py) or for the emulation (tests).
#include "barriers.cuh"
#include "dsmem.cuh"
#include "l2_flags.cuh"
#include "products.cuh"

using namespace sora;
using namespace sora::micro;

namespace {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

LaunchConfig one_cluster(int size, unsigned threads, size_t shared_bytes) {
  LaunchConfig config{{unsigned(size)}, {threads}, shared_bytes};
  config.cluster = unsigned(size);
  return config;
}

LaunchConfig cooperative(int ctas, unsigned threads) {
  LaunchConfig config{{unsigned(ctas)}, {threads}};
  config.cooperative = true;
  return config;
}

using ProductsKernel = void (*)(int, Buffers);

template <class Element>
ProductsKernel products_kernel_of(int chains, int tiles) {
  if (tiles == 32 && chains == 4) return products_kernel<Element, 4, 32, 256>;
  if (tiles != 16) return nullptr;
  switch (chains) {
    case 1: return products_kernel<Element, 1, 16, 512>;
    case 2: return products_kernel<Element, 2, 16, 512>;
    case 4: return products_kernel<Element, 4, 16, 512>;
    case 8: return products_kernel<Element, 8, 16, 512>;
  }
  return nullptr;
}

}  // namespace

extern "C" {

int micro_block_barrier(int exchange, int warps, int rounds, uint64_t* stamps, uint32_t* out, uint32_t* scratch,
                        void* stream) {
  const LaunchConfig config{{1}, {32 * unsigned(warps)}, sizeof(BlockShared)};
  const auto kernel = exchange ? block_barrier_kernel<true> : block_barrier_kernel<false>;
  return launch_kernel(kernel, config, stream, rounds, Buffers{stamps, out, scratch});
}

int micro_cluster_barrier(int kind, int size, int rounds, uint64_t* stamps, uint32_t* out, uint32_t* scratch,
                          void* stream) {
  const auto kernel = kind == 0   ? cluster_barrier_kernel<ClusterBarrier::kRelaxed>
                      : kind == 1 ? cluster_barrier_kernel<ClusterBarrier::kOrdered>
                                  : cluster_barrier_kernel<ClusterBarrier::kExchange>;
  return launch_kernel(kernel, one_cluster(size, kThreads, sizeof(ClusterShared)), stream, rounds,
                       Buffers{stamps, out, scratch});
}

int micro_grid_barrier(int exchange, int ctas, int rounds, uint64_t* stamps, uint32_t* out, uint32_t* scratch,
                       void* stream) {
  const auto kernel = exchange ? grid_barrier_kernel<true> : grid_barrier_kernel<false>;
  return launch_kernel(kernel, cooperative(ctas, kThreads), stream, rounds, Buffers{stamps, out, scratch});
}

int micro_ping_pong(int bulk, int size, int rounds, uint64_t* stamps, uint32_t* out, uint32_t* scratch, void* stream) {
  const auto kernel = bulk ? ping_pong_kernel<true> : ping_pong_kernel<false>;
  return launch_kernel(kernel, one_cluster(size, 32, sizeof(PingPongShared)), stream, rounds,
                       Buffers{stamps, out, scratch});
}

int micro_all_gather(int bulk, int size, int slice_bytes, int warps, int rounds, uint64_t* stamps, uint32_t* out,
                     uint32_t* scratch, void* stream) {
  const unsigned threads = 32 * unsigned(warps);
  if (!all_gather_takes(unsigned(size), unsigned(slice_bytes), threads)) return kInvalidValue;
  const auto kernel = bulk ? all_gather_kernel<true> : all_gather_kernel<false>;
  return launch_kernel(kernel, one_cluster(size, threads, sizeof(AllGatherShared)), stream, slice_bytes, rounds,
                       Buffers{stamps, out, scratch});
}

int micro_l2_flags(int exchange, int pause, int ctas, int rounds, uint64_t* stamps, uint32_t* out, uint32_t* scratch,
                   void* stream) {
  if (unsigned(ctas) > kFlagThreads) return kInvalidValue;
  const auto kernel = exchange ? (pause ? l2_flags_kernel<true, SpinBound> : l2_flags_kernel<true, TightSpinBound>)
                               : (pause ? l2_flags_kernel<false, SpinBound> : l2_flags_kernel<false, TightSpinBound>);
  return launch_kernel(kernel, cooperative(ctas, kFlagThreads), stream, rounds, Buffers{stamps, out, scratch});
}

int micro_products(int tf32, int chains, int tiles, int warps, int rounds, uint64_t* stamps, uint32_t* out,
                   uint32_t* scratch, void* stream) {
  const auto kernel = tf32 ? products_kernel_of<float>(chains, tiles) : products_kernel_of<BFloat16>(chains, tiles);
  if (!kernel) return kInvalidValue;
  const size_t shared_bytes = tiles == 32 ? sizeof(ProductsShared<32>) : sizeof(ProductsShared<16>);
  const LaunchConfig config{{1}, {32 * unsigned(warps)}, shared_bytes};
  return launch_kernel(kernel, config, stream, rounds, Buffers{stamps, out, scratch});
}

#if !defined(SORA_HOST_EMULATION)
// How many clusters of CTAs that take an SM each (256 threads with weights in registers) run at once.
int micro_active_clusters(int size, int shared_bytes, int* clusters) {
  const auto kernel = products_kernel_of<BFloat16>(4, 32);
  const auto function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(unsigned(size));
  launch.blockDim = dim3(256);
  launch.dynamicSmemBytes = size_t(shared_bytes);
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, function, &launch);
}
#endif

}  // extern "C"
