// lsh_attention: a warp for each query, or for each key; see cpu.py for what is computed.
//
// In the order of a round, what a query sees is one stretch, from `first` up to `last`, and so are the queries that see a key.
// The lanes of a warp take 32 neighbours of such a stretch at a time: first each lane computes the weight of one pair, then
// each has some channels, and the weights come to it by shuffles. Where the first piece of the order wraps, there is a second
// stretch, the end of an order. No sum needs an atomic: backward has one kernel for queries and one for keys.
#include "kernel.cuh"

#define WIDE 128  // channels at most
#define GROUPS 4  // of 32 channels
#define WARPS 4

// What decides who sees whom in one head: arrays [R, S] of it.
struct Head {
    const long long* order;
    const long long* buckets;
    const int* place;
    const int* first;
    const int* last;
    int S, R, chunk, checked, wrap, counting, causal;
};
__device__ __forceinline__ int tail_of(const Head& head) { return head.chunk ? (head.S - 1) / head.chunk * head.chunk : 0; }
__device__ __forceinline__ int source_of(const Head& head, int r) { return head.wrap == 2 ? (r + head.R - 1) % head.R : r; }

__device__ __forceinline__ bool may_see(const Head& head, int query, int key)
{
    return (key < query) | ((key > query) & !head.causal);
}
__device__ __forceinline__ bool same_bucket(const Head& head, int r, int query, int key)
{
    return !head.checked | (head.buckets[(long long)r * head.S + query] == head.buckets[(long long)r * head.S + key]);
}
// Whether the stretch before the first piece is of the buckets that a query may see there.
__device__ __forceinline__ bool wraps_to(const Head& head, int r, int query, int key)
{
    return !head.checked | ((source_of(head, r) == r) & same_bucket(head, r, query, key));
}
// What a pair's weight is multiplied by: 1 over the number of rounds in which it is seen, or 1.
__device__ __forceinline__ float share_of(const Head& head, int query, int key)
{
    if (!head.counting) return 1.f;
    int count = 0;
#pragma unroll 1
    for (int r = 0; r < head.R; r++) {
        long long row = (long long)r * head.S;
        int at = head.place[row + key];
        count += (head.first[row + query] <= at) & (at < head.last[row + query]) & same_bucket(head, r, query, key);
        count += (head.wrap != 0) & (head.place[row + query] < head.chunk) & wraps_to(head, r, query, key)
            & (head.place[(long long)source_of(head, r) * head.S + key] >= tail_of(head));
    }
    float root = rsqrtf((float)max(count, 1));  // a division would be a function that is called
    return root * root;
}

__device__ __forceinline__ Head head_of(const long long* order, const long long* buckets, const int* place, const int* first,
                                        const int* last, long long number, int S, int R, int chunk, int checked, int wrap,
                                        int counting, int causal)
{
    long long at = number * R * S;
    Head head = {order + at, buckets + at, place + at, first + at, last + at, S, R, chunk, checked, wrap, counting, causal};
    return head;
}

// 1 / sqrt(|k|^2 + K eps), by one lane.
__device__ __forceinline__ float inverse_norm(const float* __restrict__ k, int K, float eps)
{
    float squares = K * eps;
#pragma unroll 4
    for (int c = 0; c < K; c++) squares += k[c] * k[c];
    return rsqrtf(squares);
}
__device__ __forceinline__ float dot(const float* __restrict__ a, const float* __restrict__ b, int n)
{
    float sum = 0.f;
#pragma unroll 4
    for (int c = 0; c < n; c++) sum += a[c] * b[c];
    return sum;
}
// A row into memory that the lanes of a warp share.
__device__ __forceinline__ void share(float* __restrict__ to, const float* __restrict__ from, int n, float scale)
{
#pragma unroll 1
    for (int c = threadIdx.x % 32; c < n; c += 32) to[c] = from[c] * scale;
}
// sums[g] += the weights of the 32 lanes times channels lane + 32 g of the rows that they point to.
__device__ __forceinline__ void weigh(float (&sums)[GROUPS], float weight, const float* __restrict__ base, long long stride,
                                      int row, int n)
{
#pragma unroll 1
    for (int j = 0; j < 32; j++) {
        float w = __shfl_sync(FULL, weight, j);
        int at = __shfl_sync(FULL, row, j);
        if (w == 0.f) continue;  // what is hidden may be NaN
        const float* line = base + at * stride;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            int c = threadIdx.x % 32 + 32 * g;
            if (c < n) sums[g] += w * line[c];
        }
    }
}

// The place of each position in the order of its round, what it sees, and from where to where in it stand the queries that see
// it (seen_from, seen_to). A thread for each of [B H R S]; `order` sorts `buckets`.
extern "C" __global__ void __launch_bounds__(128)
mtv_lsh_attention_lay_out(const long long* __restrict__ order, const long long* __restrict__ buckets, int* __restrict__ place,
                          int* __restrict__ first, int* __restrict__ last, int* __restrict__ seen_from, int* __restrict__ seen_to,
                          long long n, int S, int chunk, int window, int causal)
{
    long long i = blockIdx.x * 128ll + threadIdx.x, row = i / S * S;
    if (i >= n) return;
    int p = i % S;
    long long at = row + order[i], label = buckets[at];
    int begin, end, from, to;
    if (chunk) {
        from = p / chunk * chunk;
        begin = max(from - chunk, 0);
        end = min(from + chunk, S);
        to = min((long long)S, from + 2ll * chunk);
    } else {
        int low = 0, high = p;  // the first place with this label lies in [low, high]
        while (low < high) {
            int middle = (low + high) / 2;
            if (buckets[row + order[row + middle]] < label) low = middle + 1;
            else high = middle;
        }
        begin = low;
        low = p + 1;
        high = S;  // the first place with a larger label lies in [low, high]
        while (low < high) {
            int middle = (low + high) / 2;
            if (buckets[row + order[row + middle]] > label) high = middle;
            else low = middle + 1;
        }
        end = low;
        if (window) {
            begin = max(begin, p - window + 1);
            end = min((long long)end, (long long)p + window);
        }
        from = causal ? p + 1 : begin;
        to = end;
        if (causal) end = p;
    }
    place[at] = p;
    first[at] = begin;
    last[at] = end;
    seen_from[at] = from;
    seen_to[at] = to;
}

extern "C" __global__ void __launch_bounds__(128)
mtv_lsh_attention_forward(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                          const long long* __restrict__ order, const long long* __restrict__ buckets,
                          const int* __restrict__ place, const int* __restrict__ first, const int* __restrict__ last,
                          float* __restrict__ y, float* __restrict__ stats, int H, int T, int S, int K, int V, int R,
                          int chunk, int checked, int wrap, int counting, int causal, float scale, float eps,
                          long long q_b, long long q_h, long long q_t, long long k_b, long long k_h, long long k_t,
                          long long v_b, long long v_h, long long v_t)
{
    __shared__ float queries[WARPS][WIDE];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int number = blockIdx.x, i = blockIdx.y * WARPS + warp;
    if (i >= T) return;
    int b = number / H, h = number % H, t = i, query = S - T + t;
    Head head = head_of(order, buckets, place, first, last, number, S, R, chunk, checked, wrap, counting, causal);
    k += b * k_b + h * k_h;
    v += b * v_b + h * v_h;
    share(queries[warp], q + (b * q_b + h * q_h + t * q_t), K, scale);
    __syncwarp();
    float top = -INFINITE, total = 0.f, sums[GROUPS] = {};
#pragma unroll 1
    for (int r = 0; r < R; r++)
#pragma unroll 1
        for (int wrapped = 0; wrapped < 2; wrapped++) {
            long long row = (long long)r * S;
            int begin = head.first[row + query], end = head.last[row + query], source = r;
            if (wrapped) {
                if (!wrap || head.place[row + query] >= chunk) continue;
                begin = tail_of(head);
                end = S;
                source = source_of(head, r);
            }
            for (int base = begin; base < end; base += 32) {
                int key = base + lane < end ? (int)head.order[(long long)source * S + base + lane] : query;
                bool seen = may_see(head, query, key);
                seen = seen & (wrapped ? wraps_to(head, r, query, key) : same_bucket(head, r, query, key));
                const float* line = k + key * k_t;
                float score = dot(queries[warp], line, K) * inverse_norm(line, K, eps);
                if (!seen) score = -INFINITE;
                float before = top;
                top = fmaxf(top, warp_max(score));
                float shift = top == -INFINITE ? 0.f : top, fade = expf(before - shift);
                float weight = seen ? expf(score - shift) * share_of(head, query, key) : 0.f;
                total = total * fade + warp_sum(weight);
#pragma unroll
                for (int g = 0; g < GROUPS; g++) sums[g] *= fade;
                weigh(sums, weight, v, v_t, key, V);
            }
        }
    float inverse = total == 0.f ? 0.f : 1.f / total;
    y += (((long long)b * T + t) * H + h) * V;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        int c = lane + 32 * g;
        if (c < V) y[c] = total == 0.f ? v[query * v_t + c] : sums[g] * inverse;  // itself, where it sees nothing
    }
    if (lane == 0) {
        stats[2ll * number * T + t] = top == -INFINITE ? 0.f : top;
        stats[(2ll * number + 1) * T + t] = inverse;
    }
}

// gQ, and in dots [B H, T] the sums of gY Y over channels, which the other kernel needs.
extern "C" __global__ void __launch_bounds__(128)
mtv_lsh_attention_backward_queries(
    const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v, const long long* __restrict__ order,
    const long long* __restrict__ buckets, const int* __restrict__ place, const int* __restrict__ first,
    const int* __restrict__ last, const float* __restrict__ y, const float* __restrict__ stats, const float* __restrict__ g,
    float* __restrict__ gq, float* __restrict__ dots, int H, int T, int S, int K, int V, int R, int chunk, int checked,
    int wrap, int counting, int causal, float scale, float eps, long long q_b, long long q_h, long long q_t, long long k_b,
    long long k_h, long long k_t, long long v_b, long long v_h, long long v_t, long long g_b, long long g_h, long long g_t)
{
    __shared__ float queries[WARPS][WIDE], grads[WARPS][WIDE];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int number = blockIdx.x, i = blockIdx.y * WARPS + warp;
    if (i >= T) return;
    int b = number / H, h = number % H, t = i, query = S - T + t;
    Head head = head_of(order, buckets, place, first, last, number, S, R, chunk, checked, wrap, counting, causal);
    k += b * k_b + h * k_h;
    v += b * v_b + h * v_h;
    y += (((long long)b * T + t) * H + h) * V;
    share(queries[warp], q + (b * q_b + h * q_h + t * q_t), K, scale);
    share(grads[warp], g + (b * g_b + h * g_h + t * g_t), V, 1.f);
    __syncwarp();
    float own = 0.f, sums[GROUPS] = {}, shift = stats[2ll * number * T + t], inverse = stats[(2ll * number + 1) * T + t];
#pragma unroll 1
    for (int c = lane; c < V; c += 32) own += grads[warp][c] * y[c];
    own = warp_sum(own);
#pragma unroll 1
    for (int r = 0; r < R && inverse != 0.f; r++)
#pragma unroll 1
        for (int wrapped = 0; wrapped < 2; wrapped++) {
            long long row = (long long)r * S;
            int begin = head.first[row + query], end = head.last[row + query], source = r;
            if (wrapped) {
                if (!wrap || head.place[row + query] >= chunk) continue;
                begin = tail_of(head);
                end = S;
                source = source_of(head, r);
            }
            for (int base = begin; base < end; base += 32) {
                int key = base + lane < end ? (int)head.order[(long long)source * S + base + lane] : query;
                bool seen = may_see(head, query, key);
                seen = seen & (wrapped ? wraps_to(head, r, query, key) : same_bucket(head, r, query, key));
                const float* line = k + key * k_t;  // there is a key to read also where none is seen
                float norm = inverse_norm(line, K, eps), score = dot(queries[warp], line, K) * norm - shift;
                float p = seen ? expf(score) * inverse * share_of(head, query, key) : 0.f;
                float slope = dot(grads[warp], v + key * v_t, V) - own;
                slope = p != 0.f ? p * slope * norm : 0.f;
                weigh(sums, slope, k, k_t, key, K);
            }
        }
    gq += (((long long)b * T + t) * H + h) * K;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        int c = lane + 32 * group;
        if (c < K) gq[c] = sums[group] * scale;
    }
    if (lane == 0) dots[(long long)number * T + t] = own;
}

extern "C" __global__ void __launch_bounds__(128)
mtv_lsh_attention_backward_keys(
    const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v, const long long* __restrict__ order,
    const long long* __restrict__ buckets, const int* __restrict__ place, const int* __restrict__ first,
    const int* __restrict__ last, const int* __restrict__ seen_from, const int* __restrict__ seen_to,
    const float* __restrict__ stats, const float* __restrict__ g, const float* __restrict__ dots, float* __restrict__ gk,
    float* __restrict__ gv, int H, int T, int S, int K, int V, int R, int chunk, int checked, int wrap, int counting,
    int causal, float scale, float eps, long long q_b, long long q_h, long long q_t, long long k_b, long long k_h, long long k_t,
    long long v_b, long long v_h, long long v_t, long long g_b, long long g_h, long long g_t)
{
    __shared__ float keys[WARPS][WIDE], values[WARPS][WIDE];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int number = blockIdx.x, i = blockIdx.y * WARPS + warp;
    if (i >= S) return;
    int b = number / H, h = number % H, key = i, start = S - T;
    Head head = head_of(order, buckets, place, first, last, number, S, R, chunk, checked, wrap, counting, causal);
    seen_from += (long long)number * R * S;
    seen_to += (long long)number * R * S;
    q += b * q_b + h * q_h;
    g += b * g_b + h * g_h;
    k += b * k_b + h * k_h + key * k_t;
    float norm = inverse_norm(k, K, eps);
    share(keys[warp], k, K, norm);
    share(values[warp], v + (b * v_b + h * v_h + key * v_t), V, 1.f);
    __syncwarp();
    float sums_k[GROUPS] = {}, sums_v[GROUPS] = {};
#pragma unroll 1
    for (int r = 0; r < R; r++)
#pragma unroll 1
        for (int wrapped = 0; wrapped < 2; wrapped++) {
            long long row = (long long)r * S;
            int begin = seen_from[row + key], end = seen_to[row + key];
            if (wrapped) {
                if (!wrap || head.place[(long long)source_of(head, r) * S + key] < tail_of(head)) continue;
                begin = 0;
                end = min(chunk, S);
            }
            for (int base = begin; base < end; base += 32) {
                int query = base + lane < end ? (int)head.order[row + base + lane] : key, t = max(query - start, 0);
                bool seen = (query >= start) & may_see(head, query, key);
                seen = seen & (wrapped ? wraps_to(head, r, query, key) : same_bucket(head, r, query, key));
                float inverse = stats[(2ll * number + 1) * T + t], score = dot(q + t * q_t, keys[warp], K) * scale;
                float weight = expf(score - stats[2ll * number * T + t]) * inverse * share_of(head, query, key);
                weight = seen && inverse != 0.f ? weight : 0.f;
                float slope = dot(g + t * g_t, values[warp], V) - dots[(long long)number * T + t];
                slope = weight != 0.f ? weight * slope * scale : 0.f;
                weigh(sums_k, slope, q, q_t, t, K);
                weigh(sums_v, weight, g, g_t, t, V);
            }
        }
    bool alone = key >= start && stats[(2ll * number + 1) * T + key - start] == 0.f;
    gk += (((long long)b * S + key) * H + h) * K;
    gv += (((long long)b * S + key) * H + h) * V;
    float along = 0.f;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        int c = lane + 32 * group;
        if (c < K) along += keys[warp][c] * sums_k[group];
    }
    along = warp_sum(along);
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        int c = lane + 32 * group;
        if (c < K) gk[c] = (sums_k[group] - keys[warp][c] * along) * norm;
        if (c < V) gv[c] = sums_v[group] + (alone ? g[(key - start) * g_t + c] : 0.f);
    }
}
