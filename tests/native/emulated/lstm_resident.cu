// The resident recurrent kernels for ctypes: what bind.cpp gives Python, as C functions. 0 or an error.
#include <lstm/lstm_resident.cu>
#include <lstm/resident_arguments.h>
#include <lstm/resident_bwd_bf16.cu>
#include <lstm/resident_bwd_fp16.cu>
#include <lstm/resident_bwd_tf32.cu>
#include <lstm/resident_fwd_bf16.cu>
#include <lstm/resident_fwd_fp16.cu>
#include <lstm/resident_fwd_tf32.cu>

using namespace sora;

namespace sora {
const char* lstm_error(int) { return "an error of lstm_cpu.cpp, which is not in this library"; }
}  // namespace sora

extern "C" {

// arrays: the numbers of LstmResidentShape and the addresses of LstmResidentForward, in their order.
int run_lstm_resident_forward(int dtype, const int64_t* arrays, void* stream) {
  return lstm_resident_forward_cuda(DType(dtype), lstm_resident_forward_of(arrays), 0, stream);
}
int run_lstm_resident_backward(int dtype, const int64_t* arrays, void* stream) {
  return lstm_resident_backward_cuda(DType(dtype), lstm_resident_backward_of(arrays), 0, stream);
}
}
