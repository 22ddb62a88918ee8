// gated: an element a thread; backward computes the sigmoid again instead of reading it from memory.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_gated_forward(const float* __restrict__ x, const float* __restrict__ gate, float* __restrict__ y, long long n, int swish)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    y[i] = (swish ? x[i] * gate[i] : x[i]) / (1.f + expf(-gate[i]));
}

extern "C" __global__ void __launch_bounds__(256)
mtv_gated_backward(const float* __restrict__ x, const float* __restrict__ gate, const float* __restrict__ g,
                   float* __restrict__ gx, float* __restrict__ ggate, long long n, int swish)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float s = 1.f / (1.f + expf(-gate[i]));
    gx[i] = g[i] * (swish ? gate[i] * s : s);
    ggate[i] = g[i] * x[i] * s * (swish ? 1.f + gate[i] * (1.f - s) : 1.f - s);
}
