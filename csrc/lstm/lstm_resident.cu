// The host's side of the resident kernels: arguments are checked here, once for all instantiations.
#include "lstm_resident.h"

#include <cstdint>
#include <initializer_list>

#include "../common/device_guard.cuh"
#include "resident_launch.h"

namespace sora {
namespace {

using resident::Access;
using resident::Target;

constexpr int64_t kMostRows = int64_t(1) << 30;  // data rows are numbered by int, and some steps past the end
constexpr int64_t kMostMembers = 65535;          // of a grid's third axis

// Which bits of any address are set: how far all are aligned.
uintptr_t address_bits(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return bits;
}

int check_shape(DType dtype, const LstmResidentShape& shape) {
  const int64_t most = lstm_resident_max_hidden(dtype);
  if (most == 0) return kLstmUnsupportedDType;
  if (shape.H > most || shape.B > kMostRows || shape.T > kMostRows || shape.data_rows > kMostRows ||
      shape.members > kMostMembers)
    return kLstmTooLarge;
  if (shape.T < 1 || shape.B < 0 || shape.H < 1 || shape.D < 1 || shape.D > 2 || shape.members < 0)
    return kLstmBadArgument;
  if (shape.offsets ? !shape.lengths : shape.data_rows != shape.T * shape.B) return kLstmBadArgument;
  return kLstmOk;
}

bool all_there(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (!p) return false;
  return true;
}

// The most that sizes and addresses allow, or an error. `elements`, `weights`, `states`: bits of the arrays' addresses.
int find_access(DType dtype, int64_t H, uintptr_t elements, uintptr_t weights, uintptr_t states, Access& access) {
  const uintptr_t size = dtype == DType::float32 ? 4 : 2;
  if ((elements | weights) % size || states % sizeof(float)) return kLstmBadArgument;
  access = Access::exact;
  if (weights % 16) access = Access::pairs;
  if (H % 2 || (elements | weights) % (2 * size) || states % (2 * sizeof(float))) access = Access::singles;
  return kLstmOk;
}

template <class Args>
using Launch = int (*)(const Args&, Access, const Target&);

template <class Args>
int run_one(DType dtype, const Args& args, Access access, int device, const Target& target, Launch<Args> bf16,
            Launch<Args> fp16, Launch<Args> tf32) {
  const DeviceGuard guard(device);
  if (guard.error() != 0) return guard.error();
  const auto launch = dtype == DType::bfloat16 ? bf16 : dtype == DType::float16 ? fp16 : tf32;
  return launch(args, access, target);
}

int run(DType dtype, const LstmResidentForward& args, Access access, int device, const Target& target) {
  return run_one(dtype, args, access, device, target, resident::launch_forward_bf16, resident::launch_forward_fp16,
                 resident::launch_forward_tf32);
}
int run(DType dtype, const LstmResidentBackward& args, Access access, int device, const Target& target) {
  return run_one(dtype, args, access, device, target, resident::launch_backward_bf16, resident::launch_backward_fp16,
                 resident::launch_backward_tf32);
}

}  // namespace

int64_t lstm_resident_max_hidden(DType dtype) {
  switch (dtype) {
    case DType::float32: return 64;
    case DType::float16:
    case DType::bfloat16: return 128;
    default: return 0;
  }
}

int lstm_resident_forward_cuda(DType dtype, const LstmResidentForward& a, int device, void* stream) {
  if (const int error = check_shape(dtype, a.shape)) return error;
  if (a.shape.B == 0 || a.shape.members == 0) return kLstmOk;
  const bool lstm = a.shape.cell == Cell::lstm;
  if (!all_there({a.gx, a.w_hh[0], a.y, a.h_n}) || (lstm && !a.c_n)) return kLstmBadArgument;
  for (int d = 0; d < a.shape.D; ++d)
    if (!a.w_hh[d] || !a.b_ih[d] != !a.b_ih[0] || !a.b_hh[d] != !a.b_ih[0]) return kLstmBadArgument;
  Access access;
  const int error = find_access(dtype, a.shape.H,
                                address_bits({a.gx, a.b_ih[0], a.b_ih[1], a.b_hh[0], a.b_hh[1], a.h0, a.c0, a.gates,
                                              a.y, a.h_n, a.c_n}),
                                address_bits({a.w_hh[0], a.w_hh[1]}), address_bits({a.cells}), access);
  if (error) return error;
  return run(dtype, a, access, device, Target{stream});
}

int lstm_resident_backward_cuda(DType dtype, const LstmResidentBackward& a, int device, void* stream) {
  if (const int error = check_shape(dtype, a.shape)) return error;
  if (a.shape.B == 0 || a.shape.members == 0) return kLstmOk;
  const bool lstm = a.shape.cell == Cell::lstm, gated = lstm || a.shape.cell == Cell::gru;
  if (!all_there({a.w_hh[0], a.w_hh[a.shape.D - 1], a.dgates, a.dh0}) || (gated && !a.gates) || (!lstm && !a.y) ||
      (lstm && !all_there({a.cells, a.dc0})))
    return kLstmBadArgument;
  Access access;
  const int error = find_access(dtype, a.shape.H,
                                address_bits({a.gates, a.y, a.h0, a.c0, a.dy, a.dh_n, a.dc_n, a.dgates, a.dh0, a.dc0}),
                                address_bits({a.w_hh[0], a.w_hh[1]}), address_bits({a.cells, a.dcells}), access);
  if (error) return error;
  return run(dtype, a, access, device, Target{stream});
}

int lstm_resident_plan(DType dtype, const LstmResidentShape& shape, bool backward, int device, LstmResidentPlan& plan) {
  if (const int error = check_shape(dtype, shape)) return error;
  Access access;
  if (const int error = find_access(dtype, shape.H, 0, 0, 0, access)) return error;
  const Target target{nullptr, &plan};
  if (backward) {
    LstmResidentBackward args{};
    args.shape = shape;
    return run(dtype, args, access, device, target);
  }
  LstmResidentForward args{};
  args.shape = shape;
  return run(dtype, args, access, device, target);
}

const char* lstm_resident_error(int code) {
  switch (code) {
    case kLstmTooLarge: return "too large for weights in registers";
    case kLstmBadArgument: return "an argument is missing, misaligned, or does not fit the others";
  }
  return lstm_error(code);
}

}  // namespace sora
