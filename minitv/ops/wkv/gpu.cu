// wkv and bidirectional_wkv: a thread a sequence and channel walks over the positions. The numbers that meet at a position,
// and the rules by which gradients go back through them, are those of cpu.py; so is p = top + lag w, which gathers no rounding.
// EMPTY, an option, is the top of an empty state.
//
// Forward keeps the state before every STEPS positions; backward makes the states between them again, in registers.
// A state is (a, b, top, lag). `states` is [chunks, 4, channels], `first` and `final` are (a, b, p): [3, channels], where
// the channels of all sequences are counted through.
#include "kernel.cuh"

#define STEPS 8  // from one kept state to the next

// The state before a token to that after it; how much of either stays.
__device__ __forceinline__ void advance(float& a, float& b, float& top, float& lag, float w, float k, float v,
                                        float& stays, float& joins)
{
    float excess = (top - k) + (lag + 1.f) * w, e = expf(-fabsf(excess));
    bool keeps = excess > 0.f;
    stays = keeps ? 1.f : e;
    joins = keeps ? e : 1.f;
    a = stays * a + joins * v;
    b = stays * b + joins;
    top = keeps ? top : k;
    lag = keeps ? lag + 1.f : 0.f;
}

// y = past a + present v: the shares of the state before a token and of the token.
__device__ __forceinline__ void weigh(float b, float top, float lag, float w, float u, float k, float& past, float& present)
{
    float excess = (top - k) + (lag * w - u), e = expf(-fabsf(excess));
    past = excess > 0.f ? 1.f : e;
    present = excess > 0.f ? e : 1.f;
    float scale = 1.f / (past * b + present);
    past *= scale;
    present *= scale;
}

__device__ __forceinline__ void forget(float& a, float& b, float& top, float& lag)
{
    a = b = lag = 0.f;
    top = EMPTY;
}

extern "C" __global__ void __launch_bounds__(64)
mtv_wkv_forward(const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ w,
                const float* __restrict__ u, const bool* __restrict__ reset, const float* __restrict__ first,
                float* __restrict__ y, float* __restrict__ final, float* __restrict__ lags, float* __restrict__ states,
                int B, int T, int C, int resets)
{
    int i = blockIdx.x * 64 + threadIdx.x, count = B * C, sequence = i / C, c = i % C;
    if (i >= count) return;
    long long at = (long long)sequence * T * C + c;
    float decay = w[c], bonus = u[c];
    float a = first[i], b = first[(long long)count + i], top = first[2ll * count + i], lag = 0.f;
    float stays, joins, past, present;
    for (int t = 0; t < T; t++, at += C) {
        if (t % STEPS == 0) {
            float* state = states + 4ll * count * (t / STEPS) + i;
            state[0] = a;
            state[count] = b;
            state[2ll * count] = top;
            state[3ll * count] = lag;
        }
        if (resets && reset[(long long)sequence * T + t]) forget(a, b, top, lag);
        float key = k[at], value = v[at];
        weigh(b, top, lag, decay, bonus, key, past, present);
        y[at] = past * a + present * value;
        advance(a, b, top, lag, decay, key, value, stays, joins);
    }
    final[i] = a;
    final[(long long)count + i] = b;
    final[2ll * count + i] = top + lag * decay;
    lags[i] = lag;
}

// `g_final` are the gradients of the last (a, b, p), `gfirst` those of the first; `sums` those of w and u, [2, channels].
extern "C" __global__ void __launch_bounds__(64)
mtv_wkv_backward(const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ w,
                 const float* __restrict__ u, const bool* __restrict__ reset, const float* __restrict__ first,
                 const float* __restrict__ y, const float* __restrict__ final, const float* __restrict__ lags,
                 const float* __restrict__ states, const float* __restrict__ g_y, const float* __restrict__ g_final,
                 float* __restrict__ gk, float* __restrict__ gv, float* __restrict__ sums, float* __restrict__ gfirst,
                 int B, int T, int C, int resets)
{
    int i = blockIdx.x * 64 + threadIdx.x, count = B * C, sequence = i / C, c = i % C;
    if (i >= count) return;
    long long start = (long long)sequence * T * C + c, second = (long long)count + i, third = 2ll * count + i;
    float decay = w[c], bonus = u[c], gw = 0.f, gu = 0.f, alpha = g_final[i], beta = g_final[second];
    // The gradient of the last p beyond what a and b owe to their unit belongs to the key that it is, or to the first p.
    float given = g_final[third] - alpha * final[i] - beta * final[second];
    int maximum = T - 1 - (int)lags[i];
    gw += given * lags[i];
    for (int chunk = (T + STEPS - 1) / STEPS - 1; chunk >= 0; chunk--) {
        const float* state = states + 4ll * count * chunk + i;
        float a = state[0], b = state[count], top = state[2ll * count], lag = state[3ll * count];
        float as[STEPS], bs[STEPS], stays[STEPS], joins[STEPS], past[STEPS], present[STEPS], values[STEPS];
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            int t = chunk * STEPS + s;
            if (t < T) {
                long long at = start + (long long)t * C;
                if (resets && reset[(long long)sequence * T + t]) forget(a, b, top, lag);
                float key = k[at];
                values[s] = v[at];
                as[s] = a;
                bs[s] = b;
                weigh(b, top, lag, decay, bonus, key, past[s], present[s]);
                advance(a, b, top, lag, decay, key, values[s], stays[s], joins[s]);
            }
        }
#pragma unroll
        for (int s = STEPS - 1; s >= 0; s--) {
            int t = chunk * STEPS + s;
            if (t < T) {
                long long at = start + (long long)t * C;
                float g = g_y[at], out = y[at], value = values[s];
                float now = present[s] * g, pulled = past[s] * g, key = present[s] * pulled * (bs[s] * value - as[s]);
                gu += key;
                gv[at] = now + joins[s] * alpha;
                gk[at] = key + joins[s] * (alpha * value + beta) + (t == maximum ? given : 0.f);
                gw += stays[s] * (alpha * as[s] + beta * bs[s]);
                alpha = stays[s] * alpha + pulled;
                beta = stays[s] * beta - pulled * out;
                if (resets && reset[(long long)sequence * T + t]) alpha = beta = 0.f;
            }
        }
    }
    sums[i] = gw;
    sums[second] = gu;
    gfirst[i] = alpha;
    gfirst[second] = beta;
    gfirst[third] = alpha * first[i] + beta * first[second] + (maximum < 0 ? given : 0.f);
}

// -- both directions --------------------------------------------------------------------------------------------------
// `before` and `after` are [T, 4, channels]: the states of all tokens before and after each position.

__device__ __forceinline__ void keep(float* __restrict__ states, long long t, int count, int i, float a, float b, float top,
                                     float lag)
{
    float* state = states + 4 * t * count + i;
    state[0] = a;
    state[count] = b;
    state[2ll * count] = top;
    state[3ll * count] = lag;
}

// The shares of what lies before, of what lies after and of the present.
__device__ __forceinline__ void weigh_both(const float* __restrict__ left, const float* __restrict__ right, int count, float w,
                                           float u, float k, float& before, float& after, float& present)
{
    float one = (left[2ll * count] - k) + (left[3ll * count] * w - u);
    float other = (right[2ll * count] - k) + (right[3ll * count] * w - u);
    float top = fmaxf(fmaxf(one, other), 0.f);
    before = expf(one - top);
    after = expf(other - top);
    present = expf(-top);
    float scale = 1.f / (before * left[count] + after * right[count] + present);
    before *= scale;
    after *= scale;
    present *= scale;
}

// The gradient of the state after a token to that of the state before it: what the token and w get of it.
__device__ __forceinline__ void retreat(const float* __restrict__ state, int count, float w, float k, float v, float pulled,
                                        float y, float& alpha, float& beta, float& gk, float& gv, float& gw)
{
    float a = state[0], b = state[count], top = state[2ll * count], lag = state[3ll * count], old_a = a, old_b = b;
    float stays, joins;
    advance(a, b, top, lag, w, k, v, stays, joins);
    gv += joins * alpha;
    gk += joins * (alpha * v + beta);
    gw += stays * (alpha * old_a + beta * old_b);
    alpha = stays * alpha + pulled;
    beta = stays * beta - pulled * y;
}

extern "C" __global__ void __launch_bounds__(64)
mtv_wkv_bidirectional_forward(const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ w,
                              const float* __restrict__ u, float* __restrict__ y, float* __restrict__ before,
                              float* __restrict__ after, int B, int T, int C)
{
    int i = blockIdx.x * 64 + threadIdx.x, count = B * C, c = i % C;
    if (i >= count) return;
    long long start = (long long)(i / C) * T * C + c;
    float decay = w[c], bonus = u[c], a, b, top, lag, stays, joins;
    forget(a, b, top, lag);
    for (int t = 0; t < T; t++) {
        long long at = start + (long long)t * C;
        keep(before, t, count, i, a, b, top, lag);
        advance(a, b, top, lag, decay, k[at], v[at], stays, joins);
    }
    forget(a, b, top, lag);
    for (int t = T - 1; t >= 0; t--) {
        long long at = start + (long long)t * C;
        float key = k[at], value = v[at], one, other, present;
        keep(after, t, count, i, a, b, top, lag);
        const float *left = before + 4ll * t * count + i, *right = after + 4ll * t * count + i;
        weigh_both(left, right, count, decay, bonus, key, one, other, present);
        y[at] = one * left[0] + other * right[0] + present * value;
        advance(a, b, top, lag, decay, key, value, stays, joins);
    }
}

extern "C" __global__ void __launch_bounds__(64)
mtv_wkv_bidirectional_backward(const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ w,
                               const float* __restrict__ u, const float* __restrict__ y, const float* __restrict__ before,
                               const float* __restrict__ after, const float* __restrict__ g, float* __restrict__ gk,
                               float* __restrict__ gv, float* __restrict__ sums, int B, int T, int C)
{
    int i = blockIdx.x * 64 + threadIdx.x, count = B * C, c = i % C;
    if (i >= count) return;
    long long start = (long long)(i / C) * T * C + c;
    float decay = w[c], bonus = u[c], gw = 0.f, gu = 0.f, alpha = 0.f, beta = 0.f;
    for (int t = T - 1; t >= 0; t--) {
        long long at = start + (long long)t * C;
        float key = k[at], value = v[at], out = y[at], slope = g[at], one, other, present;
        const float *left = before + 4ll * t * count + i, *right = after + 4ll * t * count + i;
        weigh_both(left, right, count, decay, bonus, key, one, other, present);
        float slope_v = present * slope;
        float slope_k = slope_v * (one * (left[count] * value - left[0]) + other * (right[count] * value - right[0]));
        gu += slope_k;
        retreat(left, count, decay, key, value, one * slope, out, alpha, beta, slope_k, slope_v, gw);
        gk[at] = slope_k;
        gv[at] = slope_v;
    }
    alpha = beta = 0.f;
    for (int t = 0; t < T; t++) {
        long long at = start + (long long)t * C;
        float key = k[at], value = v[at], out = y[at], slope = g[at], slope_k = gk[at], slope_v = gv[at], one, other, present;
        const float *left = before + 4ll * t * count + i, *right = after + 4ll * t * count + i;
        weigh_both(left, right, count, decay, bonus, key, one, other, present);
        retreat(right, count, decay, key, value, other * slope, out, alpha, beta, slope_k, slope_v, gw);
        gk[at] = slope_k;
        gv[at] = slope_v;
    }
    sums[i] = gw;
    sums[(long long)count + i] = gu;
}
