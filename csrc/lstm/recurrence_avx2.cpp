#if defined(__x86_64__)

// What other translation units share comes before the instruction set is switched on: inline functions from here must
// stay runnable anywhere.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "lstm_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define SORA_ISA avx2
#define SORA_ISA_NAME "avx2"
#define SORA_VECTOR_BYTES 32
#define SORA_VECTOR_REGISTERS 16
#include "recurrence.h"

namespace sora {

const LstmKernels* lstm_kernels_avx2(DType dtype, Cell cell) { return avx2::kernels_for(dtype, cell); }

}  // namespace sora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
