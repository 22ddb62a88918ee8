"""What must hold for every model of a variant, and the models on which it is tried.

A law of models is like one of operators: a name and ``check(case, draw)``, which raises AssertionError. Its *case* is a
Specimen of a variant, small, and with weights so large that everything counts. LAWS are those of all variants, each with the
variants that it is about; identities between variants are declared on their records (``Variant.becomes``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from autograd import Tensor, assert_close, cross_entropy, gradients, no_grad, tanh, use
from autograd.draw import Draw
from autograd.laws import Law
from autograd.metric import within
from autograd.random import Random

from . import checkpoint
from .blocks import Block
from .decode import FusedDecoder, decoder
from .experiment import default_task, namespace
from .stack import Reversible
from .tasks import load as load_task
from .variant import Variant
from .variants import load

VOCAB = 11
SIZES = {"B": 3, "T": 12, "D": 16, "L": 2}  # batch, positions, width, layers; H, the heads, are the variant's own
OPTIONS = {"T": "context", "D": "width", "L": "layers", "H": "heads"}
ROUNDING = 10_000  # terms of the sums that a model is made of
FADED = {"retnet": ROUNDING}  # where q · k is near 0, the norm of heads makes its rounding up to 1/√eps = 300 times as large
FRAMES = 8  # of sound, for a position


class Specimen:
    """Small models of a variant, what they read, and what they give.

    ``sizes`` are others than SIZES, by letters; ``options`` further options by name.
    """

    def __init__(self, variant: Variant, sizes: Mapping[str, int] | None = None, **options: Any):
        self.variant, self.sizes = variant, {**SIZES, **(sizes or {})}
        offered = namespace(variant, load_task(default_task(variant))).settings
        chosen = {OPTIONS[letter]: size for letter, size in self.sizes.items() if letter in OPTIONS}
        self.options = {name: value for name, value in {**chosen, "bias": True}.items() if name in offered} | options

    def model(self, dtype: Any = np.float64, seed: int = 0, spread: float = 0.3, **options: Any) -> Any:
        """A new model; ``spread`` is how far its weights are from those that training begins with."""
        made = self.variant.configure(**{**self.options, **options})
        model = self.variant.build(made.model, made.mixer, VOCAB, Random(seed), dtype)
        rng = np.random.default_rng(seed)
        for name, parameter in model.named_parameters():
            noise = spread * rng.normal(size=parameter.shape)
            if ".filters." not in name:  # they are drawn anyway, and in float32 sines of large angles have few digits
                parameter.assign_((parameter.numpy() + noise).astype(dtype))
        return model

    def of(self, name: str, **options: Any) -> Any:
        """A model of another variant, of the same sizes."""
        return Specimen(load(name), self.sizes).model(**options)

    def ids(self, draw: Draw, length: int | None = None) -> np.ndarray:
        """Tokens [B T]."""
        return draw.generator().integers(0, VOCAB, (self.sizes["B"], length or self.sizes["T"]))

    def inputs(self, draw: Draw) -> tuple[np.ndarray, ...]:
        """What a model reads: tokens, sources and targets, or frames."""
        if self.variant.reads == "tokens":
            return (self.ids(draw),)
        if self.variant.reads == "pairs of sequences":
            return self.ids(draw), self.ids(draw)
        shape = self.sizes["B"], FRAMES * self.sizes["T"], self.model().features
        return (draw.generator().normal(size=shape),)

    def same(self, one: Any, other: Any, draw: Draw) -> None:
        """Two models are one function: AssertionError unless they give the same logits, and, in parts, those of the call."""
        inputs = self.inputs(draw)
        with no_grad():
            expected = other(*inputs).numpy()
            assert_close(one(*inputs).numpy(), expected, "the two models differ", terms=ROUNDING)
            if remembers(self.variant):
                cuts = [draw.integer(1, inputs[-1].shape[1])]
                assert_close(self.read(one, inputs, cuts), expected, f"they differ after the cut {cuts}", terms=ROUNDING)

    @staticmethod
    def loss(model: Any, inputs: tuple[np.ndarray, ...]) -> Tensor:
        """The mean cross-entropy in nats of labels that follow from the positions."""
        logits = model(*inputs)
        return cross_entropy(logits, np.arange(logits.shape[0] * logits.shape[1]).reshape(logits.shape[:2]) * 7 % VOCAB)

    @staticmethod
    def read(model: Any, inputs: tuple[np.ndarray, ...], cuts: Iterable[int]) -> np.ndarray:
        """Logits [B T V] of what is read in parts."""
        *source, ids = inputs
        state, parts = model.begin(*source) if source else model.init_state(len(ids)), []
        for start, stop in pairwise([0, *cuts, ids.shape[1]]):
            if start < stop:
                logits, state = model.prefill(ids[:, start:stop], state)
                parts.append(logits.numpy())
        assert state.position == ids.shape[1], f"the state says that {state.position} of {ids.shape[1]} tokens were read"
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class ModelLaw(Law):
    """A law of models, and the variants that it is about."""

    about: Callable[[Variant], bool] = lambda variant: True


def remembers(variant: Variant) -> bool:
    """Whether it can read in parts."""
    return hasattr(variant.model, "prefill") and variant.reads != "frames of sound"


LAWS: list[ModelLaw] = []


def model_law(name: str, about: Callable[[Variant], bool] = lambda variant: True) -> Callable:
    """Declare a law of all models of the variants that it is about."""
    def declare(statement: Callable) -> Callable:
        LAWS.append(ModelLaw(name, statement, about=about))
        return statement

    return declare


def laws_of(variant: Variant) -> list[Law]:
    """All laws of a variant: those of models that are about it, and its own identities."""
    return [*(law for law in LAWS if law.about(variant)), *variant.identities]


# -- reading -----------------------------------------------------------------------------------------------------------
@model_law("in parts and token by token it reads what it reads at once", remembers)
def _(case, draw):
    model, inputs = case.model(), case.inputs(draw)
    with no_grad():
        expected, length = model(*inputs).numpy(), inputs[-1].shape[1]
        drawn = sorted(draw.integer(0, length) for _ in range(draw.integer(1, 3)))
        for cuts in (drawn, range(1, length)):
            assert_close(case.read(model, inputs, cuts), expected, f"it depends on the cuts {list(cuts)}", terms=ROUNDING)
        *source, ids = inputs
        last, _ = model.prefill(ids, model.begin(*source) if source else model.init_state(len(ids)), last=True)
        assert_close(last.numpy(), expected[:, -1:], "the last position alone", terms=ROUNDING)


@model_law("a state is a value: what is read after it does not change it", remembers)
def _(case, draw):
    model, (*source, ids) = case.model(), case.inputs(draw)
    with no_grad():
        _, state = model.prefill(ids[:, :-1], model.begin(*source) if source else model.init_state(len(ids)))
        one, _ = model.prefill(ids[:, -1:], state)
        model.prefill((ids[:, -1:] + 1) % VOCAB, state)
        again, _ = model.prefill(ids[:, -1:], state)
    assert np.array_equal(one.numpy(), again.numpy()), "the second continuation of a state is not the first one's equal"


@model_law("the kernels that write compute what the model computes", lambda variant: variant.fused is not None)
def _(case, draw):
    model, exact, ids = case.model(np.float32), case.model(), case.ids(draw)
    exact.load(model.state())
    check_writing(model, exact, ids, draw.integer(1, ids.shape[1]))


def check_writing(model: Any, exact: Any, ids: np.ndarray, first: int) -> None:
    """The fused kernels of a model read the first so many of the ids[B T] at once and the others one by one, and give, at every
    position, what the same model in float64 gives through forms.
    """
    with use(kernel="none"), no_grad():
        expected = exact(ids).numpy()
    reader = decoder(model, len(ids))
    assert isinstance(reader, FusedDecoder), "no fused kernels read this model"
    terms = FADED.get(model.variant.name, 200)
    logits = reader.prefill(ids[:, :first])
    assert reader.position == first and logits.dtype == model.embed.weight.dtype
    assert_close(logits, expected[:, first - 1], f"after {first} tokens at once", terms=terms)
    for position in range(first, ids.shape[1]):
        assert_close(reader.step(ids[:, position]), expected[:, position], f"the step to position {position}", terms=terms)
    assert reader.position == ids.shape[1]


# -- what depends on what ----------------------------------------------------------------------------------------------
def _changed(model, inputs, part: int, at: int, stop: int | None = None) -> np.ndarray:
    """By how much logits change [B T] when position ``at`` of one part of the inputs changes, or those up to ``stop``."""
    other, where = list(inputs), slice(at, at + 1 if stop is None else stop)
    other[part] = inputs[part].copy()
    if inputs[part].dtype.kind == "i":
        other[part][:, where] = (other[part][:, where] + 1 + np.arange(len(other[part]))[:, None]) % VOCAB
    else:
        other[part][:, where] += 1
    return np.abs(model(*other).numpy() - model(*inputs).numpy()).max(axis=2)


@model_law("a logit depends on its token and no later one", lambda variant: variant.causal or remembers(variant))
def _(case, draw):
    model, inputs = case.model(), case.inputs(draw)
    length = inputs[-1].shape[1]
    with no_grad():
        largest = np.abs(model(*inputs).numpy()).max()
        for t in range(length) if length <= SIZES["T"] else sorted({draw.integer(0, length - 1) for _ in range(SIZES["T"])}):
            change = _changed(model, inputs, -1, t)
            before = np.append(change[:, :t] + largest, largest)  # relative to the largest logit
            assert_close(before, np.full_like(before, largest), f"logits before position {t} depend on it")
            assert (change[:, t] > 1e-6).all(), f"the logits of position {t} do not depend on its token"


@model_law("it is not causal, as its record says: an output depends on later inputs",
           lambda variant: not variant.causal and not remembers(variant))
def _(case, draw):
    model, inputs = case.model(), case.inputs(draw)
    with no_grad():
        length = inputs[0].shape[1]
        change = _changed(model, inputs, 0, length - max(length // FRAMES, 1), length)
    assert (change[:, 0] > 1e-9).any(), "the first output does not depend on the last input: is it causal?"


@model_law("every answer sees the whole source", lambda variant: variant.reads == "pairs of sequences")
def _(case, draw):
    model, inputs = case.model(), case.inputs(draw)
    with no_grad():
        for t in range(inputs[0].shape[1]):
            assert (_changed(model, inputs, 0, t) > 1e-9).all(), f"an answer does not see position {t} of the source"


@model_law("the sequences of a batch do not meet")
def _(case, draw):
    model, inputs = case.model(), case.inputs(draw)
    with no_grad():
        alone = [model(*(part[i : i + 1] for part in inputs)).numpy() for i in range(len(inputs[0]))]
        assert_close(np.concatenate(alone), model(*inputs).numpy(), "a sequence depends on the others", terms=ROUNDING)


# -- learning ----------------------------------------------------------------------------------------------------------
@model_law("every weight has a gradient")
def _(case, draw):
    model = case.model()
    case.loss(model, case.inputs(draw)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and np.abs(parameter.grad.numpy()).max() > 0, f"{name} has no gradient"


@model_law("the gradient is the slope of the loss, along random directions")
def _(case, draw):
    model, inputs = case.model(), case.inputs(draw)
    case.loss(model, inputs).backward()
    rng, before = draw.generator(), model.state()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    # What the loss depends on steeply moves less, so that one step suits all.
    direction = {name: rng.normal(size=g.shape) / max(1.0, np.linalg.norm(g)) for name, g in gradients.items()}

    def along(step: float) -> float:
        model.load({**before, **{name: before[name] + step * change for name, change in direction.items()}})
        return case.loss(model, inputs).item()

    _check_slope(along, sum(float((g * direction[name]).sum()) for name, g in gradients.items()))


def _check_slope(along: Callable[[float], float], expected: float) -> None:
    """AssertionError unless ``along(h)``, a loss that moved by h, changes as a gradient says, to a relative 1e-7.

    Where the loss has a kink nearby, as that of a ReLU, a smaller step finds the slope on this side of it.
    """
    errors = {}
    for h in (1e-5, 1e-6, 1e-7):
        found = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        errors[abs(found - expected) / max(abs(expected), 1e-30)] = found
        if min(errors) <= 1e-7:
            break
    if not within(min(errors), 1e-7):
        raise AssertionError(f"the loss changes by {errors[min(errors)]!r}, and the gradient says {expected!r}")


@model_law("its kernels give the loss and the gradients of its forms")
def _(case, draw):
    found, expected, inputs = case.model(np.float32), case.model(), case.inputs(draw)
    expected.load(found.state())
    results = []
    for model, kernel in ((found, "cpu"), (expected, "none")):
        with use(kernel=kernel):
            loss = case.loss(model, inputs)
            loss.backward()
        results.append({"the loss": loss.numpy(), **{name: p.grad.numpy() for name, p in model.named_parameters()}})
    largest = max(float(np.abs(gradient).max()) for gradient in results[1].values())
    for name, value in results[0].items():
        one, other = (np.append(x, largest).astype(value.dtype) for x in (value, results[1][name]))
        assert_close(one, other, f"{name} of kernels and of forms", terms=1000)


@model_law("saved and loaded, it is the same, to the bit")
def _(case, draw):
    model, other, inputs = case.model(seed=1), case.model(), case.inputs(draw)
    with tempfile.TemporaryDirectory() as folder, no_grad():
        checkpoint.save(folder, "last", model=model.state(), optimizer={}, state={})
        other.load(checkpoint.load(folder, "last").model)
        assert np.array_equal(other(*inputs).numpy(), model(*inputs).numpy()), "the loaded model gives other logits"


class Kept(Reversible):
    """The same sums as those of a reversible stack, on the ordinary tape, which keeps all activations."""

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        one, two = x, x
        for layer, block in enumerate(self.blocks):
            for branch in block.branches:
                one, two = two, one + branch(two, rng and rng.split(layer))
        return (one + two) * 0.5


@model_law("its blocks, undone and computed again in backward, have the gradients of the ordinary tape",
           lambda variant: variant.causal and variant.block.branches is not Block.branches)
def _(case, draw):
    models = [Specimen(replace(case.variant, stack=stack), case.sizes).model(dropout=0.3) for stack in (Reversible, Kept)]
    x = Tensor(draw.generator().normal(size=[case.sizes[letter] for letter in "BTD"]), requires_grad=True)
    pairs = list(zip(*([part for part in model.modules() if isinstance(part, Reversible)] for model in models), strict=True))
    assert pairs, "no stack of it is reversible"
    for pair in pairs:  # a model may have several stacks
        for rng in (None, Random(5)):
            results = []
            for stack in pair:
                y = stack(x, rng)
                results.append([y, *gradients((tanh(y) * y).sum(), [x, *stack.parameters()])])
            for one, other in zip(*results, strict=True):
                scale = max(1.0, np.abs(other.numpy()).max(initial=0))  # what is left after cancellation may be tiny
                one, other = (np.append(x.numpy(), scale) for x in (one, other))
                assert_close(one, other, "a reversible stack is not what the tape has", terms=ROUNDING)
