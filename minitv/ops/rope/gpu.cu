// rope: a thread turns one pair of channels of a position in all heads, so that an angle is taken once. Angles are in double:
// in float, one would be off by 0.05 at position 1e6. In half turns, cospi and sinpi need no table of digits of pi. Pair j is
// also multiplied by gain * exp(growth[j] * position), where `growing`.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(256)
mtv_rope(const float* __restrict__ x, const double* __restrict__ angles, const double* __restrict__ growth,
         const long long* __restrict__ positions, float* __restrict__ y, int B, int H, int T, int K, int pairs, int interleaved,
         int growing, int given, long long start, float scale, float gain, float sign, long long x_b, long long x_h,
         long long x_t)
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
    long long position = given ? positions[at] : start + t;
    double turn = position * angles[j] * 0.31830988618379067;
    float size = scale * gain * (growing ? (float)exp(position * growth[j]) : 1.f);
    float c = (float)cospi(turn) * size, s = (float)sinpi(turn) * size * sign;
    int one = interleaved ? 2 * j : j, two = interleaved ? 2 * j + 1 : pairs + j;
    for (int h = 0; h < H; h++) {
        float u = x[h * x_h + one], v = x[h * x_h + two];
        y[(long long)h * K + one] = u * c - v * s;
        y[(long long)h * K + two] = u * s + v * c;
    }
}
