#include "resident_bwd.cuh"
#include "resident_launch.cuh"

namespace sora {
namespace resident {

int launch_backward_fp16(const LstmResidentBackward& args, Access access, const Target& target) {
  return launch_pass<BackwardPass, Half>(args, access, target);
}

}  // namespace resident
}  // namespace sora
