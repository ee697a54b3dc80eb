// One LSTM step on the GPU, after the caller's GEMM: elementwise over [B, H], one thread a (row, unit), neighbouring
// threads on neighbouring units. It reads and writes each array once, so memory bounds it; at the small sizes of a step
// the launch does.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../common/device_guard.cuh"
#include "cell.h"
#include "lstm.h"

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

// A 64-bit division costs as much as the cell; almost every size fits 32 bits.
__device__ __forceinline__ int64_t row_of(int64_t at, int64_t H, int64_t count) {
  return count <= UINT32_MAX ? int64_t(uint32_t(at) / uint32_t(H)) : at / H;
}

template <class Element>
__global__ void __launch_bounds__(kThreads) lstm_cell_fwd_kernel(LstmCellForward a) {
  using State = typename StateOf<Element>::type;
  const int64_t count = a.B * a.H, step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < count; at += step) {
    const int64_t b = row_of(at, a.H, count), j = at - b * a.H;
    Element* row = static_cast<Element*>(a.gates) + b * 4 * a.H + j;
    LstmGates<State> gate{State(row[0]), State(row[a.H]), State(row[2 * a.H]), State(row[3 * a.H])};
    State h;
    const State c_prev = a.c_prev ? static_cast<const State*>(a.c_prev)[b * a.c_prev_stride + j] : State(0);
    const State c = lstm_cell(gate, c_prev, h);
    row[0] = Element(gate.i);
    row[a.H] = Element(gate.f);
    row[2 * a.H] = Element(gate.g);
    row[3 * a.H] = Element(gate.o);
    static_cast<State*>(a.c)[b * a.c_stride + j] = c;
    static_cast<Element*>(a.h)[b * a.h_stride + j] = Element(h);
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads) lstm_cell_bwd_kernel(LstmCellBackward a) {
  using State = typename StateOf<Element>::type;
  const int64_t count = a.B * a.H, step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < count; at += step) {
    const int64_t b = row_of(at, a.H, count), j = at - b * a.H;
    const Element* row = static_cast<const Element*>(a.gates) + b * 4 * a.H + j;
    const LstmGates<State> gate{State(row[0]), State(row[a.H]), State(row[2 * a.H]), State(row[3 * a.H])};
    const State c_prev = a.c_prev ? static_cast<const State*>(a.c_prev)[b * a.c_prev_stride + j] : State(0);
    const State c = static_cast<const State*>(a.c)[b * a.c_stride + j];
    State dh(0), dc = static_cast<State*>(a.dc)[at];
    if (a.dy) dh += State(static_cast<const Element*>(a.dy)[b * a.dy_stride + j]);
    if (a.dh) dh += State(static_cast<const Element*>(a.dh)[at]);
    if (a.dcell) dc += static_cast<const State*>(a.dcell)[b * a.dcell_stride + j];
    const LstmGates<State> grad = lstm_cell_backward(gate, c_prev, c, dh, dc);
    static_cast<State*>(a.dc)[at] = dc;
    Element* out = static_cast<Element*>(a.dgates) + b * 4 * a.H + j;
    out[0] = Element(grad.i);
    out[a.H] = Element(grad.f);
    out[2 * a.H] = Element(grad.g);
    out[3 * a.H] = Element(grad.o);
  }
}

template <class Args>
int launch(void (*kernel)(Args), const Args& args, int device, void* stream) {
  const int64_t count = args.B * args.H;
  if (count == 0) return kLstmOk;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((count + kThreads - 1) / kThreads, 1 << 20));
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace

int lstm_cell_forward_cuda(DType dtype, const LstmCellForward& args, int device, void* stream) {
  switch (dtype) {
    case DType::float32: return launch(lstm_cell_fwd_kernel<float>, args, device, stream);
    case DType::float64: return launch(lstm_cell_fwd_kernel<double>, args, device, stream);
    case DType::float16: return launch(lstm_cell_fwd_kernel<__half>, args, device, stream);
    case DType::bfloat16: return launch(lstm_cell_fwd_kernel<__nv_bfloat16>, args, device, stream);
  }
  return kLstmUnsupportedDType;
}

int lstm_cell_backward_cuda(DType dtype, const LstmCellBackward& args, int device, void* stream) {
  switch (dtype) {
    case DType::float32: return launch(lstm_cell_bwd_kernel<float>, args, device, stream);
    case DType::float64: return launch(lstm_cell_bwd_kernel<double>, args, device, stream);
    case DType::float16: return launch(lstm_cell_bwd_kernel<__half>, args, device, stream);
    case DType::bfloat16: return launch(lstm_cell_bwd_kernel<__nv_bfloat16>, args, device, stream);
  }
  return kLstmUnsupportedDType;
}

const char* lstm_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace sora
