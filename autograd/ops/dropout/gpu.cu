// dropout: each thread draws the four words of one counter, for four values; backward is the same on the gradient.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_dropout(const float* __restrict__ x, float* __restrict__ y, long long n, unsigned long long threshold, float scale,
            unsigned long long seed)
{
    long long block = blockIdx.x * 256ll + threadIdx.x, i = 4 * block;
    if (i >= n) return;
    uint4 words = philox((unsigned)block, (unsigned)(block >> 32), 0u, 0u, seed);
    y[i] = words.x >= threshold ? x[i] * scale : 0.f;
    if (i + 1 < n) y[i + 1] = words.y >= threshold ? x[i + 1] * scale : 0.f;
    if (i + 2 < n) y[i + 2] = words.z >= threshold ? x[i + 2] * scale : 0.f;
    if (i + 3 < n) y[i + 3] = words.w >= threshold ? x[i + 3] * scale : 0.f;
}
