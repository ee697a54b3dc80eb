// sora_kernels._C: each operator registers its functions through its own bind.cpp.
#include <pybind11/pybind11.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "build_info.h"
#ifdef SORA_WITH_CUDA
#include "cuda_info.h"
#endif

namespace py = pybind11;

namespace sora {
void init_dropout(py::module_& m);
void init_lstm(py::module_& m);
void init_pyramid_pool(py::module_& m);
}

namespace {

py::object build_info() {
  py::dict info = py::module_::import("json").attr("loads")(sora::build_info_json());
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
#ifdef SORA_WITH_CUDA
  info["cuda_runtime"] = sora::cuda_runtime_version();
#else
  info["cuda_runtime"] = py::none();
#endif
  return std::move(info);
}

int openmp_max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

int openmp_team_size(int threads) {
  int size = 1;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    size = omp_get_num_threads();
  }
#else
  (void)threads;
#endif
  return size;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of sora_kernels. Functions take addresses, sizes and a thread count.";
  m.def("build_info", &build_info, "What this extension was built from and with.");
  m.def("openmp_max_threads", &openmp_max_threads,
        "Threads that the next team of this thread would have; 1 without OpenMP.");
  m.def("openmp_team_size", &openmp_team_size, py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "Runs a team and returns the size it really had.");
#ifdef SORA_WITH_CUDA
  m.def("cuda_driver_version", &sora::cuda_driver_version,
        "Newest CUDA the driver supports (1000 * major + 10 * minor), 0 without one.");
#endif
  sora::init_dropout(m);
  sora::init_lstm(m);
  sora::init_pyramid_pool(m);
}
