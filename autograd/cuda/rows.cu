// Rows added up by id, without atomics: the rows of an id stand side by side in `order`, from starts[id] to starts[id + 1].
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_rows_add(const Number* __restrict__ rows, const long long* __restrict__ order, const long long* __restrict__ starts,
             Number* __restrict__ target, int width)
{
    __shared__ Number parts[8][1][32];
    int warp = threadIdx.x / 32, column = blockIdx.y * 32 + threadIdx.x % 32;
    long long end = starts[blockIdx.x + 1ll];
    Number own[1] = {};
    if (column < width)
        for (long long i = starts[blockIdx.x] + warp; i < end; i += 8) own[0] += rows[order[i] * width + column];
    Number total = sum_warps(parts, own);
    if (warp == 0 && column < width) target[(long long)blockIdx.x * width + column] += total;
}
