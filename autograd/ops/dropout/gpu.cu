// dropout: each thread draws the four words of one counter, for four values; backward is the same on the gradient.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_dropout(const Storage* __restrict__ x, Storage* __restrict__ y, long long n, unsigned long long threshold, float scale,
            unsigned long long seed)
{
    long long block = blockIdx.x * 256ll + threadIdx.x, i = 4 * block;
    if (i >= n) return;
    uint4 words = philox((unsigned)block, (unsigned)(block >> 32), 0u, 0u, seed);
    store(y[i], words.x >= threshold ? load(x[i]) * scale : 0.f);
    if (i + 1 < n) store(y[i + 1], words.y >= threshold ? load(x[i + 1]) * scale : 0.f);
    if (i + 2 < n) store(y[i + 2], words.z >= threshold ? load(x[i + 2]) * scale : 0.f);
    if (i + 3 < n) store(y[i + 3], words.w >= threshold ? load(x[i + 3]) * scale : 0.f);
}
