// Which instruction set the CPU kernels use.
#pragma once

#include <cstdlib>
#include <cstring>

namespace sora {

enum class CpuIsa : int { generic = 0, avx2 = 1, avx512 = 2 };

// The best this machine has, or less: SORA_CPU_ISA=generic|avx2|avx512 is an upper limit, read once. An unknown value
// is no limit.
inline CpuIsa cpu_isa() {
  static const CpuIsa isa = [] {
    CpuIsa best = CpuIsa::generic;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = CpuIsa::avx2;
    if (best == CpuIsa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = CpuIsa::avx512;
#endif
    const char* limit = std::getenv("SORA_CPU_ISA");
    if (limit && !std::strcmp(limit, "generic")) return CpuIsa::generic;
    if (limit && !std::strcmp(limit, "avx2") && best == CpuIsa::avx512) return CpuIsa::avx2;
    return best;
  }();
  return isa;
}

}  // namespace sora
