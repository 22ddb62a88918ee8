"""ctc_loss beyond what the registry draws: long utterances, what is impossible, errors; and the decoding beside it."""

from __future__ import annotations

import itertools
import math

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd import DomainError, ShapeError, Tensor, assert_close, use
from autograd.verify import PLACES, compute, differentiate
from minitv.ops import ctc_loss
from minitv.ops.ctc_loss import cpu, frames_needed
from minitv.ops.ctc_loss.decoding import align, beam_search, collapse, greedy
from tests.autograd.operator_checks import marks
from tests.autograd.test_kernel_math import ARITHMETIC, assembly, libm_calls, reads_assembly

ROUTES = [pytest.param(route, id=route.replace(" ", "_"), marks=marks(route))
          for route in ("form recurrent", "kernel cpu", "kernel cuda on emulator", "kernel cuda on card")]


def call(route, args, **params):
    """The losses and their gradient, for the cotangent 1."""
    outputs = compute(ctc_loss, route, args, params)
    gradients = differentiate(ctc_loss, route, args, params, [np.ones_like(outputs[0])])
    return outputs[0], gradients[0]


# -- long utterances ---------------------------------------------------------------------------------------------------
def utterances(length, labels, scale, dtype=np.float32):
    rng = np.random.default_rng(length)
    targets = rng.integers(1, 5, (2, labels))
    targets[1, 1:] += targets[1, 1:] == targets[1, :-1]  # at least some without repeats
    lengths = np.array([length, max(length - 7, int(frames_needed(targets)[1]))])
    return (scale * rng.standard_normal((2, length, 6))).astype(dtype), targets, lengths, None


@pytest.mark.parametrize("route", ["kernel cpu", *[p for p in ROUTES if "cuda" in p.values[0]]])
@pytest.mark.parametrize(("length", "labels", "scale"), [(300, 40, 1), (130, 60, 30), (400, 50, 1000)])
def test_long_utterances_are_exact(route, length, labels, scale):
    """Probabilities far below what a float holds: e^-100,000 and less."""
    args = utterances(length, labels, scale)
    loss, gradient = call(route, args, reduction="none")
    right, expected = call("form recurrent", (args[0].astype(np.float64), *args[1:]), reduction="none")
    assert_close(loss, right, terms=64)
    assert_close(gradient, expected, terms=64)


def test_the_one_path_that_is_possible_is_found_however_unlikely():
    """As many frames as labels: every frame is a label that the model thinks impossible but for e^-600."""
    logits = np.zeros((1, 90, 3), np.float32)
    logits[..., 0] = 600
    targets = 1 + np.arange(90)[None] % 2
    for route in ("form recurrent", "kernel cpu"):
        loss, gradient = call(route, (logits, targets, None, None), reduction="none")
        assert_close(loss, np.array([90 * 600.0]))
        assert_close(gradient[0, np.arange(90), targets[0]], -np.ones(90))
        assert_close(gradient[..., 0], np.ones((1, 90)))


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_sum_to_zero_over_the_classes_and_are_zero_in_the_padding(route):
    logits, targets, lengths, _ = utterances(40, 8, 2)
    _, gradient = call(route, (logits, targets, lengths, None), reduction="sum")
    assert np.abs(gradient.sum(axis=-1)).max() < 1e-5 and np.abs(gradient[1, : lengths[1]]).max() > 0.1
    assert not gradient[1, lengths[1] :].any() and lengths[1] < 40


# -- what is impossible ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_an_impossible_label_costs_infinity_or_nothing_and_has_no_gradient(route, zero_infinity):
    """A class whose logit is -∞; the other utterance is not touched."""
    logits, targets, _, _ = utterances(12, 3, 2)
    targets[0], targets[1] = 1, (2, 3, 2)
    logits[..., 1] = -math.inf
    loss, gradient = call(route, (logits, targets, None, None), reduction="none", zero_infinity=zero_infinity)
    assert loss[0] == (0 if zero_infinity else math.inf) and 0 < loss[1] < math.inf
    assert not gradient[0].any() and gradient[1].any() and np.isfinite(gradient).all()


@pytest.mark.parametrize("route", ROUTES)
def test_a_target_that_is_too_long_counts_as_nothing_if_so_asked(route):
    logits, targets, _, _ = utterances(6, 4, 1)
    targets[:] = [[1, 1, 2, 2], [1, 2, 3, 4]]
    assert frames_needed(targets).tolist() == [6, 4] and frames_needed(targets, np.array([3, 0])).tolist() == [4, 0]
    args = logits, targets, np.array([5, 5]), None
    losses, gradient = call(route, args, reduction="none", zero_infinity=True)
    assert losses[0] == 0 < losses[1] and not gradient[0].any() and gradient[1].any()
    mean, _ = call(route, args, zero_infinity=True)
    assert_close(mean, np.asarray(losses[1] / 4 / 2))  # it counts in the batch, as in PyTorch


@pytest.mark.parametrize("route", ROUTES)
def test_no_number_is_never_hidden(route):
    logits, targets, _, _ = utterances(12, 3, 2)
    logits[0, 5, 2] = math.nan
    loss, _ = call(route, (logits, targets, None, None), reduction="none", zero_infinity=True)
    assert math.isnan(loss[0]) and math.isfinite(loss[1])


WRONG = [
    ({"input_lengths": np.array([3, 4])}, "ctc_loss: targets[1] needs 5 frames, for its labels and a blank between equal ones, "
     "and has 4; 1 of 2 targets need too many, and zero_infinity=True gives these the loss 0"),
    ({"input_lengths": np.array([6, -1])}, "ctc_loss: input_lengths[1] is -1, allowed: 0 .. 6, the frames of logits"),
    ({"input_lengths": np.array([7, 6])}, "ctc_loss: input_lengths[0] is 7, allowed: 0 .. 6, the frames of logits"),
    ({"target_lengths": np.array([3, 4])}, "ctc_loss: target_lengths[1] is 4, allowed: 0 .. 3, the labels of targets"),
    ({"targets": np.array([[1, 2, 3], [1, 2, 5]])}, "ctc_loss: targets[1] has the label 5, allowed: 0 .. 4"),
    ({"targets": np.array([[1, -2, 3], [1, 2, 3]])}, "ctc_loss: targets[0] has the label -2, allowed: 0 .. 4"),
    ({"blank": 3}, "ctc_loss: targets[0] has the label 3, which is the blank, allowed: others (target_lengths says how many "
     "labels count)"),
    ({"blank": 5}, "ctc_loss: blank 5, allowed: a class of the 5 of logits, 0 .. 4"),
    ({"blank": -1}, "ctc_loss: blank -1, allowed: a class of the 5 of logits, 0 .. 4"),
    ({"zero_infinity": 1}, "ctc_loss: zero_infinity 1, allowed: True or False"),
    ({"reduction": "average"}, "ctc_loss: reduction 'average', allowed: mean, sum, none, batch, frames"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_what_is_wrong_is_said(change, sentence):
    good = {"logits": np.zeros((2, 6, 5)), "targets": np.array([[1, 2, 3], [4, 4, 4]])}
    with pytest.raises(DomainError) as caught:
        ctc_loss(**{**good, **change})
    assert str(caught.value) == sentence


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_what_is_wrong_is_said_on_a_gpu_with_the_next_read(place):
    with PLACES[place]() as put:
        loss = ctc_loss(put(np.zeros((2, 6, 5), np.float32)), put(np.array([[1, 2, 3], [4, 4, 4]])), put(np.array([3, 4])))
        with pytest.raises(DomainError, match=r"targets\[1\] needs 5 frames.*has 4; 1 of 2 targets need too many"):
            loss.numpy()
        for name, wrong, sentence in (("targets", [[1, 2, 3], [4, 5, 4]], "label 5"), ("input_lengths", [6, 7], "is 7"),
                                      ("target_lengths", [3, 4], "is 4")):
            chosen = {"targets": np.array([[1, 2, 3], [4, 3, 4]]), name: np.array(wrong)}
            logits = Tensor.wrap(put(np.zeros((2, 6, 5), np.float32)), requires_grad=True)
            ctc_loss(logits, **{key: put(array) for key, array in chosen.items()}, zero_infinity=True).backward()
            with pytest.raises(DomainError, match=sentence):
                logits.grad.numpy()


# -- decoding ----------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 2), max_size=12), st.integers(0, 12), st.integers(0, 2))
def test_a_path_read_in_two_parts_reads_the_same(path, cut, blank):
    whole = [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]
    first, rest = path[:cut], path[cut:]
    assert collapse(path, blank=blank) == whole
    assert collapse(first, blank=blank) + collapse(rest, blank=blank, previous=first[-1] if first else None) == whole


def test_greedy_decoding_reads_the_best_class_of_every_frame():
    logits = np.random.default_rng(0).standard_normal((3, 20, 4))
    lengths, best = np.array([20, 7, 0]), logits.argmax(axis=-1)
    expected = [collapse(row[:n].tolist(), blank=2) for row, n in zip(best, lengths, strict=True)]
    assert greedy(logits, lengths, blank=2) == expected
    assert greedy(logits)[0] == collapse(best[0].tolist())
    with pytest.raises(ShapeError, match=r"greedy: logits \(20, 4\) and lengths None, allowed: \[B T V\] and \[B\]"):
        greedy(logits[0])


def transcripts(logits, blank):
    """ln of the probability of every transcript that the frames can read as, by the form of ctc_loss."""
    length, symbols = len(logits), [v for v in range(logits.shape[1]) if v != blank]
    every = [t for n in range(length + 1) for t in itertools.product(symbols, repeat=n)
             if frames_needed(np.array([t], np.intp).reshape(1, -1))[0] <= length]
    return {t: ln_probability(logits, t, blank) for t in every}


def ln_probability(logits, transcript, blank=0):
    with use(ctc_loss, form="recurrent"):
        return -ctc_loss(logits[None], np.array([transcript], np.intp).reshape(1, -1), blank=blank, reduction="sum").item()


@pytest.mark.parametrize("blank", [0, 2])
def test_a_beam_search_that_keeps_everything_is_exact(blank):
    logits = np.random.default_rng(blank).standard_normal((4, 3))
    expected = transcripts(logits, blank)
    found = beam_search(logits, beams=10**6, blank=blank)
    assert dict(found).keys() == expected.keys() and [score for _, score in found] == sorted(dict(found).values())[::-1]
    assert_close(np.array([score for _, score in found]), np.array([expected[t] for t, _ in found]), terms=64)


def test_fewer_beams_find_the_best_and_claim_no_more_than_its_probability():
    logits = 2 * np.random.default_rng(1).standard_normal((7, 4))
    (best, score), *rest = beam_search(logits, beams=10**4)
    few = beam_search(logits, beams=8)
    assert few[0][0] == best and few[0][1] <= score + 1e-12 and len(few) == 8
    assert score <= ln_probability(logits, best) + 1e-12 and rest


def test_a_language_model_is_added_once_for_each_label_and_at_the_end():
    logits = np.random.default_rng(3).standard_normal((4, 3))

    def language(labels, label):
        return {None: -0.7 * len(labels), 1: 0.3 - 0.1 * len(labels), 2: -0.5}[label]

    expected = {t: score + sum(language(t[:i], label) for i, label in enumerate(t)) + language(t, None)
                for t, score in transcripts(logits, 0).items()}
    found = dict(beam_search(logits, beams=10**6, language=language))
    assert found.keys() == expected.keys()
    assert_close(np.array(list(found.values())), np.array([expected[t] for t in found]), terms=64)


@pytest.mark.parametrize(("logits", "options", "error", "sentence"), [
    (np.zeros((1, 3, 4)), {}, ShapeError, r"logits \(1, 3, 4\) and blank 0, allowed: \[T V\] and a class of V"),
    (np.zeros((3, 4)), {"blank": 4}, ShapeError, r"logits \(3, 4\) and blank 4"),
    (np.zeros((3, 4)), {"beams": 0}, DomainError, "beams 0, allowed: an integer from 1"),
])
def test_wrong_arguments_of_the_beam_search(logits, options, error, sentence):
    with pytest.raises(error, match=sentence):
        beam_search(logits, **options)


@pytest.mark.parametrize("target", [[], [1], [1, 1], [2, 1], [1, 2, 1], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("blank", [0, 3])
def test_the_alignment_is_the_best_path_that_reads_as_the_target(target, blank):
    logits = np.random.default_rng(len(target)).standard_normal((5, 4))
    paths = [p for p in itertools.product(range(4), repeat=5) if collapse(p, blank=blank) == target]
    best = max(paths, key=lambda p: sum(logits[t, v] for t, v in enumerate(p)))
    assert align(logits, target, blank=blank) == list(best)


def test_an_alignment_that_does_not_exist_is_an_error():
    with pytest.raises(DomainError, match="align: no path of 3 frames reads as these 2 labels"):
        align(np.where(np.arange(3) == 1, -math.inf, np.zeros((3, 3))), [1, 1])
    assert align(np.zeros((3, 2)), [1, 1]) == [1, 0, 1] and align(np.zeros((0, 2)), []) == []


# -- machine code ------------------------------------------------------------------------------------------------------
DOUBLES, INTEGERS = numba.float64[::1], numba.int64[::1]
PAIR = (DOUBLES, INTEGERS)
LOOPS = {  # the types of arguments, and how many packed operations there are at least; _frame is in test_kernel_math
    cpu._two: (3 * PAIR, 2), cpu._three: ((*4 * PAIR, INTEGERS), 3), cpu._times: (2 * PAIR, 1),
    cpu._posterior: ((*3 * PAIR, "int64", "float64"), 3),
}


@pytest.mark.full
@reads_assembly
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_inner_loops_are_packed(loop):
    arguments, operations = LOOPS[loop]
    code = assembly(loop.py_func, arguments)
    assert ARITHMETIC.findall(code).count("d") >= operations and not libm_calls(code)
