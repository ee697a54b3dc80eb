// The launches of the resident kernels by element type, each in a file of its own: nvcc compiles them side by side.
#pragma once

#include "lstm_resident.h"

namespace sora {
namespace resident {

// How pairs of neighbouring units are read and written.
//   exact    H is the kernel's own size: whole pairs at aligned addresses, none absent
//   pairs    H is even: a pair is there or not
//   singles  H is odd, or an array starts at an odd element: unit by unit
enum class Access { exact, pairs, singles };

// Where a launch goes: onto a stream, or, to be told of and not queued, into `plan`.
struct Target {
  void* stream = nullptr;
  LstmResidentPlan* plan = nullptr;
};

// `access`: the most that the arrays' addresses and H allow. The arguments have been checked; a plan reads the shape's
// numbers alone.
int launch_forward_bf16(const LstmResidentForward& args, Access access, const Target& target);
int launch_forward_fp16(const LstmResidentForward& args, Access access, const Target& target);
int launch_forward_tf32(const LstmResidentForward& args, Access access, const Target& target);
int launch_backward_bf16(const LstmResidentBackward& args, Access access, const Target& target);
int launch_backward_fp16(const LstmResidentBackward& args, Access access, const Target& target);
int launch_backward_tf32(const LstmResidentBackward& args, Access access, const Target& target);

}  // namespace resident
}  // namespace sora
