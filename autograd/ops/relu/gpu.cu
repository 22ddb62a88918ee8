// relu: an element a thread; NaN stays.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_relu_forward(const float* __restrict__ x, float* __restrict__ y, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    y[i] = v < 0.f ? 0.f : v;
}

extern "C" __global__ void __launch_bounds__(256)
mtv_relu_backward(const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ gx, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    gx[i] = x[i] > 0.f ? g[i] : 0.f;
}
