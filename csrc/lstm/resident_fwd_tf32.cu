#include "resident_fwd.cuh"
#include "resident_launch.cuh"

namespace sora {
namespace resident {

int launch_forward_tf32(const LstmResidentForward& args, Access access, const Target& target) {
  return launch_pass<ForwardPass, float>(args, access, target);
}

}  // namespace resident
}  // namespace sora
