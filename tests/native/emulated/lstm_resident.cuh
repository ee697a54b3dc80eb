// The C functions of lstm_resident.cu and lstm_resident_few.cu.
#include <lstm/resident_arguments.h>

namespace sora {
const char* lstm_error(int) { return "an error of lstm_cpu.cpp, which is not in this library"; }
}  // namespace sora

extern "C" {

// numbers: those of LstmResidentShape and the addresses of LstmResidentForward, in their order.
int run_lstm_resident_forward(int dtype, const int64_t* numbers, void* stream) {
  return sora::lstm_resident_forward_cuda(sora::DType(dtype), sora::lstm_resident_forward_of(numbers), 0, stream);
}
int run_lstm_resident_backward(int dtype, const int64_t* numbers, void* stream) {
  return sora::lstm_resident_backward_cuda(sora::DType(dtype), sora::lstm_resident_backward_of(numbers), 0, stream);
}
}
