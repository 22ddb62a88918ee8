// adamw: one step in place, and the sum of squares of a gradient by chunks.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_adamw_update(float* __restrict__ param, const float* __restrict__ grad, float* __restrict__ m, float* __restrict__ v,
                 long long n, long long decayed, float kept, float rate, float beta1, float beta2, float correction,
                 float eps, float scale)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float g = grad[i] * scale;
    float mean = beta1 * m[i] + (1.f - beta1) * g, square = beta2 * v[i] + (1.f - beta2) * g * g;
    m[i] = mean;
    v[i] = square;
    param[i] = param[i] * (i < decayed ? kept : 1.f) - rate * mean / (sqrtf(square) * correction + eps);
}

#define SQUARES 4096  // of which a block has the sum

// sums[b]: of the squares of the values from SQUARES b on.
extern "C" __global__ void __launch_bounds__(256)
mtv_adamw_squares(const float* __restrict__ values, double* __restrict__ sums, long long n)
{
    float square = 0.f;
    for (int j = 0; j < SQUARES / 256; j++) {
        long long i = (long long)blockIdx.x * SQUARES + j * 256 + threadIdx.x;
        if (i < n) square += values[i] * values[i];
    }
    double total = block_sum((double)square);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}
