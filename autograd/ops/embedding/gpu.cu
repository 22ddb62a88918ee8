// Rows added up by id, without atomics: the rows of an id stand side by side in `order`, from starts[id] to starts[id + 1].
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_embedding_add(const Number* __restrict__ rows, const long long* __restrict__ order,
                  const long long* __restrict__ starts, Number* __restrict__ target, int width)
{
    __shared__ Number parts[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.y * 32 + lane;
    long long end = starts[blockIdx.x + 1ll];
    Number total = 0;
    if (column < width)
        for (long long i = starts[blockIdx.x] + warp; i < end; i += 8) total += rows[order[i] * width + column];
    parts[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && column < width) {
        total = parts[0][lane];
        for (int i = 1; i < 8; i++) total += parts[i][lane];
        target[(long long)blockIdx.x * width + column] += total;
    }
}
