// relu_squared: an element a thread; NaN stays.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_relu_squared_forward(const Storage* __restrict__ x, Storage* __restrict__ y, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = load(x[i]);
    store(y[i], v < 0.f ? 0.f : v * v);
}

extern "C" __global__ void __launch_bounds__(256)
mtv_relu_squared_backward(const Storage* __restrict__ x, const Storage* __restrict__ g, Storage* __restrict__ dx, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float v = load(x[i]);
    store(dx[i], v < 0.f ? 0.f : 2.f * load(g[i]) * v);
}
