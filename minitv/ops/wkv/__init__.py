"""wkv: a weighted mean of the past whose weights fade (RWKV-4: Peng et al. 2023, arXiv 2305.13048, section 3.1.2).

Every channel is a sequence of its own, so k_t, v_t, w and u are numbers in these formulas, and positions count from 0:

    y_t = (Σ_{i<t} e^((t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (Σ_{i<t} e^((t-1-i) w + k_i) + e^(u + k_t))        (16)

The weight of token t-1 is e^k_{t-1}: it has not faded yet. The weight of an older token is smaller by the factor e^w for every
further step, where w ≤ 0. The paper has the opposite sign: it subtracts w ≥ 0. The present token has a factor e^u of its own,
and no later output sees this factor. All weights are positive and are divided by their sum. So y_t is a mean: it lies between
the smallest and the largest value so far, and adding a number to all keys changes nothing. minitv/variants/rwkv.py tells why
RWKV wants such a mean.

As attention. y = softmax(E) v with the exponents E[T T] of (16), which no query can change. This costs O(T²) per channel:

    E_ti = (t-1-i) w + k_i for i < t,    E_tt = u + k_t,    E_ti = -∞ for i > t

As a recurrence, O(T) per channel. Since e^((t-1-i) w) is multiplied by e^w at every step, two sums are all that must be kept:

    A_{-1} = B_{-1} = 0                                                     (19)
    y_t = (A_{t-1} + e^(u + k_t) v_t) / (B_{t-1} + e^(u + k_t))             (20)
    A_t = e^w A_{t-1} + e^k_t v_t                                           (21)
    B_t = e^w B_{t-1} + e^k_t                                               (22)

e^k is too large for float32 from k = 89 on. So the state holds the sums in units of their largest term: p is the largest
exponent so far, A = a e^p and B = b e^p. The same recurrence for a, b and p, where no exponent is above 0:

    q = max(p_{t-1}, u + k_t)                                                                                       (23)
    y_t = (e^(p_{t-1} - q) a_{t-1} + e^(u + k_t - q) v_t) / (e^(p_{t-1} - q) b_{t-1} + e^(u + k_t - q))             (24)
    p_t = max(p_{t-1} + w, k_t)                                                                               (25), (28)
    a_t = e^(p_{t-1} + w - p_t) a_{t-1} + e^(k_t - p_t) v_t                                                         (26)
    b_t = e^(p_{t-1} + w - p_t) b_{t-1} + e^(k_t - p_t)                                                             (27)

One term of b is e^0, so b ≥ 1 after the first token, and no division needs a small number to keep it from 0.

In chunks. Two neighbouring stretches of tokens, the right one n tokens long, have states (a, b, p) and (a', b', p') of their
own. Together they have the state with p" = max(p + n w, p') and a" = e^(p + n w - p") a + e^(p' - p") a', and b" alike. This
rule is associative, so the states of chunks can be computed next to each other and joined afterwards. It is not in the paper.

Gradients. Let g_t be the gradient of y_t, h_t = g_t / (B_{t-1} + e^(u + k_t)), and α_t and β_t the gradients of A_t and B_t
through all later outputs. They start as the gradients of the final state, and run from the last token to the first:

    dv_t = e^(u + k_t) h_t + e^k_t α_t                      α_{t-1} = e^w α_t + h_t
    dk_t = e^(u + k_t) h_t (v_t - y_t) + e^k_t (α_t v_t + β_t)
    du = Σ_t e^(u + k_t) h_t (v_t - y_t)                    β_{t-1} = e^w β_t - h_t y_t
    dw = Σ_t e^w (α_t A_{t-1} + β_t B_{t-1})

α_{-1} and β_{-1} are the gradients of the state that came in. cpu.py computes the same in units of e^p. p only chooses the unit
of a and b, but it is an output too, and has the gradient of a maximum.
"""

from __future__ import annotations

import math

import numpy as np

from autograd import Tensor
from autograd.device import namespace
from autograd.errors import ShapeError
from autograd.laws import becomes, causal, independent, law, linear_in, shift_invariant, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, exp, matmul, maximum, reshape, softmax, stack, swapaxes, where

EMPTY = -1e38  # p of an empty state: e^(EMPTY - anything) is 0, and no difference overflows in float32


@op("k[B T C], v[B T C], w[C], u[C], a?[B C], b?[B C], p?[B C], reset?:bool[B T] -> y[B T C], a[B C], b[B C], p[B C]",
    laws=[causal("k v"), independent("B C"), linear_in("v"), streams(), shift_invariant("k p", "all keys", moves="p")])
def wkv(k, v, w, u, a=None, b=None, p=None, reset=None):
    """y_t = (Σ_{i<t} e^((t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (the same sums without the v), and the state a, b, p.

    k, v[B T C] are keys and values, w[C] ≤ 0 is the logarithm of the decay, and u[C] that of the present token's factor.
    a, b, p[B C] are what an earlier call returned; ShapeError if only some of them are there. reset[B T] is True where a new
    sequence begins, for which the state is empty. The page has the formulas, equations (16) to (28) of the paper.
    """
    y, state = np.empty(k.shape, k.dtype), np.zeros((3, k.shape[0], k.shape[2]), k.dtype)
    for n, c in np.ndindex(state.shape[1:]):
        past = [] if p is None else [(p[n, c].item(), a[n, c].item(), b[n, c].item())]  # exponent, value, weight
        for t in range(k.shape[1]):
            key, value = k[n, t, c].item(), v[n, t, c].item()
            past = [] if reset is not None and reset[n, t] else past
            _, numerator, denominator = _total([*past, (u[c].item() + key, value, 1.0)])
            y[n, t, c] = np.divide(numerator, denominator)  # (16); 0/0 where all keys are -∞
            past = [*((e + w[c].item(), s, z) for e, s, z in past), (key, value, 1.0)]  # every older exponent falls by w
        state[:, n, c] = _total(past)
    return y, state[1], state[2], state[0]


def _total(terms):
    """The largest exponent, and the sums of values and of weights in its unit."""
    top = float(np.max([e for e, _, _ in terms], initial=EMPTY))  # NaN if one is
    return top, sum(math.exp(e - top) * s for e, s, _ in terms), sum(math.exp(e - top) * z for e, _, z in terms)


# -- forms -------------------------------------------------------------------------------------------------------------
def _empty(like, *shape):
    """The state before the first token, equation (19)."""
    xp = namespace(like.data)
    return tuple(Tensor.wrap(xp.full(shape, value, like.dtype)) for value in (0.0, 0.0, EMPTY))


def _forget(state, reset):
    """The empty state where ``reset`` is True."""
    if reset is None:
        return state
    return tuple(where(reset[..., None], value, x) for value, x in zip((0.0, 0.0, EMPTY), state, strict=True))


def _join(a, b, p, value, weight, exponent):
    """The sums of two sets of tokens together, in the unit of the larger exponent."""
    top = maximum(p, exponent)  # (23), (25)
    one, other = exp(p - top), exp(exponent - top)
    return one * a + other * value, one * b + other * weight, top


def _read(k, v, u, state):
    """y of a token after this state, equations (23) and (24)."""
    numerator, denominator, _ = _join(*state, v, 1.0, u + k)
    return numerator / denominator  # (24)


def _advance(k, v, w, state):
    """The state after one more token, equations (25) to (28)."""
    a, b, p = state
    return _join(a, b, p + w, v, 1.0, k)


def _reset(reset, part):
    return None if reset is None else reset[part]


@wkv.form
def recurrent(k, v, w, u, a, b, p, reset):
    """Equations (23) to (28), one token after the other: time O(T) per channel, as the paper trains and generates.

    The state has three numbers per channel and does not grow. Channels and sequences run next to each other.
    """
    state = _empty(k, k.shape[0], k.shape[2]) if p is None else (a, b, p)  # each [B C]
    ys = [k[:, :0]]
    for t in range(k.shape[1]):
        state = _forget(state, _reset(reset, np.s_[:, t]))
        ys.append(reshape(_read(k[:, t], v[:, t], u, state), (k.shape[0], 1, k.shape[2])))
        state = _advance(k[:, t], v[:, t], w, state)
    return concat(ys, axis=1), *state


@wkv.form(tuning={"chunk_size": 32})
def chunkwise(k, v, w, u, a, b, p, reset, chunk_size):
    """The same in 2 chunk_size + T / chunk_size steps, of which each does many positions at once.

    First every chunk computes the state of its own tokens, all chunks at once. Then the state before each chunk follows from
    the one before it and the chunk's own. At last all chunks compute their outputs, again at once.
    """
    (batch, length, width), size = k.shape, chunk_size
    count, rest = length // size, length // size * size
    chunks = [reshape(x[:, :rest], (batch, count, size, width)) for x in (k, v)]  # each [B chunks size C]
    starts = None if reset is None else reset[:, :rest].reshape(batch, count, size)
    alone = _empty(k, batch, count, width)
    for i in range(size):
        alone = _advance(*(x[:, :, i] for x in chunks), w, _forget(alone, _reset(starts, np.s_[:, :, i])))
    anew = None if reset is None else starts.any(axis=2)  # where a chunk forgets what came before it
    state, before = _empty(k, batch, width) if p is None else (a, b, p), []
    for j in range(count):
        before.append(state)
        a, b, p = _forget(state, _reset(anew, np.s_[:, j]))
        state = _join(a, b, p + float(size) * w, *(x[:, j] for x in alone))
    ys = []
    if count:
        states, columns = tuple(stack(x, axis=1) for x in zip(*before, strict=True)), []
        for i in range(size):
            key, value = (x[:, :, i] for x in chunks)
            states = _forget(states, _reset(starts, np.s_[:, :, i]))
            columns.append(_read(key, value, u, states))
            states = _advance(key, value, w, states)
        ys = [reshape(stack(columns, axis=2), (batch, rest, width))]
    y, *state = recurrent(k[:, rest:], v[:, rest:], w, u, *state, _reset(reset, np.s_[:, rest:]))
    return concat([*ys, y], axis=1), *state


wkv.kernel("cpu", name="step", prefix="step_", sizes={"T": 1})
wkv.kernel("cpu", tuning={"chunk_size": 32})  # positions from one kept state to the next
wkv.kernel("cuda")


@wkv.validate
def _(a, b, p):
    if len({x is None for x in (a, b, p)}) > 1:
        missing = [name for name, x in zip("abp", (a, b, p), strict=True) if x is None]
        raise ShapeError(f"wkv: a, b and p are one state, give all or none; missing: {', '.join(missing)}")


def _rates(draw, width):
    """w from -1e-6 to -20: what forgets almost nothing, and what remembers one step."""
    return draw.layout(-(10 ** draw.generator().uniform(-6, 1.3, width)).astype(draw.dtype))


def _keys(draw, batch, length, width):
    """Keys up to ±1, ±10 or ±100."""
    return draw.floats(batch, length, width, low=-1.0, high=1.0) * draw.dtype.type(draw.choice((1, 10, 100)))


@wkv.inputs
def _(draw):
    batch, length, width = draw.size(0, 2, "B"), draw.size(0, 7, "T"), draw.size(0, 3, "C")
    k, w = _keys(draw, batch, length, width), _rates(draw, width)
    a, b, p = draw.floats(batch, width), draw.floats(batch, width, low=1.0, high=3.0), draw.floats(batch, width)
    carried = draw.boolean()
    reset = draw.layout(draw.generator().random((batch, length)) < 0.2) if draw.boolean() else None
    # The p that comes out is a maximum, which has no derivative where two exponents are equal: its winner is raised by 1.
    k, p = (x if x.flags.writeable else x.copy() for x in (k, p))
    top, winner = p.copy() if carried else np.full_like(p, EMPTY), np.full((batch, width), -1)
    for t in range(length):
        top = top + w if reset is None else np.where(reset[:, t, None], EMPTY, top + w)
        top, winner = np.maximum(top, k[:, t]), np.where(k[:, t] > top, t, winner)
    k += winner[:, None] == np.arange(length)[:, None]
    p += winner < 0
    return (k, draw.floats(batch, length, width), w, draw.floats(width, low=-2.0, high=2.0),
            *((a, b, p) if carried else (None, None, None)), reset), {}


# -- both directions ---------------------------------------------------------------------------------------------------
@op("k[B T C], v[B T C], w[C], u[C] -> y[B T C]",
    laws=[independent("B C"), linear_in("v"), shift_invariant("k", "all keys")])
def bidirectional_wkv(k, v, w, u):
    """y_t = (Σ_{i≠t} e^((|t-i|-1) w + k_i) v_i + e^(u + k_t) v_t) / (the same sums without the v): wkv in both directions.

    k, v[B T C], w[C] and u[C] as in wkv, but a model that is not causal sees the tokens after t as well. Vision-RWKV (Duan et
    al. 2024, arXiv 2403.02308) divides a learned w by T and does not force its sign. Here w is the change of the exponent for
    one step, and may be positive.
    """
    y = np.empty(k.shape, k.dtype)
    for n, t, c in np.ndindex(k.shape):
        exponents = [(abs(t - i) - 1) * w[c].item() + k[n, i, c].item() if i != t else u[c].item() + k[n, t, c].item()
                     for i in range(k.shape[1])]
        _, numerator, denominator = _total([(e, v[n, i, c].item(), 1.0) for i, e in enumerate(exponents)])
        y[n, t, c] = np.divide(numerator, denominator)  # 0/0 where all keys are -∞
    return y


@bidirectional_wkv.form
def parallel(k, v, w, u):
    """y = softmax(E) v with E_ti = (|t-i|-1) w + k_i for i ≠ t, E_tt = u + k_t: time and memory O(T²) per channel."""
    xp, (batch, length, width) = namespace(k.data), k.shape
    step = xp.arange(length)
    distance = xp.abs(step[:, None] - step)
    keys = reshape(swapaxes(k), (batch, width, 1, length))
    decay = reshape(w, (width, 1, 1)) * Tensor.wrap((distance - 1).astype(k.dtype))
    weights = softmax(keys + where(distance == 0, reshape(u, (width, 1, 1)), decay))
    return swapaxes(reshape(matmul(weights, reshape(swapaxes(v), (batch, width, length, 1))), (batch, width, length)))


@bidirectional_wkv.form
def scans(k, v, w, u):
    """The states of the tokens before t and of those after t, joined with token t: time and memory O(T) per channel."""
    def states(order):
        each, state = [], _empty(k, k.shape[0], k.shape[2])
        for t in order:
            each.append(state)
            state = _advance(k[:, t], v[:, t], w, state)
        return each

    length = k.shape[1]
    before, after = states(range(length)), states(reversed(range(length)))[::-1]
    ys = [reshape(_read(k[:, t], v[:, t], u, _join(*before[t], *after[t])), (k.shape[0], 1, k.shape[2]))
          for t in range(length)]
    return concat([k[:, :0], *ys], axis=1)


bidirectional_wkv.kernel("cpu", prefix="bidirectional_")
bidirectional_wkv.kernel("cuda", prefix="bidirectional_")


@bidirectional_wkv.inputs
def _(draw):
    batch, length, width = draw.size(0, 2, "B"), draw.size(0, 7, "T"), draw.size(0, 3, "C")
    return (_keys(draw, batch, length, width), draw.floats(batch, length, width), _rates(draw, width),
            draw.floats(width, low=-2.0, high=2.0)), {}


# -- laws --------------------------------------------------------------------------------------------------------------
@law(wkv, "weights sum to one")
def _(case, draw):
    y = case(v=1.0, a=case.b).y
    assert_close(y, np.ones_like(y), "weights do not sum to 1", terms=16)


@becomes(wkv, "aft_simple", "nothing fades and no token counts more (w = u = 0)")
def _(case, draw):
    y = case.anew(w=0.0, u=0.0, reset=None).y
    weights = np.exp(case.k - case.k.max(axis=1, keepdims=True, initial=EMPTY))
    total = np.cumsum(weights, axis=1)
    mask = total > 1e-3  # before, everything is far below the largest key, and this simple formula has no digits left
    expected = np.cumsum(weights * case.v, axis=1) / np.where(mask, total, 1)
    assert_close(np.where(mask, y, 0), np.where(mask, expected, 0), "wkv: w = u = 0 is not AFT-simple", terms=1e6)


@law(wkv, "a reset forgets what came before")
def _(case, draw):
    k, v, reset = case.k, case.v, case.reset
    if not k.shape[1]:
        return
    cut = draw.integer(0, k.shape[1] - 1)
    reset = np.zeros(k.shape[:2], bool) if reset is None else reset.copy()
    reset[:, cut] = True
    past = {name: np.concatenate([np.full_like(x[:, :cut], draw.choice((2, np.nan, np.inf))), x[:, cut:]], axis=1)
            for name, x in case.present("k v").items()}
    whole, anew = case(**past, reset=reset), case.anew(k=k[:, cut:], v=v[:, cut:], reset=reset[:, cut:])
    for name, x, y in zip("yabp", (whole.y[:, cut:], *whole[1:]), anew, strict=True):
        assert_close(x, y, f"wkv: {name} remembers what came before a reset", terms=64)


@law(bidirectional_wkv, "reversing the tokens reverses the result")
def _(case, draw):
    back = case(k=case.k[:, ::-1], v=case.v[:, ::-1]).y
    assert_close(back[:, ::-1], case().y, "bidirectional_wkv: reversing the tokens does more than reverse the result", terms=64)


@becomes(bidirectional_wkv, "wkv", "the last position is read")
def _(case, draw):
    assert_close(case().y[:, -1:], case.defined_by(wkv).y[:, -1:],
                 "bidirectional_wkv at the last position is not wkv", terms=64)


@law(bidirectional_wkv, "weights sum to one")
def _(case, draw):
    y = case(v=1.0).y
    assert_close(y, np.ones_like(y), "weights do not sum to 1", terms=16)
