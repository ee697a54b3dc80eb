// Private to csrc/lstm: what lstm_cpu.cpp (threads, scratch memory, order of steps) asks of recurrence.h (arithmetic),
// which is compiled once for each instruction set.
#pragma once

#include "../common/threads.h"
#include "lstm.h"

namespace sora {

// Gates of a cell: w_hh has this many times H rows.
inline int lstm_gates(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// Where a step's rows lie, and how they follow each other.
struct LstmRows {
  const LstmShape& shape;
  const int64_t* offsets;  // [T], packed row of (t, 0); null without batch_sizes

  int64_t active(int64_t t) const { return shape.batch_sizes ? shape.batch_sizes[t] : shape.B; }
  bool has(int64_t t, int64_t b) const { return t >= 0 && t < shape.T && b < active(t); }
  int64_t packed(int64_t t, int64_t b) const { return (offsets ? offsets[t] : t * shape.B) + b; }
  int64_t data(int64_t t, int64_t b) const { return shape.order ? t * shape.B + shape.order[b] : packed(t, b); }
  int64_t state(int64_t b) const { return shape.order ? shape.order[b] : b; }
  int64_t packed_rows() const { return offsets ? offsets[shape.T - 1] + active(shape.T - 1) : shape.T * shape.B; }
  int64_t data_rows() const { return shape.order ? shape.T * shape.B : packed_rows(); }

  // Step number s = 0..T-1 of the forward pass, in the direction's own order; and the step that precedes step t.
  int64_t step(int direction, int64_t s) const { return direction == 0 ? s : shape.T - 1 - s; }
  int64_t before(int direction, int64_t t) const { return direction == 0 ? t - 1 : t + 1; }
  int64_t after(int direction, int64_t t) const { return direction == 0 ? t + 1 : t - 1; }
  bool clears(int direction, int64_t t, int64_t b) const {
    if (!shape.reset) return false;
    const int64_t boundary = direction == 0 ? t : t + 1;
    return has(boundary, b) && shape.reset[data(boundary, b)];
  }
};

// What a packed array holds: values of the state type, of the element type, or int8 numbers.
enum class LstmWeights : int { state, element, int8 };

// A weight matrix in the order that the inner loop reads: blocks of `vectors` x lanes units, and in a block for each of
// the `depth` terms of a sum, gates x vectors vectors. Units past `outputs` are zero.
struct LstmPacking {
  int64_t depth, outputs;
  int gates, vectors;
  bool transposed;  // w is [depth, outputs] and not [gates * outputs, depth]
  LstmWeights kept_as;

  int columns() const { return gates * vectors; }
  int64_t grain(int64_t lanes) const { return vectors * lanes; }
  int64_t values(int64_t lanes) const { return depth * gates * ((outputs + grain(lanes) - 1) / grain(lanes)) * grain(lanes); }
};

// Scratch arrays, in the state type. Double buffers are indexed by the parity of the step, so that one barrier after
// each product is enough when threads own units.
struct LstmScratch {
  const int64_t* offsets;
  LstmPacking hh, hr;
  void* w_hh[2];  // D packed arrays; null where there are no weights
  void* w_hr[2];
  void* bias[2];  // forward, D arrays [4, H]: b_ih + b_hh; for a GRU of r and z, then b_in, b_hn. Null without biases
  void* h;        // forward: [2, D, B, O]; backward: [D, B, O], dL/dh(t) from the later step
  void* c;        // [D, B, H]: forward c, backward dL/dc
  void* m;        // with a projection, [D, B, H]: forward o tanh(c), backward its gradient
  void* dh;       // backward with a projection, [D, B, P]: dL/dh(t), whole
  void* dgates;   // backward: [2, D, B, G*H]
};

// Which part of the layer one call works on. Units are hidden units, or units of h; ranges begin at multiples of the
// grain.
struct LstmPart {
  int direction;
  Range rows, units;
};

struct LstmKernels {
  const char* isa;
  int64_t lanes, state_bytes, element_bytes;
  void (*pack)(const void* w, const LstmPacking&, Range units, void* packed);
  // [4, H] from b_ih and b_hh, units of H.
  void (*add_biases)(const LstmForward&, int direction, void* bias);
  // Fill scratch h (units of O) and c (of H) from h0 and c0, resp. dL/dh and dL/dc from dh_n and dc_n; and the other
  // way after the backward pass. forward_begin also ends the rows that have no step.
  void (*forward_begin)(const LstmForward&, const LstmScratch&, const LstmPart& outputs, const LstmPart& hidden);
  void (*backward_begin)(const LstmBackward&, const LstmScratch&, const LstmPart& outputs, const LstmPart& hidden);
  void (*backward_end)(const LstmBackward&, const LstmScratch&, const LstmPart& outputs, const LstmPart& hidden);
  // Step s = 0..T-1; backward counts from the last step to the first. The parts of a step, in order; what is marked "all"
  // reads units of the part before it that other threads may own.
  void (*forward_cell)(const LstmForward&, const LstmScratch&, const LstmPart&, int64_t s);      // all of h(t-1)
  void (*forward_project)(const LstmForward&, const LstmScratch&, const LstmPart&, int64_t s);   // all; units of P
  void (*backward_outputs)(const LstmBackward&, const LstmScratch&, const LstmPart&, int64_t s);  // units of P
  void (*backward_project)(const LstmBackward&, const LstmScratch&, const LstmPart&, int64_t s);  // all
  void (*backward_cell)(const LstmBackward&, const LstmScratch&, const LstmPart&, int64_t s);
  void (*backward_product)(const LstmBackward&, const LstmScratch&, const LstmPart&, int64_t s);  // all; units of O
  // Step t of LstmSteps.
  void (*step_forward)(const LstmStepForward&, int64_t t, const void* hidden);
  void (*step_backward)(const LstmStepBackward&, int64_t t, const void* dh_next);
};

// Null when the element type has no kernel.
const LstmKernels* lstm_kernels_generic(DType dtype, Cell cell);
#if defined(__x86_64__)
const LstmKernels* lstm_kernels_avx2(DType dtype, Cell cell);
const LstmKernels* lstm_kernels_avx512(DType dtype, Cell cell);
#endif

}  // namespace sora
