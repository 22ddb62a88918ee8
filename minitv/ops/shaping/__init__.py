"""shaping: attention beside the identity and less its own start (shaped attention: Noci et al. 2023, arXiv 2306.17759).

He and Hofmann 2023, arXiv 2311.01906, equation (5), replace the weights A of attention in each head by

    α I + β A - γ C           I the identity, C the weights of a softmax whose scores are all equal, α, β, γ numbers of the head

minitv/variants/simplified.py tells why. Row t of C has 1 / (t + 1) at the tokens 0 .. t if token t sees no later one, and 1 / T
everywhere if it sees all T tokens. So row t of C v is a mean of values: of all values so far, or of all. Attention gives A v.
With it, (α I + β A - γ C) v needs no matrix, and costs O(T D) for T tokens with D channels:

    y_t = α v_t + β a_t - γ m_t           a = A v, the outputs of attention,   m_t = (v_0 + .. + v_t) / (t + 1)

A sequence may continue another one of n tokens with the mean μ. Then m_t = (n μ + v_0 + .. + v_t) / (n + t + 1), and the mean
of the last token is what the next part of the sequence needs. The kernel does not keep a sum, which would grow with the length
and lose precision. It corrects the mean by each value: m ← m + (v_t - m) / (n + t + 1).

Gradients. Let g_t be the gradient of y_t and c that of the last mean. Let R_t be the sum of g_i / (n + i + 1) over the tokens
i ≥ t, and N the number of all tokens, those n before included. The products of the second line are summed over the tokens, the
channels of a head and the batch:

    da = β g      dv_t = α g_t - γ R_t + c / N      dμ = n (c / N - γ R_0)
    dα = Σ g_t · v_t      dβ = Σ g_t · a_t      dγ = -Σ g_t · m_t = -(Σ v_t · R_t + n μ · R_0)

So one pass from the last token to the first computes all of them, and training keeps the inputs alone. If every token sees all
others, the sum of all g_i / N takes the place of every R_t.
"""

from __future__ import annotations

import numpy as np

from autograd import Tensor
from autograd.device import namespace
from autograd.errors import DomainError, ShapeError
from autograd.laws import becomes, causal, independent, law, linear_in
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import broadcast_to, cumsum, reshape, sum
from autograd.ops.elementwise import fsum

from ..attention import attention
from ..heads import merge_heads, split_heads


@op("a[B T D], v[B T D], alpha[H], beta[H], gamma[H], mean?[B D] -> y[B T D], mean[B D]",
    laws=[causal("a v", causal=True), independent("B"), linear_in("a"), linear_in("v")])
def shaping(a, v, alpha, beta, gamma, mean=None, *, past=0, causal=True):
    """y_t = α v_t + β a_t - γ m_t, with the mean m_t of the values up to token t; and the mean of all values.

    a[B T D] are the outputs of attention for the values v[B T D], their heads side by side; alpha[H], beta[H] and gamma[H] have
    a number for each head. ``past`` is how many values came before, and mean[B D] their mean, 0 if absent. Without ``causal``
    m_t is the mean of all values. H that does not divide D raises ShapeError, a negative ``past`` DomainError.
    """
    batch, length, width = v.shape
    y, last = np.zeros_like(v), np.zeros((batch, width), v.dtype)
    size = width // max(len(alpha), 1)
    for b, c in np.ndindex(batch, width):
        h, total = c // size, past * mean[b, c].item() if past and mean is not None else 0.0
        whole = total + fsum(v[b, :, c].tolist())
        for t in range(length):
            total += v[b, t, c].item()
            m = total / (past + t + 1) if causal else whole / (past + length)
            y[b, t, c] = alpha[h].item() * v[b, t, c].item() + beta[h].item() * a[b, t, c].item() - gamma[h].item() * m
        last[b, c] = whole / (past + length) if past + length else 0.0
    return y, last


@shaping.form
def composed(a, v, alpha, beta, gamma, mean, past, causal):
    """The means of all tokens at once, as running sums divided by how many they are of."""
    xp, (batch, length, width), heads = namespace(v.data), v.shape, alpha.shape[0]
    alpha, beta, gamma = (reshape(broadcast_to(reshape(gain, (heads, 1)), shape=(heads, width // max(heads, 1))), (width,))
                          for gain in (alpha, beta, gamma))  # [D]
    before = 0.0 if mean is None or not past else reshape(mean, (batch, 1, width)) * float(past)
    counts = Tensor.wrap(xp.arange(past + 1, past + length + 1).astype(v.dtype)[:, None])  # [T 1]
    whole = sum(v, axis=1, keepdims=True) + before  # [B 1 D]
    m = (cumsum(v, axis=1) + before) / counts if causal else whole * (1 / max(past + length, 1))
    return alpha * v + beta * a - gamma * m, reshape(whole * (1 / max(past + length, 1)), (batch, width))


shaping.kernel("cpu")
shaping.kernel("cuda")


@shaping.validate
def _(v, alpha, past):
    heads = alpha.shape[0]
    if heads < 1 or v.shape[2] % heads:
        raise ShapeError(f"shaping: the H = {heads} heads of alpha do not divide the D = {v.shape[2]} channels of v")
    if type(past) is not int or past < 0:
        raise DomainError(f"shaping: past is {past!r}, allowed: an integer of at least 0")


@shaping.inputs
def _(draw):
    batch, length, (heads, width) = draw.size(0, 2, "B"), draw.size(0, 6, "T"), draw.multiple("H", "D", 1, 3, 0, 3)
    past = draw.choice((0, 1, 7))
    mean = draw.floats(batch, width) if past and draw.boolean() else None
    shape = batch, length, width
    return ((draw.floats(*shape), draw.floats(*shape), *(draw.floats(heads) for _ in range(3)), mean),
            {"past": past, "causal": draw.boolean()})


# -- laws --------------------------------------------------------------------------------------------------------------
def _uniform(case):
    """What attention gives where all scores are equal, for the values of a case."""
    (v,) = split_heads.definition(case.v.astype(np.float64), heads=(len(case.alpha),))
    y, _ = attention.definition(np.zeros((*v.shape[:3], 1)), np.zeros((*v.shape[:3], 1)), v, causal=case.causal)
    return merge_heads.definition([y]).astype(case.v.dtype)


@becomes(shaping, "identity", "all scores are equal and β = γ: α times it, as at the start")
def _(case, draw):
    """The weights are the identity then, and every block begins like this."""
    y = case(a=_uniform(case), gamma=case.beta, past=0, mean=None).y
    assert_close(y, np.repeat(case.alpha, case.v.shape[2] // len(case.alpha)) * case.v, "it is not α v", terms=64)


@law(shaping, "m is what attention gives where all scores are equal")
def _(case, draw):
    y = case(alpha=0.0, beta=0.0, gamma=-1.0, past=0, mean=None).y
    assert_close(y, _uniform(case), "m is another mean", terms=64)


@law(shaping, "a sequence in two parts, with the mean of the first, is the sequence")
def _(case, draw):
    length = case.v.shape[1]
    cut = draw.integer(0, length)
    y, mean = case(a=case.a[:, :cut], v=case.v[:, :cut])
    past = {"past": case.past + cut, "mean": mean}
    other, last = case(a=case.a[:, cut:], v=case.v[:, cut:], **past)
    assert_close(last, case().mean, f"the mean depends on the cut at {cut}", terms=64)
    if case.causal:
        assert_close(np.concatenate([y, other], axis=1), case().y, f"y depends on the cut at {cut}", terms=64)


@law(shaping, "a number of a head is that of its channels alone")
def _(case, draw):
    h, size = draw.integer(0, len(case.alpha) - 1), case.v.shape[2] // len(case.alpha)
    alone = {name: case[name][..., h * size : (h + 1) * size] for name in ("a", "v", "mean") if case[name] is not None}
    gains = {name: case[name][[h]] for name in ("alpha", "beta", "gamma")}
    for one, all_ in zip(case(**alone, **gains), case(), strict=True):
        assert_close(one, all_[..., h * size : (h + 1) * size], f"head {h} depends on another")
