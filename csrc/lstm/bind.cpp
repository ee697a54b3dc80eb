// Python sees ints: data_ptr() values, sizes, a dtype code, a stream handle. 0 is the null pointer.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "lstm.h"

namespace sora {
namespace {

namespace py = pybind11;
using Address = std::uintptr_t;

void* ptr(Address address) { return reinterpret_cast<void*>(address); }

void check(int code, const char* function) {
  if (code != kLstmOk) throw std::runtime_error(std::string(function) + ": " + lstm_error(code));
}

}  // namespace

void init_lstm(py::module_& m) {
  using namespace pybind11::literals;
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  m.def(
      "lstm_forward_cpu",
      [](int dtype, int64_t T, int64_t B, int64_t H, int D, Address gates, Address w_hh, Address w_hh_reverse,
         Address h0, Address c0, Address y, Address cells, Address h_n, Address c_n, int threads) {
        const LstmForward args{T,       B,       H,      D,          ptr(gates), {ptr(w_hh), ptr(w_hh_reverse)},
                               ptr(h0), ptr(c0), ptr(y), ptr(cells), ptr(h_n),   ptr(c_n)};
        check(lstm_forward_cpu(static_cast<DType>(dtype), args, threads), "lstm_forward_cpu");
      },
      "dtype"_a, "T"_a, "B"_a, "H"_a, "D"_a, "gates"_a, "w_hh"_a, "w_hh_reverse"_a, "h0"_a, "c0"_a, "y"_a, "cells"_a,
      "h_n"_a, "c_n"_a, "threads"_a, nogil);

  m.def(
      "lstm_backward_cpu",
      [](int dtype, int64_t T, int64_t B, int64_t H, int D, Address gates, Address cells, Address w_hh,
         Address w_hh_reverse, Address c0, Address dy, Address dcells, Address dh_n, Address dc_n, Address dgates,
         Address dh0, Address dc0, int threads) {
        const LstmBackward args{T,           B,         H,         D,           ptr(gates), ptr(cells),
                                {ptr(w_hh), ptr(w_hh_reverse)},    ptr(c0),     ptr(dy),    ptr(dcells),
                                ptr(dh_n),   ptr(dc_n), ptr(dgates), ptr(dh0),  ptr(dc0)};
        check(lstm_backward_cpu(static_cast<DType>(dtype), args, threads), "lstm_backward_cpu");
      },
      "dtype"_a, "T"_a, "B"_a, "H"_a, "D"_a, "gates"_a, "cells"_a, "w_hh"_a, "w_hh_reverse"_a, "c0"_a, "dy"_a,
      "dcells"_a, "dh_n"_a, "dc_n"_a, "dgates"_a, "dh0"_a, "dc0"_a, "threads"_a, nogil);

  m.def("lstm_cpu_isa", &lstm_cpu_isa);

  // `device` < 0 is the CPU.
  m.def(
      "lstm_cell_forward",
      [](int dtype, int64_t B, int64_t H, Address gates, Address c_prev, int64_t c_prev_stride, Address c,
         int64_t c_stride, Address h, int64_t h_stride, int device, [[maybe_unused]] Address stream) {
        const LstmCellForward args{B,      H,        ptr(gates), ptr(c_prev), c_prev_stride,
                                   ptr(c), c_stride, ptr(h),     h_stride};
        const auto type = static_cast<DType>(dtype);
        if (device < 0) return check(lstm_cell_forward_cpu(type, args), "lstm_cell_forward");
#ifdef SORA_WITH_CUDA
        check(lstm_cell_forward_cuda(type, args, device, ptr(stream)), "lstm_cell_forward");
#else
        throw std::runtime_error("lstm_cell_forward: built without CUDA");
#endif
      },
      "dtype"_a, "B"_a, "H"_a, "gates"_a, "c_prev"_a, "c_prev_stride"_a, "c"_a, "c_stride"_a, "h"_a, "h_stride"_a,
      "device"_a, "stream"_a, nogil);

  m.def(
      "lstm_cell_backward",
      [](int dtype, int64_t B, int64_t H, Address gates, Address c_prev, int64_t c_prev_stride, Address c,
         int64_t c_stride, Address dy, int64_t dy_stride, Address dcell, int64_t dcell_stride, Address dh, Address dc,
         Address dgates, int device, [[maybe_unused]] Address stream) {
        const LstmCellBackward args{B,         H,          ptr(gates),   ptr(c_prev), c_prev_stride,
                                    ptr(c),    c_stride,   ptr(dy),      dy_stride,   ptr(dcell),
                                    dcell_stride, ptr(dh), ptr(dc),      ptr(dgates)};
        const auto type = static_cast<DType>(dtype);
        if (device < 0) return check(lstm_cell_backward_cpu(type, args), "lstm_cell_backward");
#ifdef SORA_WITH_CUDA
        check(lstm_cell_backward_cuda(type, args, device, ptr(stream)), "lstm_cell_backward");
#else
        throw std::runtime_error("lstm_cell_backward: built without CUDA");
#endif
      },
      "dtype"_a, "B"_a, "H"_a, "gates"_a, "c_prev"_a, "c_prev_stride"_a, "c"_a, "c_stride"_a, "dy"_a, "dy_stride"_a,
      "dcell"_a, "dcell_stride"_a, "dh"_a, "dc"_a, "dgates"_a, "device"_a, "stream"_a, nogil);
}

}  // namespace sora
