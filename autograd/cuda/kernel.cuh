// What every CUDA kernel may use: sums over a warp, a block and rows, and Philox.

#define FULL 0xffffffffu  // all lanes of a warp
#define INFINITE __int_as_float(0x7f800000)

// Sums and maxima over the lanes of a warp, or over each group of LANES of them. Every lane gets the same bits.
template <int LANES = 32, class T> __device__ __forceinline__ T warp_sum(T v)
{
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) v += __shfl_xor_sync(FULL, v, o);
    return v;
}
template <int LANES = 32> __device__ __forceinline__ float warp_max(float v)
{
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) v = fmaxf(v, __shfl_xor_sync(FULL, v, o));
    return v;
}

// The sum over a block of at most 1024 threads, a multiple of 32; thread 0 gets it. One call a kernel.
__device__ __forceinline__ double block_sum(double v)
{
    __shared__ double parts[32];
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    v = warp_sum(v);
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    if (warp == 0) v = warp_sum(lane < blockDim.x / 32 ? parts[lane] : 0.);
    return v;
}

// Sums over the 8 warps of a block: the threads of warp i < COUNT get the totals of own[i] over those of their lane.
template <int COUNT, class T>
__device__ __forceinline__ T sum_warps(T (&parts)[8][COUNT][32], const T (&own)[COUNT])
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < COUNT; i++) parts[warp][i][lane] = own[i];
    __syncthreads();
    T total = 0;
    if (warp < COUNT)
        for (int i = 0; i < 8; i++) total += parts[i][warp][lane];
    return total;
}

// A kernel of rows.sum_rows, 8 warps a block: sums[chunks, COUNT, width] of what add(own, row, column) adds to own[COUNT].
template <int COUNT, class Add>
__device__ __forceinline__ void sum_rows(float (&parts)[8][COUNT][32], float* __restrict__ sums, int rows, int width, int chunk,
                                         Add add)
{
    int column = blockIdx.x * 32 + threadIdx.x % 32, warp = threadIdx.x / 32;
    int end = min((long long)rows, (blockIdx.y + 1ll) * chunk);
    float own[COUNT] = {};
    if (column < width)
        for (int row = blockIdx.y * chunk + warp; row < end; row += 8) add(own, row, column);
    float total = sum_warps(parts, own);
    if (warp < COUNT && column < width) sums[((long long)blockIdx.y * COUNT + warp) * width + column] = total;
}

// Philox4x32-10 (Salmon et al. 2011, SC'11): four words of the counter (c0, c1, c2, c3) under the key `seed`.
__device__ __forceinline__ uint4 philox(unsigned c0, unsigned c1, unsigned c2, unsigned c3, unsigned long long seed)
{
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}
