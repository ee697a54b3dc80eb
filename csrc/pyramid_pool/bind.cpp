// Python sees ints: data_ptr() values, sizes, a dtype code. 0 is the null pointer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "pyramid_pool.h"

namespace sora {
namespace {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* ptr(Address address) {
  return reinterpret_cast<T*>(address);
}

// B, C, T, H, W, valid_size, levels, level_count, columns, inner: as PyramidPool.
using Pool = std::array<int64_t, 10>;

constexpr int64_t kNumbers = 15;  // of a level
static_assert(sizeof(PyramidLevel) == kNumbers * sizeof(int64_t), "levels cross as int64");

PyramidPool pool_of(const Pool& p) {
  return {p[0], p[1], {p[2], p[3], p[4]}, ptr<const int64_t>(p[5]), ptr<const PyramidLevel>(p[6]), p[7], p[8],
          p[9] != 0};
}

std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> found;
  for (const Address address : addresses) found.push_back(ptr<void>(address));
  return found;
}

void check(int code, const char* function) {
  if (code == kPyramidPoolOutOfMemory) throw std::bad_alloc();
  if (code != kPyramidPoolOk) throw std::runtime_error(std::string(function) + ": " + pyramid_pool_error(code));
}

}  // namespace

void init_pyramid_pool(py::module_& m) {
  using namespace pybind11::literals;

  m.def(
      "pyramid_pool_forward_cpu",
      [](int dtype, const Pool& pool, Address x, const std::array<int64_t, 5>& strides,
         const std::vector<Address>& results, Address indices, int threads) {
        const auto targets = pointers(results);
        const auto& s = strides;
        const PyramidPoolForward args{pool_of(pool), ptr<const void>(x), {s[0], s[1], s[2], s[3], s[4]}, targets.data(),
                                      ptr<int32_t>(indices)};
        const py::gil_scoped_release nogil;
        check(pyramid_pool_forward_cpu(static_cast<DType>(dtype), args, threads), "pyramid_pool_forward_cpu");
      },
      "dtype"_a, "pool"_a, "x"_a, "strides"_a, "results"_a, "indices"_a, "threads"_a);

  m.def(
      "pyramid_pool_backward_cpu",
      [](int dtype, const Pool& pool, const std::vector<Address>& results, Address indices, Address dx, int threads) {
        const auto gradients = pointers(results);
        const PyramidPoolBackward args{pool_of(pool), gradients.data(), ptr<const int32_t>(indices), ptr<void>(dx)};
        const py::gil_scoped_release nogil;
        check(pyramid_pool_backward_cpu(static_cast<DType>(dtype), args, threads), "pyramid_pool_backward_cpu");
      },
      "dtype"_a, "pool"_a, "results"_a, "indices"_a, "dx"_a, "threads"_a);

  m.def("pyramid_pool_cpu_isa", &pyramid_pool_cpu_isa);
}

}  // namespace sora
