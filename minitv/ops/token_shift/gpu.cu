// token_shift: an element a thread. The gradient of mix is a sum over rows, of autograd/cuda/rows.py, which are the positions
// of all sequences, counted through.
#include "kernel.cuh"

// What lies before element i, of position t in channel c of a sequence.
__device__ __forceinline__ float before(const float* __restrict__ x, const float* __restrict__ first,
                                        const bool* __restrict__ reset, long long row, int t, int c, int T, int C,
                                        int carried, int resets)
{
    if (resets && reset[row]) return 0.f;
    if (t > 0) return x[(row - 1) * C + c];
    return carried ? first[row / T * C + c] : 0.f;
}

extern "C" __global__ void __launch_bounds__(256)
mtv_token_shift_forward(const float* __restrict__ x, const float* __restrict__ mix, const float* __restrict__ first,
                        const bool* __restrict__ reset, float* __restrict__ y, long long n, int T, int C,
                        int carried, int resets)
{
    long long i = blockIdx.x * 256ll + threadIdx.x, row = i / C;
    if (i >= n) return;
    int c = i % C, t = row % T;
    float share = mix[c];
    y[i] = share * x[i] + (1.f - share) * before(x, first, reset, row, t, c, T, C, carried, resets);
}

// `g_last` is the gradient of the last position as a state; gfirst that of the position before the first one.
extern "C" __global__ void __launch_bounds__(256)
mtv_token_shift_backward(const float* __restrict__ mix, const bool* __restrict__ reset, const float* __restrict__ g,
                         const float* __restrict__ g_last, float* __restrict__ gx, float* __restrict__ gfirst, long long n,
                         int T, int C, int resets)
{
    long long i = blockIdx.x * 256ll + threadIdx.x, row = i / C;
    if (i >= n) return;
    int c = i % C, t = row % T;
    float share = mix[c], passed;
    if (t == T - 1) passed = g_last[row / T * C + c];
    else passed = resets && reset[row + 1] ? 0.f : (1.f - share) * g[i + C];
    gx[i] = share * g[i] + passed;
    if (t == 0) gfirst[row / T * C + c] = resets && reset[row] ? 0.f : (1.f - share) * g[i];
}

// sums[chunks, C]: of g times what mix multiplies.
extern "C" __global__ void __launch_bounds__(256)
mtv_token_shift_backward_mix(const float* __restrict__ x, const float* __restrict__ first, const bool* __restrict__ reset,
                             const float* __restrict__ g, float* __restrict__ sums, int rows, int T, int C,
                             int carried, int resets, int chunk)
{
    __shared__ float parts[8][1][32];
    sum_rows(parts, sums, rows, C, chunk, [=](float* own, int row, int c) {
        long long at = (long long)row * C + c;
        *own += g[at] * (x[at] - before(x, first, reset, row, row % T, c, T, C, carried, resets));
    });
}
