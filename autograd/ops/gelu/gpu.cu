// gelu and gelu_tanh: backward computes the slope again from x, which is less traffic than storing it.
#include "kernel.cuh"

#define FAR 40.f  // beyond, the slope is 0 or 1; infinities must not meet zeros
__device__ __forceinline__ float from_below(float v) { return v < -FAR ? -FAR : v; }
__device__ __forceinline__ float between(float v) { return v > FAR ? FAR : from_below(v); }

extern "C" __global__ void __launch_bounds__(256)
mtv_gelu_forward(const float* __restrict__ x, float* __restrict__ y, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    y[i] = 0.5f * from_below(v) * erfcf(v * -0.70710678f);
}

extern "C" __global__ void __launch_bounds__(256)
mtv_gelu_backward(const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ gx, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    float density = 0.39894228f * expf(-0.5f * v * v);
    gx[i] = g[i] * (0.5f * erfcf(v * -0.70710678f) + between(v) * density);
}

// (1 + tanh(inner / 2)) / 2 for inner = 2 sqrt(2/pi) (z + 0.044715 z^3), and its complement: neither cancels.
__device__ __forceinline__ void shares(float z, float& share, float& rest)
{
    float inner = 1.59576912f * (z + 0.044715f * z * z * z), e = expf(-fabsf(inner)), upper = 1.f / (1.f + e);
    share = inner > 0.f ? upper : e * upper;
    rest = inner > 0.f ? e * upper : upper;
}

extern "C" __global__ void __launch_bounds__(256)
mtv_gelu_tanh_forward(const float* __restrict__ x, float* __restrict__ y, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i], share, rest;
    shares(between(v), share, rest);
    y[i] = from_below(v) * share;
}

extern "C" __global__ void __launch_bounds__(256)
mtv_gelu_tanh_backward(const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ gx, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float z = between(x[i]), share, rest;
    shares(z, share, rest);
    gx[i] = g[i] * (share + z * share * rest * 1.59576912f * (1.f + 0.134145f * z * z));
}
