"""Statements about MEGABYTE and what follows in the review: rows that are exact, and verdicts of planted measurements."""

from types import SimpleNamespace

import numpy as np
import pytest

from autograd.metric import distance
from minitv.claims import CONDITIONS, RIGHT, UNDECIDED, UNTESTABLE, WRONG, claims
from minitv.claims._shapes import above, outline, products, weights
from minitv.claims.measure import Measure, Ratio
from minitv.claims.megabyte import pairs_of
from minitv.stream import mass
from tests.minitv.test_claims import Grown

CLAIMS = claims()


# -- what they share ---------------------------------------------------------------------------------------------------
def test_an_outline_has_the_weights_of_a_model_and_takes_no_memory():
    options = dict(context=8, width=16, layers=2, heads=2)
    with Measure() as measure:
        model, shapes = measure.model("transformer", vocab=5, **options), outline("transformer", vocab=5, **options)
    assert weights(shapes) == weights(model) == 2 * 12 * 16**2 + (8 + 5) * 16
    assert all(not p.data.any() and p.data.strides == (0,) * p.ndim for p in outline("transformer", width=4096).parameters())


def test_products_are_those_of_the_formulas():
    counts = products(2048, 96, 12288, 96)
    assert counts == (96 * 8 * 12288**2, 96 * 4 * 12288**2, 96 * 12288 * 2049)
    assert counts.share("ffn", "projections", "pairs") == 1 and counts.share("ffn") == pytest.approx(0.6575, abs=1e-4)


def test_losses_of_several_seeds():
    assert above([1.1, 1.2], [1.0, 1.1]) and not above([1.1, 1.0], [1.0, 1.1]) and not above([1.005], [1.0])
    assert distance(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5


def test_the_mass_of_the_first_positions_where_all_scores_are_equal():
    for kind in ("first-tokens", "zero"):
        with Measure() as measure:
            model = measure.model("attention-sinks", context=8, width=8, layers=2, heads=2, sink_kind=kind)
        for block in model.blocks:
            block.mixer.layer.qkv.weight.data[:] = 0
        keys = np.arange(5, 9) + (kind == "zero")  # that the second half of 8 positions sees, the sink among them
        share = round(float(np.mean(1 / keys)), 4)
        assert mass(model, np.zeros((2, 8), int)) == [[share] * (4 + (kind == "zero"))] * 2


def test_pairs_are_those_that_masks_show():
    for length, patch in ((64, 4), (60, 5), (12, 1)):
        among, inside = (int(np.tril(np.ones((size, size))).sum()) for size in (length // patch, patch))
        assert pairs_of(length, patch) == among + length // patch * inside


# -- rows that are exact -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number, verdict", [(40, CONDITIONS), (44, WRONG), (46, RIGHT), (59, CONDITIONS)])
def test_identities_and_counts(number, verdict):
    with Measure() as measure:
        measure.begin(number)
        assert CLAIMS[number].test(measure).verdict is verdict


def test_a_map_that_falls_into_parts_is_told(monkeypatch):
    import minitv.claims.linformer as rows

    def halves(q, k, v, mask=None, **options):  # two attentions of half the length
        half = k.shape[2] // 2
        y = np.zeros((*q.shape[:3], v.shape[3]))
        y[:, :, :half] = v[:, :, :half].mean(axis=2)
        y[:, :, half:] = v[:, :, half:].mean(axis=2)
        return SimpleNamespace(numpy=lambda: y), None

    monkeypatch.setattr(rows, "attention", halves)
    monkeypatch.setattr(rows, "project", lambda x, weight: x)
    assert CLAIMS[44].test(Measure()).verdict is RIGHT


def test_positions_that_count_are_told(monkeypatch):
    import minitv.claims.roformer as rows

    def added(x, angles, start=0):
        return SimpleNamespace(numpy=lambda: x + 0.1 * (start + np.arange(x.shape[2])[:, None]))

    monkeypatch.setattr(rows, "rope", added)
    assert CLAIMS[46].test(Measure()).verdict is WRONG


# -- verdicts with planted measurements --------------------------------------------------------------------------------
@pytest.mark.parametrize("number, exponents, noise, verdict", [
    (38, [4 / 3, 1, 1.9, 1], 0.01, CONDITIONS), (38, [4 / 3] * 4, 0.01, RIGHT), (38, [2, 4 / 3, 2, 2], 0.01, WRONG),
    (38, [4 / 3, 4 / 3, 1.5, 1.2], 1.0, UNDECIDED),
    (39, [1], 0.001, WRONG), (39, [1.16], 0.001, RIGHT), (39, [1.08], 0.5, UNDECIDED),
    (45, [1, 2], 0.01, RIGHT), (45, [2, 2], 0.01, WRONG), (45, [1.5, 2], 2.0, UNDECIDED),
    (48, [1, 1, 2.2, 1], 0.01, CONDITIONS), (48, [1, 0, 2.2, 1], 0.01, RIGHT), (48, [2, 1, 2.2, 1], 0.01, WRONG),
    (48, [1, 1, 1, 1], 0.01, WRONG), (48, [1.5, 1, 2.2, 1], 2.0, UNDECIDED),
    (50, [1.9, 1, 1, 1, 1], 0.01, CONDITIONS), (50, [1, 1, 1, 1, 1], 0.01, RIGHT), (50, [1, 1, 1, 2, 1], 0.01, WRONG),
    (50, [1.9, 2, 1, 1, 1], 0.01, WRONG), (50, [1.9, 1, 1, 1, 2], 0.01, WRONG), (50, [1.5, 1, 1, 1.5, 1], 2.0, UNDECIDED),
    (53, [1.5, 1.1, 1.5, 2, 2, 1.5, 2], 0.01, CONDITIONS), (53, [1.5, 1.1, 1.5, 1.5, 1.5, 1.5, 1.5], 0.01, RIGHT),
    (53, [2, 1.1, 1.5, 2, 2, 1.5, 2], 0.01, WRONG), (53, [1.7, 1.7, 1.5, 2, 2, 1.5, 2], 2.0, UNDECIDED),
])
def test_a_verdict_follows_from_exponents(number, exponents, noise, verdict):
    measure = Grown(list(exponents), noise)
    measure.begin(number)
    assert CLAIMS[number].test(measure).verdict is verdict


class Planted(Measure):
    """Ratios of times as they are told, and losses by the options of a training."""

    def __init__(self, ratios=(), loss=lambda variant, options: 1.0):
        super().__init__()
        self.ratios, self.loss = list(ratios), loss

    def ratio(self, call, other):
        value = self.ratios.pop(0)
        return Ratio(value, 0.98 * value, 1.02 * value, value)

    def train(self, variant, **options):
        loss = self.loss(variant, options)
        return SimpleNamespace(loss=loss, value=1 / (1 + loss), parameters=100)


def _blocks(without_local, without_global):
    return lambda variant, options: {"2": 1.0, "0": without_local, "4": without_global}[options["local_layers"]]


def _convolution(without, wider):
    def loss(variant, options):
        return 1.0 if options.get("convolution", True) else wider if options["ffn_multiple"] > 4 else without

    return loss


def _of(**losses):
    return lambda variant, options: losses[variant.replace("-", "_")]


@pytest.mark.parametrize("number, ratios, loss, verdict", [
    (41, [2.0, 1.5], None, CONDITIONS), pytest.param(41, [2.0, 0.8], None, UNTESTABLE, marks=pytest.mark.full),
    (42, [], _blocks(1.2, 1.3), RIGHT), (42, [], _blocks(1.2, 0.9), CONDITIONS), (42, [], _blocks(0.9, 0.9), WRONG),
    (43, [2.0], None, RIGHT),
    (47, [1.18, 1.2, 1.3], _of(encoder_decoder=1.0, one_wide_ffn=1.0), RIGHT),
    (47, [1.3, 1.3, 1.4], _of(encoder_decoder=1.0, one_wide_ffn=2.0), CONDITIONS),
    (47, [1.18, 1.3, 1.4], _of(encoder_decoder=1.0, one_wide_ffn=2.0), CONDITIONS),
    (47, [0.8, 0.9, 0.9], _of(encoder_decoder=1.0, one_wide_ffn=1.0), WRONG),
    (47, [1.0, 1.0, 1.0], _of(encoder_decoder=1.0, one_wide_ffn=1.0), UNDECIDED),
    (54, [], _convolution(1.2, 1.2), RIGHT), (54, [], _convolution(0.9, 1.2), WRONG),
    (54, [], _convolution(1.0, 1.2), UNDECIDED),
    (58, [1.2], _of(transformer=1.0, simplified=1.0), RIGHT), (58, [1.2], _of(transformer=1.0, simplified=1.1), CONDITIONS),
    (58, [1.0], _of(transformer=1.0, simplified=1.0), CONDITIONS),
])
def test_a_verdict_follows_from_ratios_and_losses(number, ratios, loss, verdict):
    measure = Planted(ratios, loss) if loss else Planted(ratios)
    measure.begin(number)
    assert CLAIMS[number].test(measure).verdict is verdict


@pytest.mark.full
@pytest.mark.parametrize("number", [51, 52])
def test_memory_is_saved(number):
    with Measure() as measure:
        measure.begin(number)
        assert CLAIMS[number].test(measure).verdict is RIGHT
