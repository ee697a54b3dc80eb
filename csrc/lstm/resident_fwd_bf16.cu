#include "resident_fwd.cuh"
#include "resident_launch.cuh"

namespace sora {
namespace resident {

int launch_forward_bf16(const LstmResidentForward& args, Access access, const Target& target) {
  return launch_pass<ForwardPass, BFloat16>(args, access, target);
}

}  // namespace resident
}  // namespace sora
