#include "resident_bwd.cuh"
#include "resident_launch.cuh"

namespace sora {
namespace resident {

int launch_backward_tf32(const LstmResidentBackward& args, Access access, const Target& target) {
  return launch_pass<BackwardPass, float>(args, access, target);
}

}  // namespace resident
}  // namespace sora
