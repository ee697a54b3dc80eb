// Launches of step_kernels.cuh: the kernel of an element type and a cell, as many blocks as the step has elements.
#include "../common/device_guard.cuh"
#include "step_kernels.cuh"

namespace sora {
namespace {

template <class Args>
using StepKernel = void (*)(Args, LstmStepRows, const void*);

template <class Element>
StepKernel<LstmStepForward> kernel_of(const LstmStepForward& args) {
  switch (args.steps.cell) {
    case Cell::lstm: return lstm_step_fwd_kernel<Element, Cell::lstm>;
    case Cell::gru: return lstm_step_fwd_kernel<Element, Cell::gru>;
    case Cell::rnn_tanh: return lstm_step_fwd_kernel<Element, Cell::rnn_tanh>;
    case Cell::rnn_relu: return lstm_step_fwd_kernel<Element, Cell::rnn_relu>;
  }
  return nullptr;
}
template <class Element>
StepKernel<LstmStepBackward> kernel_of(const LstmStepBackward& args) {
  switch (args.steps.cell) {
    case Cell::lstm: return lstm_step_bwd_kernel<Element, Cell::lstm>;
    case Cell::gru: return lstm_step_bwd_kernel<Element, Cell::gru>;
    case Cell::rnn_tanh: return lstm_step_bwd_kernel<Element, Cell::rnn_tanh>;
    case Cell::rnn_relu: return lstm_step_bwd_kernel<Element, Cell::rnn_relu>;
  }
  return nullptr;
}

template <class Args>
StepKernel<Args> kernel_of(DType dtype, const Args& args) {
  switch (dtype) {
    case DType::float32: return kernel_of<float>(args);
    case DType::float64: return kernel_of<double>(args);
    case DType::float16: return kernel_of<Half>(args);
    case DType::bfloat16: return kernel_of<BFloat16>(args);
  }
  return nullptr;
}

template <class Args>
int launch(DType dtype, const Args& args, const LstmStepRows& rows, int64_t row_count, const void* from_product,
           int device, void* stream) {
  const StepKernel<Args> kernel = kernel_of(dtype, args);
  if (!kernel) return kLstmUnsupportedDType;
  const int64_t count = row_count * args.steps.H;
  if (count == 0) return kLstmOk;
  const DeviceGuard guard(device);
  if (guard.error() != 0) return guard.error();
  LaunchConfig config;
  config.grid.x = static_cast<unsigned>((count + kStepThreads - 1) / kStepThreads);
  config.block.x = kStepThreads;
  return launch_kernel(kernel, config, stream, args, rows, from_product);
}

}  // namespace

int lstm_step_forward_cuda(DType dtype, const LstmStepForward& args, int64_t t, const void* hidden, int device,
                           void* stream) {
  const LstmStepRows rows = lstm_step_rows(args.steps, t);
  return launch(dtype, args, rows, rows.forward_rows(), hidden, device, stream);
}

int lstm_step_backward_cuda(DType dtype, const LstmStepBackward& args, int64_t t, const void* dh_next, int device,
                            void* stream) {
  const LstmStepRows rows = lstm_step_rows(args.steps, t);
  return launch(dtype, args, rows, rows.backward_rows(), dh_next, device, stream);
}

#if !defined(SORA_HOST_EMULATION)
const char* lstm_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#endif

}  // namespace sora
