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
// plan: units, CTAs, threads, registers, bytes of shared memory.
int run_lstm_resident_plan(int dtype, const int64_t* numbers, int backward, int64_t* plan, void* /*stream*/) {
  sora::LstmResidentPlan found;
  const int error =
      sora::lstm_resident_plan(sora::DType(dtype), sora::lstm_resident_shape_of(numbers), backward != 0, 0, found);
  const int64_t fields[] = {found.units, found.ctas, found.threads, found.registers, found.shared_bytes};
  for (int i = 0; i < 5; ++i) plan[i] = fields[i];
  return error;
}
}
