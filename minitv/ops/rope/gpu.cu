// rope: a thread turns one pair of channels of a position in all heads, so that an angle is taken once. Angles are in double:
// in float, one would be off by 0.05 at position 1e6. In half turns, cospi and sinpi need no table of digits of pi.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_rope(const float* __restrict__ x, const double* __restrict__ angles, const long long* __restrict__ positions,
         float* __restrict__ y, int B, int H, int T, int K, int pairs, int adjacent, int given, long long start, float scale,
         float sign, long long x_b, long long x_h, long long x_t)
{
    int units = K - pairs;  // pairs, and what is only scaled
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= (long long)B * T * units) return;
    int j = i % units;
    long long at = i / units, b = at / T, t = at % T;
    x += b * x_b + t * x_t;
    y += at * H * K;
    if (j >= pairs) {
        for (int h = 0; h < H; h++) y[(long long)h * K + pairs + j] = x[h * x_h + pairs + j] * scale;
        return;
    }
    double turn = (given ? positions[at] : start + t) * angles[j] * 0.31830988618379067;
    float c = (float)cospi(turn) * scale, s = (float)sinpi(turn) * scale * sign;
    int one = adjacent ? 2 * j : j, two = adjacent ? 2 * j + 1 : pairs + j;
    for (int h = 0; h < H; h++) {
        float u = x[h * x_h + one], v = x[h * x_h + two];
        y[(long long)h * K + one] = u * c - v * s;
        y[(long long)h * K + two] = u * s + v * c;
    }
}
