// The resident recurrent kernels for ctypes: what bind.cpp gives Python, as C functions. 0 or an error.
#include <lstm/lstm_resident.cu>
#include <lstm/resident_bwd_bf16.cu>
#include <lstm/resident_bwd_tf32.cu>
#include <lstm/resident_fwd_bf16.cu>
#include <lstm/resident_fwd_tf32.cu>

// fp16 differs from bf16 in wrappers: two cells of one size.
namespace sora {
namespace resident {

template <class Pass>
int launch_fp16(const typename Pass::Args& args, const Target& target) {
  if (args.shape.cell == Cell::lstm) return launch<Pass, Half, 32, Cell::lstm, Access::pairs, true>(args, target);
  return launch<Pass, Half, 32, Cell::gru, Access::pairs, true>(args, target);
}
int launch_forward_fp16(const LstmResidentForward& args, Access, const Target& target) {
  return launch_fp16<ForwardPass>(args, target);
}
int launch_backward_fp16(const LstmResidentBackward& args, Access, const Target& target) {
  return launch_fp16<BackwardPass>(args, target);
}

}  // namespace resident
}  // namespace sora

#include "lstm_resident.cuh"
