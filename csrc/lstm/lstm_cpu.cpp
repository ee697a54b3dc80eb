// Whole sequences on the CPU: threads, scratch memory and the order of steps. The arithmetic is in recurrence.h.
//
// One OpenMP region lasts for the whole sequence. Rows of the batch are independent of each other, and so are
// directions: while there are enough of those, each thread walks the whole sequence with its own rows and never waits.
// With fewer, threads share the hidden units instead and meet at one barrier a step.
#include <cstdlib>

#include "../common/cpu_isa.h"
#include "lstm_kernels.h"

namespace sora {
namespace {

// A thread must get at least this much of one step to pay for a barrier (about 1 us), and at least this much of the
// sequence to pay for starting a team (some us, more when threads sleep).
constexpr int64_t kFlopsPerStepPerThread = 400'000;
constexpr int64_t kFlopsPerThread = 4'000'000;
constexpr int64_t kRowsPerThread = 4;  // fewer rows would read w_hh too often for each sum

struct Plan {
  int team;
  bool share_units;
};

Plan plan_threads(int64_t T, int64_t B, int64_t H, int D, int threads) {
  const int64_t step_flops = 8 * B * H * H * D;
  const int64_t by_rows = D * std::max<int64_t>(1, B / kRowsPerThread);
  const int64_t by_work = step_flops * T / kFlopsPerThread, by_step = step_flops / kFlopsPerStepPerThread;
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(threads, by_work));
  if (by_rows >= most) return {static_cast<int>(most), false};
  const int64_t sharing = std::min(most, by_step);
  if (sharing > by_rows) return {static_cast<int>(sharing), true};
  return {static_cast<int>(std::min(most, by_rows)), false};
}

const LstmKernels* kernels_for(DType dtype) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::avx512) return lstm_kernels_avx512(dtype);
  if (cpu_isa() == CpuIsa::avx2) return lstm_kernels_avx2(dtype);
#endif
  return lstm_kernels_generic(dtype);
}

// One block of scratch memory, handed out in 64-byte aligned pieces: reserve all, allocate, take in the same order.
class Scratch {
 public:
  ~Scratch() { std::free(base_); }
  void reserve(int64_t bytes) { total_ += rounded_up(bytes); }
  bool allocate() { return posix_memalign(&base_, 64, total_) == 0; }
  void* take(int64_t bytes) {
    void* piece = static_cast<char*>(base_) + used_;
    used_ += rounded_up(bytes);
    return piece;
  }

 private:
  static int64_t rounded_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  void* base_ = nullptr;
  int64_t total_ = 64, used_ = 0;
};

// Runs visit(part) on the parts that this thread owns. By rows: the D directions x row groups are dealt out as
// consecutive slots. By units: all rows of both directions, a range of units.
template <class Visit>
void for_own_parts(const Plan& plan, int thread, int team, int64_t B, int64_t H, int D, int64_t grain,
                   const Visit& visit) {
  if (plan.share_units) {
    for (int d = 0; d < D; ++d) visit(LstmPart{d, {0, B}, part_of(H, team, thread, grain)});
    return;
  }
  const Range own = part_of(D * B, team, thread);
  for (int d = 0; d < D; ++d) {
    const Range rows{std::max(own.begin, d * B) - d * B, std::min(own.end, (d + 1) * B) - d * B};
    if (rows.begin < rows.end) visit(LstmPart{d, rows, {0, H}});
  }
}

}  // namespace

int lstm_forward_cpu(DType dtype, const LstmForward& a, int threads) {
  const LstmKernels* kernels = kernels_for(dtype);
  if (!kernels) return kLstmUnsupportedDType;
  if (a.B == 0 || a.H == 0) return kLstmOk;
  const int64_t state = kernels->state_bytes, rows = a.D * a.B * a.H * state;
  const int64_t packed = kernels->packed_forward_size(a.H) * state;
  Scratch memory;
  memory.reserve(packed), memory.reserve(a.D == 2 ? packed : 0), memory.reserve(2 * rows), memory.reserve(rows);
  if (!memory.allocate()) return kLstmOutOfMemory;
  LstmScratch scratch{};
  for (int d = 0; d < a.D; ++d) scratch.packed[d] = memory.take(packed);
  scratch.h = memory.take(2 * rows);
  scratch.c = memory.take(rows);

  const Plan plan = plan_threads(a.T, a.B, a.H, a.D, threads);
  const int64_t grain = kernels->unit_grain_forward;
  run_team(plan.team, [&](int thread, int team) {
    for (int d = 0; d < a.D; ++d)
      kernels->pack_forward(a.w_hh[d], a.H, part_of(a.H, team, thread, grain), scratch.packed[d]);
    const auto for_parts = [&](auto visit) { for_own_parts(plan, thread, team, a.B, a.H, a.D, grain, visit); };
    for_parts([&](const LstmPart& part) { kernels->forward_begin(a, scratch, part); });
    team_barrier(team);
    if (plan.share_units) {
      for (int64_t s = 0; s < a.T; ++s) {
        for_parts([&](const LstmPart& part) { kernels->forward_step(a, scratch, part, s); });
        team_barrier(team);
      }
    } else {
      for_parts([&](const LstmPart& part) {
        for (int64_t s = 0; s < a.T; ++s) kernels->forward_step(a, scratch, part, s);
      });
    }
    for_parts([&](const LstmPart& part) { kernels->forward_end(a, scratch, part); });
  });
  return kLstmOk;
}

int lstm_backward_cpu(DType dtype, const LstmBackward& a, int threads) {
  const LstmKernels* kernels = kernels_for(dtype);
  if (!kernels) return kLstmUnsupportedDType;
  if (a.B == 0 || a.H == 0) return kLstmOk;
  const int64_t state = kernels->state_bytes, rows = a.D * a.B * a.H * state;
  const int64_t packed = kernels->packed_backward_size(a.H) * state;
  Scratch memory;
  memory.reserve(packed), memory.reserve(a.D == 2 ? packed : 0), memory.reserve(rows), memory.reserve(rows);
  memory.reserve(8 * rows);
  if (!memory.allocate()) return kLstmOutOfMemory;
  LstmScratch scratch{};
  for (int d = 0; d < a.D; ++d) scratch.packed[d] = memory.take(packed);
  scratch.h = memory.take(rows);
  scratch.c = memory.take(rows);
  scratch.dgates = memory.take(8 * rows);

  const Plan plan = plan_threads(a.T, a.B, a.H, a.D, threads);
  const int64_t grain = kernels->unit_grain_backward(a.H);
  run_team(plan.team, [&](int thread, int team) {
    for (int d = 0; d < a.D; ++d)
      kernels->pack_backward(a.w_hh[d], a.H, part_of(a.H, team, thread, grain), scratch.packed[d]);
    const auto for_parts = [&](auto visit) { for_own_parts(plan, thread, team, a.B, a.H, a.D, grain, visit); };
    for_parts([&](const LstmPart& part) { kernels->backward_begin(a, scratch, part); });
    team_barrier(team);
    if (plan.share_units) {
      for (int64_t s = 0; s < a.T; ++s) {
        for_parts([&](const LstmPart& part) { kernels->backward_cell(a, scratch, part, s); });
        team_barrier(team);
        for_parts([&](const LstmPart& part) { kernels->backward_product(a, scratch, part, s); });
      }
    } else {
      for_parts([&](const LstmPart& part) {
        for (int64_t s = 0; s < a.T; ++s) {
          kernels->backward_cell(a, scratch, part, s);
          kernels->backward_product(a, scratch, part, s);
        }
      });
    }
    for_parts([&](const LstmPart& part) { kernels->backward_end(a, scratch, part); });
  });
  return kLstmOk;
}

const char* lstm_cpu_isa() { return kernels_for(DType::float32)->isa; }

int lstm_cell_forward_cpu(DType dtype, const LstmCellForward& a) {
  const LstmKernels* kernels = kernels_for(dtype);
  return kernels ? kernels->cell_forward(a) : kLstmUnsupportedDType;
}

int lstm_cell_backward_cpu(DType dtype, const LstmCellBackward& a) {
  const LstmKernels* kernels = kernels_for(dtype);
  return kernels ? kernels->cell_backward(a) : kLstmUnsupportedDType;
}

const char* lstm_error(int code) {
  switch (code) {
    case kLstmOk: return "success";
    case kLstmUnsupportedDType: return "no kernel for this element type";
    case kLstmOutOfMemory: return "out of memory";
  }
#ifdef SORA_WITH_CUDA
  return lstm_cuda_error(code);
#else
  return "unknown error";
#endif
}

}  // namespace sora
