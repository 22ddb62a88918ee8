// cross_entropy: a warp a row finds its maximum and its sum; backward computes the softmax again from them.
#include "kernel.cuh"

extern "C" __global__ void __launch_bounds__(128)
mtv_cross_entropy_forward(const float* __restrict__ logits, const long long* __restrict__ labels,
                          float* __restrict__ losses, float* __restrict__ tops, float* __restrict__ inverses,
                          int rows, int size, int ignoring, long long ignored)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    logits += (long long)row * size;
    float top = -INFINITE, weight = 0.f;
    for (int j = lane; j < size; j += 32) top = fmaxf(top, logits[j]);
    top = warp_max(top);
    for (int j = lane; j < size; j += 32) weight += expf(logits[j] - top);
    weight = warp_sum(weight);
    if (lane == 0) {
        long long label = labels[row];
        float loss = 0.f;
        if (!ignoring || label != ignored)  // a label out of range is reported when the host next reads
            loss = label >= 0 && label < size ? logf(weight) - (logits[label] - top) : 0.f;
        losses[row] = loss;
        tops[row] = top;
        inverses[row] = 1.f / weight;
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
                           const float* __restrict__ tops, const float* __restrict__ inverses,
                           const float* __restrict__ share, const float* __restrict__ g, float* __restrict__ gx,
                           int rows, int size, int ignoring, long long ignored)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    logits += (long long)row * size;
    gx += (long long)row * size;
    long long label = labels[row];
    bool counted = !ignoring || label != ignored;
    float top = tops[row], inverse = inverses[row], factor = *g * *share;
    for (int j = lane; j < size; j += 32)
        gx[j] = counted ? (expf(logits[j] - top) * inverse - (j == label)) * factor : 0.f;
}
