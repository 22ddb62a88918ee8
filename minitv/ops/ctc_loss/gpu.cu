// ctc_loss: a block an utterance walks over the frames, its threads are the states of the extended target; the recursions are
// over logarithms, in double. alpha is [B, T + 1, 2 U + 1], row t + 1 after frame t: its logarithm, and gamma after backward.
#include "kernel.cuh"

#define THREADS 128

__device__ __forceinline__ double log_sum(double a, double b, double c)
{
    double top = fmax(fmax(a, b), c);
    return top == -(double)INFINITE ? a + b + c : top + log(exp(a - top) + exp(b - top) + exp(c - top));  // -inf, or NaN
}

// A number from 0 to `most`: the host reports lengths and labels out of range, but later.
__device__ __forceinline__ int within(long long n, int most)
{
    return n < 0 ? 0 : n > most ? most : (int)n;
}

// The class of a state: every second one is a label.
__device__ __forceinline__ int symbol(const long long* __restrict__ targets, int s, int blank, int V)
{
    return s % 2 ? within(targets[s / 2], V - 1) : blank;
}

// Whether a path may come to a state from two states before: from one label to another.
__device__ __forceinline__ bool skips(const long long* __restrict__ targets, int s)
{
    return s % 2 && s > 1 && targets[s / 2] != targets[s / 2 - 1];
}

// ln of the sum that a softmax divides by: a warp a frame.
extern "C" __global__ void __launch_bounds__(128)
mtv_ctc_loss_sums(const float* __restrict__ logits, double* __restrict__ sums, int rows, int V)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    logits += (long long)row * V;
    float top = -INFINITE;
    double total = 0.;
    for (int v = lane; v < V; v += 32) top = fmaxf(top, logits[v]);
    top = warp_max(top);
#pragma unroll 1
    for (int v = lane; v < V; v += 32) total += exp((double)logits[v] - top);
    total = warp_sum(total);
    if (lane == 0) sums[row] = top + log(total);
}

extern "C" __global__ void __launch_bounds__(THREADS)
mtv_ctc_loss_forward(const float* __restrict__ logits, const long long* __restrict__ targets,
                     const long long* __restrict__ frames, const long long* __restrict__ labels,
                     const double* __restrict__ sums, double* __restrict__ alpha, double* __restrict__ losses,
                     int T, int V, int U, int blank)
{
    const double nothing = -(double)INFINITE;
    int b = blockIdx.x, length = within(frames[b], T), S = 2 * within(labels[b], U) + 1;
    logits += (long long)b * T * V;
    targets += (long long)b * U;
    sums += (long long)b * T;
    alpha += (T + 1ll) * b * (2 * U + 1);
    for (int s = threadIdx.x; s < S; s += THREADS) alpha[s] = s ? nothing : 0.;
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < length; t++) {
#pragma unroll 1
        for (int s = threadIdx.x; s < S; s += THREADS) {
            double share = logits[symbol(targets, s, blank, V)] - sums[t];
            alpha[s + 2 * U + 1] = share + log_sum(alpha[s], s > 0 ? alpha[s - 1] : nothing,
                                                   skips(targets, s) ? alpha[s - 2] : nothing);
        }
        alpha += 2 * U + 1;
        logits += V;
        __syncthreads();
    }
    if (threadIdx.x == 0) losses[b] = -log_sum(alpha[S - 1], S > 1 ? alpha[S - 2] : nothing, nothing);
}

// `beta` is [B, 2, 2 U + 1]: what comes after a frame, and the same times the frame's own probability.
extern "C" __global__ void __launch_bounds__(THREADS)
mtv_ctc_loss_backward(const float* __restrict__ logits, const long long* __restrict__ targets,
                      const long long* __restrict__ frames, const long long* __restrict__ labels,
                      const double* __restrict__ sums, const double* __restrict__ losses, double* __restrict__ alpha,
                      double* __restrict__ beta, int T, int V, int U, int blank)
{
    const double nothing = -(double)INFINITE;
    int b = blockIdx.x, length = within(frames[b], T), S = 2 * within(labels[b], U) + 1;
    double loss = losses[b];
    logits += (long long)b * T * V;
    targets += (long long)b * U;
    sums += (long long)b * T;
    alpha += (T + 1ll) * b * (2 * U + 1);
    double *after = beta + (long long)b * 2 * (2 * U + 1), *with = after + 2 * U + 1;
    for (int s = threadIdx.x; s < S; s += THREADS) after[s] = s < S - 2 ? nothing : 0.;
    for (int t = length - 1; t >= 0; t--) {
        double* row = alpha + (t + 1ll) * (2 * U + 1);
        for (int s = threadIdx.x; s < S; s += THREADS) {  // each thread has the states that it wrote
            double later = after[s];
            row[s] = loss == -nothing ? 0. : exp(row[s] + later + loss);
            with[s] = later + logits[(long long)t * V + symbol(targets, s, blank, V)] - sums[t];
        }
        __syncthreads();
#pragma unroll 1
        for (int s = threadIdx.x; s < S; s += THREADS)
            after[s] = log_sum(with[s], s + 1 < S ? with[s + 1] : nothing,
                               s + 2 < S && skips(targets, s + 2) ? with[s + 2] : nothing);
        __syncthreads();
    }
}

// p - gamma times a factor for each utterance: a warp a frame.
extern "C" __global__ void __launch_bounds__(128)
mtv_ctc_loss_gradient(const float* __restrict__ logits, const long long* __restrict__ targets,
                      const long long* __restrict__ frames, const long long* __restrict__ labels,
                      const double* __restrict__ sums, const double* __restrict__ gammas, const double* __restrict__ losses,
                      const float* __restrict__ factors, float* __restrict__ gx, int rows, int T, int V, int U, int blank)
{
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    int b = row / T, count = within(labels[b], U);
    bool counts = row % T < frames[b] && losses[b] != (double)INFINITE;
    double total = sums[row];
    logits += (long long)row * V;
    gx += (long long)row * V;
    targets += (long long)b * U;
    gammas += (row + b + 1ll) * (2 * U + 1);
    for (int v = lane; v < V; v += 32) {
        double share = 0.;
        if (counts) {
            share = exp((double)logits[v] - total);
            if (v == blank)
                for (int i = 0; i <= count; i++) share -= gammas[2 * i];
            else
                for (int i = 0; i < count; i++) share -= targets[i] == v ? gammas[2 * i + 1] : 0.;
        }
        gx[v] = (float)share * factors[b];
    }
}
