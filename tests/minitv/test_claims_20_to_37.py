"""Statements about AFT, RetNet and LongNet: verdicts that follow from planted measurements, and what ranks receive."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from minitv.claims import CONDITIONS, RIGHT, UNDECIDED, UNTESTABLE, WRONG, claims
from minitv.claims.longnet import PART, PUBLISHED, _busy, _rank
from minitv.claims.measure import Measure, fitted, lower, span
from minitv.variants.longnet import patterns

CLAIMS = claims()


def verdict(number: int, measure: Measure):
    measure.begin(number)
    return CLAIMS[number].test(measure).verdict


@pytest.mark.parametrize(("number", "expected"), [(21, RIGHT), (22, RIGHT), (27, CONDITIONS), (28, RIGHT), (34, RIGHT)])
def test_what_is_checked_by_computing_both_sides(number, expected):
    with Measure() as measure:
        assert verdict(number, measure) is expected


def test_seeds_are_lower_only_where_all_are():
    assert [lower((1, 2), others) for others in ((3, 4), (2, 4), (0.2, 0.9))] == [True, None, False]
    assert span([1.0]) == "1.000" and span([1.0, 2.0]) == "1.500 (1.000 to 2.000)"


# -- exponents ---------------------------------------------------------------------------------------------------------
class Grown(Measure):
    """Exponents in the order in which they are asked for; nothing else is measured."""

    def __init__(self, exponents, noise=0.01):
        super().__init__()
        self.exponents, self.noise = list(exponents), noise

    def exponent(self, name, values, seconds=None):
        exponent = self.exponents.pop(0)
        return fitted(name, [(size, size**exponent * np.exp(self.noise * self.rng.standard_normal())) for size in values])

    def times(self, calls, seconds=None):  # 3 + b / 100 + h / 100 of chunks in row 25
        return {name: [3 + sum(name) / 100 if isinstance(name, tuple) else 1.0] for name in calls}

    def normal(self, *shape):
        return np.zeros([1] * len(shape), np.float32)

    def memory(self, call):
        return 1

    def model(self, variant, **options):
        heads = {} if variant.startswith("aft") else {"heads": 2}
        return super().model(variant, **{**options, "context": 2, "width": 32, **heads})


@pytest.mark.parametrize(("number", "exponents", "noise", "expected"), [
    (20, [1, 1, 2, 1, 1, 2, 1], 0.01, CONDITIONS), (20, [1, 1, 2, 1, 1, 1, 1], 0.01, RIGHT),
    (20, [2, 1, 2, 1, 1, 2, 1], 0.01, WRONG), (20, [1, 1, 2, 1, 1, 2, 2], 0.01, WRONG),
    (20, [1, 1, 1.5, 1, 1, 2, 1], 1.0, UNDECIDED),
    (25, [1, 1, 2], 0.01, CONDITIONS), (25, [1, 1, 1], 0.01, RIGHT), (25, [2, 1, 2], 0.01, WRONG),
    (25, [1.5, 1, 2], 1.0, UNDECIDED),
    (26, [1, 1], 0.01, CONDITIONS), (26, [1, 0], 0.01, RIGHT), (26, [2, 1], 0.01, WRONG), (26, [1.5, 1], 1.0, UNDECIDED),
    (32, [1, 1], 0.01, RIGHT), (32, [2, 1], 0.01, WRONG), (32, [1.5, 1], 1.0, UNDECIDED),
    (33, [1, 1.12], 0.001, CONDITIONS), (33, [1, 1], 0.001, WRONG), (33, [1.12, 1.12], 0.001, RIGHT),
    (33, [2, 2], 0.001, WRONG), (33, [1.06, 1.06], 0.1, UNDECIDED),
])
def test_a_verdict_follows_from_the_exponents(number, exponents, noise, expected):
    assert verdict(number, Grown(exponents, noise)) is expected


LADDERS = "16:1,32:2,64:4,128:8", "16:1/32:2/64:4/128:8", "16:1/16:1,32:2/16:1,64:4/16:1,128:8"


# -- trainings ---------------------------------------------------------------------------------------------------------
class Trained(Measure):
    """Trainings with planted losses, by their variant or their segments, and layers that take 1 s but for some."""

    def __init__(self, losses, seconds=None):
        super().__init__()
        self.losses, self.slow = losses, seconds or {}

    def train(self, variant, **options):
        return SimpleNamespace(loss=self.losses.get(variant, self.losses.get(options.get("segments"))))

    def times(self, calls, seconds=None):
        return {name: [self.slow.get(name, 1.0)] for name in calls}


@pytest.mark.parametrize(("number", "losses", "seconds", "expected"), [
    (23, {"aft-simple": 1.5, "aft-local": 1.4, "linformer": 1.6, "performer-encoder": 1.5}, {}, RIGHT),
    (23, {"aft-simple": 1.5, "aft-local": 1.4, "linformer": 1.6, "performer-encoder": 1.5}, {"aft-local": 1.2}, CONDITIONS),
    (23, {"aft-simple": 1.5, "aft-local": 1.4, "linformer": 1.6, "performer-encoder": 1.3}, {}, WRONG),
    (23, {"aft-simple": 1.5, "aft-local": 1.4, "linformer": 1.6, "performer-encoder": 1.4}, {}, UNDECIDED),
    (30, {"retnet": 1.0, "transformer": 2.0}, {}, UNTESTABLE),
    (31, {"retnet": 1.0, "rwkv": 1.2, "hyena": 1.3, "aft-local": 1.2}, {}, RIGHT),
    (31, {"retnet": 1.0, "rwkv": 1.1, "hyena": 1.3, "aft-local": 1.2}, {}, CONDITIONS),
    (31, {"retnet": 1.1, "rwkv": 1.1, "hyena": 1.3, "aft-local": 1.2}, {}, UNDECIDED),
    (31, {"retnet": 1.3, "rwkv": 1.1, "hyena": 1.3, "aft-local": 1.2}, {}, CONDITIONS),
    (37, dict(zip(LADDERS, (1.0, 1.1, 1.2), strict=True)), {}, WRONG),
    (37, dict(zip(LADDERS, (1.0, 1.1, 0.9), strict=True)), {}, CONDITIONS),
    (37, dict(zip(LADDERS, (1.0, 1.1, 1.0), strict=True)), {}, WRONG),
])
def test_a_verdict_follows_from_the_losses(number, losses, seconds, expected):
    assert verdict(number, Trained(losses, seconds)) is expected


# -- generating --------------------------------------------------------------------------------------------------------
class Generating(Measure):
    """A Transformer whose cost of a token has a planted ratio to RetNet's at the first and at the last prefix."""

    def __init__(self, first, last):
        super().__init__()
        self.ends, self.asked = (first, last), 0

    def _curve(self, prefixes):
        self.asked += 1  # of the Transformer first, twice
        return dict(zip(prefixes, np.geomspace(*self.ends, len(prefixes)) if self.asked <= 2 else np.ones(len(prefixes)),
                        strict=True))

    def steps(self, model, positions, count=32):
        return {t: [value] for t, value in self._curve(positions).items()}

    def times(self, calls, seconds=None):
        return {t: [value] for t, value in self._curve(calls).items()}

    def model(self, variant, **options):
        self.transformer = variant == "transformer"
        return super().model(variant, **{**options, "width": 32, "layers": 1})

    def ids(self, *shape, vocab=2):
        return super().ids(*shape[:-1], 1, vocab=vocab)

    def state_bytes(self, model, t):
        return 10**9 * (self.ends[0] if t < 1000 else self.ends[1]) if self.transformer else 10**9


@pytest.mark.parametrize(("first", "last", "expected"), [(1, 5, CONDITIONS), (16, 20, RIGHT), (0.5, 0.9, WRONG), (3, 2, WRONG)])
def test_a_verdict_follows_from_the_ratios(first, last, expected):
    assert verdict(29, Generating(first, last)) is expected


# -- ranks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grows", [True, False])
def test_the_busiest_parts_receive_as_much_as_any_part(grows):
    T = 2**15
    segments, dilations = patterns(None, T) if grows else PUBLISHED
    run = _rank(Measure(), segments, dilations, PART)
    amounts = {place: sum(run(place, T)[2]) for place in range(0, T, PART)}
    assert max(amounts.values()) == max(amounts[place] for place in _busy(T, dilations, PART)) > 0
