// rotary_linear: what rope and retention, whose kernels compute the numerator, leave to do: the running sums of keys, the
// division, and the gradients of both. q, k and y are [B T H ..] or as their strides say; a row is one position of one head.
#include "kernel.cuh"

// z[b, h, t, c] = sum over s <= t of k[b, h, s, c], from z_in on, and the last of them; a thread a channel.
extern "C" __global__ void __launch_bounds__(256)
mtv_rotary_linear_sums(const float* __restrict__ k, const float* __restrict__ z_in, float* __restrict__ sums, float* __restrict__ z_out,
                int count, int H, int T, int K, long long k_b, long long k_h, long long k_t)
{
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= count) return;
    int c = i % K, head = i / K, b = head / H, h = head % H;
    k += b * k_b + h * k_h + c;
    sums += (long long)head * T * K + c;
    float z = z_in[i];
    for (int t = 0; t < T; t++) {
        z += k[t * k_t];
        sums[(long long)t * K] = z;
    }
    z_out[i] = z;
}

// y = o / (q z), 0 where that is 0, and the inverses of q z; a warp a row. y is [B T H V].
extern "C" __global__ void __launch_bounds__(256)
mtv_rotary_linear_divide(const float* __restrict__ q, const float* __restrict__ sums, const float* __restrict__ o,
                  float* __restrict__ y, float* __restrict__ inverses, int rows, int H, int T, int K, int V, long long q_b,
                  long long q_h, long long q_t, long long o_b, long long o_h, long long o_t)
{
    int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    int t = row % T, head = row / T, b = head / H, h = head % H;
    q += b * q_b + h * q_h + t * q_t;
    o += b * o_b + h * o_h + t * o_t;
    y += (((long long)b * T + t) * H + h) * V;
    sums += (long long)row * K;
    float divisor = 0.f;
    for (int c = lane; c < K; c += 32) divisor += q[c] * sums[c];
    divisor = warp_sum(divisor);
    float inverse = divisor != 0.f ? 1.f / divisor : 0.f;
    for (int j = lane; j < V; j += 32) y[j] = inverse != 0.f ? o[j] * inverse : 0.f;
    if (lane == 0) inverses[row] = inverse;
}

// The gradient of o, g / (q z), of q z, -(g y) / (q z), and of q through it: slope z is added to gq; a warp a row. y, go and gq
// are [B T H ..].
extern "C" __global__ void __launch_bounds__(256)
mtv_rotary_linear_rows(const float* __restrict__ g, const float* __restrict__ y, const float* __restrict__ inverses,
                float* __restrict__ go, float* __restrict__ slopes, int rows, int H, int T, int V, long long g_b, long long g_h,
                long long g_t)
{
    int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    int t = row % T, head = row / T, b = head / H, h = head % H;
    long long at = (((long long)b * T + t) * H + h) * V;
    g += b * g_b + h * g_h + t * g_t;
    float inverse = inverses[row], total = 0.f;
    for (int j = lane; j < V; j += 32) {
        total += g[j] * y[at + j];
        go[at + j] = g[j] * inverse;
    }
    total = warp_sum(total);
    if (lane == 0) slopes[row] = -total * inverse;
}

// gq += slope z, gk += the sum of slope q from this position on and of gz, the gradient of the last z; and that of the first z.
// A thread a channel; gq and gk are [B T H K].
extern "C" __global__ void __launch_bounds__(256)
mtv_rotary_linear_add(const float* __restrict__ q, const float* __restrict__ sums, const float* __restrict__ slopes,
               const float* __restrict__ gz, float* __restrict__ gq, float* __restrict__ gk, float* __restrict__ gz_in, int count,
               int H, int T, int K, long long q_b, long long q_h, long long q_t)
{
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= count) return;
    int c = i % K, head = i / K, b = head / H, h = head % H;
    q += b * q_b + h * q_h + c;
    sums += (long long)head * T * K + c;
    slopes += (long long)head * T;
    float rest = gz[i];
    for (int t = T - 1; t >= 0; t--) {
        long long at = (((long long)b * T + t) * H + h) * K + c;
        gq[at] += slopes[t] * sums[(long long)t * K];
        rest += slopes[t] * q[t * q_t];
        gk[at] += rest;
    }
    gz_in[i] = rest;
}
