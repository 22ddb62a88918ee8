// bfloat16 as storage: the upper half of a float.
#pragma once
#include "cuda.h"
struct alignas(2) __nv_bfloat16 { uint16_t bits; };
static inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float((uint32_t)h.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16(float f) {  // to nearest even
  uint32_t u = __float_as_uint(f);
  if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
