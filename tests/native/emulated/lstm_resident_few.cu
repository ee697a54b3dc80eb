// Six of the resident kernels, bf16 and H = 32, that compile in seconds: for races and mutations, which do not ask for
// types and sizes.
#include <lstm/lstm_resident.cu>
#include <lstm/resident_bwd.cuh>
#include <lstm/resident_fwd.cuh>
#include <lstm/resident_launch.cuh>

namespace sora {
namespace resident {

template <class Pass>
int launch_few(const typename Pass::Args& args, const Target& target) {
  switch (args.shape.cell) {
    case Cell::lstm: return launch<Pass, BFloat16, 32, Cell::lstm, Access::exact, true>(args, target);
    case Cell::gru: return launch<Pass, BFloat16, 32, Cell::gru, Access::exact, true>(args, target);
    default: return launch<Pass, BFloat16, 32, Cell::rnn_tanh, Access::exact, true>(args, target);
  }
}

int launch_forward_bf16(const LstmResidentForward& args, Access, const Target& target) {
  return launch_few<ForwardPass>(args, target);
}
int launch_backward_bf16(const LstmResidentBackward& args, Access, const Target& target) {
  return launch_few<BackwardPass>(args, target);
}
int launch_forward_fp16(const LstmResidentForward&, Access, const Target&) { return kLstmUnsupportedDType; }
int launch_backward_fp16(const LstmResidentBackward&, Access, const Target&) { return kLstmUnsupportedDType; }
int launch_forward_tf32(const LstmResidentForward&, Access, const Target&) { return kLstmUnsupportedDType; }
int launch_backward_tf32(const LstmResidentBackward&, Access, const Target&) { return kLstmUnsupportedDType; }

}  // namespace resident
}  // namespace sora

#include "lstm_resident.cuh"
