// Halves as storage: kernels compute in float and convert.
#pragma once
#include "cuda.h"
struct alignas(2) __half { uint16_t bits; };
static inline float __half2float(__half h) {
  uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, mantissa = h.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return (sign ? -1.f : 1.f) * (float)mantissa * 0x1p-24f;
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
static inline __half __float2half(float f) {  // to nearest even
  uint32_t u = __float_as_uint(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return {(uint16_t)(sign | 0x7fff)};
  if (a >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};
  if (a < 0x38800000) return {(uint16_t)(sign | (uint32_t)nearbyintf(__uint_as_float(a) * 0x1p24f))};
  a += 0xfff + (a >> 13 & 1);
  return {(uint16_t)(sign | (a - 0x38000000) >> 13)};
}
