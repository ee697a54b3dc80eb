// The float of the resident kernels' cells: cell.h's formulas with the special function unit's activations.
#pragma once

#include "../common/element.cuh"
#include "../common/fast_math.cuh"
#include "cell.h"

namespace sora {
namespace resident {

// kApprox: tanh.approx, as exact as a 16-bit result can show. Else ex2 and rcp, for fp32 results.
template <bool kApprox>
struct GateFloat {
  float value;
};

template <class Element>
using GateFloatOf = GateFloat<sizeof(Element) == 2>;

#define SORA_GATE_OPERATOR(op)                                                                 \
  template <bool kApprox>                                                                      \
  SORA_HOST_DEVICE GateFloat<kApprox> operator op(GateFloat<kApprox> a, GateFloat<kApprox> b) { \
    return {a.value op b.value};                                                               \
  }                                                                                            \
  template <bool kApprox>                                                                      \
  SORA_HOST_DEVICE GateFloat<kApprox> operator op(float a, GateFloat<kApprox> b) {             \
    return {a op b.value};                                                                     \
  }
SORA_GATE_OPERATOR(+)
SORA_GATE_OPERATOR(-)
SORA_GATE_OPERATOR(*)
#undef SORA_GATE_OPERATOR
template <bool kApprox>
SORA_HOST_DEVICE bool operator<(GateFloat<kApprox> a, GateFloat<kApprox> b) {
  return a.value < b.value;
}
template <bool kApprox>
SORA_HOST_DEVICE bool operator<=(GateFloat<kApprox> a, GateFloat<kApprox> b) {
  return a.value <= b.value;
}

// cell.h compiles for nvcc's host pass too, where these are never called.
#if defined(__CUDA_ARCH__) || defined(SORA_HOST_EMULATION)
#define SORA_ON_DEVICE(...) __VA_ARGS__
#else
#define SORA_ON_DEVICE(...)
#endif

template <bool kApprox>
SORA_HOST_DEVICE GateFloat<kApprox> tanh(GateFloat<kApprox> x) {
  SORA_ON_DEVICE(x.value = kApprox ? tanh_approx(x.value) : tanh_ex2(x.value);)
  return x;
}

// As activations.h: sigmoid of the first `sigmoids` of x, tanh of the others.
template <int sigmoids, bool kApprox, int n>
SORA_HOST_DEVICE void activate(GateFloat<kApprox> (&x)[n]) {
  SORA_UNROLL
  for (int k = 0; k < n; ++k) {
    if (k < sigmoids) {
      SORA_ON_DEVICE(x[k].value = kApprox ? sigmoid_approx(x[k].value) : sigmoid_ex2(x[k].value);)
    } else {
      x[k] = tanh(x[k]);
    }
  }
}
#undef SORA_ON_DEVICE

}  // namespace resident

template <bool kApprox>
struct Lanes<resident::GateFloat<kApprox>> {
  using Scalar = float;
};

}  // namespace sora
