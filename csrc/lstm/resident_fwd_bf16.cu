#include "resident_fwd.cuh"
#include "resident_launch.cuh"

namespace sora {
namespace resident {

int launch_forward_bf16(const LstmResidentForward& args, Access access, void* stream) {
  return launch_pass<ForwardPass, BFloat16>(args, access, stream);
}

}  // namespace resident
}  // namespace sora
