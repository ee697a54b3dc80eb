#include "resident_bwd.cuh"
#include "resident_launch.cuh"

namespace sora {
namespace resident {

int launch_backward_fp16(const LstmResidentBackward& args, Access access, void* stream) {
  return launch_pass<BackwardPass, Half>(args, access, stream);
}

}  // namespace resident
}  // namespace sora
