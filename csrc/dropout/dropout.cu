// Dropout on the GPU: a thread makes the four words of one counter and walks four neighbouring elements with them.
// Memory bounds it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../common/device_guard.cuh"
#include "../common/philox.h"
#include "dropout_kernels.h"

namespace sora {
namespace {

constexpr int kThreads = 256;

template <class Element>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};

// The elements of one counter, as one or two accesses to memory.
template <class Element>
struct alignas(sizeof(Element) < 4 ? 8 : 16) Four {
  Element at[4];
};

template <class Element>
__global__ void __launch_bounds__(kThreads) dropout_kernel(Dropout a, DropoutFactor factor) {
  using State = typename StateOf<Element>::type;
  const auto* x = static_cast<const Element*>(a.x);
  auto* y = static_cast<Element*>(a.y);
  const auto seed = static_cast<uint64_t>(*a.seed);
  const State scale = State(factor.scale);
  const int64_t counters = (a.count + 3) / 4, step = int64_t(gridDim.x) * kThreads;
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % alignof(Four<Element>) == 0;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < counters; at += step) {
    uint64_t words[4] = {uint64_t(at), uint64_t(at) >> 32, 0, 0};
    philox4x32_10(words, seed, WideProduct{});
    const auto dropped = [&](Element value, int k) {
      return Element(State(value) * (uint32_t(words[k]) < factor.threshold ? State(0) : scale));
    };
    if (aligned && 4 * at + 4 <= a.count) {
      Four<Element> four = reinterpret_cast<const Four<Element>*>(x)[at];
      for (int k = 0; k < 4; ++k) four.at[k] = dropped(four.at[k], k);
      reinterpret_cast<Four<Element>*>(y)[at] = four;
    } else {
      for (int k = 0; k < 4 && 4 * at + k < a.count; ++k) y[4 * at + k] = dropped(x[4 * at + k], k);
    }
  }
}

template <class Element>
int launch(const Dropout& args, int device, void* stream) {
  if (args.count == 0) return kDropoutOk;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const int64_t counters = (args.count + 3) / 4;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((counters + kThreads - 1) / kThreads, 1 << 20));
  dropout_kernel<Element>
      <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, DropoutFactor(args.p));
  return cudaGetLastError();
}

}  // namespace

int dropout_cuda(DType dtype, const Dropout& args, int device, void* stream) {
  switch (dtype) {
    case DType::float32: return launch<float>(args, device, stream);
    case DType::float64: return launch<double>(args, device, stream);
    case DType::float16: return launch<__half>(args, device, stream);
    case DType::bfloat16: return launch<__nv_bfloat16>(args, device, stream);
  }
  return kDropoutUnsupportedDType;
}

const char* dropout_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace sora
