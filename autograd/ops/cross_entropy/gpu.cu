// cross_entropy: a warp a row finds its maximum and the sum of e^(x - maximum) over all but the label, which loses no digits
// where the label is nearly certain; backward computes the softmax again from them.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(128)
mtv_cross_entropy_forward(const float* __restrict__ logits, const long long* __restrict__ labels,
                          float* __restrict__ losses, float* __restrict__ tops, float* __restrict__ others,
                          int rows, int size, int ignoring, long long ignored)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    logits += (long long)row * size;
    float top = -INFINITE, other = 0.f;
    long long label = labels[row];
    for (int j = lane; j < size; j += 32) top = fmaxf(top, logits[j]);
    top = warp_max(top);
    for (int j = lane; j < size; j += 32) other += j == label ? 0.f : expf(logits[j] - top);
    other = warp_sum(other);
    if (lane == 0) {
        float loss = 0.f;
        if ((!ignoring || label != ignored) && label >= 0 && label < size) {  // the host reports a label out of range
            float chosen = logits[label], e = expf(chosen - top);
            loss = e == 1.f ? log1pf(other) : logf(e + other) + (top - chosen);
        }
        losses[row] = loss;
        tops[row] = top;
        others[row] = other;
    }
}

// The mean over the rows that count, and one over their number, by one block.
extern "C" __global__ void __launch_bounds__(1024)
mtv_cross_entropy_mean(const float* __restrict__ losses, const long long* __restrict__ labels, float* __restrict__ loss,
                       float* __restrict__ share, int rows, int ignoring, long long ignored)
{
    __shared__ double totals[32];
    double total = 0., counted = 0.;
    for (int row = threadIdx.x; row < rows; row += 1024) {
        total += losses[row];
        counted += !ignoring || labels[row] != ignored;
    }
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = total;
    counted = block_sum(counted);  // which has a barrier
    if (threadIdx.x == 0) {
        total = 0.;
        for (int i = 0; i < 32; i++) total += totals[i];
        double one = 1. / (counted > 0. ? counted : 1.);
        *loss = (float)(total * one);
        *share = (float)one;
    }
}

extern "C" __global__ void __launch_bounds__(128)
mtv_cross_entropy_backward(const float* __restrict__ logits, const long long* __restrict__ labels,
                           const float* __restrict__ tops, const float* __restrict__ others,
                           const float* __restrict__ share, const float* __restrict__ g, float* __restrict__ gx,
                           int rows, int size, int ignoring, long long ignored)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    logits += (long long)row * size;
    gx += (long long)row * size;
    long long label = labels[row];
    bool counted = (!ignoring || label != ignored) && label >= 0 && label < size;
    float top = tops[row], other = others[row], factor = 0.f;
    if (counted) factor = *g * *share / (other + expf(logits[label] - top));
    for (int j = lane; j < size; j += 32)
        gx[j] = counted ? (j == label ? -other : expf(logits[j] - top)) * factor : 0.f;
}
