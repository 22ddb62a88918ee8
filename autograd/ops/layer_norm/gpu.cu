// layer_norm: a warp a row, normalised as in cpu.py, from differences with its first value. Gradients of weight and bias are sums over rows, of autograd/cuda/rows.py.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(128)
mtv_layer_norm_forward(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                       float* __restrict__ y, float* __restrict__ shifts, float* __restrict__ scales,
                       int rows, int width, float eps, int weighted, int biased)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (long long)row * width;
    y += (long long)row * width;
    float first = x[0], total = 0.f, square = 0.f;
    for (int j = lane; j < width; j += 32) total += x[j] - first;
    float shift = warp_sum(total) / width;
    for (int j = lane; j < width; j += 32) {
        float d = x[j] - first - shift;
        square += d * d;
    }
    float scale = 1.f / sqrtf(warp_sum(square) / width + eps);
    for (int j = lane; j < width; j += 32) {
        float v = (x[j] - first - shift) * scale;
        if (weighted) v *= weight[j];
        y[j] = biased ? v + bias[j] : v;
    }
    if (lane == 0) {
        shifts[row] = shift;
        scales[row] = scale;
    }
}

extern "C" __global__ void __launch_bounds__(128)
mtv_layer_norm_backward(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ shifts,
                        const float* __restrict__ scales, const float* __restrict__ g, float* __restrict__ gx,
                        int rows, int width, int weighted)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (long long)row * width;
    g += (long long)row * width;
    gx += (long long)row * width;
    float first = x[0], shift = shifts[row], scale = scales[row], a = 0.f, b = 0.f;
    float g_first = weighted ? __fmul_rn(g[0], weight[0]) : g[0];
    for (int j = lane; j < width; j += 32) {
        float d = (weighted ? __fmul_rn(g[j], weight[j]) : g[j]) - g_first;  // not fused: 0 where they are equal
        a += d;
        b += d * ((x[j] - first - shift) * scale);
    }
    a = warp_sum(a) / width;
    b = warp_sum(b) / width;
    for (int j = lane; j < width; j += 32) {
        float d = (weighted ? __fmul_rn(g[j], weight[j]) : g[j]) - g_first, h = (x[j] - first - shift) * scale;
        gx[j] = (d - a - h * b) * scale;
    }
}

// sums[chunks, 2, width]: of g times the normalised row, and of g.
extern "C" __global__ void __launch_bounds__(256)
mtv_layer_norm_backward_affine(const float* __restrict__ x, const float* __restrict__ shifts,
                               const float* __restrict__ scales, const float* __restrict__ g, float* __restrict__ sums,
                               int rows, int width, int chunk)
{
    __shared__ float parts[8][2][32];
    sum_rows(parts, sums, rows, width, chunk, [=](float* own, int row, int column) {
        long long at = (long long)row * width + column;
        own[0] += g[at] * ((x[at] - x[(long long)row * width] - shifts[row]) * scales[row]);
        own[1] += g[at];
    });
}
