// Multi-head attention without ever storing a T x S matrix: Dao et al. (arXiv 2205.14135), and for backward arXiv 2307.08691.
//
// Options: WIDTH, a multiple of 32 that the channels of keys and of values fit into; QUERIES and KEYS, the sizes of a tile;
// THREADS = 16 KEYS / 4.
//
// A block holds a tile of one side in shared memory and walks over the tiles of the other. Its threads form a grid of 16 rows
// by KEYS / 4 columns: in a tile of scores, thread (ty, tx) computes those of the queries ty, ty + 16, ... with the four keys
// from 4 tx on, which are also the four words of one Philox counter. The keys of a tile lie in the order of PLACE, so that at
// any time the threads of a warp read different banks. One query's scores belong to the threads of one warp.
//
//     forward    S = Q K^T               P = exp(S - max)                  Y = P V / sum
//     backward   S = Q K^T, gP = gY V^T  gS = P (gP - rowsum(gY Y))        gQ = gS K, gK = gS^T Q, gV = P^T gY
//
// The forward pass saves two numbers a query, the maximum of its scores and the inverse of the sum. Backward has two kernels,
// one that owns queries and one that owns keys: each computes the scores again, and no sum needs an atomic. The block that owns
// keys walks over the queries of all heads that share them. Pairs of tiles of which nothing is seen are skipped.
// Hidden scores are -inf, whose exponential is an exact 0; no difference of two infinities is formed.
#include "kernel.cuh"

#define LINE (WIDTH + 4)             // floats from one row of a tile to the next: rows begin in different banks
#define COLUMNS (KEYS / 4)           // of threads
#define GROUPS (WIDTH / 4 / COLUMNS) // of four channels that a thread computes of an output row
#define PLACE(key) ((key) % 4 * COLUMNS + (key) / 4)
#define FEWER (QUERIES / 2)          // queries in a tile of the backward kernels

// Where a thread stands in the block.
#define TX (threadIdx.x % COLUMNS)
#define TY (threadIdx.x / COLUMNS)

__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// ROWS rows from row `first` on of a matrix [rows, width] into a tile, zeros around them; whether a value is not finite.
template <int ROWS, bool PLACED>
__device__ __forceinline__ bool fill(float (*tile)[LINE], const float* __restrict__ from, long long stride, int first, int rows,
                                     int width, float scale)
{
    bool bad = false;
    for (int e = threadIdx.x; e < ROWS * WIDTH; e += THREADS) {
        int r = e / WIDTH, c = e % WIDTH;
        float v = r < rows - first && c < width ? from[(first + r) * stride + c] * scale : 0.f;
        bad |= v * 0.f != 0.f;
        tile[PLACED ? PLACE(r) : r][c] = v;
    }
    return bad;
}

// scores[r][i]: of query TY + 16 r of one tile with key 4 TX + i of the other.
template <int R> __device__ __forceinline__ void products(float (&scores)[R][4], float (*queries)[LINE], float (*keys)[LINE])
{
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[r][i] = 0.f;
#pragma unroll 1
    for (int c = 0; c < WIDTH; c += 4) {
        float4 b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = *(const float4*)&keys[TX + COLUMNS * i][c];
#pragma unroll
        for (int r = 0; r < R; r++) {
            float4 a = *(const float4*)&queries[TY + 16 * r][c];
#pragma unroll
            for (int i = 0; i < 4; i++) scores[r][i] += dot(a, b[i]);
        }
    }
}

// sums[r][.] += weights[row][j] times row j of the other tile, for row = TY + 16 r and j < TERMS, a multiple of 4. If that
// tile has a value that is not finite, a zero hides it: 0 * NaN and 0 * inf count as 0.
template <int R, int TERMS, int PITCH, bool PLACED>
__device__ __forceinline__ void weigh(float (&sums)[R][GROUPS][4], float (*weights)[PITCH], float (*other)[LINE], bool bad)
{
#pragma unroll 1
    for (int j = 0; j < TERMS; j += 4) {
        float w[R][4];
#pragma unroll
        for (int r = 0; r < R; r++) {
            float4 four = *(const float4*)&weights[TY + 16 * r][j];
            w[r][0] = four.x;
            w[r][1] = four.y;
            w[r][2] = four.z;
            w[r][3] = four.w;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* line = other[PLACED ? PLACE(j + i) : j + i];
#pragma unroll
            for (int k = 0; k < GROUPS; k++) {
                float4 b = *(const float4*)&line[4 * (TX + COLUMNS * k)];
#pragma unroll
                for (int r = 0; r < R; r++) {
                    if (bad && w[r][i] == 0.f) continue;
                    sums[r][k][0] += w[r][i] * b.x;
                    sums[r][k][1] += w[r][i] * b.y;
                    sums[r][k][2] += w[r][i] * b.z;
                    sums[r][k][3] += w[r][i] * b.w;
                }
            }
        }
    }
}

template <int R> __device__ __forceinline__ void clear(float (&sums)[R][GROUPS][4])
{
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int k = 0; k < GROUPS; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[r][k][i] = 0.f;
}

// One row of sums into an output row of `width` channels.
__device__ __forceinline__ void put(float* __restrict__ row, const float (&sums)[GROUPS][4], int width, float scale)
{
#pragma unroll
    for (int k = 0; k < GROUPS; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int c = 4 * (TX + COLUMNS * k) + i;
            if (c < width) row[c] = sums[k][i] * scale;
        }
}

// What decides which of the S keys a query of one head sees: query i stands at i + shift, key j at j.
struct Rule {
    const bool* mask;  // of this head
    long long down, along;
    int T, S, causal, masked, shift, window, sinks, segment, dilation, offset;
};
__device__ __forceinline__ bool active(const Rule& rule, int position)
{
    int at = (rule.segment ? position % rule.segment : position) % rule.dilation;
    return (at < 0 ? at + rule.dilation : at) == rule.offset;
}
__device__ __forceinline__ bool seen(const Rule& rule, int query, int key)
{
    int p = query + rule.shift;
    if (query >= rule.T || key >= rule.S || (rule.causal && key > p)) return false;
    if (key >= rule.sinks && abs(p - key) >= rule.window) return false;
    if (rule.segment && (p < 0 || p / rule.segment != key / rule.segment)) return false;
    if (rule.dilation > 1 && !(active(rule, p) && active(rule, key))) return false;
    return !rule.masked || rule.mask[query * rule.down + key * rule.along];
}
// Whether none of `queries` queries from `query` on sees one of `keys` keys from `key` on, whatever the mask.
__device__ __forceinline__ bool apart(const Rule& rule, int query, int queries, int key, int keys)
{
    int first = query + rule.shift, last = first + queries - 1, end = key + keys - 1;
    if (rule.causal && key > last) return true;
    if (key >= rule.sinks && (first - end >= rule.window || key - last >= rule.window)) return true;
    if (!rule.segment) return false;
    return last < 0 || end / rule.segment < max(first, 0) / rule.segment || key / rule.segment > last / rule.segment;
}
__device__ __forceinline__ int offset_of(int head, int heads, int dilation, int block)
{
    return block ? head / ((heads - 1) / dilation + 1) : head % dilation;
}

// The factors of dropout of the weights of a query with the keys from `key` on: 0 or `factor`.
__device__ __forceinline__ void keep(float (&factors)[4], int query, int key, int head, unsigned long long threshold,
                                     float factor, unsigned long long seed)
{
    uint4 words = philox((unsigned)query, (unsigned)key / 4u, (unsigned)head, 1u, seed);
    factors[0] = words.x >= threshold ? factor : 0.f;
    factors[1] = words.y >= threshold ? factor : 0.f;
    factors[2] = words.z >= threshold ? factor : 0.f;
    factors[3] = words.w >= threshold ? factor : 0.f;
}

extern "C" __global__ void __launch_bounds__(THREADS)
mtv_attention_forward(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                      const bool* __restrict__ mask, const float* __restrict__ sink, const float* __restrict__ inclines,
                      float* __restrict__ y, float* __restrict__ stats,
                      int H, int T, int S, int K, int V, int causal, int masked, float scale,
                      int G, int window, int sinks, int segment, int dilation, int block,
                      int dropping, unsigned long long threshold, float factor, unsigned long long seed,
                      long long q_b, long long q_h, long long q_t, long long k_b, long long k_h, long long k_t,
                      long long v_b, long long v_h, long long v_t, long long m_b, long long m_h, long long m_t, long long m_s)
{
    constexpr int R = QUERIES / 16;
    __shared__ __align__(16) float queries[QUERIES][LINE], keys[KEYS][LINE], values[KEYS][LINE], weights[QUERIES][KEYS + 4];
    int head = blockIdx.x, b = head / H, h = head % H, query = (gridDim.y - 1 - blockIdx.y) * QUERIES;  // long ones first
    Rule rule = {mask + (b * m_b + h * m_h), m_t, m_s, T, S, causal, masked, S - T, window, sinks, segment, dilation,
                 offset_of(h, H, dilation, block)};
    q += b * q_b + h * q_h;
    int group = (int)((long long)h * G / H);
    k += b * k_b + group * k_h;
    v += b * v_b + group * v_h;
    float alone = sink[h], incline = inclines[h];
    fill<QUERIES, false>(queries, q, q_t, query, T, K, scale);
    float top[R], total[R], sums[R][GROUPS][4];
    clear(sums);
#pragma unroll
    for (int r = 0; r < R; r++) {
        top[r] = alone;
        total[r] = 0.f;
    }
    for (int key = 0; key < S; key += KEYS) {
        if (apart(rule, query, QUERIES, key, KEYS)) continue;
        __syncthreads();  // the tiles before are done with
        fill<KEYS, true>(keys, k, k_t, key, S, K, 1.f);
        bool bad = fill<KEYS, false>(values, v, v_t, key, S, V, 1.f);
        bad = __syncthreads_or(bad);
        float scores[R][4];
        products(scores, queries, keys);
#pragma unroll
        for (int r = 0; r < R; r++) {
            int row = TY + 16 * r;
            float before = top[r], highest = -INFINITE, factors[4] = {1.f, 1.f, 1.f, 1.f};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int j = key + 4 * (int)TX + i;
                scores[r][i] = seen(rule, query + row, j) ? scores[r][i] + incline * (j - (query + row + rule.shift)) : -INFINITE;
                highest = fmaxf(highest, scores[r][i]);
            }
            top[r] = fmaxf(before, warp_max<COLUMNS>(highest));
            float shift = top[r] == -INFINITE ? 0.f : top[r], fade = expf(before - shift);
            if (dropping) keep(factors, query + row, key + 4 * TX, head, threshold, factor, seed);
            total[r] *= fade;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float p = expf(scores[r][i] - shift);
                total[r] += p;
                weights[row][4 * TX + i] = p * factors[i];
            }
#pragma unroll
            for (int k = 0; k < GROUPS; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[r][k][i] *= fade;
        }
        __syncwarp();
        weigh<R, KEYS, KEYS + 4, false>(sums, weights, values, bad);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        int i = query + TY + 16 * r;
        float shift = top[r] == -INFINITE ? 0.f : top[r], sum = warp_sum<COLUMNS>(total[r]) + expf(alone - shift);
        float inverse = sum == 0.f ? 0.f : 1.f / sum;
        if (i >= T) continue;
        put(y + (((long long)b * T + i) * H + h) * V, sums[r], V, inverse);
        if (TX == 0) {
            stats[2ll * head * T + i] = shift;
            stats[(2ll * head + 1) * T + i] = inverse;
        }
    }
}

// gQ, and in dots [B H, T] the sums of gY Y over channels less the gradient of lse, which the other kernel needs.
extern "C" __global__ void __launch_bounds__(THREADS)
mtv_attention_backward_queries(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                               const bool* __restrict__ mask, const float* __restrict__ inclines, const float* __restrict__ y,
                               const float* __restrict__ stats,
                               const float* __restrict__ g, const float* __restrict__ g_lse, float* __restrict__ gq,
                               float* __restrict__ dots,
                               int H, int T, int S, int K, int V, int causal, int masked, float scale,
                               int G, int window, int sinks, int segment, int dilation, int block,
                               int dropping, unsigned long long threshold, float factor, unsigned long long seed,
                               long long q_b, long long q_h, long long q_t, long long k_b, long long k_h, long long k_t,
                               long long v_b, long long v_h, long long v_t, long long m_b, long long m_h, long long m_t,
                               long long m_s, long long g_b, long long g_h, long long g_t)
{
    constexpr int R = FEWER / 16;
    __shared__ __align__(16) float queries[FEWER][LINE], grads[FEWER][LINE], keys[KEYS][LINE], values[KEYS][LINE],
        slopes[FEWER][KEYS + 4];
    int head = blockIdx.x, b = head / H, h = head % H, query = (gridDim.y - 1 - blockIdx.y) * FEWER;
    Rule rule = {mask + (b * m_b + h * m_h), m_t, m_s, T, S, causal, masked, S - T, window, sinks, segment, dilation,
                 offset_of(h, H, dilation, block)};
    int group = (int)((long long)h * G / H);
    k += b * k_b + group * k_h;
    v += b * v_b + group * v_h;
    float incline = inclines[h];
    fill<FEWER, false>(queries, q + (b * q_b + h * q_h), q_t, query, T, K, scale);
    fill<FEWER, false>(grads, g + (b * g_b + h * g_h), g_t, query, T, V, 1.f);
    __syncthreads();
    float shift[R], inverse[R], rest[R], sums[R][GROUPS][4];
    clear(sums);
#pragma unroll
    for (int r = 0; r < R; r++) {
        int row = TY + 16 * r, i = query + row;
        shift[r] = i < T ? stats[2ll * head * T + i] : 0.f;
        inverse[r] = i < T ? stats[(2ll * head + 1) * T + i] : 0.f;
        rest[r] = 0.f;
        if (i < T)
            for (int c = TX; c < V; c += COLUMNS) rest[r] += grads[row][c] * y[(((long long)b * T + i) * H + h) * V + c];
        rest[r] = warp_sum<COLUMNS>(rest[r]) - (i < T ? g_lse[(long long)head * T + i] : 0.f);
        if (TX == 0 && i < T) dots[(long long)head * T + i] = rest[r];
    }
    for (int key = 0; key < S; key += KEYS) {
        if (apart(rule, query, FEWER, key, KEYS)) continue;
        __syncthreads();  // the tiles before are done with
        bool bad = fill<KEYS, true>(keys, k, k_t, key, S, K, 1.f);
        fill<KEYS, true>(values, v, v_t, key, S, V, 1.f);
        bad = __syncthreads_or(bad);
        float scores[R][4], slope[R][4];
        products(scores, queries, keys);
        products(slope, grads, values);
#pragma unroll
        for (int r = 0; r < R; r++) {
            int row = TY + 16 * r;
            float factors[4] = {1.f, 1.f, 1.f, 1.f};
            if (dropping) keep(factors, query + row, key + 4 * TX, head, threshold, factor, seed);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float p = 0.f;
                int j = key + 4 * (int)TX + i;
                if (seen(rule, query + row, j))
                    p = expf(scores[r][i] + incline * (j - (query + row + rule.shift)) - shift[r]) * inverse[r];
                slopes[row][4 * TX + i] = p != 0.f ? p * ((factors[i] != 0.f ? slope[r][i] * factors[i] : 0.f) - rest[r]) : 0.f;
            }
        }
        __syncwarp();
        weigh<R, KEYS, KEYS + 4, true>(sums, slopes, keys, bad);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        int i = query + TY + 16 * r;
        if (i < T) put(gq + (((long long)b * T + i) * H + h) * K, sums[r], K, scale);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
mtv_attention_backward_keys(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                            const bool* __restrict__ mask, const float* __restrict__ inclines, const float* __restrict__ stats,
                            const float* __restrict__ g,
                            const float* __restrict__ dots, float* __restrict__ gk, float* __restrict__ gv,
                            int H, int T, int S, int K, int V, int causal, int masked, float scale,
                            int G, int window, int sinks, int segment, int dilation, int block,
                            int dropping, unsigned long long threshold, float factor, unsigned long long seed,
                            long long q_b, long long q_h, long long q_t, long long k_b, long long k_h, long long k_t,
                            long long v_b, long long v_h, long long v_t, long long m_b, long long m_h, long long m_t,
                            long long m_s, long long g_b, long long g_h, long long g_t)
{
    constexpr int R = FEWER / 16, N = KEYS / 16;
    __shared__ __align__(16) float queries[FEWER][LINE], grads[FEWER][LINE], keys[KEYS][LINE], values[KEYS][LINE],
        weights[KEYS][FEWER + 4], slopes[KEYS][FEWER + 4];
    int b = blockIdx.x / G, group = blockIdx.x % G, key = blockIdx.y * KEYS, share = H / G;
    fill<KEYS, true>(keys, k + (b * k_b + group * k_h), k_t, key, S, K, 1.f);
    fill<KEYS, true>(values, v + (b * v_b + group * v_h), v_t, key, S, V, 1.f);
    float sums_k[N][GROUPS][4], sums_v[N][GROUPS][4];
    clear(sums_k);
    clear(sums_v);
    for (int h = group * share, query = 0; h < (group + 1) * share; query + FEWER < T ? query += FEWER : (h++, query = 0)) {
        int head = b * H + h;
        Rule rule = {mask + (b * m_b + h * m_h), m_t, m_s, T, S, causal, masked, S - T, window, sinks, segment, dilation,
                     offset_of(h, H, dilation, block)};
        if (apart(rule, query, FEWER, key, KEYS)) continue;
        float incline = inclines[h];
        __syncthreads();  // the tiles before are done with
        bool bad_q = fill<FEWER, false>(queries, q + (b * q_b + h * q_h), q_t, query, T, K, scale);
        bool bad_g = fill<FEWER, false>(grads, g + (b * g_b + h * g_h), g_t, query, T, V, 1.f);
        bool bad = __syncthreads_or(bad_q || bad_g);
        float scores[R][4], slope[R][4];
        products(scores, queries, keys);
        products(slope, grads, values);
#pragma unroll
        for (int r = 0; r < R; r++) {
            int row = TY + 16 * r, at = query + row;
            bool there = at < T;
            float shift = there ? stats[2ll * head * T + at] : 0.f, inverse = there ? stats[(2ll * head + 1) * T + at] : 0.f;
            float rest = there ? dots[(long long)head * T + at] : 0.f, factors[4] = {1.f, 1.f, 1.f, 1.f};
            if (dropping) keep(factors, at, key + 4 * TX, head, threshold, factor, seed);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float p = 0.f;
                int j = key + 4 * (int)TX + i;
                if (seen(rule, at, j)) p = expf(scores[r][i] + incline * (j - (at + rule.shift)) - shift) * inverse;
                weights[4 * TX + i][row] = p * factors[i];
                slopes[4 * TX + i][row] = p != 0.f ? p * ((factors[i] != 0.f ? slope[r][i] * factors[i] : 0.f) - rest) : 0.f;
            }
        }
        __syncthreads();
        weigh<N, FEWER, FEWER + 4, false>(sums_k, slopes, queries, bad);
        weigh<N, FEWER, FEWER + 4, false>(sums_v, weights, grads, bad);
    }
#pragma unroll
    for (int r = 0; r < N; r++) {
        int j = key + TY + 16 * r;
        if (j >= S) continue;
        put(gk + (((long long)b * S + j) * G + group) * K, sums_k[r], K, 1.f);
        put(gv + (((long long)b * S + j) * G + group) * V, sums_v[r], V, 1.f);
    }
}
