// Dropout without a stored mask: what is dropped is a function of a seed and of the element's place alone, so the
// backward pass is the same call on the gradient.
//
//     y[e] = x[e] * (word(e) < floor(p 2^32) ? 0 : 1 / (1 - p))
//
// word(e) is word e % 4 of Philox4x32-10 at counter (e / 4, 0) under the key `seed`. The product is taken in float64
// for float64, in float32 for the others, and rounded once; at p = 1 every factor is 0. NaN and infinity times 0 are
// NaN, as in torch.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace sora {

enum DropoutError : int {
  kDropoutOk = 0,
  kDropoutUnsupportedDType = -1,  // this function has no kernel for the element type
};
// Codes above zero are cudaError_t. The text lives as long as the process.
const char* dropout_error(int code);

struct Dropout {
  int64_t count;
  const void* x;        // [count] element
  const int64_t* seed;  // one value, where x is
  double p;             // in [0, 1]
  void* y;              // [count] element; may be x
};

// float32, float64, bfloat16. `threads` is the most that may be used; the result does not depend on it.
int dropout_cpu(DType dtype, const Dropout& args, int threads);
#ifdef SORA_WITH_CUDA
// All four types. `device` is made current for the launch, `stream` is a cudaStream_t; the call returns as soon as the
// kernel is queued.
int dropout_cuda(DType dtype, const Dropout& args, int device, void* stream);
const char* dropout_cuda_error(int code);
#endif

}  // namespace sora
