// shaping: a thread a channel of a sequence, which goes from token to token; neighbouring threads read neighbouring channels.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(128)
mtv_shaping_forward(const float* __restrict__ a, const float* __restrict__ v, const float* __restrict__ alpha,
                   const float* __restrict__ beta, const float* __restrict__ gamma, const float* __restrict__ first,
                   float* __restrict__ y, float* __restrict__ last, long long n, int T, int D, int size, int past, int causal)
{
    long long i = blockIdx.x * 128ll + threadIdx.x;
    if (i >= n) return;
    int c = i % D, h = c / size;
    long long start = i / D * T * D + c;
    float m = first[i];
    if (!causal)
        for (int t = 0; t < T; t++) m += (v[start + (long long)t * D] - m) / (float)(past + t + 1);
    for (int t = 0; t < T; t++) {
        long long at = start + (long long)t * D;
        float value = v[at];
        if (causal) m += (value - m) / (float)(past + t + 1);
        y[at] = alpha[h] * value + beta[h] * a[at] - gamma[h] * m;
    }
    last[i] = m;
}

// sums[3, B, D]: of the gradients of the gains. g_mean is the gradient of the last mean, gmean that of the first.
extern "C" __global__ void __launch_bounds__(128)
mtv_shaping_backward(const float* __restrict__ a, const float* __restrict__ v, const float* __restrict__ alpha,
                    const float* __restrict__ beta, const float* __restrict__ gamma, const float* __restrict__ first,
                    const float* __restrict__ g, const float* __restrict__ g_mean, float* __restrict__ ga,
                    float* __restrict__ gv, float* __restrict__ gmean, float* __restrict__ sums, long long n, int T, int D,
                    int size, int past, int causal)
{
    long long i = blockIdx.x * 128ll + threadIdx.x;
    if (i >= n) return;
    int c = i % D, h = c / size;
    long long start = i / D * T * D + c;
    float all = 1.f / (float)(past + T > 0 ? past + T : 1), passed = g_mean[i] * all, r = 0.f;
    float by_alpha = 0.f, by_beta = 0.f, by_gamma = 0.f;
    if (!causal)
        for (int t = 0; t < T; t++) r += g[start + (long long)t * D] * all;
    for (int t = T - 1; t >= 0; t--) {
        long long at = start + (long long)t * D;
        float grad = g[at], value = v[at];
        if (causal) r += grad / (float)(past + t + 1);
        ga[at] = beta[h] * grad;
        gv[at] = alpha[h] * grad - gamma[h] * r + passed;
        by_alpha += grad * value;
        by_beta += grad * a[at];
        by_gamma -= value * r;
    }
    gmean[i] = (float)past * (passed - gamma[h] * r);
    sums[i] = by_alpha;
    sums[n + i] = by_beta;
    sums[2 * n + i] = by_gamma - (float)past * first[i] * r;
}
