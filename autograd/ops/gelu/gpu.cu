// gelu and gelu_tanh: backward computes the slope again from x, which is less traffic than storing it.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_gelu_forward(const float* __restrict__ x, float* __restrict__ y, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    y[i] = 0.5f * v * erfcf(v * -0.70710678f);
}

extern "C" __global__ void __launch_bounds__(256)
mtv_gelu_backward(const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ gx, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    float density = 0.39894228f * expf(-0.5f * v * v);
    gx[i] = g[i] * (0.5f * erfcf(v * -0.70710678f) + v * density);
}

// tanh(sqrt(2/pi) (v + 0.044715 v^3))
__device__ __forceinline__ float bend(float v) { return tanhf(0.79788456f * (v + 0.044715f * v * v * v)); }

extern "C" __global__ void __launch_bounds__(256)
mtv_gelu_tanh_forward(const float* __restrict__ x, float* __restrict__ y, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    y[i] = 0.5f * v * (1.f + bend(v));
}

extern "C" __global__ void __launch_bounds__(256)
mtv_gelu_tanh_backward(const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ gx, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i], t = bend(v), steep = 1.f - t * t;
    if (steep != 0.f) steep *= v * 0.79788456f * (1.f + 0.134145f * v * v);  // v * v may overflow
    gx[i] = g[i] * 0.5f * (1.f + t + steep);
}
