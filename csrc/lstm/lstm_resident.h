// One recurrent layer on the GPU with W_hh in registers: a CTA holds the whole of it, and runs 8 rows of the batch
// through all their steps. For H <= 128 in 16 bits and H <= 64 in fp32, whose products are then TF32.
//
// The cells, the gate order and the conventions are those of lstm.h, with these differences:
//   * Every pointer is to device memory, the integers too: the host never learns a length.
//   * All arrays have a leading axis of `members`: independent layers of the same sizes, as torch.vmap over a layer's
//     parameters makes them. Lengths, offsets and resets are common to the members.
//   * There is no projection. "state" is float.
//   * Rows may come in any order. A CTA takes rows 8 k .. 8 k + 7 and ends with the longest of them.
//   * What lies past a row's length is neither read nor written: a caller who wants zeros there puts them there first.
//   * h0 and c0 may be null at the same time as dh0, dc0 are wanted.
// Results are the same bits every time, whatever else runs on the GPU.
#pragma once

#include <cstdint>

#include "lstm.h"

namespace sora {

// Beyond those of LstmError and cudaError_t.
enum LstmResidentError : int {
  kLstmTooLarge = -3,      // H, or more than 2^31 - 1 data rows, or 65535 members
  kLstmBadArgument = -4,   // a pointer is null that must not be, or not aligned to an element; sizes do not fit
};

struct LstmResidentShape {
  Cell cell;
  int64_t T, B, H;
  int D;
  int64_t members;
  // Rows of the arrays that hold one row a (row, step) pair: step t of row b is at offsets[t] + b, without offsets at
  // t * B + b. offsets are those of a PackedSequence (sums of the batch sizes before t), and ask for lengths that do
  // not increase.
  int64_t data_rows;
  const int32_t* lengths;  // [B]: row b runs steps 0 .. lengths[b] - 1, cut to 0 .. T; or null for T
  const int64_t* offsets;  // [T]; or null
  const uint8_t* reset;    // [data rows], 0 or 1: as in lstm.h; or null
};

struct LstmResidentForward {
  LstmResidentShape shape;
  const void* gx;       // [members, D, data rows, G*H] element: x W_ih^T
  const void* w_hh[2];  // D arrays [members, G*H, H] element
  const void* b_ih[2];  // D arrays [members, G*H] element; all four null without biases
  const void* b_hh[2];
  const void* h0;  // [members, D, B, H] element, or null for zero
  const void* c0;  // [members, D, B, H] element, or null for zero; LSTM only
  void* gates;     // [members, D, data rows, 4*H] element, as in lstm.h; null when not wanted, and for RNN
  void* y;         // [members, data rows, D*H] element
  void* cells;     // [members, data rows, D*H] state; LSTM only; null when not wanted
  void* h_n;       // [members, D, B, H] element
  void* c_n;       // [members, D, B, H] element; LSTM only
};

struct LstmResidentBackward {
  LstmResidentShape shape;
  const void* gates;  // as left by the forward pass; unused for RNN
  const void* cells;  // as left by the forward pass; LSTM only
  const void* y;      // as left by the forward pass; unused for LSTM
  const void* w_hh[2];
  const void* h0;      // [members, D, B, H] element, or null for zero; GRU only
  const void* c0;      // [members, D, B, H] element, or null for zero; LSTM only
  const void* dy;      // [members, data rows, D*H] element, or null for zero
  const void* dcells;  // [members, data rows, D*H] state, or null for zero; LSTM only
  const void* dh_n;    // [members, D, B, H] element, or null for zero
  const void* dc_n;    // [members, D, B, H] element, or null for zero; LSTM only
  void* dgates;        // [members, D, data rows, A*H] element: gradient of a + u as in lstm.h, A = G, for a GRU 4
  void* dh0;           // [members, D, B, H] element
  void* dc0;           // [members, D, B, H] element; LSTM only
};

// What a launch is made of.
struct LstmResidentPlan {
  int units = 0;  // that the kernel was compiled for, at least H
  int64_t ctas = 0;
  int threads = 0;       // of a CTA
  int registers = 0;     // of a thread
  int shared_bytes = 0;  // of a CTA
};

// The largest H that there is a kernel for: 128, of float32 64, of float64 0.
int64_t lstm_resident_max_hidden(DType dtype);

// `device` is made current for the launch, `stream` is a cudaStream_t. One launch, nothing allocated, no
// synchronisation: the call returns as soon as the kernel is queued, and may be captured into a graph.
int lstm_resident_forward_cuda(DType dtype, const LstmResidentForward& args, int device, void* stream);
int lstm_resident_backward_cuda(DType dtype, const LstmResidentBackward& args, int device, void* stream);
// What a call with these sizes would launch, its arrays aligned to 16 bytes. Of the pointers alone counts whether they
// are null.
int lstm_resident_plan(DType dtype, const LstmResidentShape& shape, bool backward, int device, LstmResidentPlan& plan);
const char* lstm_resident_error(int code);

}  // namespace sora
