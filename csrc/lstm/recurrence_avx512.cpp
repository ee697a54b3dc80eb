#if defined(__x86_64__)

// What other translation units share comes before the instruction set is switched on: inline functions from here must
// stay runnable anywhere.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "lstm_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define SORA_ISA avx512
#define SORA_ISA_NAME "avx512"
#define SORA_VECTOR_BYTES 64
#define SORA_VECTOR_REGISTERS 32
#include "recurrence.h"

namespace sora {

const LstmKernels* lstm_kernels_avx512(DType dtype, Cell cell) { return avx512::kernels_for(dtype, cell); }

}  // namespace sora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
