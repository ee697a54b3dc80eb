#if defined(__x86_64__)

// What other translation units share comes before the instruction set is switched on.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "pyramid_pool_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define SORA_ISA avx2
#define SORA_VECTOR_BYTES 32
#include "kernels.h"

namespace sora {

const PoolKernels* pool_kernels_avx2(DType dtype) { return avx2::kernels_for(dtype); }

}  // namespace sora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
