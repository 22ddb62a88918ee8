"""AFT: how its time and memory grow, what its weights are, and how it compares (Zhai et al. 2021)."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from autograd import Tensor, cross_entropy, gradients, no_grad
from autograd.errors import ShapeError
from autograd.metric import distance
from autograd.verify import compute, refuses, routes

from ..ops import aft_full, aft_simple, attention
from ..timing import inference, training
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from .measure import Measure, lower, span

PAPER = "2105.14103"
PLACE = "section AFT"
EXACT = 1e-10  # of two sides of an equation in float64
ASKED = 16  # characters at the end of a window
BLOCK = 64  # rows of the biases that a layer makes at a time


def layer(measure: Measure, variant: str, **options: Any) -> Any:
    """The mixer of a new model with one layer."""
    (block,) = measure.model(variant, layers=1, **options).blocks
    return block.mixer


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@claim(20, "AFT", "AFT-simple takes O(T d) time, AFT-full O(T² d), and both take O(T d) space.", place=PLACE,
       paper=f"The same is in table 1 of {PAPER}. It leaves out AFT-full's biases: T² numbers, unless they are made in parts.")
def cost(measure: Measure) -> Finding:
    """The exponents in T and in d of the time of both operators, and in T of the memory of a layer. AFT-full reads the sequence
    at once, so that it makes all biases, or 64 tokens at a time.
    """
    lengths, widths = measure.sizes((384, 512, 768, 1024, 1536, 2048), (512, 768, 1024, 1536, 2048, 3072, 4096)), (
        64, 128, 192, 256, 384, 512)

    def simple(T: int, d: int) -> Any:
        return inference(aft_simple, *(measure.normal(1, T, d) for _ in range(3)))

    def full(T: int, d: int) -> Any:
        return inference(aft_full, *(measure.normal(1, T, d) for _ in range(3)), 0.1 * measure.normal(T, T))

    times = {"AFT-simple in T": measure.exponent("T", {4 * T: simple(4 * T, 32) for T in lengths}),
             "AFT-simple in d": measure.exponent("d", {d: simple(512, d) for d in widths}),
             "AFT-full in T": measure.exponent("T", {T: full(T, 64) for T in lengths}),
             "AFT-full in d": measure.exponent("d", {d: full(512, d) for d in widths})}
    measure.progress("memory of the layers")
    memory = {"AFT-simple": {}, "AFT-full at once": {}, f"AFT-full {BLOCK} tokens at a time": {}}
    for T in measure.sizes((256, 384, 512, 768, 1024, 1536), (256, 512, 1024, 2048, 3072, 4096)):
        for name, sizes in memory.items():
            mixer = layer(measure, "aft-simple" if name == "AFT-simple" else "aft-full", context=T, width=16, positions="none")
            x = Tensor.wrap(measure.normal(1, T, 16))
            sizes[T] = measure.memory(inference(_in_parts if "tokens" in name else _whole, mixer, x))
    memory = {name: measure.exponent("T", sizes) for name, sizes in memory.items()}
    growths = [fit.nearest({"1": 1, "2": 2}) for fit in (*times.values(), *memory.values())]
    measured = (f"Time grows as {times['AFT-simple in T']} and {times['AFT-simple in d']} in AFT-simple, as "
                f"{times['AFT-full in T']} and {times['AFT-full in d']} in AFT-full. The memory of a layer grows as "
                + ", ".join(f"{fit} in {name}" for name, fit in memory.items()) + ".")
    numbers = {"times": times, "memory": memory}
    if None in growths:
        return UNDECIDED(measured, **numbers)
    if growths[:4] != ["1", "1", "2", "1"] or growths[4] == "2" or growths[6] == "2":
        return WRONG(measured, **numbers)
    return RIGHT(measured, **numbers) if growths[5] == "1" else CONDITIONS(
        measured + " So the space is O(T d) only for AFT-full that never has all its biases at once.", **numbers)


def _whole(mixer: Any, x: Tensor) -> Tensor:
    return mixer(x)


def _in_parts(mixer: Any, x: Tensor) -> list[Tensor]:
    """The same output as of a call, made of parts."""
    state, ys = mixer.init_state(x.shape[0]), []
    for start in range(0, x.shape[1], BLOCK):
        y, state = mixer.prefill(x[:, start:start + BLOCK], state)
        ys.append(y)
    return ys


@claim(21, "AFT", "AFT is attention with as many heads as channels, without computing it.", place=PLACE,
       paper=f"Equation (3) of {PAPER} says so: the weights of a channel depend on its keys and on the positions.")
def heads(measure: Measure) -> Finding:
    """AFT-full beside softmax attention with a head for each channel, whose query is 1 and the row of U, and whose key is the
    channel's key and the row of V; and how many of the channels' weight matrices differ.
    """
    T, d, rank = 48, 16, 4
    q, k, v = measure.rng.normal(size=(3, 1, T, d))
    U, V = measure.rng.normal(size=(2, T, rank))
    y = aft_full(q, k, v, U @ V.T).numpy()
    query = np.broadcast_to(np.concatenate([np.ones((T, 1)), U], axis=1), (1, d, T, 1 + rank))  # no content is in it
    key = np.concatenate([k.transpose(0, 2, 1)[..., None], np.broadcast_to(V, (1, d, T, rank))], axis=3)
    explicit, _ = attention(np.ascontiguousarray(query), key, np.ascontiguousarray(v.transpose(0, 2, 1)[..., None]), scale=1.0)
    error = distance(y, _sigmoid(q) * explicit.numpy()[..., 0].transpose(0, 2, 1))
    unit = np.broadcast_to(np.eye(T)[:, :, None], (T, T, d))  # a sequence for each s, whose value is 1 at s alone
    weights = aft_full(*(np.ascontiguousarray(np.broadcast_to(x, (T, T, d))) for x in (q, k)), np.ascontiguousarray(unit),
                       U @ V.T).numpy() / _sigmoid(q)  # a_ts [s t d]
    matrices = weights.reshape(-1, d).T
    different = len({tuple(row) for row in np.round(matrices, 6)})
    measured = (f"The two outputs differ by {error:.1e} of the largest value, and {different} of {d} channels have a matrix of "
                "weights of their own.")
    return (RIGHT if error < EXACT and different == d else WRONG)(measured, error=error, channels=d, matrices=different)


@claim(22, "AFT", "Learned position biases are added to the keys, and the result is gated by the queries.", place=PLACE,
       paper=f"Equation (2) of {PAPER} is this.")
def gate(measure: Measure) -> Finding:
    """Equation (2) written out beside the operator by each of its forms and kernels; a constant added to one key or to its
    column of biases; what other queries change; and the gradient that reaches the biases of a layer.
    """
    T, d = 12, 3
    q, k, v = measure.rng.normal(size=(3, 1, T, d))
    w = measure.rng.normal(size=(T, T))
    seen = np.tril(np.ones((T, T)))[..., None] * np.exp(k + w[..., None])  # e^(k_s + w_ts) [T S d]
    mean = (seen * v).sum(axis=1) / seen.sum(axis=1)  # [T d]
    arguments = q, k, v, w, None
    errors = {route: distance(*compute(aft_full, route, arguments, {}), _sigmoid(q) * mean) for route in routes(aft_full)
              if " on " not in route and refuses(aft_full, route, arguments, {}) is None}  # on this machine's processor
    moved, column = k.copy(), w.copy()
    moved[:, 5] += 1.5
    column[:, 5] += 1.5
    added = distance(aft_full(q, moved, v, w).numpy(), aft_full(q, k, v, column).numpy())
    other = measure.rng.normal(size=q.shape)
    gated = distance(aft_full(other, k, v, w).numpy() / _sigmoid(other), aft_full(q, k, v, w).numpy() / _sigmoid(q))
    mixer = layer(measure, "aft-full", context=T, width=8)
    y = mixer(Tensor.wrap(measure.normal(1, T, 8)))
    size = float(np.linalg.norm(gradients([y], [mixer.pos_u], [Tensor.wrap(np.ones_like(y.numpy()))])[0].numpy()))
    worst = max(errors.values())
    measured = (f"The {len(errors)} forms and kernels differ from equation (2) by at most {worst:.1e}. A constant that is "
                f"added to a key does the same as one that is added to its column of biases, up to {added:.1e}; other queries "
                f"change the gate alone, up to {gated:.1e}. The biases are learned: their gradient has the norm {size:.2g}.")
    right = max(worst, added, gated) < EXACT and size > 0
    return (RIGHT if right else WRONG)(measured, errors=errors, added=added, gated=gated, gradient=size)


@claim(23, "AFT", "AFT is better than Linformer and Performer at the same cost.", place=PLACE,
       paper=f"On enwik8 AFT-local has 1.154 bits, AFT-simple 1.209 and Performer 1.199; Linformer is not in the table "
             f"({PAPER}, table 4). Table 4.3 of 2302.10866 has AFT-conv with a perplexity of 28.2 on WikiText-103, and "
             "Performer with 26.8.")
def against(measure: Measure) -> Finding:
    """Models of one size learn ListOps, a task of a few that causal models and those of both directions can do, from the same
    batches: the held-out losses of all seeds, and the time of a training step of each layer.
    """
    length, width, steps = 32, 64, measure.sizes(40, 250)
    options = dict(task="listops", context=length, width=width, layers=2, lr=3e-3, shortest=8, depth=3, arguments=4, batch=64,
                   eval_every=steps, steps=steps, eval_examples=measure.sizes(500, 2000))
    ours, theirs = ("aft-simple", "aft-local"), ("linformer", "performer-encoder")
    own = {"performer-encoder": {"random_features": 32}}
    losses = {name: [measure.train(name, seed=seed, **options, **own.get(name, {})).loss for seed in range(measure.sizes(2, 3))]
              for name in (*ours, *theirs)}
    calls = {}
    for name in losses:
        mixer = layer(measure, name, context=length, width=width, **own.get(name, {}))
        calls[name] = training(mixer, measure.normal(64, length, width), weights=mixer.parameters())
    seconds = {name: min(times) for name, times in measure.times(calls).items()}
    ahead = {name: [lower(losses[name], losses[other]) for other in theirs] for name in ours}
    dear = {name: any(seconds[name] > 1.1 * seconds[other] for other in theirs) for name in ours}
    best = min(ours, key=lambda name: (ahead[name] != [True, True], dear[name], statistics.fmean(losses[name])))
    measured = (f"On ListOps {best} reaches a loss of {span(losses[best])} nats, " + " and ".join(
        f"{name} {span(losses[name])}" for name in theirs) + "; a step of its layer takes " + " and ".join(
        f"{seconds[best] / seconds[name]:.2f} of the time of {name}" for name in theirs) + ".")
    numbers = {"losses": losses, "seconds": seconds}
    if ahead[best] == [True, True]:
        return CONDITIONS(measured + " So it is better, but at a higher cost.", **numbers) if dear[best] else RIGHT(
            measured, **numbers)
    return (WRONG if all(False in each for each in ahead.values()) else UNDECIDED)(measured, **numbers)


@claim(24, "AFT", "AFT handles inputs of any length.", place=PLACE,
       paper=f"It is so for AFT-simple and AFT-conv; AFT-full and AFT-local have a row of U and V for each position ({PAPER}, "
             "section 3.2).")
def lengths(measure: Measure) -> Finding:
    """Models without position vectors learn texts of 64 characters, and then predict the same characters with up to eight times
    as many before them.
    """
    context, steps, bits, refused = 64, measure.sizes(40, 300), {}, []
    for name in ("aft-simple", "aft-conv", "aft-local", "aft-full"):
        run = measure.train(name, context=context, width=64, layers=2, positions="none", steps=steps, eval_every=steps,
                            eval_tokens=10_000, sample_tokens=0)
        ids = np.asarray(run.trained.experiment.begin(run.trained.saved).corpus.held_out, np.intp)
        bits[name] = {}
        for times in (1, 2, 4, 8):
            try:
                bits[name][times * context] = _at_the_end(run.model, ids, times * context, 8 * context, measure.sizes(64, 160))
            except ShapeError:  # it has no biases for these positions
                refused.append(name)
                break
    reading = {name: values for name, values in bits.items() if name not in refused}
    worse = [name for name, values in reading.items() if max(values.values()) > values[context] + 0.02]
    measured = "; ".join(
        f"{name} needs {values[context]:.2f} bits for a character behind {context} others and " + (
            f"{values[8 * context]:.2f} behind {8 * context}" if name not in refused else "refuses longer texts")
        for name, values in bits.items()) + "."
    if worse:
        measured += f" {' and '.join(worse)} can read more, but it makes them worse."
    verdict = WRONG if not reading else CONDITIONS if refused or worse else RIGHT
    return verdict(measured, bits=bits, refused=refused)


def _at_the_end(model: Any, ids: np.ndarray, length: int, longest: int, count: int) -> float:
    """The bits of the last characters of windows of a length that end where windows of the longest one do."""
    ends, losses = longest * np.arange(1, min(count, (len(ids) - 1) // longest) + 1), []
    with no_grad():
        for end in ends:
            logits = model(ids[None, end - length:end])
            losses.append(cross_entropy(logits, ids[None, end - length + 1:end + 1], reduction="none").numpy()[0, -ASKED:])
    return float(np.mean(losses) / math.log(2))
