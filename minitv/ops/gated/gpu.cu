// gated: an element a thread; backward computes the sigmoid again instead of reading it from memory.
#include "kernel.cuh"

#define FAR 1e4f  // beyond, a sigmoid is 0 or 1; infinities must not meet zeros
__device__ __forceinline__ float from_below(float v) { return v < -FAR ? -FAR : v; }

extern "C" __global__ void __launch_bounds__(256)
mtv_gated_forward(const float* __restrict__ x, const float* __restrict__ gate, float* __restrict__ y, long long n, int swish)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    y[i] = (swish ? x[i] * from_below(gate[i]) : x[i]) / (1.f + expf(-gate[i]));
}

extern "C" __global__ void __launch_bounds__(256)
mtv_gated_backward(const float* __restrict__ x, const float* __restrict__ gate, const float* __restrict__ g,
                   float* __restrict__ gx, float* __restrict__ ggate, long long n, int swish)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = from_below(gate[i]), z = v > FAR ? FAR : v, e = expf(-fabsf(z)), upper = 1.f / (1.f + e), lower = e * upper;
    float s = z > 0.f ? upper : lower;  // the other is 1 - s, to all its digits
    gx[i] = g[i] * (swish ? v * s : s);
    ggate[i] = g[i] * x[i] * (swish ? s + z * upper * lower : upper * lower);
}
