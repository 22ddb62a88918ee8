// retention, a chunk of L positions at a time: what lies between the products of chunks, which cuBLAS computes for all heads
// and chunks at once. A row is one position of one head, rows = B H T; stacks are [B H, N, L, ..] with N = ceil(T / L) chunks,
// and zeros after the end of the last one.
//
// V has a column of ones, and zeros up to W columns: so z is one more column of the state S, and q z one more of the outputs.
// With A = (Q K^T) * D, D[i, j] = decay^(i-j) for i >= j, else 0, f_i = decay^(i+1), l_j = decay^(m-1-j), m positions in the
// chunk, S the state before it, gS' the gradient of that after it, and r, the gradient of q z, as a column of gY:
//
//     forward    Y = A V + f (Q S)             S' = decay^m S + (l K)^T V
//     backward   gA = D * (gY V^T)             gS = decay^m gS' + Q^T (f gY)
//                gQ = gA K + f (gY S^T)        gK = gA^T Q + l (V gS'^T)        gV = A^T gY + l (K gS')
//
// The gradient of the decay is the same sums with i decay^(i-1) in place of each decay^i: every kernel puts its part of them
// into `parts`, [B H, pitch], from `offset` on, and one sum takes them together.
#include "kernel.cuh"

#define NONE 0
#define DECAY 1
#define PAPER 2

// Powers of each head's decay: tables[0] decay^i, [1] i decay^(i-1), [2] and [3] their sums up to i; [4, H, L + 1]. A power
// below `tiny` is 0.
extern "C" __global__ void __launch_bounds__(32)
mtv_retention_tables(const float* __restrict__ decay, float* __restrict__ tables, int H, int L, double tiny)
{
    int h = blockIdx.x * 32 + threadIdx.x;
    if (h >= H) return;
    long long step = (long long)H * (L + 1);
    tables += (long long)h * (L + 1);
    double factor = decay[h], power = 1., before = 0., sum = 0., slopes = 0.;
    for (int i = 0; i <= L; i++) {
        sum += power;
        slopes += i * before;
        tables[i] = power;
        tables[step + i] = i * before;
        tables[2 * step + i] = sum;
        tables[3 * step + i] = slopes;
        before = power;
        power *= factor;
        if (fabs(power) < tiny) power = 0.;
    }
}

// Rows of x as a stack with `wide` columns, `count` numbers: with `ones` in the column after the last, and with `fading` times
// the decay from their positions to the end of the chunk.
extern "C" __global__ void __launch_bounds__(256)
mtv_retention_pack(const float* __restrict__ x, const float* __restrict__ tables, float* __restrict__ out, long long count,
                   int H, int T, int N, int L, int width, int wide, int ones, int fading,
                   long long x_b, long long x_h, long long x_t)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= count) return;
    int c = i % wide, j = i / wide % L, n = i / wide / L % N, t = n * L + j;
    long long head = i / wide / L / N, b = head / H, h = head % H;
    float v = 0.f;
    if (t < T) {
        if (c < width) v = x[b * x_b + h * x_h + t * x_t + c];
        if (c == width && ones) v = 1.f;
        if (fading) v *= tables[h * (L + 1) + min(L, T - n * L) - 1 - j];
    }
    out[i] = v;
}

// scores[.., i, j] *= decay^(i-j), and 0 for keys j after the query i; `count` numbers.
extern "C" __global__ void __launch_bounds__(256)
mtv_retention_decay(float* __restrict__ scores, const float* __restrict__ tables, long long count, int H, int N, int L)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= count) return;
    int lag = i / L % L - i % L;
    long long h = i / L / L / N % H;
    scores[i] = lag < 0 ? 0.f : scores[i] * tables[h * (L + 1) + lag];
}

// From what each chunk adds, the states [K, W] before each chunk, S, z and n at the end, and n before each chunk: a thread for
// each number of a head's state, and one for n.
extern "C" __global__ void __launch_bounds__(256)
mtv_retention_scan(const float* __restrict__ added, const float* __restrict__ tables, const float* __restrict__ state,
                   const float* __restrict__ z, const float* __restrict__ count, float* __restrict__ states,
                   float* __restrict__ counts, float* __restrict__ state_end, float* __restrict__ z_end,
                   float* __restrict__ count_end, int heads, int H, int T, int N, int L, int K, int V, int W)
{
    int size = K * W + 1;
    long long i = blockIdx.x * 256ll + threadIdx.x, head = i / size;
    if (head >= heads) return;
    int e = i % size, c = e % W;
    const float *power = tables + head % H * (L + 1), *total = power + 2ll * H * (L + 1);
    if (e == K * W) {
        float s = count[head];
        for (int n = 0; n < N; n++) {
            int m = min(L, T - n * L);
            counts[head * N + n] = s;
            s = power[m] * s + total[m - 1];
        }
        count_end[head] = s;
        return;
    }
    float s = c < V ? state[(head * K + e / W) * V + c] : c == V ? z[head * K + e / W] : 0.f;
    for (int n = 0; n < N; n++) {
        long long at = (head * N + n) * (size - 1) + e;
        states[at] = s;
        s = power[min(L, T - n * L)] * s + added[at];
    }
    if (c < V) state_end[(head * K + e / W) * V + c] = s;
    if (c == V) z_end[head * K + e / W] = s;
}

// An element of a product of L terms: of the `weights`, `step` apart, with the numbers from x on, `wide` apart. Where the
// product is not finite, it is made again without the weights of 0, of what is not seen: 0 times NaN or infinity counts as 0.
__device__ __forceinline__ float seen_product(float product, const float* weights, int step, const float* x, int wide, int L)
{
    if (product * 0.f == 0.f) return product;
    product = 0.f;
    for (int j = 0; j < L; j++)
        if (weights[(long long)j * step] != 0.f) product += weights[(long long)j * step] * x[(long long)j * wide];
    return product;
}

// The outputs: a warp a row. Saves n of each row, and the inverse of q z, or 0 where the square root of n is larger.
extern "C" __global__ void __launch_bounds__(128)
mtv_retention_finish(const float* __restrict__ inner, const float* __restrict__ carried, const float* __restrict__ scores,
                     const float* __restrict__ values, const float* __restrict__ tables, const float* __restrict__ counts,
                     float* __restrict__ y, float* __restrict__ seen, float* __restrict__ inverses, long long rows,
                     int H, int T, int N, int L, int V, int W, int kind)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32, head = row / T;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, t = row % T, n = t / L, j = t % L;
    const float* power = tables + head % H * (L + 1);
    long long at = ((head * N + n) * L + j) * W;
    float f = power[j + 1], sum = power[2ll * H * (L + 1) + j] + f * counts[head * N + n];
    float top = sqrtf(sum), score = inner[at + V] + f * carried[at + V];
    float inverse = kind == PAPER && fabsf(score) > top ? 1.f / score : 0.f;
    float factor = inverse != 0.f ? fabsf(inverse) : kind >= DECAY ? 1.f / top : 1.f;
    y += ((head / H * T + t) * H + head % H) * V;
    scores += ((head * N + n) * L + j) * L;
    values += (head * N + n) * L * W;
    for (int c = lane; c < V; c += 32)
        y[c] = (seen_product(inner[at + c], scores, 1, values + c, W, L) + f * carried[at + c]) * factor;
    if (lane == 0) {
        seen[row] = sum;
        inverses[row] = inverse;
    }
}

// gY before the divisor, with r in column V, as a stack, also times f; and the gradient of n: a warp a row of the stack.
extern "C" __global__ void __launch_bounds__(128)
mtv_retention_rows(const float* __restrict__ g, const float* __restrict__ y, const float* __restrict__ tables,
                   const float* __restrict__ seen, const float* __restrict__ inverses, float* __restrict__ grads,
                   float* __restrict__ faded, float* __restrict__ slopes, long long rows, int H, int T, int N, int L, int V,
                   int W, int kind, long long g_b, long long g_h, long long g_t)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32, head = row / L / N, b = head / H, h = head % H;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, j = row % L, t = row / L % N * L + j;
    float dot = 0.f, factor = 0.f, r = 0.f;
    g += b * g_b + h * g_h + t * g_t;
    if (t < T) {
        y += ((b * T + t) * H + h) * V;
        for (int c = lane; c < V; c += 32) dot += g[c] * y[c];
        dot = warp_sum(dot);
        float sum = seen[head * T + t], inverse = inverses[head * T + t], slope = 0.f;
        if (inverse != 0.f) {
            factor = fabsf(inverse);
            r = -dot * inverse;
        } else if (kind >= DECAY) {
            factor = 1.f / sqrtf(sum);
            slope = -0.5f * dot / sum;
        } else
            factor = 1.f;
        if (lane == 0) slopes[head * T + t] = slope;
    }
    float f = tables[h * (L + 1) + j + 1];
    for (int c = lane; c < W; c += 32) {
        float d = c < V && t < T ? g[c] * factor : c == V ? r : 0.f;
        grads[row * W + c] = d;
        faded[row * W + c] = d * f;
    }
}

// A and gA from the products, both without decays: a warp a row of the stacks.
extern "C" __global__ void __launch_bounds__(128)
mtv_retention_decay_both(float* __restrict__ scores, float* __restrict__ grads, const float* __restrict__ tables,
                         float* __restrict__ parts, long long rows, int H, int N, int L, long long pitch, long long offset)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32, head = row / L / N;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, i = row % L;
    const float *power = tables + head % H * (L + 1), *slope = power + (long long)H * (L + 1);
    float part = 0.f;
    scores += row * L;
    grads += row * L;
    for (int j = lane; j < L; j += 32) {
        float s = 0.f, d = 0.f;
        if (j <= i) {
            s = scores[j] * power[i - j];
            d = grads[j] * power[i - j];
            part += scores[j] * grads[j] * slope[i - j];
        }
        scores[j] = s;
        grads[j] = d;
    }
    part = warp_sum(part);
    if (lane == 0) parts[head * pitch + offset + row % ((long long)L * N)] = part;
}

// The gradients of the states after each chunk and of S and z at the start: a thread for each number of a head's state.
extern "C" __global__ void __launch_bounds__(256)
mtv_retention_scan_backward(const float* __restrict__ added, const float* __restrict__ states,
                            const float* __restrict__ tables, const float* __restrict__ g_state,
                            const float* __restrict__ g_z, float* __restrict__ grads, float* __restrict__ gstate,
                            float* __restrict__ gz, float* __restrict__ parts, int heads, int H, int T, int N, int L, int K,
                            int V, int W, long long pitch, long long offset)
{
    int size = K * W;
    long long i = blockIdx.x * 256ll + threadIdx.x, head = i / size;
    if (head >= heads) return;
    int e = i % size, c = e % W;
    const float *power = tables + head % H * (L + 1), *slope = power + (long long)H * (L + 1);
    float s = c < V ? g_state[(head * K + e / W) * V + c] : c == V ? g_z[head * K + e / W] : 0.f, part = 0.f;
    for (int n = N - 1; n >= 0; n--) {
        long long at = (head * N + n) * size + e;
        int m = min(L, T - n * L);
        grads[at] = s;
        part += slope[m] * s * states[at];
        s = power[m] * s + added[at];
    }
    if (c < V) gstate[(head * K + e / W) * V + c] = s;
    if (c == V) gz[head * K + e / W] = s;
    parts[head * pitch + offset + e] = part;
}

// The gradient of n at the start, from those of n at every row and at the end: a warp a head.
extern "C" __global__ void __launch_bounds__(32)
mtv_retention_counts_backward(const float* __restrict__ slopes, const float* __restrict__ counts,
                              const float* __restrict__ tables, const float* __restrict__ g_count,
                              float* __restrict__ gcount, float* __restrict__ parts, int H, int T, int N, int L,
                              long long pitch, long long offset)
{
    long long head = blockIdx.x, step = (long long)H * (L + 1);
    const float *power = tables + head % H * (L + 1), *slope = power + step, *total = slope + step, *total_slope = total + step;
    float d = g_count[head], part = 0.f;
    slopes += head * T;
    for (int n = N - 1; n >= 0; n--) {
        int m = min(L, T - n * L);
        float before = counts[head * N + n], a = 0.f, b = 0.f;
        for (int j = threadIdx.x; j < m; j += 32) {
            float v = slopes[n * L + j];
            a += power[j + 1] * v;
            b += (total_slope[j] + slope[j + 1] * before) * v;
        }
        part += warp_sum(b) + (total_slope[m - 1] + slope[m] * before) * d;
        d = warp_sum(a) + power[m] * d;
    }
    if (threadIdx.x == 0) {
        gcount[head] = d;
        parts[head * pitch + offset] = part;
    }
}

// A gradient from stacks [.., wide]: what comes from within the chunk, the product of `weights` and `others`, plus, decayed, what
// came in (of queries, `first`) or what goes out (of keys and values). With `summing`, what the latter says of the decay, by the stack x of those rows. A warp a row.
extern "C" __global__ void __launch_bounds__(128)
mtv_retention_gradient(const float* __restrict__ inner, const float* __restrict__ weights, const float* __restrict__ others,
                       const float* __restrict__ carried, const float* __restrict__ x,
                       const float* __restrict__ tables, float* __restrict__ out, float* __restrict__ parts, long long rows,
                       int H, int T, int N, int L, int width, int wide, int first, int summing, long long pitch,
                       long long offset)
{
    long long row = blockIdx.x * 4ll + threadIdx.x / 32, head = row / T;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, t = row % T, n = t / L, j = t % L, lag = first ? j + 1 : min(L, T - n * L) - 1 - j;
    long long at = ((head * N + n) * L + j) * wide;
    const float* power = tables + head % H * (L + 1) + lag;
    float part = 0.f, factor = *power, slope = power[(long long)H * (L + 1)];
    out += ((head / H * T + t) * H + head % H) * width;
    weights += (head * N + n) * L * L + (first ? j * L : j);
    others += (head * N + n) * L * wide;
    for (int c = lane; c < width; c += 32) {
        out[c] = seen_product(inner[at + c], weights, first ? 1 : L, others + c, wide, L) + factor * carried[at + c];
        part += carried[at + c] * x[at + c];
    }
    if (!summing) return;
    part = warp_sum(part);
    if (lane == 0) parts[head * pitch + offset + t] = part * slope;
}
