"""Operators, a whole GPT-2, a whole RWKV and the optimiser equal files that other libraries made, gradients included.

goldens/make_goldens.py says how they were made and what their entries mean.
"""

from pathlib import Path

import numpy as np
import pytest
from conftest import operators
from operator_checks import DTYPES, compute, device, differentiate, dtypes, floats, marks, routes

from autograd import Random, distance, no_grad, use
from autograd.check import TOLERANCE
from minitv.mixers.rwkv import RWKVOptions
from minitv.mixers.transformer import TransformerOptions
from minitv.models.lm import LanguageModel
from minitv.nn import Module, Parameter
from minitv.optim import AdamW
from minitv.options import ModelOptions

FOLDER = Path(__file__).parent / "goldens"
FILES = ("ops", "sdpa", "wkv")  # with calls of operators
LIMITS = {np.float64: 1e-10, np.float32: TOLERANCE[np.dtype(np.float32)]}
OPERATORS = {op.name: op for op in operators()}
CALLED = {
    "adamw", "attention", "bidirectional_wkv", "causal_conv1d", "cross_entropy", "embedding", "gelu", "gelu_tanh", "group_norm",
    "layer_norm", "log_softmax", "logsumexp", "rms_norm", "sigmoid_gate", "silu", "softplus", "token_shift", "wkv",
}  # fmt: skip

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


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

    def add(self, key):
        self[key] = np.ones(3)
        self.unread.add(key)

    def only(self, call):
        """Leave out all other calls."""
        for key in [key for key in self if not key.startswith(f"{call}/")]:
            del self[key]
            self.unread.remove(key)
        return self


CALLS = {call: name for name in FILES for call in sorted({key.split("/")[0] for key in Golden(name)})}


def close(actual, expected, dtype, what):
    assert actual.dtype == dtype and actual.shape == expected.shape, what
    found = distance(actual, expected)
    assert found <= LIMITS[dtype], f"{what}: relative error {found:.3g}, allowed {LIMITS[dtype]:.3g}"


def cast(array, dtype):
    return array.astype(dtype) if array.dtype.kind == "f" else array


def operator_of(call):
    return OPERATORS[call.partition(".")[0]]


def verify_call(call, golden, route, dtype):
    """The outputs and the gradients of one call along one route."""
    op = operator_of(call)
    names = [a.name for a in op.signature.inputs]
    inputs = golden.below(f"{call}/in/")
    assert set(inputs) <= set(names)
    args = tuple(cast(inputs[name], dtype) if name in inputs else None for name in names)
    params = {name: value.item() for name, value in golden.below(f"{call}/param/").items()}
    expected = golden.below(f"{call}/out/")
    outputs = compute(op, route, args, params)
    assert set(expected) == {str(i) for i in range(len(outputs))}
    for i, output in enumerate(outputs):
        close(np.asarray(output), expected[str(i)], dtype, f"{call}, {route}, output {i}")
    cotangents, gradients = golden.below(f"{call}/cotangent/"), golden.below(f"{call}/grad/")
    assert set(cotangents) == (set(expected) if op.differentiable else set())
    assert set(gradients) == ({names[i] for i in floats(op, args)} if op.differentiable else set())
    if op.differentiable and route != "definition":  # a definition is values only
        found = differentiate(op, route, args, params, [cast(cotangents[str(i)], dtype) for i in range(len(outputs))])
        for i, gradient in found.items():
            close(gradient, gradients[names[i]], dtype, f"{call}, {route}, gradient of {names[i]}")
    assert not golden.unread, f"nothing reads {sorted(golden.unread)}"


def transformer(golden, activation, dtype):
    """The model of the file, every size from the shapes of its weights."""
    weights = {name: w.astype(dtype) for name, w in golden.below("param/").items()}
    weights["embed.weight"] = weights.pop("embed")
    context, width = weights["positions"].shape
    layers = sum(name.endswith("mixer.qkv.weight") for name in weights)
    options = ModelOptions(context=context, layers=layers, width=width, activation=activation, bias=True)
    heads = TransformerOptions(heads=golden["heads"].item())
    model = LanguageModel("transformer", options, heads, len(weights["embed.weight"]), Random(0), dtype)
    model.load(weights)
    return model


def verify_gpt2(golden, dtype, place="cpu"):
    """Logits, loss and the gradients of all parameters; with the exact gelu, logits and loss."""
    ids, labels = golden["ids"], golden["labels"]
    model = transformer(golden, "gelu_tanh", dtype).to(place)
    close(model(ids).numpy(), golden["logits"], dtype, "logits")
    loss = model.loss(ids, labels)
    close(loss.numpy(), golden["loss"], dtype, "loss")
    loss.backward()
    gradients = golden.below("grad/")
    gradients["embed.weight"] = gradients.pop("embed")
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(gradients)
    for name, parameter in parameters.items():
        close(parameter.grad.numpy(), gradients[name], dtype, f"gradient of {name}")
    exact = transformer(golden, "gelu", dtype).to(place)
    close(exact(ids).numpy(), golden["logits_erf"], dtype, "logits with the exact gelu")
    close(exact.loss(ids, labels).numpy(), golden["loss_erf"], dtype, "loss with the exact gelu")
    assert not golden.unread, f"nothing reads {sorted(golden.unread)}"


# -- operators ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("call", "route", "dtype"), [
    pytest.param(call, route, dtype, id=f"{call}-{route}-{dtype.__name__}".replace(" ", "_"), marks=marks(route))
    for call in CALLS for route in routes(operator_of(call)) for dtype in dtypes(route)])
def test_every_route_of_an_operator_equals_pytorch(call, route, dtype):
    verify_call(call, Golden(CALLS[call]).only(call), route, dtype)


def test_the_files_hold_calls_of_each_operator_and_float64():
    assert {call.partition(".")[0] for call in CALLS} == CALLED
    for name in (*FILES, "gpt2", "rwkv"):
        for key, array in Golden(name).items():
            assert array.dtype in (np.float64, np.int64, np.bool_), key
            assert array.dtype != np.float64 or np.isfinite(array).all(), key


# -- GPT-2 -------------------------------------------------------------------------------------------------------------
@each_dtype
@pytest.mark.parametrize("kernel", ["cpu", "none"], ids=["kernels", "forms"])
def test_the_transformer_equals_gpt2(kernel, dtype):
    with use(kernel=kernel):
        verify_gpt2(Golden("gpt2"), dtype)


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_the_transformer_equals_gpt2_on_a_gpu(place):
    with device(place):
        verify_gpt2(Golden("gpt2"), np.float32, "cuda")


@each_dtype
def test_the_transformer_equals_gpt2_token_by_token(dtype):
    golden = Golden("gpt2")
    ids, expected, model = golden["ids"], golden["logits"], transformer(golden, "gelu_tanh", dtype)
    with no_grad():
        logits, state = model.prefill(ids[:, :4], model.init_state(len(ids)))
        close(logits.numpy(), expected[:, :4], dtype, "logits of the first tokens")
        for t in range(4, ids.shape[1]):
            logits, state = model.step(ids[:, t], state)
            close(logits.numpy(), expected[:, t], dtype, f"logits at position {t}")


# -- RWKV --------------------------------------------------------------------------------------------------------------
def rwkv(golden, dtype):
    """The model of the file, every size from the shapes of its weights."""
    weights = {name: w.astype(dtype) for name, w in golden.below("param/").items()}
    vocab, width = weights["embed.weight"].shape
    layers, hidden = sum(name.endswith("time_decay") for name in weights), len(weights["blocks.0.ffn.key"])
    options = ModelOptions(layers=layers, width=width, activation="relu_squared", bias=True, tied=False)
    model = LanguageModel("rwkv", options, RWKVOptions(ffn_width=hidden / width), vocab, Random(0), dtype)
    model.load(weights)
    return model


def verify_rwkv(golden, dtype, place="cpu"):
    """Logits, loss and the gradients of all parameters."""
    ids, model = golden["ids"], rwkv(golden, dtype).to(place)
    close(model(ids).numpy(), golden["logits"], dtype, "logits")
    loss = model.loss(ids, golden["labels"])
    close(loss.numpy(), golden["loss"], dtype, "loss")
    loss.backward()
    gradients, parameters = golden.below("grad/"), dict(model.named_parameters())
    assert set(parameters) == set(gradients)
    for name, parameter in parameters.items():
        close(parameter.grad.numpy(), gradients[name], dtype, f"gradient of {name}")


def verify_states(state, expected, dtype):
    """Arrays [L B D] by the names of the vectors that a layer keeps."""
    found = [(*mixed._asdict().items(), *fed._asdict().items()) for mixed, fed in state.blocks]
    assert {name for name, _ in found[0]} == set(expected)
    for layer in zip(*found, strict=True):
        (name, *_), values = layer[0], [value.numpy() for _, value in layer]
        close(np.stack(values), expected[name], dtype, f"state {name}")


@each_dtype
@pytest.mark.parametrize("route", [{"kernel": "cpu"}, {"form": "recurrent"}, {"form": "chunkwise"}],
                         ids=lambda route: next(iter(route.values())))
def test_rwkv_equals_transformers(route, dtype):
    with use("wkv", **route):
        verify_rwkv(Golden("rwkv"), dtype)


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_rwkv_equals_transformers_on_a_gpu(place):
    with device(place):
        verify_rwkv(Golden("rwkv"), np.float32, "cuda")


@each_dtype
def test_the_state_of_rwkv_equals_transformers(dtype):
    """Its steps of one token mix up a batch of states, so the state after several tokens is what is compared."""
    golden = Golden("rwkv")
    ids, model = golden["ids"], rwkv(golden, dtype)
    with no_grad():
        logits, state = model.prefill(ids[:, :4], model.init_state(len(ids)))
        close(logits.numpy(), golden["logits"][:, :4], dtype, "logits of the first tokens")
        verify_states(state, golden.below("state/"), dtype)
        for t in range(4, ids.shape[1]):
            logits, state = model.step(ids[:, t], state)
            close(logits.numpy(), golden["logits"][:, t], dtype, f"logits at position {t}")


def test_rwkv_equals_the_package_of_its_author():
    golden = Golden("rwkv")
    ids, model = golden["ids"][:1], rwkv(golden, np.float32)
    with no_grad():
        logits, state = model.prefill(ids, model.init_state(1))
    close(logits.numpy()[0], golden["logits_rwkv"], np.float32, "logits")
    verify_states(state, {name: value[:, None] for name, value in golden.below("state_rwkv/").items()}, np.float32)


# -- AdamW -------------------------------------------------------------------------------------------------------------
@each_dtype
def test_five_steps_of_the_optimiser_equal_pytorch(dtype):
    """The first six values are a matrix, which decays, the other four a vector."""
    golden = Golden("ops")
    start = golden["adamw.step1/in/param"].astype(dtype)
    model = Module()
    model.vector, model.matrix = Parameter(start[6:]), Parameter(start[:6].reshape(2, 3))
    settings = {name: value.item() for name, value in golden.below("adamw.step1/param/").items()}
    fixed = {name: settings[name] for name in ("beta1", "beta2", "eps", "weight_decay")}
    optimizer = AdamW(model, clip=0.0, **fixed)
    for step in range(1, 6):
        grad = golden[f"adamw.step{step}/in/grad"].astype(dtype)
        loss = (model.matrix * grad[:6].reshape(2, 3)).sum() + (model.vector * grad[6:]).sum()
        loss.backward(sink=optimizer.buffers[0])
        optimizer.step(settings["lr"])
        state = optimizer.state()
        found = (
            np.append(model.matrix.numpy(), model.vector.numpy()),
            np.append(state["m.matrix"], state["m.vector"]), np.append(state["v.matrix"], state["v.vector"]),
        )  # fmt: skip
        for i, array in enumerate(found):
            close(array, golden[f"adamw.step{step}/out/{i}"], dtype, f"step {step}, output {i}")


# -- the checks notice -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", ["out/0", "grad/x", "grad/weight", "grad/bias"])
@pytest.mark.parametrize("route", [r for r in routes(OPERATORS["layer_norm"])[1:] if np.float64 in dtypes(r)])
def test_an_operator_that_is_off_is_noticed(route, entry):
    golden = Golden("ops").only("layer_norm")
    golden[f"layer_norm/{entry}"] = golden[f"layer_norm/{entry}"] * (1 + 1e-9)
    with pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify_call("layer_norm", golden, route, np.float64)


@pytest.mark.parametrize("entry", [key for key in Golden("gpt2") if key.startswith(("logits", "loss", "grad/"))])
def test_a_gpt2_that_is_off_is_noticed(entry):
    golden = Golden("gpt2")
    golden[entry] = golden[entry] * (1 + 1e-9)
    with pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify_gpt2(golden, np.float64)


@pytest.mark.parametrize("entry", [key for key in Golden("rwkv") if key.startswith("grad/") or key in ("logits", "loss")])
def test_an_rwkv_that_is_off_is_noticed(entry):
    golden = Golden("rwkv")
    golden[entry] = golden[entry] * (1 + 1e-9)
    with pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify_rwkv(golden, np.float64)


@pytest.mark.parametrize("entry", ["in/gain", "grad/eps", "out/1", "cotangent/1", "note"])
def test_an_entry_of_a_call_that_nothing_reads_is_noticed(entry):
    golden = Golden("ops").only("layer_norm")
    golden.add(f"layer_norm/{entry}")
    with pytest.raises(AssertionError):
        verify_call("layer_norm", golden, "form composed", np.float64)


@pytest.mark.parametrize("entry", ["grad/blocks.2.norm1.weight", "note"])
def test_an_entry_of_gpt2_that_nothing_reads_is_noticed(entry):
    golden = Golden("gpt2")
    golden.add(entry)
    with pytest.raises(AssertionError):
        verify_gpt2(golden, np.float64)
