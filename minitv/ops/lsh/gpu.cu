// lsh_buckets: a thread for each position and round. bucket_order: a sort by counting, a thread for each CHUNK positions of a
// row. Each counts its labels in a column of its own, counts[row, label, chunk]; the sums of all that stands before an entry
// say where its positions go, and each thread puts its own there. So equal labels stay in order, without atomics.
#include "kernel.cuh"

#define CHUNK 64

extern "C" __global__ void __launch_bounds__(128)
mtv_lsh_hash(const float* __restrict__ x, const float* __restrict__ rotations, const long long* __restrict__ factors,
             long long* __restrict__ buckets, long long n, int H, int R, int T, int K, int F, int parts)
{
    long long i = blockIdx.x * 128ll + threadIdx.x, row = i / T, head = row / R;
    if (i >= n) return;
    x += (head * T + i % T) * K;
    rotations += (head % H * R + row % R) * K * F;
    long long below = 1, bucket = 0;
    for (int part = 0, first = 0; part < parts; part++) {
        int half = (int)factors[part] / 2, up = 0, down = 0;
        float highest = 0.f, lowest = 0.f;
        for (int f = 0; f < half; f++) {
            float turned = 0.f;
            for (int k = 0; k < K; k++) turned += x[k] * rotations[(long long)k * F + first + f];
            if (f == 0 || turned > highest) {
                highest = turned;
                up = f;
            }
            if (f == 0 || turned < lowest) {
                lowest = turned;
                down = f;
            }
        }
        bucket += below * (-lowest > highest ? half + down : up);
        below *= 2 * half;
        first += half;
    }
    buckets[i] = bucket;
}

extern "C" __global__ void __launch_bounds__(128)
mtv_lsh_count(const long long* __restrict__ buckets, long long* __restrict__ counts, long long n, int T, int labels, int chunks)
{
    long long i = blockIdx.x * 128ll + threadIdx.x, row = i / chunks;
    if (i >= n) return;
    int first = i % chunks * CHUNK;
    for (int t = first; t < min(first + CHUNK, T); t++) counts[(row * labels + buckets[row * T + t]) * chunks + i % chunks]++;
}

// ends [row, label, chunk]: how many positions come up to this entry, this one included.
extern "C" __global__ void __launch_bounds__(128)
mtv_lsh_order(const long long* __restrict__ buckets, const long long* __restrict__ ends, long long* __restrict__ counts,
              long long* __restrict__ order, long long* __restrict__ place, long long n, int T, int labels, int chunks)
{
    long long i = blockIdx.x * 128ll + threadIdx.x, row = i / chunks;
    if (i >= n) return;
    int first = i % chunks * CHUNK;
    for (int t = first; t < min(first + CHUNK, T); t++) {
        long long at = (row * labels + buckets[row * T + t]) * chunks + i % chunks, p = ends[at] - counts[at]--;
        order[row * T + p] = t;
        place[row * T + t] = p;
    }
}
