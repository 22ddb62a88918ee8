// rms_norm: a warp a row. The gradient of weight is a sum over rows, of autograd/cuda/rows.py.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(128)
mtv_rms_norm_forward(const float* __restrict__ x, const float* __restrict__ weight, float* __restrict__ y,
                     float* __restrict__ scales, int rows, int width, float eps, int weighted)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (long long)row * width;
    y += (long long)row * width;
    float square = 0.f;
    for (int j = lane; j < width; j += 32) square += x[j] * x[j];
    float scale = 1.f / sqrtf(warp_sum(square) / width + eps);
    for (int j = lane; j < width; j += 32) y[j] = x[j] * scale * (weighted ? weight[j] : 1.f);
    if (lane == 0) scales[row] = scale;
}

extern "C" __global__ void __launch_bounds__(128)
mtv_rms_norm_backward(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ scales,
                      const float* __restrict__ g, float* __restrict__ gx, int rows, int width, int weighted)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (long long)row * width;
    g += (long long)row * width;
    gx += (long long)row * width;
    float scale = scales[row], b = 0.f;
    for (int j = lane; j < width; j += 32) b += g[j] * (weighted ? weight[j] : 1.f) * x[j];
    b = warp_sum(b) / width * scale * scale;
    for (int j = lane; j < width; j += 32)
        gx[j] = (g[j] * (weighted ? weight[j] : 1.f) - x[j] * b) * scale;
}

// sums[chunks, width]: of g times the normalised row.
extern "C" __global__ void __launch_bounds__(256)
mtv_rms_norm_backward_weight(const float* __restrict__ x, const float* __restrict__ scales, const float* __restrict__ g,
                             float* __restrict__ sums, int rows, int width, int chunk)
{
    __shared__ float parts[8][1][32];
    sum_rows(parts, sums, rows, width, chunk, [=](float* own, int row, int column) {
        long long at = (long long)row * width + column;
        *own += g[at] * x[at] * scales[row];
    });
}
