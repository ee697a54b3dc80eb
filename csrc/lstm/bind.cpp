// Python sees ints: data_ptr() values, sizes, a dtype code, a stream handle. 0 is the null pointer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "lstm.h"
#include "resident_arguments.h"

namespace sora {
namespace {

namespace py = pybind11;
using Address = std::uintptr_t;

void* ptr(Address address) { return reinterpret_cast<void*>(address); }

// cell, T, B, H, P, D, then the addresses of batch_sizes, order, reset: as LstmShape.
using Shape = std::array<int64_t, 9>;
// w_hh, b_ih, b_hh, w_hr, w_hh_int8, int8_scale: of the forward direction and then the reverse one.
using Weights = std::array<Address, 12>;

LstmShape shape_of(const Shape& s) {
  const auto [cell, T, B, H, P, D, batch_sizes, order, reset] = s;
  return {static_cast<Cell>(cell),
          T,
          B,
          H,
          P,
          static_cast<int>(D),
          reinterpret_cast<const int64_t*>(batch_sizes),
          reinterpret_cast<const int64_t*>(order),
          reinterpret_cast<const uint8_t*>(reset)};
}

void check(int code, const char* function) {
  if (code != kLstmOk) throw std::runtime_error(std::string(function) + ": " + lstm_error(code));
}

// Numbers in the order of LstmResidentForward or LstmResidentBackward.
using ResidentNumbers = std::array<int64_t, kLstmResidentNumbers>;

#ifdef SORA_WITH_CUDA
void check_resident(int code, const char* function) {
  if (code != kLstmOk) throw std::runtime_error(std::string(function) + ": " + lstm_resident_error(code));
}
#endif

}  // namespace

void init_lstm(py::module_& m) {
  using namespace pybind11::literals;
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  m.def(
      "lstm_forward_cpu",
      [](int dtype, const Shape& shape, Address input, int64_t input_stride, const Weights& weights, Address h0,
         Address c0, Address gates, Address y, Address cells, Address h_n, Address c_n, int threads) {
        const auto& w = weights;
        const LstmForward args{shape_of(shape),
                               ptr(input),
                               input_stride,
                               {ptr(w[2]), ptr(w[3])},
                               {ptr(w[4]), ptr(w[5])},
                               {ptr(w[0]), ptr(w[1])},
                               {ptr(w[8]), ptr(w[9])},
                               {reinterpret_cast<const float*>(w[10]), reinterpret_cast<const float*>(w[11])},
                               {ptr(w[6]), ptr(w[7])},
                               ptr(h0),
                               ptr(c0),
                               ptr(gates),
                               ptr(y),
                               ptr(cells),
                               ptr(h_n),
                               ptr(c_n)};
        const py::gil_scoped_release nogil;
        check(lstm_forward_cpu(static_cast<DType>(dtype), args, threads), "lstm_forward_cpu");
      },
      "dtype"_a, "shape"_a, "input"_a, "input_stride"_a, "weights"_a, "h0"_a, "c0"_a, "gates"_a, "y"_a, "cells"_a,
      "h_n"_a, "c_n"_a, "threads"_a);

  m.def(
      "lstm_backward_cpu",
      [](int dtype, const Shape& shape, Address gates, Address cells, Address y, const Weights& weights, Address h0,
         Address c0, Address dy, Address dcells, Address dh_n, Address dc_n, Address dgates, Address dh, Address dh0,
         Address dc0, int threads) {
        const LstmBackward args{shape_of(shape),
                                ptr(gates),
                                ptr(cells),
                                ptr(y),
                                {ptr(weights[0]), ptr(weights[1])},
                                {ptr(weights[6]), ptr(weights[7])},
                                ptr(h0),
                                ptr(c0),
                                ptr(dy),
                                ptr(dcells),
                                ptr(dh_n),
                                ptr(dc_n),
                                ptr(dgates),
                                ptr(dh),
                                ptr(dh0),
                                ptr(dc0)};
        const py::gil_scoped_release nogil;
        check(lstm_backward_cpu(static_cast<DType>(dtype), args, threads), "lstm_backward_cpu");
      },
      "dtype"_a, "shape"_a, "gates"_a, "cells"_a, "y"_a, "weights"_a, "h0"_a, "c0"_a, "dy"_a, "dcells"_a, "dh_n"_a,
      "dc_n"_a, "dgates"_a, "dh"_a, "dh0"_a, "dc0"_a, "threads"_a);

  m.def(
      "lstm_previous_states_cpu",
      [](int64_t element_bytes, const Shape& shape, int direction, Address y, Address h0, Address h_prev) {
        const LstmShape s = shape_of(shape);
        const py::gil_scoped_release nogil;
        lstm_previous_states_cpu(element_bytes, s, direction, ptr(y), ptr(h0), ptr(h_prev));
      },
      "element_bytes"_a, "shape"_a, "direction"_a, "y"_a, "h0"_a, "h_prev"_a);

  m.def(
      "lstm_int8_bytes_cpu",
      [](int cell, int64_t H, int64_t O) { return lstm_int8_bytes_cpu(static_cast<Cell>(cell), H, O); }, "cell"_a, "H"_a,
      "O"_a);
  m.def(
      "lstm_pack_int8_cpu",
      [](int cell, int64_t H, int64_t O, Address w, Address packed) {
        lstm_pack_int8_cpu(static_cast<Cell>(cell), H, O, reinterpret_cast<const int8_t*>(w), ptr(packed));
      },
      "cell"_a, "H"_a, "O"_a, "w"_a, "packed"_a, nogil);

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

#ifdef SORA_WITH_CUDA
  m.def(
      "lstm_resident_forward",
      [](int dtype, const ResidentNumbers& numbers, int device, Address stream) {
        const LstmResidentForward args = lstm_resident_forward_of(numbers.data());
        check_resident(lstm_resident_forward_cuda(static_cast<DType>(dtype), args, device, ptr(stream)),
                       "lstm_resident_forward");
      },
      "dtype"_a, "numbers"_a, "device"_a, "stream"_a, nogil);
  m.def(
      "lstm_resident_backward",
      [](int dtype, const ResidentNumbers& numbers, int device, Address stream) {
        const LstmResidentBackward args = lstm_resident_backward_of(numbers.data());
        check_resident(lstm_resident_backward_cuda(static_cast<DType>(dtype), args, device, ptr(stream)),
                       "lstm_resident_backward");
      },
      "dtype"_a, "numbers"_a, "device"_a, "stream"_a, nogil);
#endif
}

}  // namespace sora
