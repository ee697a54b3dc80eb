// Private to csrc/lstm: what lstm_cpu.cpp (threads, scratch memory, order of steps) asks of recurrence.h (arithmetic),
// which is compiled once for each instruction set.
#pragma once

#include "../common/threads.h"
#include "lstm.h"

namespace sora {

// Scratch arrays, in the state type. `h` and `dgates` are double buffers indexed by the parity of the step, so that one
// barrier a step is enough when threads own hidden units.
struct LstmScratch {
  void* packed[2];  // D packed copies of w_hh
  void* h;          // forward: [2, D, B, H]; backward: [D, B, H], dL/dh(t) from the later step
  void* c;          // [D, B, H]: forward c, backward dL/dc
  void* dgates;     // backward: [2, D, B, 4H]
};

// Which part of the layer one call works on. Units are hidden units; ranges begin at multiples of `unit_grain`.
struct LstmPart {
  int direction;
  Range rows, units;
};

struct LstmKernels {
  const char* isa;
  int64_t state_bytes, unit_grain_forward;
  int64_t (*unit_grain_backward)(int64_t H);
  // Number of state elements of one direction's packed w_hh.
  int64_t (*packed_forward_size)(int64_t H);
  int64_t (*packed_backward_size)(int64_t H);
  void (*pack_forward)(const void* w_hh, int64_t H, Range units, void* packed);
  void (*pack_backward)(const void* w_hh, int64_t H, Range units, void* packed);
  // Fills scratch h and c from h0 and c0, resp. dL/dh and dL/dc from dh_n and dc_n.
  void (*forward_begin)(const LstmForward&, const LstmScratch&, const LstmPart&);
  void (*backward_begin)(const LstmBackward&, const LstmScratch&, const LstmPart&);
  // Step number s = 0..T-1 in the direction's own order. Backward counts from the last step to the first, and comes in
  // two halves: the cell (needs dL/dh of its own units), then the product with w_hh (needs dgates of all units).
  void (*forward_step)(const LstmForward&, const LstmScratch&, const LstmPart&, int64_t s);
  void (*backward_cell)(const LstmBackward&, const LstmScratch&, const LstmPart&, int64_t s);
  void (*backward_product)(const LstmBackward&, const LstmScratch&, const LstmPart&, int64_t s);
  void (*forward_end)(const LstmForward&, const LstmScratch&, const LstmPart&);
  void (*backward_end)(const LstmBackward&, const LstmScratch&, const LstmPart&);
  int (*cell_forward)(const LstmCellForward&);
  int (*cell_backward)(const LstmCellBackward&);
};

// Null when the element type has no kernel.
const LstmKernels* lstm_kernels_generic(DType dtype);
#if defined(__x86_64__)
const LstmKernels* lstm_kernels_avx2(DType dtype);
const LstmKernels* lstm_kernels_avx512(DType dtype);
#endif

}  // namespace sora
