// expm1, sigmoid and tanh from one source for the CPU kernels (V = a GCC/Clang vector type, so that they vectorise
// without a vector maths library) and the CUDA kernels (V = float or double). Accurate to about 2 ulp; they saturate
// for large arguments, give +-1 and 0 or 1 at infinity, and hand NaN through.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SORA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace sora {

// Scalar: what one lane of V holds. Bits: V's shape, of unsigned integers of the same width. quotient(a, b): a / b for
// normal b and |a| <= |b|.
template <class V>
struct Lanes;
template <>
struct Lanes<float> {
  using Scalar = float;
  using Bits = uint32_t;
  static SORA_HOST_DEVICE float quotient(float a, float b) { return a / b; }
};
template <>
struct Lanes<double> {
  using Scalar = double;
  using Bits = uint64_t;
  static SORA_HOST_DEVICE double quotient(double a, double b) { return a / b; }
};

template <class To, class From>
SORA_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Scalar>
struct Expm1;  // exp(r) - 1 = r + r^2 q(r) on |r| <= ln(2) / 2; q interpolates at Chebyshev nodes

template <>
struct Expm1<float> {
  static constexpr float lowest = -87.0f, highest = 88.0f;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int mantissa_bits = 23;
  static constexpr uint32_t bias = 127;
  template <class V, int n>
  static SORA_HOST_DEVICE void polynomial(const V (&r)[n], V (&q)[n]) {
    for (int k = 0; k < n; ++k) q[k] = r[k] * 1.9890991e-4f + 1.39336498e-3f;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 8.33331048e-3f;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 4.16664667e-2f;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 1.66666672e-1f;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 0.5f;
  }
};

template <>
struct Expm1<double> {
  static constexpr double lowest = -708.0, highest = 709.0;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa_bits = 52;
  static constexpr uint64_t bias = 1023;
  template <class V, int n>
  static SORA_HOST_DEVICE void polynomial(const V (&r)[n], V (&q)[n]) {
    for (int k = 0; k < n; ++k) q[k] = r[k] * 2.091404714634278e-09 + 2.5105228942129428e-08;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 2.7557275732363437e-07;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 2.7557255363772118e-06;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 2.480158732304294e-05;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 1.9841269874855768e-04;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 1.3888888888885073e-03;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 8.333333333326124e-03;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 4.1666666666666664e-02;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 1.666666666666667e-01;
    for (int k = 0; k < n; ++k) q[k] = q[k] * r[k] + 0.5;
  }
};

template <class V>
SORA_HOST_DEVICE V clamped(V x, V lowest, V highest) {
  x = x < lowest ? lowest : x;  // a comparison with NaN is false: NaN stays
  return x > highest ? highest : x;
}

// 2^n, from n + Expm1::magic.
template <class V>
SORA_HOST_DEVICE V power_of_two(V shifted) {
  using Bits = typename Lanes<V>::Bits;
  using E = Expm1<typename Lanes<V>::Scalar>;
  return bit_cast<V>((bit_cast<Bits>(shifted) << E::mantissa_bits) + (E::bias << E::mantissa_bits));
}

// exp(x) - 1 of each, with x clamped so that exp(x) stays a normal number. Step by step over all of them: one alone is
// a chain of some 25 operations, each waiting for the one before.
template <class V, int n>
SORA_HOST_DEVICE void expm1_clamped(V (&x)[n]) {
  using Scalar = typename Lanes<V>::Scalar;
  using E = Expm1<Scalar>;
  V shifted[n], q[n];
  for (int k = 0; k < n; ++k) x[k] = clamped(x[k], V{} + E::lowest, V{} + E::highest);
  for (int k = 0; k < n; ++k) shifted[k] = x[k] * Scalar(1.44269504088896340736) + E::magic;
  for (int k = 0; k < n; ++k) x[k] = x[k] - (shifted[k] - E::magic) * E::ln2_high;
  for (int k = 0; k < n; ++k) x[k] = x[k] - (shifted[k] - E::magic) * E::ln2_low;
  E::polynomial(x, q);
  for (int k = 0; k < n; ++k) x[k] = x[k] + x[k] * x[k] * q[k];
  for (int k = 0; k < n; ++k) {
    const V scale = power_of_two(shifted[k]);
    x[k] = scale * x[k] + (scale - Scalar(1));
  }
}

// sigmoid of the first `sigmoids` of x, tanh of the others.
template <int sigmoids, class V, int n>
SORA_HOST_DEVICE void activate(V (&x)[n]) {
  using Scalar = typename Lanes<V>::Scalar;
  for (int k = 0; k < n; ++k) x[k] = k < sigmoids ? -x[k] : x[k] + x[k];
  expm1_clamped(x);
  for (int k = 0; k < n; ++k)
    x[k] = Lanes<V>::quotient(k < sigmoids ? V{} + Scalar(1) : x[k], x[k] + Scalar(2));
}

template <class V>
SORA_HOST_DEVICE V tanh(V x) {
  V one[1] = {x};
  activate<0>(one);
  return one[0];
}

}  // namespace sora
