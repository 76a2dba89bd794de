// Number types of the kernels, with bit-identical loads, stores and conversions on GPUs and CPUs.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define EVIT_HOST_DEVICE __host__ __device__
#define EVIT_UNROLL _Pragma("unroll")
#define EVIT_ROLLED _Pragma("unroll 1")
#else
#define EVIT_HOST_DEVICE
#define EVIT_UNROLL
#define EVIT_ROLLED
#endif

namespace evit {

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

EVIT_HOST_DEVICE inline uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

EVIT_HOST_DEVICE inline float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

EVIT_HOST_DEVICE inline float to_float(float value) { return value; }

EVIT_HOST_DEVICE inline float to_float(Bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// Written by hand for the host, because g++ 11 does not support _Float16.
EVIT_HOST_DEVICE inline float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, size = value.bits & 0x7fffu;
  if (size >= 0x7c00u) return float_of(sign | 0x7f800000u | size << 13);  // infinity or NaN
  // FP16 exponents are biased by 15, FP32 exponents by 127; the multiplication also normalizes subnormals.
  return float_of(sign | bits_of(float_of(size << 13) * 0x1p112f));
#endif
}

EVIT_HOST_DEVICE inline void from_float(float value, float& to) { to = value; }

EVIT_HOST_DEVICE inline void from_float(float value, Bfloat16& to) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  // Round to nearest, ties to even; a NaN must not become infinity.
  to.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

EVIT_HOST_DEVICE inline void from_float(float value, Half& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7fffu;  // the NaN that __float2half_rn returns
    to.bits = static_cast<uint16_t>(half);
    return;
  }
  if (size < 0x38800000u)  // below 2^-14, subnormal: adding 0.5 shifts the bits into place and rounds
    half = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
  else if (size < 0x47800000u)  // below 2^16; rounding may carry into infinity
    half = (size + 0xfffu + (size >> 13 & 1u) - (112u << 23)) >> 13;
  else
    half = 0x7c00u;
  to.bits = static_cast<uint16_t>(sign | half);
#endif
}

// Data of one memory access: 16 bytes as words, kept in registers until used, or one element.
template <class T, int kWidth>
struct alignas(16) Pack {
  uint32_t words[4];

  EVIT_HOST_DEVICE float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return float_of(words[i]);
    } else {
      return to_float(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
    }
  }
};

template <class T>
struct Pack<T, 1> {
  T item;

  EVIT_HOST_DEVICE float operator[](int) const { return to_float(item); }
};

EVIT_HOST_DEVICE inline int divide_up(int a, int b) { return (a + b - 1) / b; }

}  // namespace evit
