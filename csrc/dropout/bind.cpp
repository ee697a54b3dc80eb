// Python sees ints: data_ptr() values, sizes, a dtype code, a stream handle.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "dropout.h"

namespace sora {

namespace py = pybind11;

void init_dropout(py::module_& m) {
  using namespace pybind11::literals;
  // `device` < 0 is the CPU.
  m.def(
      "dropout",
      [](int dtype, int64_t count, std::uintptr_t x, std::uintptr_t seed, double p, std::uintptr_t y, int device,
         [[maybe_unused]] std::uintptr_t stream, int threads) {
        const Dropout args{count, reinterpret_cast<const void*>(x), reinterpret_cast<const int64_t*>(seed), p,
                           reinterpret_cast<void*>(y)};
        const auto type = static_cast<DType>(dtype);
        int code = kDropoutUnsupportedDType;
        if (device < 0) {
          code = dropout_cpu(type, args, threads);
        } else {
#ifdef SORA_WITH_CUDA
          code = dropout_cuda(type, args, device, reinterpret_cast<void*>(stream));
#else
          throw std::runtime_error("dropout: built without CUDA");
#endif
        }
        if (code != kDropoutOk) throw std::runtime_error(std::string("dropout: ") + dropout_error(code));
      },
      "dtype"_a, "count"_a, "x"_a, "seed"_a, "p"_a, "y"_a, "device"_a, "stream"_a, "threads"_a,
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace sora
