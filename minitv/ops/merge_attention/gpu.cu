// merge_attention: a warp a row of V channels; backward computes the weights again from both lse.
//
//     g (y - other_y) = delta      gy = w g      glse = w u delta + w c      and for the others, with -w u delta + u c
//
// A weight of 0 hides its row, which may hold anything.
#include "kernel.cuh"

// The two weights of a row, and what was subtracted from both logs; the sum of the exponentials.
__device__ __forceinline__ float weights(float a, float b, float& w, float& u, float& shift)
{
    float top = fmaxf(a, b);
    shift = top == -INFINITE ? 0.f : top;
    w = expf(a - shift);
    u = expf(b - shift);
    float total = w + u, inverse = total == 0.f ? 0.f : 1.f / total;
    w *= inverse;
    u *= inverse;
    return total;
}

extern "C" __global__ void __launch_bounds__(256)
mtv_merge_attention_forward(const float* __restrict__ y, const float* __restrict__ lse, const float* __restrict__ other_y,
                            const float* __restrict__ other_lse, float* __restrict__ out, float* __restrict__ out_lse,
                            int B, int H, int T, int V, long long y_b, long long y_h, long long y_t,
                            long long o_b, long long o_h, long long o_t)
{
    long long i = blockIdx.x * 8ll + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (i >= (long long)B * H * T) return;
    long long b = i / ((long long)H * T), h = i / T % H, t = i % T;
    float w, u, shift, total = weights(lse[i], other_lse[i], w, u, shift);
    y += b * y_b + h * y_h + t * y_t;
    other_y += b * o_b + h * o_h + t * o_t;
    out += ((b * T + t) * H + h) * V;
    for (int c = lane; c < V; c += 32) out[c] = (w == 0.f ? 0.f : w * y[c]) + (u == 0.f ? 0.f : u * other_y[c]);
    if (lane == 0) out_lse[i] = total == 0.f ? -INFINITE : shift + logf(total);
}

extern "C" __global__ void __launch_bounds__(256)
mtv_merge_attention_backward(const float* __restrict__ y, const float* __restrict__ lse, const float* __restrict__ other_y,
                             const float* __restrict__ other_lse, const float* __restrict__ g_y,
                             const float* __restrict__ g_lse, float* __restrict__ gy, float* __restrict__ glse,
                             float* __restrict__ gother_y, float* __restrict__ gother_lse, int B, int H, int T, int V,
                             int arrived, long long y_b, long long y_h, long long y_t, long long o_b, long long o_h,
                             long long o_t, long long g_b, long long g_h, long long g_t)
{
    long long i = blockIdx.x * 8ll + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (i >= (long long)B * H * T) return;
    long long b = i / ((long long)H * T), h = i / T % H, t = i % T, at = ((b * T + t) * H + h) * V;
    float w, u, shift, delta = 0.f, c_lse = arrived ? g_lse[i] : 0.f;
    weights(lse[i], other_lse[i], w, u, shift);
    y += b * y_b + h * y_h + t * y_t;
    other_y += b * o_b + h * o_h + t * o_t;
    g_y += b * g_b + h * g_h + t * g_t;
    for (int c = lane; c < V; c += 32) {
        float g = g_y[c];
        gy[at + c] = w * g;
        gother_y[at + c] = u * g;
        if (w != 0.f && u != 0.f) delta += g * (y[c] - other_y[c]);
    }
    delta = warp_sum(delta) * w * u;
    if (lane == 0) {
        glse[i] = delta + w * c_lse;
        gother_lse[i] = u * c_lse - delta;
    }
}
