// What the cases of driver.cpp, steps.cpp and pyramid_pool.cpp share: random numbers, arrays of exactly their size, comparison.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "scalar.h"

namespace cases {

using scalar::DType;
using scalar::Values;

inline std::string g_case;  // what is being checked

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", g_case.c_str(), what.c_str());
  std::exit(1);
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Room for rounding, relative to the largest value: several steps of a few dozen summands. A wrong index or a skipped
// element is off by its own size.
inline double tolerance(DType dtype) { return dtype == DType::float64 ? 1e-12 : dtype == DType::float32 ? 2e-5 : 4e-2; }

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t in(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool one_in(int64_t n) { return in(1, n) == 1; }
  double real(double scale) { return std::uniform_real_distribution<double>(-scale, scale)(engine_); }
  Values values(int64_t count, DType dtype, double scale) {
    Values found(count);
    for (double& v : found) v = scalar::round_to(dtype, real(scale));
    return found;
  }

 private:
  std::mt19937_64 engine_;
};

// A block of exactly `count` elements, sometimes not aligned to more than one; all bits set (NaN) to begin with.
class Array {
 public:
  Array(DType dtype, int64_t count, Random& random) : dtype_(dtype), count_(count), shift_(random.one_in(2)) {
    block_.reset(static_cast<char*>(std::malloc((count + shift_) * bytes_of(dtype))));
    std::memset(data(), 0xff, count * bytes_of(dtype));
  }
  Array(DType dtype, const Values& values, Random& random) : Array(dtype, int64_t(values.size()), random) {
    for (int64_t i = 0; i < count_; ++i) set(i, values[i]);
  }
  char* data() const { return block_.get() + shift_ * bytes_of(dtype_); }
  // Null for an array without elements that stands for "not given".
  void* or_null() const { return count_ ? data() : nullptr; }
  int64_t count() const { return count_; }

  double get(int64_t i) const {
    if (dtype_ == DType::float64) return read<double>(i);
    if (dtype_ == DType::float32) return read<float>(i);
    const uint32_t bits = uint32_t(read<uint16_t>(i)) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
  }
  void set(int64_t i, double value) {
    if (dtype_ == DType::float64) return write(i, value);
    const float narrow = static_cast<float>(scalar::round_to(dtype_, value));
    if (dtype_ == DType::float32) return write(i, narrow);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof(bits));
    write(i, static_cast<uint16_t>(bits >> 16));
  }
  Values all() const {
    Values found(count_);
    for (int64_t i = 0; i < count_; ++i) found[i] = get(i);
    return found;
  }

 private:
  struct Free {
    void operator()(char* block) const { std::free(block); }
  };
  template <class T>
  T read(int64_t i) const {
    T value;
    std::memcpy(&value, data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void write(int64_t i, T value) {
    std::memcpy(data() + i * sizeof(T), &value, sizeof(T));
  }
  DType dtype_;
  int64_t count_, shift_;
  std::unique_ptr<char, Free> block_;
};

// NaN in `expected` means: not written.
inline void compare(const char* name, const Array& found, const Values& expected, double limit) {
  if (found.count() != int64_t(expected.size())) fail(std::string(name) + ": the driver mistook a size");
  double scale = 1;
  for (double v : expected)
    if (v == v) scale = std::fmax(scale, std::fabs(v));
  for (int64_t i = 0; i < found.count(); ++i) {
    const double got = found.get(i), want = expected[i];
    if (want != want ? got == got : !(std::fabs(got - want) <= limit * scale)) {
      char text[160];
      std::snprintf(text, sizeof(text), "%s[%lld] = %.9g, expected %.9g", name, static_cast<long long>(i), got, want);
      fail(text);
    }
  }
}

// steps.cpp
void check_steps(const scalar::Problem& p, const scalar::Outputs& run, const scalar::Gradients& expected, Random& random);

// pyramid_pool.cpp
void check_pyramid_pool(uint64_t number);

}  // namespace cases
