// AFT: every channel its own weighted mean, whatever the range of keys and biases. A thread has a channel, so that the threads
// of a warp read neighbours; all weights are exponentials relative to the largest exponent so far, and sums of pairs
//
//     N = sum of e^(x - top) v      Z = sum of e^(x - top)      x = k + bias, or its pair (top, N, Z) of what is outside
//
// Keys form an image of `rows` and `columns`, a sequence one of one row, and query t = y wide + x. The window of a query is
// the columns x + low .. x + high in the rows y - up .. y + up; the bias of a key in it lies at origin + h by_head + x by_query
// + x_key by_key + (y - y_key) by_row. Keys outside count with a bias of 0 if `far`; else a scan over them joins the sums.
//
//     backward   h = gy sigmoid(q)     p = h / Z     r = -h y / (sigmoid(q) Z)     a = e^(x - top)
//                gv = sum of a p       gk = v gv + sum of a r                         gbias = sum of a (p v + r)
#include "kernel.cuh"

#define LOWEST -1e38f  // below all keys, and a difference with it is no NaN
#define TILE 4         // queries, keys or taps of a thread; and steps of a scan that are loaded together

struct Window {
    int wide, rows, columns, low, high, up, far;
    long long by_query, by_key, by_row;
};

// Whether query (y, x) sees the key (y_key, x_key), and its bias, where `bias` is that of the head at the origin.
__device__ __forceinline__ bool sees(const Window& w, const float* bias, int y, int x, int y_key, int x_key, float& weight)
{
    int column = x_key - x, row = y - y_key;
    bool inside = column >= w.low && column <= w.high && row >= -w.up && row <= w.up;
    weight = inside ? bias[x * w.by_query + x_key * w.by_key + row * w.by_row] : 0.f;
    return inside || w.far;
}

struct Sums {
    float top, n, z;
};

__device__ __forceinline__ void add(Sums& sums, float x, float n, float z)
{
    float rise = x - sums.top, small = expf(-fabsf(rise)), fade = rise > 0.f ? small : 1.f, e = rise > 0.f ? 1.f : small;
    sums.n = sums.n * fade + e * n;
    sums.z = sums.z * fade + e * z;
    sums.top = fmaxf(sums.top, x);
}

// scan[0], scan[1] and scan[2], each [B S C]: the sums (top, N, Z) up to each key, from the last key on if `backwards`.
extern "C" __global__ void __launch_bounds__(128)
mtv_aft_scan(const float* __restrict__ k, const float* __restrict__ v, float* __restrict__ scan,
             int S, int C, int size, int backwards)
{
    int c = blockIdx.y * 128 + threadIdx.x, b = blockIdx.x, H = C / size;
    if (c >= C) return;
    long long plane = (long long)gridDim.x * S * C;
    Sums sums = {LOWEST, 0.f, 0.f};
#pragma unroll 4
    for (int i = 0; i < S; i++) {
        long long key = (long long)b * S + (backwards ? S - 1 - i : i), at = key * C + c;
        add(sums, k[key * H + c / size], v[at], 1.f);
        scan[at] = sums.top;
        scan[plane + at] = sums.n;
        scan[2 * plane + at] = sums.z;
    }
}

// gk and gv += what the queries' rests, and the state at key `left`, give to the keys of a scan. state[0] and state[1], each
// [B C], are the gradients of N and Z there; offset is the key of a query's rest minus the query.
extern "C" __global__ void __launch_bounds__(128)
mtv_aft_scan_backward(const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ scan,
                      const float* __restrict__ tops, const float* __restrict__ p, const float* __restrict__ r,
                      const float* __restrict__ state, float* __restrict__ gk, float* __restrict__ gv,
                      int T, int S, int C, int size, int backwards, int offset, int left)
{
    int c = blockIdx.y * 128 + threadIdx.x, b = blockIdx.x, H = C / size;
    if (c >= C) return;
    float above = -LOWEST, h = 0.f, x = 0.f;  // the first fades nothing
#pragma unroll 4
    for (int i = S - 1; i >= 0; i--) {
        int s = backwards ? S - 1 - i : i, t = s - offset;
        long long key = (long long)b * S + s, at = key * C + c;
        float top = scan[at], fade = expf(top - above);
        above = top;
        h *= fade;
        x *= fade;
        if (t >= 0 && t < T) {
            long long query = ((long long)b * T + t) * C + c;
            float share = expf(top - tops[query]);
            h += share * p[query];
            x += share * r[query];
        }
        if (s == left) {
            h += state[(long long)b * C + c];
            x += state[((long long)gridDim.x + b) * C + c];
        }
        float e = expf(k[key * H + c / size] - top);
        gv[at] += e * h;
        gk[at] += e * (v[at] * h + x);
    }
}

// y, and for backward of every query and channel top, 1 / Z and N / Z; the latter are 0 where there is no key.
extern "C" __global__ void __launch_bounds__(128)
mtv_aft_forward(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                const float* __restrict__ bias, const float* __restrict__ before, const float* __restrict__ after,
                float* __restrict__ y, float* __restrict__ tops, float* __restrict__ inverses, float* __restrict__ means,
                int T, int C, int size, int wide, int rows, int columns, int low, int high, int up, int far,
                long long by_head, long long by_query, long long by_key, long long by_row, long long origin,
                int scanned, int both)
{
    int channels = (C + 127) / 128, c = blockIdx.x % channels * 128 + threadIdx.x, b = blockIdx.x / channels;
    int start = blockIdx.y * TILE, S = rows * columns, H = C / size;
    if (c >= C) return;
    Window window = {wide, rows, columns, low, high, up, far, by_query, by_key, by_row};
    bias += origin + c / size * by_head;
    k += (long long)b * S * H + c / size;
    v += (long long)b * S * C + c;
    Sums sums[TILE];
    int at_y[TILE], at_x[TILE];
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        sums[i] = {LOWEST, 0.f, 0.f};
        at_y[i] = (start + i) / wide;
        at_x[i] = (start + i) % wide;
    }
    int first = far ? 0 : max(start + low, 0), last = far ? columns : min(start + TILE + high, columns);
    for (int row = 0; row < rows; row++) {
        for (int column = first; column < last; column++) {
            int s = row * columns + column;
            float key = k[(long long)s * H], value = v[(long long)s * C], weight;
#pragma unroll
            for (int i = 0; i < TILE; i++)
                if (start + i < T && sees(window, bias, at_y[i], at_x[i], row, column, weight))
                    add(sums[i], key + weight, value, 1.f);
        }
    }
    long long plane = (long long)(gridDim.x / channels) * S * C;
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        int t = start + i;
        if (t >= T) continue;
        if (scanned && t + low > 0) {
            long long at = ((long long)b * S + t + low - 1) * C + c;
            add(sums[i], before[at], before[plane + at], before[2 * plane + at]);
        }
        if (both && t + high + 1 < S) {
            long long at = ((long long)b * S + t + high + 1) * C + c;
            add(sums[i], after[at], after[plane + at], after[2 * plane + at]);
        }
        long long at = ((long long)b * T + t) * C + c;
        float inverse = sums[i].z > 0.f ? 1.f / sums[i].z : 0.f, mean = sums[i].n * inverse;
        y[at] = mean / (1.f + expf(-q[at]));
        tops[at] = sums[i].top;
        inverses[at] = inverse;
        means[at] = mean;
    }
}

// The gradient of q, and p and r.
extern "C" __global__ void __launch_bounds__(256)
mtv_aft_backward_queries(const float* __restrict__ q, const float* __restrict__ g, const float* __restrict__ inverses,
                         const float* __restrict__ means, float* __restrict__ gq, float* __restrict__ p,
                         float* __restrict__ r, long long n)
{
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float e = expf(-fabsf(q[i])), upper = 1.f / (1.f + e), lower = e * upper;  // of the gate: 1 - upper, to all its digits
    gq[i] = g[i] * means[i] * upper * lower;
    float h = g[i] * (q[i] > 0.f ? upper : lower) * inverses[i];
    p[i] = h;
    r[i] = -h * means[i];
}

// What the windows give to their keys; gk is that of every channel.
extern "C" __global__ void __launch_bounds__(128)
mtv_aft_backward_keys(const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ bias,
                      const float* __restrict__ tops, const float* __restrict__ p, const float* __restrict__ r,
                      float* __restrict__ gk, float* __restrict__ gv,
                      int T, int C, int size, int wide, int rows, int columns, int low, int high, int up, int far,
                      long long by_head, long long by_query, long long by_key, long long by_row, long long origin)
{
    int channels = (C + 127) / 128, c = blockIdx.x % channels * 128 + threadIdx.x, b = blockIdx.x / channels;
    int start = blockIdx.y * TILE, S = rows * columns, H = C / size;
    if (c >= C) return;
    Window window = {wide, rows, columns, low, high, up, far, by_query, by_key, by_row};
    bias += origin + c / size * by_head;
    long long first_query = (long long)b * T * C + c;
    float key[TILE], h[TILE], x[TILE];
    int at_y[TILE], at_x[TILE];
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        key[i] = start + i < S ? k[((long long)b * S + start + i) * H + c / size] : 0.f;
        h[i] = x[i] = 0.f;
        at_y[i] = (start + i) / columns;
        at_x[i] = (start + i) % columns;
    }
    int first = far ? 0 : max(start - high, 0), last = far ? wide : min(start + TILE - low, wide);
    for (int row = 0; row < T / wide; row++) {
        for (int column = first; column < last; column++) {
            long long at = first_query + (long long)(row * wide + column) * C;
            float top = tops[at], p_t = p[at], r_t = r[at], weight;
#pragma unroll
            for (int i = 0; i < TILE; i++) {
                if (start + i < S && sees(window, bias, row, column, at_y[i], at_x[i], weight)) {
                    float a = expf(key[i] + weight - top);
                    h[i] += a * p_t;
                    x[i] += a * r_t;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        if (start + i >= S) continue;
        long long at = ((long long)b * S + start + i) * C + c;
        gv[at] = h[i];
        gk[at] = v[at] * h[i] + x[i];
    }
}

// The gradient of a bias that all batches and channels share, of one row: a warp has TILE queries and TILE keys, and adds up.
extern "C" __global__ void __launch_bounds__(128)
mtv_aft_backward_bias(const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ bias,
                      const float* __restrict__ tops, const float* __restrict__ p, const float* __restrict__ r,
                      float* __restrict__ gbias, int B, int T, int S, int C, int low, int high,
                      long long by_query, long long by_key, long long origin)
{
    int lane = threadIdx.x % 32, query = blockIdx.y * TILE;
    int key = max(query + low, 0) + (blockIdx.x * 4 + threadIdx.x / 32) * TILE;
    if (key >= min(query + TILE + high, S)) return;
    float sums[TILE][TILE], weights[TILE][TILE];
#pragma unroll
    for (int i = 0; i < TILE; i++) {
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            int t = query + i, s = key + j;
            bool seen = t < T && s < S && s - t >= low && s - t <= high;
            weights[i][j] = seen ? bias[origin + t * by_query + s * by_key] : -INFINITE;
            sums[i][j] = 0.f;
        }
    }
    for (int b = 0; b < B; b++) {
        for (int c = lane; c < C; c += 32) {
            float keys[TILE], values[TILE];
#pragma unroll
            for (int j = 0; j < TILE; j++) {
                long long at = ((long long)b * S + min(key + j, S - 1)) * C + c;
                keys[j] = k[at];
                values[j] = v[at];
            }
#pragma unroll
            for (int i = 0; i < TILE; i++) {
                long long at = ((long long)b * T + min(query + i, T - 1)) * C + c;
                float top = tops[at], p_t = p[at], r_t = r[at];
#pragma unroll
                for (int j = 0; j < TILE; j++)
                    if (weights[i][j] > -INFINITE) sums[i][j] += expf(keys[j] + weights[i][j] - top) * (p_t * values[j] + r_t);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TILE; i++) {
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            float total = warp_sum(sums[i][j]);
            if (lane == 0 && weights[i][j] > -INFINITE) gbias[origin + (query + i) * by_query + (key + j) * by_key] = total;
        }
    }
}

// The gradient of biases that all positions share, taps[M N]: sums[chunks, M N, C] over `chunk` queries of all batches each.
extern "C" __global__ void __launch_bounds__(128)
mtv_aft_backward_taps(const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ bias,
                      const float* __restrict__ tops, const float* __restrict__ p, const float* __restrict__ r,
                      float* __restrict__ sums, int B, int T, int C, int size, int wide, int rows, int columns,
                      int high, int M, int N, int chunk)
{
    int channels = (C + 127) / 128, c = blockIdx.x % channels * 128 + threadIdx.x, tiles = (N + TILE - 1) / TILE;
    int tile = blockIdx.x / channels, up = tile / tiles, tap = tile % tiles * TILE, H = C / size, S = rows * columns;
    if (c >= C) return;
    float taps[TILE], totals[TILE];
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        taps[i] = tap + i < N ? bias[((long long)(c / size) * M + up) * N + tap + i] : 0.f;
        totals[i] = 0.f;
    }
    long long end = min((long long)B * T, ((long long)blockIdx.y + 1) * chunk);
    for (long long query = (long long)blockIdx.y * chunk; query < end; query++) {
        int b = query / T, t = query % T, row = t / wide + M / 2 - up, column = t % wide + high - tap;
        if (row < 0 || row >= rows) continue;
        float top = tops[query * C + c], p_t = p[query * C + c], r_t = r[query * C + c];
#pragma unroll
        for (int i = 0; i < TILE; i++) {
            if (tap + i >= N || column - i < 0 || column - i >= columns) continue;
            long long at = (long long)b * S + row * columns + column - i;
            totals[i] += expf(k[at * H + c / size] + taps[i] - top) * (p_t * v[at * C + c] + r_t);
        }
    }
#pragma unroll
    for (int i = 0; i < TILE; i++)
        if (tap + i < N) sums[(((long long)blockIdx.y * M + up) * N + tap + i) * C + c] = totals[i];
}

// bias[t, j] = u_t . v_s for s = t + newest - j, and 0 where there is no such row.
extern "C" __global__ void __launch_bounds__(128)
mtv_aft_band_forward(const float* __restrict__ u, const float* __restrict__ v, float* __restrict__ bias,
                     int T, int S, int R, int W, int newest)
{
    long long at = blockIdx.x * 128ll + threadIdx.x;
    if (at >= (long long)T * W) return;
    int t = at / W, s = t + newest - (int)(at % W);
    float total = 0.f;
    if (s >= 0 && s < S)
        for (int c = 0; c < R; c++) total += u[(long long)t * R + c] * v[(long long)s * R + c];
    bias[at] = total;
}

// gu[t] = the sum of g[t, j] v_s; with `turned` gv[s] = that of g[t, j] u_t, for `rows` of the one and `others` of the other.
extern "C" __global__ void __launch_bounds__(128)
mtv_aft_band_backward(const float* __restrict__ g, const float* __restrict__ other, float* __restrict__ out,
                      int rows, int others, int R, int W, int newest, int turned)
{
    long long at = blockIdx.x * 128ll + threadIdx.x;
    if (at >= (long long)rows * R) return;
    int row = at / R, c = at % R;
    float total = 0.f;
    for (int j = 0; j < W; j++) {
        int pair = turned ? row - newest + j : row + newest - j;
        if (pair >= 0 && pair < others) total += g[(long long)(turned ? pair : row) * W + j] * other[(long long)pair * R + c];
    }
    out[at] = total;
}
