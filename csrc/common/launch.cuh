// A kernel, its threads and its launch, from one source for nvcc and for the host emulation (SORA_HOST_EMULATION).
//
//   template <int H>
//   SORA_KERNEL(2 * H, 1) lstm_resident_fwd_kernel(Args args) { ... }     threads of a CTA, CTAs an SM should hold
//
//   Shared& s = shared_memory<Shared>();      the dynamic shared memory, as one struct; no static __shared__ anywhere
//   thread_index().x, block_index(), block_size(), grid_size(); lane(), warp()
//   SORA_DEVICE void helper(...)              an inlined device function
//   SORA_UNROLL for (...)                     #pragma unroll
//   keep(x)                                   x (4 or 8 bytes) is worked out here, once: the compiler would rather
//                                             repeat what is cheap than hold a register through a loop
//
//   LaunchConfig config{grid, block, shared_bytes};   config.cluster = 4; config.cooperative = true;
//   int error = launch_kernel(kernel<H>, config, stream, args);      0, or a cudaError_t; emulated: emu::last_result()
//   int error = registers_of(kernel<H>, registers);                  of a thread; emulated: 0 registers
//
// Every wrapper of csrc/common/*.cuh ends with SORA_SITE or SORA_AND_SITE: nothing on the device, on the host a default
// argument that names the caller's line in reports. A kernel calls wrappers and plain C++ only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(SORA_HOST_EMULATION)
#include "../emu/emulation.h"
#define SORA_DEVICE inline __attribute__((always_inline))
#define SORA_KERNEL(...) void
#define SORA_UNROLL
#define SORA_RESTRICT __restrict__
#define SORA_GRID_CONSTANT
#define SORA_SITE ::emu::Site site = ::emu::Site::here()
#define SORA_AND_SITE , ::emu::Site site = ::emu::Site::here()
#else
#include <cuda_runtime.h>
#define SORA_DEVICE __device__ __forceinline__
#define SORA_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define SORA_UNROLL _Pragma("unroll")
#define SORA_RESTRICT __restrict__
#define SORA_GRID_CONSTANT __grid_constant__
#define SORA_SITE
#define SORA_AND_SITE
#endif

// Instructions that an architecture lacks trap there: launchers choose kernels by architecture.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SORA_SM90(...) __trap()
#else
#define SORA_SM90(...) __VA_ARGS__
#endif

namespace sora {

constexpr uint32_t kFullWarp = 0xffffffffu;

template <class T>
SORA_DEVICE void keep([[maybe_unused]] T& x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one register, or two");
#if !defined(SORA_HOST_EMULATION)
  if constexpr (std::is_same_v<T, float>)
    asm volatile("" : "+f"(x));
  else if constexpr (sizeof(T) == 4)
    asm volatile("" : "+r"(x));
  else
    asm volatile("" : "+l"(x));
#endif
}

struct GridSize {
  unsigned x = 1, y = 1, z = 1;
};

struct LaunchConfig {
  GridSize grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // CTAs along x; more than 8 is asked for as a non-portable size
  bool cooperative = false;
};

#if defined(SORA_HOST_EMULATION)

using ThreadIndex = emu::Index3;
SORA_DEVICE ThreadIndex thread_index() { return emu::thread_index(); }
SORA_DEVICE ThreadIndex block_index() { return emu::block_index(); }
SORA_DEVICE ThreadIndex block_size() { return emu::block_size(); }
SORA_DEVICE ThreadIndex grid_size() { return emu::grid_size(); }
SORA_DEVICE unsigned lane() { return emu::lane(); }
SORA_DEVICE unsigned warp() { return emu::warp(); }

template <class Shared>
SORA_DEVICE Shared& shared_memory(SORA_SITE) {
  return *static_cast<Shared*>(emu::shared_memory(sizeof(Shared), site));
}

template <class... Params, class... Args>
int launch_kernel(void (*kernel)(Params...), const LaunchConfig& config, void* /*stream*/, Args... args) {
  const emu::LaunchShape shape{{config.grid.x, config.grid.y, config.grid.z},
                               {config.block.x, config.block.y, config.block.z},
                               config.cluster,
                               config.shared_bytes,
                               config.cooperative};
  return emu::launch(shape, [=] { kernel(args...); }).ok ? 0 : 1;
}

template <class... Params>
int registers_of(void (*)(Params...), int& registers) {
  registers = 0;
  return 0;
}

#else

using ThreadIndex = uint3;
SORA_DEVICE ThreadIndex thread_index() { return threadIdx; }
SORA_DEVICE ThreadIndex block_index() { return blockIdx; }
SORA_DEVICE dim3 block_size() { return blockDim; }
SORA_DEVICE dim3 grid_size() { return gridDim; }
SORA_DEVICE unsigned lane() { return threadIdx.x & 31u; }
SORA_DEVICE unsigned warp() { return threadIdx.x >> 5; }

template <class Shared>
SORA_DEVICE Shared& shared_memory() {
  extern __shared__ __align__(1024) unsigned char sora_dynamic_shared[];
  return *reinterpret_cast<Shared*>(sora_dynamic_shared);
}

template <class... Params, class... Args>
int launch_kernel(void (*kernel)(Params...), const LaunchConfig& config, void* stream, Args... args) {
  const auto function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (config.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.shared_bytes));
  if (error == cudaSuccess && config.cluster > 8)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(config.grid.x, config.grid.y, config.grid.z);
  launch.blockDim = dim3(config.block.x, config.block.y, config.block.z);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = attributes;
  if (config.cluster > 1) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch.numAttrs++].val.clusterDim = {config.cluster, 1, 1};
  }
  if (config.cooperative) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[launch.numAttrs++].val.cooperative = 1;
  }
  return cudaLaunchKernelEx(&launch, kernel, Params(args)...);
}

template <class... Params>
int registers_of(void (*kernel)(Params...), int& registers) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  registers = attributes.numRegs;
  return error;
}

#endif

}  // namespace sora
