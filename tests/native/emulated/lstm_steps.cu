// The step kernels for ctypes: what bind.cpp gives Python, as C functions. 0 or an error.
#include <lstm/lstm_step.cu>
#include <lstm/resident_arguments.h>

namespace {

using namespace sora;

LstmSteps steps_of(NumbersInOrder& in) {
  LstmSteps s;
  in.get_all(s.cell, s.T, s.B, s.H, s.direction, s.offsets, s.lengths, s.reset);
  return s;
}

}  // namespace

extern "C" {

// numbers: those of LstmSteps, then the addresses and strides of LstmStepForward, in their order.
int run_lstm_step_forward(int dtype, const int64_t* numbers, int64_t t, const void* hidden, void* stream) {
  NumbersInOrder in(numbers);
  LstmStepForward a;
  a.steps = steps_of(in);
  in.get_all(a.input, a.input_stride, a.b_ih, a.b_hh, a.h_prev, a.h, a.c, a.y, a.y_stride, a.cells, a.cells_stride,
             a.gates);
  return lstm_step_forward_cuda(DType(dtype), a, t, hidden, 0, stream);
}

int run_lstm_step_backward(int dtype, const int64_t* numbers, int64_t t, const void* dh_next, void* stream) {
  NumbersInOrder in(numbers);
  LstmStepBackward a;
  a.steps = steps_of(in);
  in.get_all(a.gates, a.cells, a.cells_stride, a.c0, a.h, a.h_stride, a.dy, a.dy_stride, a.dcells, a.dcells_stride,
             a.dh, a.dc, a.dgates);
  return lstm_step_backward_cuda(DType(dtype), a, t, dh_next, 0, stream);
}
}
