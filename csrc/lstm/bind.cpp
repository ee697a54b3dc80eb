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

// The arguments of all steps of a direction, cast from Python once; a call is one step. `device` < 0 is the CPU.
template <class Args>
struct Steps {
  DType dtype;
  Args args;
  int device;
  void* stream;

  void operator()(int64_t t, Address from_product) const {
    constexpr bool forward = std::is_same_v<Args, LstmStepForward>;
    const char* name = forward ? "LstmForwardSteps" : "LstmBackwardSteps";
    if (device < 0) {
      if constexpr (forward)
        check(lstm_step_forward_cpu(dtype, args, t, ptr(from_product)), name);
      else
        check(lstm_step_backward_cpu(dtype, args, t, ptr(from_product)), name);
      return;
    }
#ifdef SORA_WITH_CUDA
    if constexpr (forward)
      check(lstm_step_forward_cuda(dtype, args, t, ptr(from_product), device, stream), name);
    else
      check(lstm_step_backward_cuda(dtype, args, t, ptr(from_product), device, stream), name);
#else
    throw std::runtime_error(std::string(name) + ": built without CUDA");
#endif
  }
};

// cell, T, B, H, direction, then the addresses of offsets, lengths, reset: as LstmSteps.
LstmSteps steps_of(const std::array<int64_t, 8>& s) {
  const auto [cell, T, B, H, direction, offsets, lengths, reset] = s;
  return {static_cast<Cell>(cell),
          T,
          B,
          H,
          static_cast<int>(direction),
          reinterpret_cast<const int64_t*>(offsets),
          reinterpret_cast<const int64_t*>(lengths),
          reinterpret_cast<const uint8_t*>(reset)};
}

void bind_steps(py::module_& m) {
  using namespace pybind11::literals;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  using Forward = Steps<LstmStepForward>;
  using Backward = Steps<LstmStepBackward>;

  py::class_<Forward>(m, "LstmForwardSteps")
      .def(py::init([](int dtype, const std::array<int64_t, 8>& steps, Address input, int64_t input_stride,
                       Address b_ih, Address b_hh, Address h_prev, Address h, Address c, Address y, int64_t y_stride,
                       Address cells, int64_t cells_stride, Address gates, int device, Address stream) {
             return Forward{static_cast<DType>(dtype),
                            {steps_of(steps), ptr(input), input_stride, ptr(b_ih), ptr(b_hh), ptr(h_prev), ptr(h),
                             ptr(c), ptr(y), y_stride, ptr(cells), cells_stride, ptr(gates)},
                            device,
                            ptr(stream)};
           }),
           "dtype"_a, "steps"_a, "input"_a, "input_stride"_a, "b_ih"_a, "b_hh"_a, "h_prev"_a, "h"_a, "c"_a, "y"_a,
           "y_stride"_a, "cells"_a, "cells_stride"_a, "gates"_a, "device"_a, "stream"_a)
      .def("__call__", &Forward::operator(), "t"_a, "hidden"_a, nogil);

  py::class_<Backward>(m, "LstmBackwardSteps")
      .def(py::init([](int dtype, const std::array<int64_t, 8>& steps, Address gates, Address cells,
                       int64_t cells_stride, Address c0, Address h, int64_t h_stride, Address dy, int64_t dy_stride,
                       Address dcells, int64_t dcells_stride, Address dh, Address dc, Address dgates, int device,
                       Address stream) {
             return Backward{static_cast<DType>(dtype),
                             {steps_of(steps), ptr(gates), ptr(cells), cells_stride, ptr(c0), ptr(h), h_stride, ptr(dy),
                              dy_stride, ptr(dcells), dcells_stride, ptr(dh), ptr(dc), ptr(dgates)},
                             device,
                             ptr(stream)};
           }),
           "dtype"_a, "steps"_a, "gates"_a, "cells"_a, "cells_stride"_a, "c0"_a, "h"_a, "h_stride"_a, "dy"_a,
           "dy_stride"_a, "dcells"_a, "dcells_stride"_a, "dh"_a, "dc"_a, "dgates"_a, "device"_a, "stream"_a)
      .def("__call__", &Backward::operator(), "t"_a, "dh_next"_a, nogil);
}

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

  bind_steps(m);

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
      "lstm_resident_plan",
      [](int dtype, const std::array<int64_t, kLstmResidentShapeNumbers>& numbers, bool backward, int device) {
        LstmResidentPlan plan;
        check_resident(lstm_resident_plan(static_cast<DType>(dtype), lstm_resident_shape_of(numbers.data()), backward,
                                          device, plan),
                       "lstm_resident_plan");
        return py::dict("units"_a = plan.units, "ctas"_a = plan.ctas, "threads"_a = plan.threads,
                        "registers"_a = plan.registers, "shared_bytes"_a = plan.shared_bytes);
      },
      "dtype"_a, "numbers"_a, "backward"_a, "device"_a);
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
