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
  template <class V>
  static SORA_HOST_DEVICE V q(V r) {
    V q = r * 1.9890991e-4f + 1.39336498e-3f;
    q = q * r + 8.33331048e-3f;
    q = q * r + 4.16664667e-2f;
    q = q * r + 1.66666672e-1f;
    return q * r + 0.5f;
  }
};

template <>
struct Expm1<double> {
  static constexpr double lowest = -708.0, highest = 709.0;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa_bits = 52;
  static constexpr uint64_t bias = 1023;
  template <class V>
  static SORA_HOST_DEVICE V q(V r) {
    V q = r * 2.091404714634278e-09 + 2.5105228942129428e-08;
    q = q * r + 2.7557275732363437e-07;
    q = q * r + 2.7557255363772118e-06;
    q = q * r + 2.480158732304294e-05;
    q = q * r + 1.9841269874855768e-04;
    q = q * r + 1.3888888888885073e-03;
    q = q * r + 8.333333333326124e-03;
    q = q * r + 4.1666666666666664e-02;
    q = q * r + 1.666666666666667e-01;
    return q * r + 0.5;
  }
};

// exp(x) - 1, with x clamped so that exp(x) stays a normal number.
template <class V>
SORA_HOST_DEVICE V expm1_clamped(V x) {
  using Scalar = typename Lanes<V>::Scalar;
  using Bits = typename Lanes<V>::Bits;
  using E = Expm1<Scalar>;
  const V lowest = V{} + E::lowest, highest = V{} + E::highest;
  x = x < lowest ? lowest : x;  // a comparison with NaN is false: NaN stays
  x = x > highest ? highest : x;
  const V shifted = x * Scalar(1.44269504088896340736) + E::magic;
  const V n = shifted - E::magic;
  V r = x - n * E::ln2_high;
  r = r - n * E::ln2_low;
  const V p = r + r * r * E::q(r);
  const V scale = bit_cast<V>((bit_cast<Bits>(shifted) << E::mantissa_bits) + (E::bias << E::mantissa_bits));  // 2^n
  return scale * p + (scale - Scalar(1));
}

template <class V>
SORA_HOST_DEVICE V sigmoid(V x) {
  using Scalar = typename Lanes<V>::Scalar;
  return Lanes<V>::quotient(V{} + Scalar(1), Scalar(2) + expm1_clamped(-x));
}

template <class V>
SORA_HOST_DEVICE V tanh(V x) {
  using Scalar = typename Lanes<V>::Scalar;
  const V e = expm1_clamped(x + x);
  return Lanes<V>::quotient(e, e + Scalar(2));
}

}  // namespace sora
