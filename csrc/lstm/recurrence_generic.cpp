// The kernels for any machine: 128-bit vectors, which SSE2 and NEON have always.
#define SORA_ISA generic
#define SORA_ISA_NAME "generic"
#define SORA_VECTOR_BYTES 16
#if defined(__aarch64__)
#define SORA_VECTOR_REGISTERS 32
#else
#define SORA_VECTOR_REGISTERS 16
#endif
#include "recurrence.h"

namespace sora {

const LstmKernels* lstm_kernels_generic(DType dtype, Cell cell) { return generic::kernels_for(dtype, cell); }

}  // namespace sora
