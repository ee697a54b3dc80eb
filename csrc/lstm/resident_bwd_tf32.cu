#include "resident_bwd.cuh"
#include "resident_launch.cuh"

namespace sora {
namespace resident {

int launch_backward_tf32(const LstmResidentBackward& args, Access access, void* stream) {
  return launch_pass<BackwardPass, float>(args, access, stream);
}

}  // namespace resident
}  // namespace sora
