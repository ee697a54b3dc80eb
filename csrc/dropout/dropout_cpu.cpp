// Threads and the choice of an instruction set; the arithmetic is in dropout_walk.h.
#include "../common/cpu_isa.h"
#include "../common/threads.h"
#include "dropout_kernels.h"

namespace sora {
namespace {

constexpr int64_t kElementsPerThread = 1 << 15;  // some 30 us of work, to pay for starting a team

DropoutWalk walk_for(DType dtype) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::avx512) return dropout_walk_avx512(dtype);
  if (cpu_isa() == CpuIsa::avx2) return dropout_walk_avx2(dtype);
#endif
  return dropout_walk_generic(dtype);
}

}  // namespace

int dropout_cpu(DType dtype, const Dropout& args, int threads) {
  const DropoutWalk walk = walk_for(dtype);
  if (!walk) return kDropoutUnsupportedDType;
  const DropoutFactor factor(args.p);
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(threads, args.count / kElementsPerThread));
  run_team(static_cast<int>(most), [&](int thread, int team) {
    const Range own = part_of(args.count, team, thread, kDropoutGrain);
    walk(args, factor, own.begin, own.end);
  });
  return kDropoutOk;
}

const char* dropout_error(int code) {
  if (code == kDropoutOk) return "ok";
  if (code == kDropoutUnsupportedDType) return "no kernel for this element type";
#ifdef SORA_WITH_CUDA
  if (code > 0) return dropout_cuda_error(code);
#endif
  return "unknown error";
}

}  // namespace sora
