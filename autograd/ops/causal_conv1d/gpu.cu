// Sums of any number of taps over the past and the future, a channel a lane. A thread keeps ROWS neighbouring sums and as many
// neighbouring x in registers; both move on by one, so a step of ROWS products loads two numbers.
#include "kernel.cuh"

#define ROWS 8  // of the result, a thread; and warps of a block
#define TIMES 64  // of the result, a block
#define SPAN 32  // time steps that a warp sums at once for the gradient of the taps

// x at a time, which is 0 outside of 0 .. T - 1.
__device__ __forceinline__ float at(const float* __restrict__ x, int time, int T, int C)
{
    return 0 <= time && time < T ? x[(long long)time * C] : 0.f;
}

// y[b, t] = bias + sum_u taps[u] x[b, t - first - u]
extern "C" __global__ void __launch_bounds__(256)
mtv_causal_conv1d_convolve(const float* __restrict__ x, const float* __restrict__ taps, const float* __restrict__ bias,
                           float* __restrict__ y, int T, int C, int count, int first, int biased)
{
    int tiles = (T + TIMES - 1) / TIMES, c = blockIdx.y * 32 + threadIdx.x % 32;
    int t = blockIdx.x % tiles * TIMES + threadIdx.x / 32 * ROWS;
    if (t >= T || c >= C) return;
    long long start = (long long)(blockIdx.x / tiles) * T * C + c;
    x += start;
    y += start;
    taps += c;
    int low = max(0, t - T + 1 - first), high = min(count, t + ROWS - first);  // beyond, x is 0
    float sums[ROWS], near[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sums[r] = biased ? bias[c] : 0.f;
        near[r] = r ? at(x, t + r - first - low, T, C) : 0.f;
    }
    for (int u = low; u < high; u++) {
        float tap = taps[(long long)u * C];
        near[0] = at(x, t - first - u, T, C);
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[r] += tap * near[r];
#pragma unroll
        for (int r = ROWS - 1; r > 0; r--) near[r] = near[r - 1];
    }
    for (int r = 0; r < ROWS && t + r < T; r++) y[(long long)(t + r) * C] = sums[r];
}

// sums[part, u] = sum of g[b, t] x[b, t - first - u] over the spans of a part: `each` of them for each of 8 warps.
extern "C" __global__ void __launch_bounds__(256)
mtv_causal_conv1d_correlate(const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ sums,
                            int B, int T, int C, int count, int first, int each)
{
    __shared__ float parts[8][ROWS][32];
    int warp = threadIdx.x / 32, c = blockIdx.y * 32 + threadIdx.x % 32, u = blockIdx.z * ROWS;
    long long spans = (T + SPAN - 1) / SPAN, from = ((long long)blockIdx.x * 8 + warp) * each;
    long long to = min(from + each, B * spans);
    float own[ROWS] = {};
    for (long long span = from; span < to && c < C; span++) {
        long long start = span / spans * T * C + c;
        int t = span % spans * SPAN, end = min(t + SPAN, T);
        float near[ROWS];
#pragma unroll
        for (int r = 1; r < ROWS; r++) near[r] = at(x + start, t - first - u - r, T, C);
        for (; t < end; t++) {
            float slope = g[start + (long long)t * C];
            near[0] = at(x + start, t - first - u, T, C);
#pragma unroll
            for (int r = 0; r < ROWS; r++) own[r] += slope * near[r];
#pragma unroll
            for (int r = ROWS - 1; r > 0; r--) near[r] = near[r - 1];
        }
    }
    float total = sum_warps(parts, own);
    u += warp;
    if (c < C && u < count) sums[((long long)blockIdx.x * count + u) * C + c] = total;
}
