"""ctc_loss on the CPU: forward, backward and gradient of one utterance after the other, without a logarithm in the recursions.

Every probability is a pair (m, k), the number m 2^k with a float64 m and an integer k. A sum takes the largest exponent of its
terms and multiplies each m by a power of 2, which needs no more than a shift of bits; a product multiplies the m and adds the
k. So nothing underflows however long the path is, and products and sums keep all digits. A sum takes a few instructions, for 8
states at a time where a processor has registers that wide; the logarithm of a sum of exponentials would take a hundred. What
is 0 has m = 0 and an exponent below all others, EMPTY. The m drift away from 1 by less than a factor of 5 a frame, so they are
brought back to [1, 2) after every PERIOD frames only.

The blanks of the extended target and its labels are two rows, so that neighbours in a row are updated alike:

    blank i:   α' = p(blank) (α_blank[i] + α_label[i-1])
    label i:   α' = p(l_i) (α_label[i] + α_blank[i] + [l_i ≠ l_{i-1}] α_label[i-1])

Where a gradient will be wanted, forward leaves p - γ, as cross_entropy's does. Only the α of one utterance are kept at a time.
"""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel, inline, inner
from autograd.cpu.math import exp

from . import lengths_of, weights

EMPTY = -(2**61)  # the exponent of 0: below that of any path, and three times as much is no overflow
APART = 2 * EMPTY  # of what must not be added, below all that is 0
PERIOD = 16  # frames
FURTHEST = -(2.0**43)  # a logit that is further below the largest one has the probability 0
LOG2E, LN2 = 1 / math.log(2), math.log(2)
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.42860682030941723212e-6  # k LN2_HIGH loses no digits up to k = 2^37


@inline
def _power(k):
    """2^k for k up to 1023; 0 where that is too small to count."""
    return np.int64(((k if k > -960 else -1023) + 1023) << 52).view(np.float64)


@inline(exact=True)
def _rest(x, power):
    """x - power ln 2 in two parts, which regrouping would undo."""
    return (x - power * LN2_HIGH) - power * LN2_LOW


@inner
def _frame(row, m, k, share):
    """softmax(row) as pairs and as numbers."""
    top = np.float64(row[0])
    for v in range(row.size):
        x = np.float64(row[v])
        top = x if x > top or x != x else top
    total = 0.0
    for v in range(row.size):
        far = np.float64(row[v]) - top
        d = far if far > FURTHEST else FURTHEST
        power = np.floor(d * LOG2E + 0.5)
        rest = exp(_rest(d, power))
        m[v] = (rest if far > FURTHEST else 0.0) if far == far else far
        k[v] = np.int64(power)
        share[v] = m[v] * _power(k[v])
        total += share[v]
    up = (np.float64(total).view(np.int64) >> 52) - 1023 if total > 0 else 0  # total = scale 2^up with scale in [1, 2)
    inverse, unscaled = 1 / total, 1 / (total * _power(-up))
    for v in range(row.size):
        share[v] *= inverse
        m[v] *= unscaled
        k[v] -= up


@inner
def _two(m, k, a, ka, b, kb):
    """a + b."""
    for i in range(m.size):
        k[i] = ka[i] if ka[i] > kb[i] else kb[i]
    for i in range(m.size):
        m[i] = a[i] * _power(ka[i] - k[i]) + b[i] * _power(kb[i] - k[i])


@inner
def _three(m, k, a, ka, b, kb, c, kc, skip):
    """a + b + c 2^skip, where ``skip`` is 0 or APART."""
    for i in range(m.size):
        least = kc[i] + skip[i]
        most = ka[i] if ka[i] > kb[i] else kb[i]
        k[i] = most if most > least else least
    for i in range(m.size):
        m[i] = a[i] * _power(ka[i] - k[i]) + b[i] * _power(kb[i] - k[i]) + c[i] * _power(kc[i] + skip[i] - k[i])


@inner
def _times(m, k, p, kp):
    for i in range(m.size):
        m[i] *= p[i]
        k[i] += kp[i]


@inner
def _times_one(m, k, p, kp):
    for i in range(m.size):
        m[i] *= p
        k[i] += kp


@inner
def _normalise(m, k):
    """The same numbers with 1 <= m < 2."""
    for i in range(m.size):
        bits = np.float64(m[i]).view(np.int64)
        change = (bits >> 52) - 1023
        positive = m[i] > 0
        m[i] = np.int64((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).view(np.float64) if positive else m[i]
        k[i] += change if positive else 0


@inner
def _forward(p, kp, skip, alpha, power, frames, U, keep):
    """α of all frames, row t + 1 after frame t, or in two rows that take turns; returns the row of the last one.

    A row is the blanks 0 ... U, a zero, and the labels, so that label i - 1 stands U + 1 after blank i.
    """
    alpha[0, :], power[0, :] = 0.0, EMPTY
    alpha[0, 0], power[0, 0] = 1.0, 0
    row = 0
    for t in range(frames):
        old, kold = alpha[row], power[row]
        row = t + 1 if keep else 1 - row
        new, knew = alpha[row], power[row]
        blanks, labels, kblanks, klabels = old[: U + 1], old[U + 1 : 2 * U + 2], kold[: U + 1], kold[U + 1 : 2 * U + 2]
        q, kq = p[t], kp[t]
        _two(new[: U + 1], knew[: U + 1], blanks, kblanks, labels, klabels)
        _times_one(new[: U + 1], knew[: U + 1], q[0], kq[0])
        new[U + 1], knew[U + 1] = 0.0, EMPTY
        following, kfollowing = new[U + 2 : 2 * U + 2], knew[U + 2 : 2 * U + 2]
        _three(following, kfollowing, labels[1:], klabels[1:], blanks[:U], kblanks[:U], labels[:U], klabels[:U], skip)
        _times(following, kfollowing, q[1 : U + 1], kq[1 : U + 1])
        if t % PERIOD == PERIOD - 1:
            _normalise(new[: 2 * U + 2], knew[: 2 * U + 2])
    return row


@inner
def _posterior(m, k, a, ka, b, kb, kz, scale):
    """m = a b scale 2^-kz: γ, of which k is scratch."""
    for i in range(m.size):
        k[i] = ka[i] + kb[i] - kz
    for i in range(m.size):
        m[i] = a[i] * b[i] * scale * _power(k[i])


@inner
def _backward(p, kp, skip, alpha, power, frames, U, blank, target, z, kz, difference):
    """Take γ from ``difference`` [T V], the last frame first."""
    size = 2 * U + 2  # blanks 0 ... U, labels, and a zero
    beta, kbeta = np.zeros((2, size)), np.full((2, size), EMPTY)
    gamma, spare = np.empty(U + 1), np.empty(U + 1, np.int64)
    row, scale = 0, 1 / z
    beta[0, U], kbeta[0, U] = 1.0, 0
    if U:
        beta[0, 2 * U], kbeta[0, 2 * U] = 1.0, 0
    for t in range(frames - 1, -1, -1):
        a, ka, b, kb, out = alpha[t + 1], power[t + 1], beta[row], kbeta[row], difference[t]
        blanks, labels, kblanks, klabels = b[: U + 1], b[U + 1 :], kb[: U + 1], kb[U + 1 :]
        _posterior(gamma, spare, a[: U + 1], ka[: U + 1], blanks, kblanks, kz, scale)
        total = 0.0
        for i in range(U + 1):
            total += gamma[i]
        out[blank] -= total
        _posterior(gamma[:U], spare[:U], a[U + 2 : 2 * U + 2], ka[U + 2 : 2 * U + 2], labels[:U], klabels[:U], kz, scale)
        for i in range(U):
            out[target[i]] -= gamma[i]
        q, kq = p[t], kp[t]
        _times_one(blanks, kblanks, q[0], kq[0])
        _times(labels[:U], klabels[:U], q[1 : U + 1], kq[1 : U + 1])
        row = 1 - row
        new, knew = beta[row], kbeta[row]
        _two(new[: U + 1], knew[: U + 1], blanks, kblanks, labels, klabels)
        _three(new[U + 1 : 2 * U + 1], knew[U + 1 : 2 * U + 1], labels[:U], klabels[:U], blanks[1:], kblanks[1:], labels[1:],
               klabels[1:], skip[1:])
        if t % PERIOD == 0:
            _normalise(new, knew)


@cpu_kernel
def _ctc(logits, targets, frames, labels, blank, losses, difference):
    """Losses in nats, and p - γ unless ``difference`` is empty."""
    B, T, V = logits.shape
    U, keep = targets.shape[1], difference.size > 0
    p, kp = np.empty((T, U + 1)), np.empty((T, U + 1), np.int64)  # of the blank, and of each label
    rows = T + 1 if keep else 2
    alpha, power = np.empty((rows, 2 * U + 2)), np.empty((rows, 2 * U + 2), np.int64)
    m, k, share, skips = np.empty(V), np.empty(V, np.int64), np.empty(V), np.empty(U + 1, np.int64)
    for b in range(B):
        n, length, target = labels[b], frames[b], targets[b]
        for i in range(n):
            skips[i] = 0 if i > 0 and target[i] != target[i - 1] else APART
        skips[n] = APART
        for t in range(length):
            _frame(logits[b, t], m, k, share)
            p[t, 0], kp[t, 0] = m[blank], k[blank]
            for i in range(n):
                p[t, i + 1], kp[t, i + 1] = m[target[i]], k[target[i]]
            if keep:
                out = difference[b, t]
                for v in range(V):
                    out[v] = share[v]
        row = _forward(p, kp, skips[:n], alpha, power, length, n, keep)
        last, klast = alpha[row], power[row]
        kz = max(klast[n], klast[2 * n + 1])  # without labels the second is a zero
        z = last[n] * _power(klast[n] - kz) + last[2 * n + 1] * _power(klast[2 * n + 1] - kz)
        losses[b] = math.inf if z == 0 else -(math.log(z) + kz * LN2)
        if keep:
            if z == 0:
                difference[b, :length] = 0
            else:
                _backward(p, kp, skips[: n + 1], alpha, power, length, n, blank, target, z, kz, difference[b])
            difference[b, length:] = 0


def forward(logits, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, recording):
    frames, labels = lengths_of(logits, targets, input_lengths, target_lengths)
    losses = np.zeros(len(logits))
    difference = np.empty(logits.shape if recording else (0, 0, 0), logits.dtype)
    _ctc(np.ascontiguousarray(logits), np.ascontiguousarray(targets), np.ascontiguousarray(frames),
         np.ascontiguousarray(labels), blank, losses, difference)
    if zero_infinity:
        losses[losses == math.inf] = 0
    share = weights(reduction, frames, labels)
    loss = losses if reduction == "none" else (losses * share).sum()
    return np.asarray(loss, logits.dtype), (difference, share)


def backward(saved, g):
    difference, share = saved
    return (difference * (g * share).astype(difference.dtype)[:, None, None],)
