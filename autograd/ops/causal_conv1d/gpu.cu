// Sums of any number of taps over the past and the future, a channel a lane. A thread keeps ROWS neighbouring sums and as many
// neighbouring x in registers; both move on by one, so a step of ROWS products loads two numbers.
#include "kernel.cuh"

#define ROWS 8  // of the result, a thread
#define TIMES 64  // of the result, a block of 8 warps
#define SPAN 32  // time steps that a warp sums at once for the gradient of the taps

// x at a time, which is 0 outside of 0 .. length - 1.
__device__ __forceinline__ float at(const float* __restrict__ x, int time, int length, int channels)
{
    return 0 <= time && time < length ? x[(long long)time * channels] : 0.f;
}

// y[b, t] = bias + sum_u taps[u] x[b, t - first - u]
extern "C" __global__ void __launch_bounds__(256)
mtv_causal_conv1d_convolve(const float* __restrict__ x, const float* __restrict__ taps, const float* __restrict__ bias,
                           float* __restrict__ y, int length, int channels, int count, int first, int biased)
{
    int tiles = (length + TIMES - 1) / TIMES, c = blockIdx.y * 32 + threadIdx.x % 32;
    int t = blockIdx.x % tiles * TIMES + threadIdx.x / 32 * ROWS;
    if (t >= length || c >= channels) return;
    long long start = (long long)(blockIdx.x / tiles) * length * channels + c;
    x += start;
    y += start;
    taps += c;
    int low = max(0, t - length + 1 - first), high = min(count, t + ROWS - first);  // beyond, x is 0
    float sums[ROWS], near[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sums[r] = biased ? bias[c] : 0.f;
        near[r] = r ? at(x, t + r - first - low, length, channels) : 0.f;
    }
    for (int u = low; u < high; u++) {
        float tap = taps[(long long)u * channels];
        near[0] = at(x, t - first - u, length, channels);
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[r] += tap * near[r];
#pragma unroll
        for (int r = ROWS - 1; r > 0; r--) near[r] = near[r - 1];
    }
    for (int r = 0; r < ROWS && t + r < length; r++) y[(long long)(t + r) * channels] = sums[r];
}

// sums[part, u] = sum of g[b, t] x[b, t - first - u] over the spans of a part: `each` of them for each of 8 warps.
extern "C" __global__ void __launch_bounds__(256)
mtv_causal_conv1d_correlate(const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ sums,
                            int batch, int length, int channels, int count, int first, int each)
{
    __shared__ float parts[8][ROWS][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.y * 32 + lane, u = blockIdx.z * ROWS;
    long long spans = (length + SPAN - 1) / SPAN, from = ((long long)blockIdx.x * 8 + warp) * each;
    long long to = min(from + each, batch * spans);
    float own[ROWS] = {};
    for (long long span = from; span < to && c < channels; span++) {
        long long start = span / spans * length * channels + c;
        int t = span % spans * SPAN, end = min(t + SPAN, length);
        float near[ROWS];
#pragma unroll
        for (int r = 1; r < ROWS; r++) near[r] = at(x + start, t - first - u - r, length, channels);
        for (; t < end; t++) {
            float slope = g[start + (long long)t * channels];
            near[0] = at(x + start, t - first - u, length, channels);
#pragma unroll
            for (int r = 0; r < ROWS; r++) own[r] += slope * near[r];
#pragma unroll
            for (int r = ROWS - 1; r > 0; r--) near[r] = near[r - 1];
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) parts[warp][r][lane] = own[r];
    __syncthreads();
    u += warp;
    if (c >= channels || u >= count) return;
    float total = 0.f;
    for (int i = 0; i < 8; i++) total += parts[i][warp][lane];
    sums[((long long)blockIdx.x * count + u) * channels + c] = total;
}
