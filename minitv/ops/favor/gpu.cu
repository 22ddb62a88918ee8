// favor, a chunk of L positions at a time: what lies between the products of chunks, which cuBLAS computes for all heads and
// chunks at once. Stacks are [N, B H, L, ..] with N = ceil(T / L) chunks, and zeros after the end of the last one. Without
// `causal` there is one chunk of all positions, whose queries read the state after it.
//
// Values have a column of ones, and zeros up to W columns: so z is one more column of the state S [F W]. Logarithms of features
// of keys are HIDDEN where a key is masked or beyond the end; a[n] are the largest ones before chunk n, [N + 1, B H, F].
//
//     A_ij = sum over f of e^(ln phi(q_i) + ln phi(k_j) - r_i), j <= i       Q = e^(ln phi(q_i) + a[n] - r_i)
//     Y = (A V + Q S[n]) / its column of ones                             S[n+1] = e^(a[n] - a[n+1]) S[n] + e^(ln phi(k) - a[n+1])^T V
//
// r_i is the largest ln phi(q_i) + ln phi(k_j) of the keys that query i sees, so no exponent is above 0 and a row's sum is at
// least 1. The gradients are those of the page; features of other kinds are numbers, and their products take the place of e^.
#include "kernel.cuh"

#define POSITIVE 0
#define RELU 1

// Rows of x as a stack with `wide` columns, `count` numbers: with `ones` in the column after the last; 0 where mask is false.
extern "C" __global__ void __launch_bounds__(256)
mtv_favor_pack(const float* __restrict__ x, const bool* __restrict__ mask, float* __restrict__ out, long long count,
               int heads, int H, int T, int L, int width, int wide, int ones, int masked, long long x_b, long long x_h,
               long long x_t)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= count) return;
    int c = i % wide;
    long long row = i / wide, head = row / L % heads, t = row / L / heads * L + row % L, b = head / H, h = head % H;
    float v = 0.f;
    if (t < T && (!masked || mask[b * T + t])) {
        if (c < width) v = x[b * x_b + h * x_h + t * x_t + c];
        if (c == width && ones) v = 1.f;
    }
    out[i] = v;
}

// From w x of keys [.., F] the logarithms of their features, or the features, in place: a warp a row of the stack x [.., K].
extern "C" __global__ void __launch_bounds__(128)
mtv_favor_keys(float* __restrict__ logs, const float* __restrict__ x, const bool* __restrict__ mask, long long rows, int heads,
               int H, int T, int L, int K, int F, int kind, int masked, float half, float offset, float hidden)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32, t = row / L / heads * L + row % L, b = row / L % heads / H;
    if (row >= rows) return;
    int lane = threadIdx.x % 32;
    bool seen = t < T && (!masked || mask[b * T + t]);
    float square = 0.f;
    for (int c = lane; c < K; c += 32) square += x[row * K + c] * x[row * K + c];
    square = half * warp_sum(square);
    for (int f = lane; f < F; f += 32) {
        float v = logs[row * F + f];
        if (kind == POSITIVE) v = seen ? v - square : hidden;
        else v = seen ? (v < 0.f ? 0.f : v) + offset : 0.f;
        logs[row * F + f] = v;
    }
}

// The largest logarithms before each chunk and at the end, from those before the first: a thread a head and feature.
extern "C" __global__ void __launch_bounds__(256)
mtv_favor_tops(const float* __restrict__ logs, float* __restrict__ tops, int heads, int N, int L, int F)
{
    long long i = blockIdx.x * 256ll + threadIdx.x, step = (long long)heads * F;
    if (i >= step) return;
    float top = tops[i];
    for (int n = 0; n < N; n++) {
        const float* from = logs + ((n * (long long)heads + i / F) * L) * F + i % F;
        for (int j = 0; j < L; j++) top = fmaxf(top, from[(long long)j * F]);
        tops[(n + 1) * step + i] = top;
    }
}

// From what each chunk adds, the states [F W] before each chunk and at the end: a thread a number of a head's state.
extern "C" __global__ void __launch_bounds__(256)
mtv_favor_scan(const float* __restrict__ added, const float* __restrict__ tops, float* __restrict__ states, int heads, int N,
               int F, int W)
{
    long long i = blockIdx.x * 256ll + threadIdx.x, size = (long long)heads * F * W, step = (long long)heads * F, at = i / W;
    if (i >= size) return;
    float s = states[i];
    for (int n = 0; n < N; n++) {
        s = expf(tops[n * step + at] - tops[(n + 1) * step + at]) * s + added[n * size + i];
        states[(n + 1) * size + i] = s;
    }
}

// The same back: from what the queries of each chunk say of the state that they read, all gradients of states, of which the
// last is there. Without `causal` those queries read the state after the only chunk.
extern "C" __global__ void __launch_bounds__(256)
mtv_favor_scan_backward(const float* __restrict__ read, const float* __restrict__ tops, float* __restrict__ gstates, int heads,
                        int N, int F, int W, int causal)
{
    long long i = blockIdx.x * 256ll + threadIdx.x, size = (long long)heads * F * W, step = (long long)heads * F, at = i / W;
    if (i >= size) return;
    float s = gstates[N * size + i];
    for (int n = N - 1; n >= 0; n--) {
        if (!causal) gstates[(n + 1) * size + i] = s += read[n * size + i];
        s *= expf(tops[n * step + at] - tops[(n + 1) * step + at]);
        if (causal) s += read[n * size + i];
        gstates[n * size + i] = s;
    }
}

// Of w x of queries [.., F]: their features in the unit e^r, `best` r, and the products A [.., L] with the keys of the chunk.
// `tops` are those of the state that each chunk reads. A warp a row.
extern "C" __global__ void __launch_bounds__(128)
mtv_favor_rows(const float* __restrict__ dots, const float* __restrict__ logs, const float* __restrict__ tops,
               float* __restrict__ queries, float* __restrict__ pairs, float* __restrict__ best, long long rows, int L, int F,
               int kind, int causal, float offset)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32, chunk = row / L;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, i = row % L, seen = causal ? i + 1 : 0;
    dots += row * F;
    queries += row * F;
    logs += chunk * L * F;
    tops += chunk * F;
    float r = -INFINITE;
    for (int f = lane; f < F && kind == POSITIVE; f += 32) {
        float top = tops[f];
        for (int j = 0; j < seen; j++) top = fmaxf(top, logs[(long long)j * F + f]);
        r = fmaxf(r, dots[f] + top);
    }
    r = warp_max(r);
    if (lane == 0) best[row] = r;
    for (int f = lane; f < F; f += 32) {
        float x = dots[f];
        queries[f] = kind == POSITIVE ? expf(x + tops[f] - r) : (x < 0.f ? 0.f : x) + offset;
    }
    for (int j = 0; j < L && causal; j++) {
        float sum = 0.f;
        for (int f = lane; f < F && j < seen; f += 32) {
            float x = dots[f], key = logs[(long long)j * F + f];
            sum += kind == POSITIVE ? expf(x + key - r) : ((x < 0.f ? 0.f : x) + offset) * key;
        }
        sum = warp_sum(sum);
        if (lane == 0) pairs[row * L + j] = sum;
    }
}

// An element of a product of L terms: of the `weights` with the numbers from x on, `wide` apart. Where the product is not
// finite, it is made again without the weights of 0, of what is not seen: 0 times NaN or infinity counts as 0.
__device__ __forceinline__ float seen_product(float product, const float* weights, const float* x, int wide, int L)
{
    if (product * 0.f == 0.f) return product;
    product = 0.f;
    for (int j = 0; j < L; j++)
        if (weights[j] != 0.f) product += weights[j] * x[(long long)j * wide];
    return product;
}

// The outputs, and the inverse of the sum of each row of the stack, 0 where nothing is seen: a warp a row.
extern "C" __global__ void __launch_bounds__(128)
mtv_favor_finish(const float* __restrict__ inner, const float* __restrict__ carried, const float* __restrict__ pairs,
                 const float* __restrict__ values, float* __restrict__ y, float* __restrict__ inverses, long long rows, int heads,
                 int H, int T, int L, int V, int W, int causal)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32, chunk = row / L, head = chunk % heads, t = chunk / heads * L + row % L;
    if (row >= rows) return;
    int lane = threadIdx.x % 32;
    pairs += row * L;
    values += chunk * L * W;
    inner += row * W;
    carried += row * W;
    float total = carried[V] + (causal ? seen_product(inner[V], pairs, values + V, W, L) : 0.f);
    float inverse = total == 0.f || t >= T ? 0.f : 1.f / total;
    if (lane == 0) inverses[row] = inverse;
    if (t >= T) return;
    y += ((head / H * T + t) * H + head % H) * V;
    for (int c = lane; c < V; c += 32) {
        float sum = carried[c] + (causal ? seen_product(inner[c], pairs, values + c, W, L) : 0.f);
        y[c] = inverse == 0.f ? 0.f : sum * inverse;
    }
}

// The gradient of a row's weighted sum of values [.., W], with that of its sum of weights in column V: a warp a row.
extern "C" __global__ void __launch_bounds__(128)
mtv_favor_gradients(const float* __restrict__ g, const float* __restrict__ y, const float* __restrict__ inverses,
                    float* __restrict__ out, long long rows, int heads, int H, int T, int L, int V, int W, long long g_b,
                    long long g_h, long long g_t)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32, chunk = row / L, head = chunk % heads, t = chunk / heads * L + row % L;
    if (row >= rows) return;
    int lane = threadIdx.x % 32;
    long long b = head / H, h = head % H;
    float dot = 0.f, factor = inverses[row];
    g += b * g_b + h * g_h + t * g_t;
    y += ((b * T + t) * H + h) * V;
    for (int c = lane; c < V && t < T; c += 32) dot += g[c] * y[c];
    dot = warp_sum(dot);
    for (int c = lane; c < W; c += 32)
        out[row * W + c] = t >= T ? 0.f : c < V ? g[c] * factor : c == V ? -dot * factor : 0.f;
}

// The gradient of w x of queries, [.., F], from that of their features by the state and those of the pairs: a warp a row.
extern "C" __global__ void __launch_bounds__(128)
mtv_favor_queries_backward(const float* __restrict__ dots, const float* __restrict__ logs, const float* __restrict__ queries,
                           const float* __restrict__ best, const float* __restrict__ gpairs, const float* __restrict__ carried,
                           float* __restrict__ out, long long rows, int L, int F, int kind, int causal, float offset)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, seen = causal ? row % L + 1 : 0;
    logs += row / L * L * F;
    float r = best[row];
    for (int f = lane; f < F; f += 32) {
        float x = dots[row * F + f], q = queries[row * F + f], sum = 0.f;
        for (int j = 0; j < seen; j++) {
            float key = logs[(long long)j * F + f];
            sum += gpairs[row * L + j] * (kind == POSITIVE ? expf(x + key - r) : key);
        }
        float state = carried[row * F + f];
        out[row * F + f] = kind == POSITIVE ? q * state + sum : q > offset ? state + sum : 0.f;
    }
}

// The same of the logarithms of features of keys, or of w x. `keys` are the features in the unit of the state after the chunk.
extern "C" __global__ void __launch_bounds__(128)
mtv_favor_keys_backward(const float* __restrict__ dots, const float* __restrict__ logs, const float* __restrict__ queries,
                        const float* __restrict__ keys, const float* __restrict__ best, const float* __restrict__ gpairs,
                        const float* __restrict__ carried, float* __restrict__ out, long long rows, int heads, int T, int L,
                        int F, int kind, int causal, float offset)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32, chunk = row / L;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, j = row % L, end = causal ? min((long long)L, T - chunk / heads * L) : 0;
    for (int f = lane; f < F; f += 32) {
        float key = logs[row * F + f], sum = 0.f;
        for (int i = j; i < end; i++) {
            long long at = chunk * L + i;
            sum += gpairs[at * L + j] * (kind == POSITIVE ? expf(dots[at * F + f] + key - best[at]) : queries[at * F + f]);
        }
        float k = keys[row * F + f], state = carried[row * F + f];
        out[row * F + f] = kind == POSITIVE ? k * state + sum : k > offset ? state + sum : 0.f;
    }
}
