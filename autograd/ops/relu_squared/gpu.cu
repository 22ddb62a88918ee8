// relu_squared: an element a thread; NaN stays.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_relu_squared_forward(const float* __restrict__ x, float* __restrict__ y, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    y[i] = v < 0.f ? 0.f : v * v;
}

extern "C" __global__ void __launch_bounds__(256)
mtv_relu_squared_backward(const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ gx, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    gx[i] = v < 0.f ? 0.f : 2.f * g[i] * v;
}
