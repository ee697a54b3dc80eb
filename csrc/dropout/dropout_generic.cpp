// The kernels for any machine: 128-bit vectors, which SSE2 and NEON have always.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SORA_ISA generic
#define SORA_VECTOR_BYTES 16
#include "dropout_walk.h"

namespace sora {

DropoutWalk dropout_walk_generic(DType dtype) { return generic::walk_for(dtype); }

}  // namespace sora
