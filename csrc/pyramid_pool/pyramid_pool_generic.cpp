// The kernels for any machine: 128-bit vectors, which SSE2 and NEON have always.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SORA_ISA generic
#define SORA_VECTOR_BYTES 16
#include "kernels.h"

namespace sora {

const PoolKernels* pool_kernels_generic(DType dtype) { return generic::kernels_for(dtype); }

}  // namespace sora
