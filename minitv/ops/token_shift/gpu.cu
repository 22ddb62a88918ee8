// token_shift: an element a thread. The gradient of mix is a sum over all positions: first over chunks of them, in this file,
// then over the chunks. Rows are positions of all sequences, counted through.
#include "kernel.cuh"

// What lies before element i, of position t in channel c of a sequence.
__device__ __forceinline__ float before(const float* __restrict__ x, const float* __restrict__ first,
                                        const bool* __restrict__ reset, long long row, int t, int c, int length, int width,
                                        int carried, int resets)
{
    if (resets && reset[row]) return 0.f;
    if (t > 0) return x[(row - 1) * width + c];
    return carried ? first[row / length * width + c] : 0.f;
}

extern "C" __global__ void __launch_bounds__(256)
mtv_token_shift_forward(const float* __restrict__ x, const float* __restrict__ mix, const float* __restrict__ first,
                        const bool* __restrict__ reset, float* __restrict__ y, long long n, int length, int width,
                        int carried, int resets)
{
    long long i = blockIdx.x * 256ll + threadIdx.x, row = i / width;
    if (i >= n) return;
    int c = i % width, t = row % length;
    float share = mix[c];
    y[i] = share * x[i] + (1.f - share) * before(x, first, reset, row, t, c, length, width, carried, resets);
}

// `glast` is the gradient of the last position as a state; dfirst that of the position before the first one.
extern "C" __global__ void __launch_bounds__(256)
mtv_token_shift_backward(const float* __restrict__ mix, const bool* __restrict__ reset, const float* __restrict__ g,
                         const float* __restrict__ glast, float* __restrict__ dx, float* __restrict__ dfirst, long long n,
                         int length, int width, int resets)
{
    long long i = blockIdx.x * 256ll + threadIdx.x, row = i / width;
    if (i >= n) return;
    int c = i % width, t = row % length;
    float share = mix[c], passed;
    if (t == length - 1) passed = glast[row / length * width + c];
    else passed = resets && reset[row + 1] ? 0.f : (1.f - share) * g[i + width];
    dx[i] = share * g[i] + passed;
    if (t == 0) dfirst[row / length * width + c] = resets && reset[row] ? 0.f : (1.f - share) * g[i];
}

// sums [chunks, width]: of g times what mix multiplies, over `chunk` rows.
extern "C" __global__ void __launch_bounds__(256)
mtv_token_shift_backward_mix(const float* __restrict__ x, const float* __restrict__ first, const bool* __restrict__ reset,
                             const float* __restrict__ g, float* __restrict__ sums, int rows, int length, int width,
                             int chunk, int carried, int resets)
{
    __shared__ float parts[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    int end = min((long long)rows, ((long long)blockIdx.y + 1) * chunk);
    float total = 0.f;
    if (c < width) {
        for (int row = blockIdx.y * chunk + warp; row < end; row += 8) {
            long long at = (long long)row * width + c;
            total += g[at] * (x[at] - before(x, first, reset, row, row % length, c, length, width, carried, resets));
        }
    }
    parts[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && c < width) {
        for (int i = 1; i < 8; i++) total += parts[i][lane];
        sums[(long long)blockIdx.y * width + c] = total;
    }
}
