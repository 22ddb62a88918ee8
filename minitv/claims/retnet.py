"""RetNet: its three forms, their time and memory, and how it compares (Sun et al. 2023)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from autograd import Tensor, layer_norm, no_grad, use
from autograd.metric import distance
from autograd.random import Random

from .. import variants
from ..ops import retention
from ..timing import inference, training
from . import CONDITIONS, RIGHT, UNDECIDED, UNTESTABLE, WRONG, Finding, claim
from .measure import VOCAB, Measure, lower, span

PAPER = "2307.08621"
PLACE = "section RetNet"
EXACT = 1e-9  # of two sides of an equation in float64
FORMS = {"parallel": {}, "recurrent": {}, "chunkwise": {"chunk_size": 16}}


def decays(heads: int) -> np.ndarray:
    """1 - 2^(-5-h) of each head [H], as in equation (8)."""
    return 1 - 2.0 ** (-5 - np.arange(heads))


def exact(**options: Any) -> Any:
    """A new model in float64."""
    run = variants.load("retnet").configure(**options)
    return run.variant.build(run.model, run.mixer, VOCAB, Random(0), np.float64)


def _retention(measure: Measure, T: int, d: int, h: int, b: int | None = None) -> Callable[[], Any]:
    """A call of retention in d / h heads of h channels, as many of values: in chunks of b, or the parallel form."""
    q, k, v = (measure.normal(1, d // h, T, h) for _ in range(3))
    decay = np.full(d // h, 0.99, np.float32)

    def call() -> Any:
        way = use("retention", form="parallel") if b is None else use("retention", kernel="cpu", chunk_size=b)
        with no_grad(), way:
            return retention(q, k, v, decay, normalization="decay")

    return call


@claim(25, "RetNet", "Time grows as T d (b + h), with chunks of b tokens and heads of h channels.", place=PLACE,
       paper=f"Section 3.5 of {PAPER} says so of chunks; the parallel form takes O(T² d), the recurrent one O(T d h).")
def time(measure: Measure) -> Finding:
    """The exponents in T and d of chunks, that in T of the parallel form, and a plane through times of chunks over b and h."""
    sizes = measure.sizes((384, 512, 768, 1024, 1536, 2048), (512, 768, 1024, 1536, 2048, 3072, 4096))
    chunks = measure.exponent("T", {2 * T: _retention(measure, 2 * T, 64, 32, 64) for T in sizes})
    in_d = measure.exponent("d", {d: _retention(measure, 512, d, 32, 64) for d in (64, 96, 128, 192, 256, 384)})
    parallel = measure.exponent("T", {T: _retention(measure, T, 64, 32) for T in sizes})
    d, T = 256, measure.sizes(1024, 2048)
    grid = [(b, h) for b in (64, 128, 256, 512, 1024) for h in (32, 64, 128, 256)]
    times = measure.times({(b, h): _retention(measure, T, d, h, b) for b, h in grid})
    table = np.array([[1, b, h, 1e9 * min(times[b, h]) / (T * d)] for b, h in grid])  # ns
    known, seconds = table[:, :3], table[:, 3]
    (base, per_b, per_h), *_ = np.linalg.lstsq(known, seconds, rcond=None)
    explained = 1 - float(((seconds - known @ (base, per_b, per_h)) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum())
    growths = [fit.nearest({"1": 1, "2": 2}) for fit in (chunks, in_d, parallel)]
    measured = (f"The time of chunks grows as {chunks} and {in_d}, that of the parallel form as {parallel}. For each token and "
                f"channel chunks take {base:.2f} + {1e3 * per_b:.2f} b/1000 + {1e3 * per_h:.2f} h/1000 ns, which explains "
                f"{explained:.0%} of how the times over {len(grid)} pairs of b and h differ.")
    numbers = {"chunks": chunks, "d": in_d, "parallel": parallel, "explained": explained,
               "ns": {"constant": base, "b": per_b, "h": per_h}}
    if None in growths or explained < 0.7:
        return UNDECIDED(measured, **numbers)
    if growths[:2] != ["1", "1"] or min(per_b, per_h) <= 0:
        return WRONG(measured, **numbers)
    return RIGHT(measured, **numbers) if growths[2] == "1" else CONDITIONS(measured + " So it is right of chunks alone.",
                                                                           **numbers)


@claim(26, "RetNet", "Space grows as T.", place=PLACE,
       paper=f"Table 1 of {PAPER} gives the memory of long sequences as O(T), without the factor d; to generate, the state has "
             "a fixed size.")
def space(measure: Measure) -> Finding:
    """The exponents in T and in d of the memory of a layer's training step, and the state after more and more tokens."""
    def step(T: int, d: int) -> int:
        (block,) = measure.model("retnet", layers=1, width=d, heads=d // 32, context=T).blocks
        return measure.memory(training(block.mixer, measure.normal(1, T, d), weights=block.mixer.parameters()))

    measure.progress("memory of a layer")
    in_t = measure.exponent("T", {T: step(T, 64) for T in measure.sizes((128, 192, 256, 384, 512, 768), (512, 768, 1024, 1536,
                                                                                                        2048, 4096))})
    in_d = measure.exponent("d", {d: step(512, d) for d in measure.sizes((32, 64, 96, 128, 160, 192), (64, 128, 192, 256, 384,
                                                                                                      512))})
    model = measure.model("retnet", layers=1)
    states = {t: measure.state_bytes(model, t) for t in (1, 16, 256, 2048)}
    measured = (f"The memory of a training step of a layer grows as {in_t} and {in_d}; the state has "
                f"{' and '.join(str(size) for size in sorted(set(states.values())))} bytes after 1 to 2048 tokens.")
    numbers = {"T": in_t, "d": in_d, "state": states}
    growths = in_t.nearest({"1": 0, "T": 1, "T²": 2}), in_d.nearest({"1": 0, "d": 1, "d²": 2})
    if None in growths:
        return UNDECIDED(measured, **numbers)
    if growths[0] != "T":
        return WRONG(measured, **numbers)
    if growths[1] == "1":
        return RIGHT(measured, **numbers)
    fixed = len(set(states.values())) == 1
    return CONDITIONS(measured + " So it is O(T d) in training" + (", and O(1) in T to generate." if fixed else "."), **numbers)


@claim(27, "RetNet", "The parallel form of training and the recurrent form of inference compute the same.", place=PLACE,
       paper=f"Section 2.1 of {PAPER} shows it for retention; its code divides by a different sum in each form, and relies on "
             "the norm that follows.")
def forms(measure: Measure) -> Finding:
    """The three forms with the divisors that the state carries, in float64, and a whole model read at once and token by token;
    then the divisors of torchscale's forms before a norm with its eps.
    """
    T, heads, width = 96, 4, 16
    q, k, v = measure.rng.normal(size=(3, 1, heads, T, width))
    decay, outputs = decays(heads), {}
    for form, tuning in FORMS.items():
        with use("retention", form=form, **tuning):
            outputs[form] = [x.numpy() for x in retention(q, k, v, decay, normalization="paper")]
    carried = max(distance(a, b) for form in FORMS for a, b in zip(outputs[form], outputs["parallel"], strict=True))
    model, ids = exact(layers=2), measure.ids(1, 48)
    with no_grad():
        whole, state, parts = model(ids).numpy(), model.init_state(1), []
        for t in range(ids.shape[1]):
            logits, state = model.prefill(ids[:, t:t + 1], state)
            parts.append(logits.numpy())
    by_token = distance(np.concatenate(parts, axis=1), whole)
    x = measure.rng.normal(size=(1, T, model.embed.weight.shape[1]))
    gaps = {eps: _torchscale_gap(model.blocks[0].mixer, x, 16, eps) for eps in (0.0, 1e-6, 1e-5)}
    measured = (f"The forms differ by {carried:.1e} of the largest value when the sums of the divisor are carried along, and a "
                f"model that reads token by token by {by_token:.1e}. With the divisors of torchscale's forms, they differ "
                "after the norm by " + ", ".join(f"{gap:.1e} with eps {eps:g}" for eps, gap in gaps.items()) + ".")
    numbers = {"forms": carried, "by_token": by_token, "torchscale": {str(eps): gap for eps, gap in gaps.items()}}
    if max(carried, by_token) > EXACT:
        return WRONG(measured, **numbers)
    return RIGHT(measured, **numbers) if max(gaps.values()) < 1e-3 else CONDITIONS(
        measured + " So the divisor has to be the same in all forms.", **numbers)


def _torchscale_gap(mixer: Any, x: np.ndarray, chunk: int, eps: float) -> float:
    """How far a layer's normed outputs [B H T V] of x[B T D] are apart by the divisors that torchscale 0.3.0 has in its forms.

    All divide by the root of the row's decays; the parallel form also by the score's sum, if that is above 1, and chunks count
    the decays from the beginning of a chunk on.
    """
    position = np.arange(x.shape[1])
    lag = position[:, None] - position
    q, k = (_heads(part, mixer.heads) for part in np.split(x @ mixer.qk.weight.numpy().T, 2, axis=2))
    v = _heads(x @ mixer.v.weight.numpy().T, mixer.heads)
    gamma = np.where(lag >= 0, mixer.decay.numpy()[:, None, None] ** np.maximum(lag, 0), 0.0)  # [H T T]
    scores = mixer.scale * q @ k.swapaxes(2, 3) * gamma / np.sqrt(gamma.sum(axis=2, keepdims=True))  # [B H T T]
    recurrent = scores @ v
    local = np.where(position[:, None] // chunk == position // chunk, gamma, 0.0)
    divided = {"recurrent": recurrent,
               "parallel": recurrent / np.maximum(np.abs(scores.sum(axis=3, keepdims=True)), 1),
               "chunks": recurrent * np.sqrt(gamma.sum(axis=2, keepdims=True) / local.sum(axis=2, keepdims=True))}
    normed = [layer_norm(y, np.ones(v.shape[3]), np.zeros(v.shape[3]), eps=eps).numpy() for y in divided.values()]
    return max(distance(y, normed[0]) for y in normed)


@claim(28, "RetNet", "The softmax is replaced by an elementwise product with a matrix D of decays, and a group norm.",
       place=PLACE, paper=f"Equations (5) and (8) of {PAPER} are this.")
def definition(measure: Measure) -> Finding:
    """A layer's output beside equations (5) and (8) written out with its weights; the sums and signs of its scores; and what a
    factor of the scores changes after the group norm.
    """
    T, d, heads = 24, 32, 2
    (block,) = exact(layers=1, width=d, heads=heads, normalization="none").blocks
    mixer, x = block.mixer, measure.rng.normal(size=(1, T, d))
    W = {name: getattr(mixer, name).weight.numpy() for name in ("qk", "v", "gate", "out")}
    q, k = np.split(x @ W["qk"].T, 2, axis=2)
    angles = np.arange(T)[:, None] * mixer.rotation["angles"]  # [T K/2]
    q, k = (_turned(_heads(part, heads), angles) for part in (q, k))
    lag = np.arange(T)[:, None] - np.arange(T)
    D = np.where(lag >= 0, decays(heads)[:, None, None] ** np.maximum(lag, 0), 0.0)  # [H T T]
    scores = q @ k.swapaxes(2, 3) * mixer.scale * D  # (5) [B H T T]
    y = _group_norm(scores @ _heads(x @ W["v"].T, heads))
    gate = x @ W["gate"].T
    out = (gate / (1 + np.exp(-gate)) * y) @ W["out"].T  # (8)
    error = distance(mixer(Tensor.wrap(x)).numpy(), out)
    sums = scores.sum(axis=3)
    scaled = distance(_group_norm(1000 * (scores @ _heads(x @ W["v"].T, heads)), eps=0), _group_norm(
        scores @ _heads(x @ W["v"].T, heads), eps=0))
    measured = (f"A layer differs from the equations by {error:.1e}. Its rows of scores have sums from {sums.min():.2f} to "
                f"{sums.max():.2f}, and {(scores < 0).mean() / (D > 0).mean():.0%} of the scores are negative, so there is no "
                f"softmax; a factor of 1000 on all scores changes {scaled:.1e} after the norm.")
    right = error < EXACT and scaled < EXACT and (scores < 0).any()
    return (RIGHT if right else WRONG)(measured, error=error, smallest_sum=sums.min(), largest_sum=sums.max(), scaled=scaled)


def _heads(x: np.ndarray, heads: int) -> np.ndarray:
    """[B T D] -> [B H T D/H]"""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Neighbouring channels of x[B H T K] as complex numbers, turned by angles [T K/2]."""
    z = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def _group_norm(y: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Each head of y[B H T V] at each position to mean 0 and variance 1, and the heads side by side [B T H·V]."""
    y = (y - y.mean(axis=3, keepdims=True)) / np.sqrt(y.var(axis=3, keepdims=True) + eps)
    return y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)


@claim(29, "RetNet", "It needs 3.4 times less memory to generate, with 8.4 times the throughput and 15.6 times less latency.",
       place=PLACE, paper=f"Figure 6 of {PAPER} has these ratios to a Transformer, for 6.7 billion parameters and 8192 tokens.")
def inference_cost(measure: Measure) -> Finding:
    """The ratios between a Transformer and RetNet of one size after prefixes of more and more tokens: weights and state, and
    seconds for the next token of one sequence, and of four sequences at once.
    """
    prefixes = measure.sizes((64, 256, 1024, 2048), (64, 256, 1024, 2048, 4096, 8192))
    published, batch, costs = {"memory": 3.4, "throughput": 8.4, "latency": 15.6}, 4, {}
    for name in ("transformer", "retnet"):
        measure.progress(f"a token of {name}")
        model = measure.model(name, layers=2, width=128, context=max(prefixes), positions="none")
        weights = sum(parameter.numpy().nbytes for parameter in model.parameters())
        one = {t: min(seconds) for t, seconds in measure.steps(model, prefixes).items()}
        several = measure.times({t: _next(measure, model, batch, t) for t in prefixes})
        costs[name] = {"memory": {t: weights + measure.state_bytes(model, t) for t in prefixes}, "latency": one,
                       "throughput": {t: min(seconds) for t, seconds in several.items()}}
    ratios = {name: {t: costs["transformer"][name][t] / costs["retnet"][name][t] for t in prefixes} for name in published}
    measured = "After " + ", ".join(map(str, prefixes)) + " tokens, " + "; ".join(
        f"the ratio of {name} is " + ", ".join(f"{ratio:.2g}" for ratio in curve.values()) + f" (the paper: {published[name]})"
        for name, curve in ratios.items()) + "."
    ends = [(curve[prefixes[0]], curve[prefixes[-1]]) for curve in ratios.values()]
    if any(last <= 1 or last <= first for first, last in ends):
        return WRONG(measured, ratios=ratios)
    if all(min(ratios[name].values()) >= published[name] for name in published):
        return RIGHT(measured, ratios=ratios)
    return CONDITIONS(measured + " So the ratios depend on the length of the prefix.", ratios=ratios)


def _next(measure: Measure, model: Any, batch: int, t: int) -> Callable[[], Any]:
    """A call that reads one more token of each of several sequences."""
    with no_grad():
        _, state = model.prefill(measure.ids(batch, t), model.init_state(batch))
    return inference(model.prefill, measure.ids(batch, 1), state)


def _losses(measure: Measure, variant: str, width: int = 64) -> list[float]:
    """The held-out losses of all seeds after training on text, with the learning rate that is best in the mean."""
    steps = measure.sizes(60, 300)
    by_rate = [[measure.train(variant, context=64, width=width, layers=2, batch=16, steps=steps, eval_every=steps, lr=rate,
                              eval_tokens=20_000, sample_tokens=0, seed=seed).loss for seed in range(measure.sizes(1, 2))]
               for rate in measure.sizes((3e-3,), (2e-3, 5e-3))]
    return min(by_rate, key=statistics.fmean)


@claim(30, "RetNet", "It is better than Transformers from 2.7 billion parameters on.", place=PLACE,
       paper=f"Figure 5 of {PAPER} shows perplexities at 1.3, 2.7 and 6.7 billion: RetNet's is the higher one at 1.3, and the "
             "lower one at the others.")
def scale(measure: Measure) -> Finding:
    """The held-out losses of RetNet and of the Transformer in a few widths, after as many steps on the same text."""
    widths = measure.sizes((32, 64), (32, 64, 128))
    losses = {width: {name: _losses(measure, name, width) for name in ("retnet", "transformer")} for width in widths}
    measured = "Billions of parameters do not fit here. " + "; ".join(
        f"{'At' if width == widths[0] else 'at'} width {width} RetNet reaches {span(each['retnet'])} nats and the Transformer "
        f"{span(each['transformer'])}"
        for width, each in losses.items()) + "."
    return UNTESTABLE(measured, losses=losses)


@claim(31, "RetNet", "It beats RWKV, Hyena and models like AFT by a large margin in language modelling.", place=PLACE,
       paper=f"Table 5 of {PAPER} has a perplexity of 26.05 for RetNet with 200 million parameters, 29.97 and more for the "
             "others, and no AFT.")
def language(measure: Measure) -> Finding:
    """Held-out losses after as many steps on the same text, of all seeds at the better of two learning rates."""
    losses = {name: _losses(measure, name) for name in ("retnet", "rwkv", "hyena", "aft-local")}
    others = [name for name in losses if name != "retnet"]
    margin = math.log(29.97 / 26.05)  # nats, of the paper's table
    gap = min(statistics.fmean(losses[name]) for name in others) - statistics.fmean(losses["retnet"])
    measured = f"RetNet reaches {span(losses['retnet'])} nats, " + ", ".join(
        f"{name} {span(losses[name])}" for name in others) + (
        f"; it is {abs(gap):.3f} {'below' if gap > 0 else 'above'} the best of them.")
    ahead = [lower(losses["retnet"], losses[name]) for name in others]
    if all(ahead):
        return RIGHT(measured, losses=losses) if gap >= margin else CONDITIONS(
            measured + f" So it is ahead, but by less than the {margin:.3f} nats of the paper.", losses=losses)
    if False not in ahead:
        return UNDECIDED(measured, losses=losses)
    return CONDITIONS(measured + " So the order that the paper has for 200 million parameters is not that of models of this "
                      "size.", losses=losses)
