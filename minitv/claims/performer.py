"""Performer: what it costs, and how near it comes to ordinary attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from autograd.random import Random

from ..ops import attention, favor
from ..ops.favor.projection import random_projection
from ..timing import inference
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from .measure import Measure, slope

PAPER = "2009.14794"
SYSTEM, PLACE = "Performer", "section Performer"


def _estimate(measure: Measure, length: int, features: int, width: int) -> Any:
    """A call of causal attention by random features, in one head."""
    qkv = (measure.normal(1, 1, length, width) for _ in range(3))
    return inference(favor, *qkv, measure.normal(features, width))


@claim(48, SYSTEM, "Its time grows as T d² log d, its space as T d log d + d² log d.", place=PLACE,
       paper=f"Time is O(T m d) and space O(T m + T d + m d) for m features, and m = d log d are enough for a given error, "
             f"where d is the width of a head ({PAPER}, section 2.2 and theorem 4).")
def cost(measure: Measure) -> Finding:
    """The exponents of time in T, in m, and in d with m = d log d, and of memory in T."""
    lengths = measure.sizes((512, 1024, 2048, 4096, 8192, 16384), (1024, 2048, 4096, 8192, 16384, 32768))
    some = measure.sizes(256, 1024)
    in_t = measure.exponent("T", {t: _estimate(measure, t, 64, 32) for t in lengths})
    in_m = measure.exponent("m", {m: _estimate(measure, some, m, 32) for m in (128, 256, 512, 768, 1024, 1536)})
    in_d = measure.exponent("d", {d: _estimate(measure, some, round(d * math.log(d)), d) for d in (64, 96, 128, 160, 192, 256)})
    memory = measure.exponent("T", {t: measure.memory(_estimate(measure, t, 64, 32)) for t in lengths})
    product = slope([(d, d * d * math.log(d)) for d, _ in in_d.points])[0]
    text = (f"time grew as {in_t} and as {in_m}, and as {in_d} with m = d log d, where m d grows as d^{product:.2f}; memory "
            f"grew as {memory}")
    numbers = dict(time_t=in_t, time_m=in_m, time_d=in_d, memory_t=memory)
    growths = [fit.nearest({"1": 0.0, "T": 1.0, "T²": 2.0}) for fit in (in_t, memory)]
    features = in_m.nearest({"1": 0.0, "m": 1.0, "m³": 3.0})
    width = in_d.nearest({"d": 1.0, "d² log d": lambda d: d * d * math.log(d), "d⁴": 4.0})
    if None in (*growths, features, width):
        return UNDECIDED(f"The times do not tell: {text}.", **numbers)
    if growths != ["T", "T"] or width != "d² log d":
        return WRONG(f"It grows otherwise: {text}.", **numbers)
    if features == "1":
        return RIGHT(f"The number of features does not matter: {text}.", **numbers)
    return CONDITIONS(f"Time grows no faster than that with m = d log d features, and otherwise as T m d: {text}.", **numbers)


@claim(49, SYSTEM, "It estimates ordinary attention.", place=PLACE,
       paper=f"Positive features give exp(q · k) without bias, with a variance that falls as 1/m and grows with the norms of "
             f"queries and keys ({PAPER}, lemmas 1 and 2).")
def estimates(measure: Measure) -> Finding:
    """Relative errors of the kernel exp(q · k / √K) and of the output, over the features and the norm of queries and keys."""
    length, width, draws, features = 48, 16, measure.sizes(30, 300), (16, 32, 64, 128, 256, 512)

    def errors(count: int, norm: float) -> tuple[float, float, float]:
        """Of the kernel and of the output, and of the mean kernel in standard errors."""
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) * norm * width**0.25
                for x in measure.rng.standard_normal((2, 1, 1, length, width)))  # so that q · k / √K is norm² times a cosine
        v = measure.rng.standard_normal((1, 1, length, width))
        exact, right = np.exp(q[0, 0] @ k[0, 0].T / math.sqrt(width)), attention(q, k, v)[0].numpy()
        kernels, outputs = [], []
        for draw in range(draws):
            rows = random_projection(Random(draw), count, width)
            one, other = (np.exp(x @ rows.T - (x * x).sum(-1, keepdims=True) / 2)
                          for x in (q[0, 0] / width**0.25, k[0, 0] / width**0.25))  # [T F]
            kernels.append(one @ other.T / count / exact - 1)
            outputs.append(favor(q, k, v, rows)[0].numpy() - right)
        each = np.mean(kernels, axis=(1, 2))
        rms = [float(np.sqrt(np.mean(np.square(x)))) for x in (kernels, outputs, right)]
        return rms[0], rms[1] / rms[2], float(abs(each.mean()) / (each.std(ddof=1) / math.sqrt(draws)))

    by_count, by_norm = {m: errors(m, 1.0) for m in features}, {norm: errors(128, norm) for norm in (0.5, 1.0, 1.5, 2.0)}
    kernel, output = (measure.exponent("m", {m: each[i] for m, each in by_count.items()}) for i in range(2))
    bias = float(np.median([each[2] for each in by_count.values()]))
    text = (f"from 16 to 512 features the error of exp(q · k) fell from {by_count[16][0]:.2f} to {by_count[512][0]:.2f}, as "
            f"{kernel}, and that of outputs from {by_count[16][1]:.2f} to {by_count[512][1]:.2f}; the mean over {draws} "
            f"draws was {bias:.1f} standard errors off, in the median; with 128 features the error of exp(q · k) was "
            f"{by_norm[0.5][0]:.2f} at the norm 0.5 and {by_norm[2.0][0]:.2f} at the norm 2")
    numbers = dict(kernel=kernel, output=output, standard_errors_off=bias, by_norm=by_norm)
    if -0.7 < kernel.exponent < -0.3 and output.high < 0 and bias < 3:
        return RIGHT(f"It does, with an error that falls as 1/√m and grows with the norms: {text}.", **numbers)
    if output.high < 0:
        return CONDITIONS(f"It comes nearer with more features, but not as 1/√m without bias: {text}.", **numbers)
    return WRONG(f"More features do not help: {text}.", **numbers)
