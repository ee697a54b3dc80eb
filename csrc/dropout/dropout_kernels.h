// Private to csrc/dropout: what dropout_cpu.cpp asks of dropout_walk.h, which is compiled once for each instruction set.
#pragma once

#include "dropout.h"

namespace sora {

// p as the kernels use it. A word below `threshold` drops its element.
struct DropoutFactor {
  uint32_t threshold;
  double scale;

  explicit DropoutFactor(double p) {
    const uint64_t wide = static_cast<uint64_t>(p * 4294967296.0);
    const bool all = wide > 0xffffffffu;
    threshold = all ? 0 : static_cast<uint32_t>(wide);
    scale = all ? 0 : 1 / (1 - p);
  }
};

// Elements begin .. end - 1; begin is a multiple of kDropoutGrain.
constexpr int64_t kDropoutGrain = 256;
using DropoutWalk = void (*)(const Dropout& args, DropoutFactor factor, int64_t begin, int64_t end);

// Null when the element type has no kernel.
DropoutWalk dropout_walk_generic(DType dtype);
#if defined(__x86_64__)
DropoutWalk dropout_walk_avx2(DType dtype);
DropoutWalk dropout_walk_avx512(DType dtype);
#endif

}  // namespace sora
