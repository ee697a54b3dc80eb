// One recurrent layer (LSTM, GRU, plain RNN), forward and backward: the chain over time.
//
// Everything that is parallel over time (x W_ih^T, dx, dW, db) is a matrix product that the caller makes with its own
// GEMM. What is left, and lives here, is, with a = x W_ih^T + b_ih and u = W_hh h(t-1) + b_hh:
//
//     LSTM   i, f, o = sigmoid(a + u), g = tanh(a + u);  c(t) = f c(t-1) + i g;  h(t) = W_hr (o tanh(c(t)))
//     GRU    r, z = sigmoid(a + u), q = u_n, n = tanh(a_n + r q);  h(t) = n + z (h(t-1) - n)
//     RNN    h(t) = tanh(a + u) or relu(a + u)
//
// Conventions, for every function of this file:
//   * T steps, B rows (batch), H hidden units, D directions (1, or 2 = forward in time, then backward in time).
//   * O is the size of h: P for an LSTM with a projection (W_hr [P, H]), else H, and then there is no W_hr.
//   * Gate order as in torch: LSTM i, f, g, o; GRU r, z, n. G = 4, 3, 1 gates: W_hh is [G*H, O], gate by gate.
//   * Arrays are dense and row-major in the shape given, last axis fastest, unless a row stride is named.
//   * "element" is the type given by DType. "state" is the type of c, of gate arithmetic and of every sum: float64 for
//     float64, float32 for the others. h is rounded to element at each step.
//   * The caller owns every array and allocates every output; nothing is kept between calls; inputs are not written.
//     No two arrays of a call may overlap, except where an argument is said to be in-out or may alias.
//   * A null pointer is allowed only where the comment says so.
//   * Functions return an error code, 0 for success (see lstm_error). Nothing is thrown but std::bad_alloc.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace sora {

enum class Cell : int { lstm = 0, gru = 1, rnn_tanh = 2, rnn_relu = 3 };

enum LstmError : int {
  kLstmOk = 0,
  kLstmUnsupportedDType = -1,  // this function has no kernel for the element type
  kLstmOutOfMemory = -2,       // scratch memory could not be allocated
};
// Codes above zero are cudaError_t. The text lives as long as the process.
const char* lstm_error(int code);

// What the passes have in common: the cell, the sizes, and which rows run at which step.
//
// Rows are numbered so that their lengths do not increase: step t runs rows 0 .. batch_sizes[t] - 1, and the reverse
// direction begins a row at its own last step. Two kinds of arrays hold one row for each of the N = sum of batch_sizes
// (row, step) pairs:
//   * packed: pair (t, b) is at batch_sizes[0] + ... + batch_sizes[t-1] + b; the layout of torch's PackedSequence;
//   * data:   the same without `order`; with it a padded [T, B] array, where row b is `order[b]`. What lies past a
//             row's length is neither read nor written.
// Without batch_sizes all rows have T steps and both are [T, B]. Arrays of initial and final states are [D, B, .],
// where row b is `order[b]` if there is an order.
struct LstmShape {
  Cell cell;
  int64_t T, B, H;
  int64_t P;  // 0: no projection
  int D;
  const int64_t* batch_sizes;  // [T], not increasing, at most B; or null
  const int64_t* order;        // [B], a permutation; or null
  const uint8_t* reset;        // data rows, 0 or 1: a new sequence begins at this step. The state is cleared before it
                               // (by the reverse direction: before the step ahead of it, if the row has one). Or null
};

struct LstmForward {
  LstmShape shape;
  // [D, packed rows, G*H] element, row stride input_stride: x W_ih^T.
  const void* input;
  int64_t input_stride;
  const void* b_ih[2];  // D arrays [G*H] element; all four null without biases
  const void* b_hh[2];
  const void* w_hh[2];  // D arrays [G*H, O] element. Null without int8: `input` has W_hh h(t-1) in it already, a GRU's as in its
                        // gates: r, z whole, then W_in x, then W_hn h; the cells alone are walked
  // In place of w_hh, float32 and bfloat16 only: D arrays packed by lstm_pack_int8_cpu, and what a row of w_hh was
  // divided by, [G*H]. All four null otherwise.
  const void* w_hh_int8[2];
  const float* int8_scale[2];
  const void* w_hr[2];  // D arrays [P, H] element; null if P is 0, or with null w_hh, y and h_n
  const void* h0;       // [D, B, O] element, or null for zero
  const void* c0;       // [D, B, H] element, or null for zero; LSTM only
  // [D, data rows, 4*H] element: what backward needs of the gates. LSTM: i, f, g, o, GRU: r, z, n, q; RNN has none. Null
  // when not wanted. May be `input` where both have the same rows and input_stride is 4*H.
  void* gates;
  void* y;      // [data rows, D*O] element: h(t), directions side by side; null when not wanted
  void* cells;  // [data rows, D*H] state: c(t); LSTM only; null when not wanted
  void* h_n;    // [D, B, O] element: h after a row's last step; null when not wanted
  void* c_n;    // [D, B, H] element; LSTM only; null when not wanted
};

// The data-dependent part of the gradient: the rest are GEMMs and sums over `dgates`.
struct LstmBackward {
  LstmShape shape;
  const void* gates;    // as left by the forward pass; unused for RNN
  const void* cells;    // as left by the forward pass; LSTM only
  const void* y;        // as left by the forward pass; unused for LSTM
  const void* w_hh[2];  // D arrays [G*H, O] element. Null with T = 1 and P = 0: the caller adds dgates W_hh to dh0
  const void* w_hr[2];  // D arrays [P, H] element; null if P is 0
  const void* h0;       // [D, B, O] element, or null for zero; unused for LSTM
  const void* c0;       // [D, B, H] element, or null for zero; LSTM only
  const void* dy;       // [data rows, D*O] element, or null for zero
  const void* dcells;   // [data rows, D*H] state, or null for zero; LSTM only
  const void* dh_n;     // [D, B, O] element, or null for zero
  const void* dc_n;     // [D, B, H] element, or null for zero; LSTM only
  // [D, packed rows, A*H] element: gradient of a + u, gate by gate; A = G, and for a GRU 4: r, z, n of a, then n of u.
  void* dgates;
  void* dh;   // [D, packed rows, P] element: dL/dh(t), whole, for the gradient of w_hr; null if P is 0
  void* dh0;  // [D, B, O] element
  void* dc0;  // [D, B, H] element; LSTM only
};

// CPU kernels for float32, float64 and bfloat16. `threads` is the most that may be used; small work takes fewer. For a
// given machine and `threads` the result is the same bits every time. Safe to call from several threads at once.
int lstm_forward_cpu(DType dtype, const LstmForward& args, int threads);
int lstm_backward_cpu(DType dtype, const LstmBackward& args, int threads);

// The h that each step of one direction started from, after any reset: y [data rows, D*O] and h0 (or null) ->
// h_prev [packed rows, O]. Copies elements of any type of `element_bytes` bytes.
void lstm_previous_states_cpu(int64_t element_bytes, const LstmShape& shape, int direction, const void* y,
                              const void* h0, void* h_prev);

// w [G*H, O] int8 -> `packed`, of lstm_int8_bytes_cpu bytes, in the order that this machine's kernels read. Another
// machine's may be another.
int64_t lstm_int8_bytes_cpu(Cell cell, int64_t H, int64_t O);
void lstm_pack_int8_cpu(Cell cell, int64_t H, int64_t O, const int8_t* w, void* packed);

// The instruction set the CPU kernels run on: "avx512", "avx2" or "generic".
const char* lstm_cpu_isa();

// One direction of a layer a step at a time, with the caller's own GEMM between the steps: the form for few steps, and
// on CUDA for any size, cell and feature that no persistent kernel takes. A step is elementwise over [B, H]. Gates are
// summed in the state type from x W_ih^T, W_hh h(t-1) and the biases; nothing is rounded in between.
//
// "data" arrays have one row for each (step, row) pair, step by step: row (t, b) is at t * B + b, or with `offsets` at
// offsets[t] + b. Each has a row stride in its own elements, or is dense where none is named.
struct LstmSteps {
  Cell cell;
  int64_t T, B, H;
  int direction;           // 0: t counts up from 0; 1: down from T - 1
  const int64_t* offsets;  // [T + 1], on the host: step t has rows 0 .. offsets[t + 1] - offsets[t] - 1, not increasing
                           // in number and at most B. Null: B rows at every step
  const int64_t* lengths;  // [B], in any order, beside no offsets: row b runs at steps t < lengths[b]. Or null
  const uint8_t* reset;    // [data rows], as in LstmShape, or null
};

struct LstmStepForward {
  LstmSteps steps;
  const void* input;     // [data rows, G*H] element: x W_ih^T
  int64_t input_stride;
  const void* b_ih;      // [G*H] element; both or neither
  const void* b_hh;
  const void* h_prev;    // [B, H] element; GRU only
  void* h;               // [B, H] element: h(t) of the rows that run; may be h_prev; null when not wanted
  void* c;               // [B, H] state, in-out; LSTM only
  void* y;               // data rows of H element: h(t), 0 for a row that does not run; null when not wanted
  int64_t y_stride;
  void* cells;           // data rows of H state: c(t), likewise; LSTM only; null when not wanted
  int64_t cells_stride;
  void* gates;           // [data rows, 4*H] element, likewise, as in LstmForward; null when not wanted. May be `input` of
                         // the same stride
};

// Steps in the opposite order, then one more: t = -1 of direction 0, T of direction 1, if dh is there. It adds the last
// dh_next to dh.
struct LstmStepBackward {
  LstmSteps steps;
  const void* gates;     // [data rows, 4*H] element; not RNN
  const void* cells;     // data rows of H state; LSTM only
  int64_t cells_stride;
  const void* c0;        // [B, H] element, or null for zero; LSTM only
  const void* h;         // RNN: y, data rows of H element. GRU: what each step started from, after any reset, likewise
  int64_t h_stride;
  const void* dy;        // data rows of H element, or null for zero
  int64_t dy_stride;
  const void* dcells;    // data rows of H state, or null for zero; LSTM only
  int64_t dcells_stride;
  void* dh;              // [B, H] state, in-out, zero at first: what goes to h(t-1) past the product. Null where that is
                         // nothing: LSTM and RNN without offsets, lengths and reset
  void* dc;              // [B, H] state, in-out: dc_n -> dc0; LSTM only
  void* dgates;          // [data rows, A*H] element, 0 for a row that does not run: A = G, i, f, g, o of an LSTM; A = 4,
                         // n of a, then r, z, n of u, of a GRU: either's are side by side
};

// `hidden`: W_hh h(t-1) of the step's rows, [rows, G*H] element, or null for zero.
int lstm_step_forward_cpu(DType dtype, const LstmStepForward& args, int64_t t, const void* hidden);
// `dh_next`: [rows, H] element, or null for zero: dgates W_hh of the step before this one in the walk, thus the later one
// in the direction's time; at the first step dh_n, of all B rows.
int lstm_step_backward_cpu(DType dtype, const LstmStepBackward& args, int64_t t, const void* dh_next);
#ifdef SORA_WITH_CUDA
// All four element types; what is not on the host is on `device`, which is made current for the launch. `stream` is a
// cudaStream_t, and the call returns as soon as the kernel is queued.
int lstm_step_forward_cuda(DType dtype, const LstmStepForward& args, int64_t t, const void* hidden, int device,
                           void* stream);
int lstm_step_backward_cuda(DType dtype, const LstmStepBackward& args, int64_t t, const void* dh_next, int device,
                            void* stream);
const char* lstm_cuda_error(int code);
#endif

}  // namespace sora
