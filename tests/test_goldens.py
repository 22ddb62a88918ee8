"""Operators and a whole GPT-2 equal files that PyTorch and transformers made, in values and in all gradients.

goldens/make_goldens.py says how they were made and what their entries mean.
"""

from pathlib import Path

import numpy as np
import pytest
from conftest import operators
from operator_checks import DTYPES, compute, differentiate, floats, routes

from autograd import Random, distance, use
from autograd.check import TOLERANCE
from minitv.mixers.transformer import TransformerOptions
from minitv.models.lm import LanguageModel
from minitv.options import ModelOptions

FOLDER = Path(__file__).parent / "goldens"
LIMITS = {np.float64: 1e-10, np.float32: TOLERANCE[np.dtype(np.float32)]}
OPERATORS = {op.name: op for op in operators()}


class Golden(dict):
    """The arrays of a file; ``unread`` are the names that nothing has asked for."""

    def __init__(self, name):
        with np.load(FOLDER / f"{name}.npz") as file:
            super().__init__(file)
        self.unread = set(self)

    def __getitem__(self, key):
        self.unread.discard(key)
        return super().__getitem__(key)

    def below(self, prefix):
        """The arrays whose names begin with a prefix, by the rest of their names."""
        return {key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}


CALLS = {call: name for name in ("ops", "sdpa") for call in sorted({key.split("/")[0] for key in Golden(name)})}


def close(actual, expected, dtype, what):
    assert actual.dtype == dtype and actual.shape == expected.shape, what
    found = distance(actual, expected)
    assert found <= LIMITS[dtype], f"{what}: relative error {found:.3g}, allowed {LIMITS[dtype]:.3g}"


def cast(array, dtype):
    return array.astype(dtype) if array.dtype.kind == "f" else array


def verify(call, golden, route, dtype):
    op = OPERATORS[call.partition(".")[0]]
    inputs = golden.below(f"{call}/in/")
    assert set(inputs) <= {a.name for a in op.signature.inputs}
    arrays = tuple(cast(inputs[a.name], dtype) if a.name in inputs else None for a in op.signature.inputs)
    params = {name: value.item() for name, value in golden.below(f"{call}/param/").items()}
    expected = golden.below(f"{call}/out/")
    outputs = compute(op, route, arrays, params)
    assert [str(i) for i in range(len(outputs))] == sorted(expected)
    for i, output in enumerate(outputs):
        close(np.asarray(output), expected[str(i)], dtype, f"{call}, {route}, output {i}")
    gradients = golden.below(f"{call}/grad/")
    cotangents = golden.below(f"{call}/cotangent/")
    assert set(gradients) == ({op.signature.inputs[i].name for i in floats(op, arrays)} if op.differentiable else set())
    if gradients and route != "definition":
        found = differentiate(op, route, arrays, params, [cast(cotangents["0"], dtype)])
        for i, gradient in found.items():
            name = op.signature.inputs[i].name
            close(gradient, gradients[name], dtype, f"{call}, {route}, gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("call", CALLS)
def test_every_route_of_an_operator_equals_pytorch(call, dtype):
    golden = Golden(CALLS[call])
    for route in routes(OPERATORS[call.partition(".")[0]]):
        verify(call, golden, route, dtype)
    assert not {key for key in golden.unread if key.startswith(f"{call}/")}


def gpt2(golden, activation, dtype):
    weights = {name if name != "embed" else "embed.weight": w.astype(dtype) for name, w in golden.below("param/").items()}
    context, width = weights["positions"].shape
    layers = len([name for name in weights if name.endswith("mixer.qkv.weight")])
    options = ModelOptions(context=context, layers=layers, width=width, activation=activation, bias=True)
    heads = TransformerOptions(heads=golden["heads"].item())
    model = LanguageModel("transformer", options, heads, len(weights["embed.weight"]), Random(0), dtype)
    model.load(weights)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("kernel", ["cpu", "none"])
def test_the_transformer_equals_gpt2(dtype, kernel):
    golden = Golden("gpt2")
    ids, labels = golden["ids"], golden["labels"]
    with use(kernel=kernel):
        model = gpt2(golden, "gelu_tanh", dtype)
        close(model(ids).numpy(), golden["logits"], dtype, "logits")
        loss = model.loss(ids, labels)
        close(loss.numpy(), golden["loss"], dtype, "loss")
        loss.backward()
        gradients = golden.below("grad/")
        gradients["embed.weight"] = gradients.pop("embed")
        for name, parameter in model.named_parameters():
            close(parameter.grad.numpy(), gradients.pop(name), dtype, f"gradient of {name}")
        assert not gradients
        exact = gpt2(golden, "gelu", dtype)
        close(exact(ids).numpy(), golden["logits_erf"], dtype, "logits with the exact gelu")
        close(exact.loss(ids, labels).numpy(), golden["loss_erf"], dtype, "loss with the exact gelu")
    assert not golden.unread


def test_a_golden_that_is_off_is_noticed():
    golden = Golden("ops")
    for entry, factor in (("out/0", 1 + 1e-9), ("grad/weight", 1 + 1e-9)):
        changed = Golden("ops")
        dict.__setitem__(changed, f"layer_norm/{entry}", golden[f"layer_norm/{entry}"] * factor)
        with pytest.raises(AssertionError, match="relative error 1e-09"):
            verify("layer_norm", changed, "form composed", np.float64)
    verify("layer_norm", golden, "form composed", np.float64)
