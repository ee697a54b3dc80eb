// One LSTM layer: the recurrent part, forward and backward.
//
// Everything that is parallel over time (x W_ih^T + b, dx, dW, db) is a matrix product that the caller makes with its
// own GEMM. What is left, and lives here, is the chain over time:
//
//     [i f g o](t) = input part(t) + W_hh h(t-1)      i, f, o -> sigmoid, g -> tanh
//     c(t) = f c(t-1) + i g
//     h(t) = o tanh(c(t))
//
// Conventions, for every function of this file:
//   * T steps, B rows (batch), H hidden units, D directions (1, or 2 = forward in time, then backward in time).
//   * Gate order i, f, g, o; a gate row is [4H] = [i(H) f(H) g(H) o(H)], as in torch.nn.LSTM.
//   * Arrays are dense and row-major in the shape given, last axis fastest, unless a row stride is named.
//   * "element" is the type given by DType. "state" is the type of cell states and of every sum: float64 for float64,
//     float32 for the other three.
//   * The caller owns every array and allocates every output; nothing is kept between calls; inputs are not written.
//     No two arrays of a call may overlap, except where an argument is said to be in-out or may alias.
//   * A null pointer is allowed only where the comment says so.
//   * No exceptions cross this interface: functions return an error code, 0 for success (see lstm_error).
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace sora {

enum LstmError : int {
  kLstmOk = 0,
  kLstmUnsupportedDType = -1,  // this function has no kernel for the element type
  kLstmOutOfMemory = -2,       // scratch memory could not be allocated
};
// Codes above zero are cudaError_t. The text lives as long as the process.
const char* lstm_error(int code);

// A whole sequence, all directions, in one call.
struct LstmForward {
  int64_t T, B, H;
  int D;
  // [D, T, B, 4H] element, in-out. In: x W_ih^T + b_ih + b_hh. Out: the gates after their activations, which is what
  // the backward pass needs; a caller that does not want them passes its buffer all the same and drops it.
  void* gates;
  const void* w_hh[2];  // D arrays [4H, H] element
  const void* h0;       // [D, B, H] element, or null for zero
  const void* c0;       // [D, B, H] element, or null for zero
  void* y;              // [T, B, D*H] element: h(t), directions side by side
  void* cells;          // [T, B, D*H] state: c(t); null when not wanted
  void* h_n;            // [D, B, H] element
  void* c_n;            // [D, B, H] element
};

// The data-dependent part of the gradient: the rest are GEMMs and sums over `dgates`.
struct LstmBackward {
  int64_t T, B, H;
  int D;
  const void* gates;    // [D, T, B, 4H] element, as left by the forward pass
  const void* cells;    // [T, B, D*H] state, as left by the forward pass
  const void* w_hh[2];  // D arrays [4H, H] element
  const void* c0;       // [D, B, H] element, or null for zero
  const void* dy;       // [T, B, D*H] element, or null for zero
  const void* dcells;   // [T, B, D*H] state, or null for zero
  const void* dh_n;     // [D, B, H] element, or null for zero
  const void* dc_n;     // [D, B, H] element, or null for zero
  void* dgates;         // [D, T, B, 4H] element: gradient of the gates before their activations
  void* dh0;            // [D, B, H] element
  void* dc0;            // [D, B, H] element
};

// CPU kernels for float32, float64 and bfloat16. `threads` is the most that may be used; small work takes fewer. For a
// given machine and `threads` the result is the same bits every time. Safe to call from several threads at once.
int lstm_forward_cpu(DType dtype, const LstmForward& args, int threads);
int lstm_backward_cpu(DType dtype, const LstmBackward& args, int threads);
// The instruction set the CPU kernels run on: "avx512", "avx2" or "generic".
const char* lstm_cpu_isa();

// One step, one direction, after the caller's own GEMM has added W_hh h(t-1): the form for a step at a time, and for
// any size that no persistent kernel takes. Row strides are in elements of the array they belong to.
struct LstmCellForward {
  int64_t B, H;
  void* gates;           // [B, 4H] element, in-out: before -> after activation
  const void* c_prev;    // [B, H] state, row stride c_prev_stride, or null for zero
  int64_t c_prev_stride;
  void* c;               // [B, H] state, row stride c_stride; may be c_prev
  int64_t c_stride;
  void* h;               // [B, H] element, row stride h_stride
  int64_t h_stride;
};

struct LstmCellBackward {
  int64_t B, H;
  const void* gates;     // [B, 4H] element, after activation
  const void* c_prev;    // [B, H] state, row stride c_prev_stride, or null for zero
  int64_t c_prev_stride;
  const void* c;         // [B, H] state, row stride c_stride
  int64_t c_stride;
  const void* dy;        // [B, H] element, row stride dy_stride, or null for zero
  int64_t dy_stride;
  const void* dcell;     // [B, H] state, row stride dcell_stride, or null for zero
  int64_t dcell_stride;
  const void* dh;        // [B, H] element, or null for zero: what the next step's dgates W_hh gave
  void* dc;              // [B, H] state, in-out: dL/dc(t) from the next step -> dL/dc(t-1)
  void* dgates;          // [B, 4H] element
};

// CPU: float32, float64, bfloat16, float16 refused. CUDA: all four; `device` is made current for the launch, `stream`
// is a cudaStream_t, and the call returns as soon as the kernel is queued.
int lstm_cell_forward_cpu(DType dtype, const LstmCellForward& args);
int lstm_cell_backward_cpu(DType dtype, const LstmCellBackward& args);
#ifdef SORA_WITH_CUDA
int lstm_cell_forward_cuda(DType dtype, const LstmCellForward& args, int device, void* stream);
int lstm_cell_backward_cuda(DType dtype, const LstmCellBackward& args, int device, void* stream);
const char* lstm_cuda_error(int code);
#endif

}  // namespace sora
