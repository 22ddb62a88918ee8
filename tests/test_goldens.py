"""Operators, whole models and the optimiser equal files that other libraries made, gradients included.

goldens/make_goldens.py, and make_VARIANT.py beside it, say how they were made and what their entries mean.
"""


import numpy as np
import pytest

from autograd import Random, Tensor, distance, no_grad, use
from autograd.device import move
from autograd.verify import DTYPES, PLACES, declared, dtypes, forms, routes
from minitv.goldens import Golden, calls, close, verify_call
from minitv.nn import Module, Parameter
from minitv.optim import AdamW
from minitv.options import ModelOptions
from minitv.variants import simplified
from minitv.variants.hyena import Hyena, HyenaOptions
from minitv.variants.linformer import Linformer, LinformerOptions
from minitv.variants.longnet import Bidirectional, Dilated, LongNetOptions
from minitv.variants.simplified import SimplifiedOptions
from tests.autograd.operator_checks import marks
from tests.conftest import operators
from tests.minitv import models
from tests.minitv.models import mean_loss

OPERATORS = {op.name: op for op in operators()}
WITHOUT = {"banded_product"}  # a paper's operator has calls in the files, but for this one, which is ours alone

each_way = pytest.mark.parametrize(("kernel", "dtype"), [
    pytest.param(kernel, dtype, marks=[] if (kernel == "cpu") == (dtype is np.float32) else pytest.mark.full,
                 id=f"{'kernels' if kernel == 'cpu' else 'forms'}-{dtype.__name__}")
    for kernel in ("cpu", "none") for dtype in DTYPES])


def each_route(*routes):
    """Routes of the operator of a model, as they are written for ``use``, in each dtype."""
    return pytest.mark.parametrize(("route", "dtype"), [
        pytest.param(dict([route.split()]), dtype, marks=marks(route, dtype), id=f"{route.split()[1]}-{dtype.__name__}")
        for route in routes for dtype in DTYPES])


CALLS = calls()
FILES = sorted(set(CALLS.values()))


def operator_of(call):
    return OPERATORS[call.partition(".")[0]]


# -- whole models ------------------------------------------------------------------------------------------------------
def load(golden, variant, dtype, **options):
    """The language model of a file, which calls the embedding and the head by their short names."""
    weights = {name: w.astype(dtype) for name, w in long_names(golden.below("param/")).items()}
    model = models.build(variant, len(weights["embed.weight"]), dtype, **options)
    model.load(weights)
    return model


def long_names(arrays):
    return {f"{name}.weight" if name in ("embed", "head") else name: array for name, array in arrays.items()}


def layers(golden, name):
    return sum(key.startswith("param/") and key.endswith(name) for key in golden)


def verify(golden, model, dtype):
    """Logits, loss and the gradients of all parameters."""
    ids = golden["ids"]
    close(model(ids).numpy(), golden["logits"], dtype, "logits")
    loss = mean_loss(model, ids, golden["labels"])
    close(loss.numpy(), golden["loss"], dtype, "loss")
    loss.backward()
    gradients, parameters = long_names(golden.below("grad/")), dict(model.named_parameters())
    assert set(parameters) == set(gradients)
    for name, parameter in parameters.items():
        close(parameter.grad.numpy(), gradients[name], dtype, f"gradient of {name}")


def transformer(golden, activation, dtype):
    """GPT-2, every size from the shapes of its weights."""
    context, width = golden["param/positions"].shape
    return load(golden, "transformer", dtype, context=context, layers=layers(golden, "mixer.qkv.weight"), width=width,
                activation=activation, bias=True, heads=golden["heads"].item())


def verify_gpt2(golden, dtype, place="cpu"):
    """With the exact gelu too, logits and loss."""
    verify(golden, transformer(golden, "gelu_tanh", dtype).to(place), dtype)
    exact = transformer(golden, "gelu", dtype).to(place)
    close(exact(golden["ids"]).numpy(), golden["logits_erf"], dtype, "logits with the exact gelu")
    close(mean_loss(exact, golden["ids"], golden["labels"]).numpy(), golden["loss_erf"], dtype, "loss with the exact gelu")
    assert not golden.unread, f"nothing reads {sorted(golden.unread)}"


def retnet(golden, dtype, **options):
    """torchscale's model, every size from the shapes of its weights."""
    width, values, hidden = (golden[f"param/{name}"].shape[axis]
                             for name, axis in (("embed", 1), ("blocks.0.mixer.v.weight", 0), ("blocks.0.ffn.up.weight", 0)))
    return load(golden, "retnet", dtype, layers=layers(golden, "mixer.v.weight"), width=width, norm="rms_norm", tied=False,
                heads=golden["heads"].item(), value_width=values / width, head_norm="rms_norm", ffn="glu",
                ffn_width=hidden / width, norm_eps=golden["eps"].item(), **options)


def verify_retnet(golden, dtype, place="cpu"):
    """The parallel form of torchscale."""
    verify(golden, retnet(golden, dtype).to(place), dtype)


def rwkv(golden, dtype):
    """The model of transformers, every size from the shapes of its weights."""
    hidden, width = golden["param/blocks.0.ffn.key"].shape
    return load(golden, "rwkv", dtype, layers=layers(golden, "time_decay"), width=width, activation="relu_squared", bias=True,
                tied=False, ffn_width=hidden / width)


def verify_rwkv(golden, dtype, place="cpu"):
    verify(golden, rwkv(golden, dtype).to(place), dtype)


def reformer(golden, dtype, place):
    """The language model of transformers in training, every size from the shapes of its weights."""
    axes = [golden[f"param/axial.tables.{a}"].shape[0] for a in range(2)]
    hidden, width = golden["param/blocks.0.ffn.up.weight"].shape
    rounds = golden["rotations"].shape[2]
    weights = long_names(golden.below("param/"))
    model = models.build("reformer", len(weights["embed.weight"]), dtype, context=axes[0] * axes[1], width=width, tied=False,
                         layers=layers(golden, "mixer.qkv.weight"), heads=golden["heads"].item(), rounds=rounds,
                         wrap="previous", chunk=golden["chunk"].item(), buckets=golden["buckets"].item(),
                         attend="chunks", correction=False,
                         axial=f"{axes[0]}x{axes[1]}", streams="concat", ffn_width=hidden / width)
    rotations = {f"blocks.{i}.mixer.rotations": r for i, r in enumerate(golden["rotations"])}
    model.load({name: w.astype(dtype) for name, w in (weights | rotations).items()})
    return model.to(place)


def verify_reformer(golden, dtype, place="cpu"):
    verify(golden, reformer(golden, dtype, place), dtype)


MODELS = {"gpt2": verify_gpt2, "retnet": verify_retnet, "rwkv": verify_rwkv, "reformer": verify_reformer}


# -- operators ---------------------------------------------------------------------------------------------------------
def whole(op):
    """The routes that take sequences of any length."""
    return [route for route in routes(op) if route == "definition" or not getattr(declared(op, route), "sizes", None)]


@pytest.mark.parametrize(("call", "route", "dtype"), [
    pytest.param(call, route, dtype, id=f"{call}-{route}-{dtype.__name__}".replace(" ", "_"),
                 marks=[*marks(route, dtype), *[pytest.mark.full] * (route in forms(operator_of(call))[1:])])
    for call in CALLS for route in whole(operator_of(call)) for dtype in dtypes(operator_of(call), route)])
def test_every_route_of_an_operator_equals_pytorch(call, route, dtype):
    verify_call(operator_of(call), call, Golden(CALLS[call]).only(call), route, dtype)


def test_the_files_hold_calls_of_each_operator_and_float64():
    called = {call.partition(".")[0] for call in CALLS}
    for op in OPERATORS.values():
        if op.kernels and op.definition.__module__.startswith("minitv."):
            assert (op.name in called) != (op.name in WITHOUT), f"{op.name} has kernels: add calls of it in tests/goldens"
    assert called <= OPERATORS.keys()
    for name in (*FILES, *MODELS, "hyena", "angles"):
        for key, array in Golden(name).items():
            assert array.dtype in (np.float64, np.int64, np.bool_) or (array.dtype.kind == "U" and "/param/" in key), key
            assert array.dtype != np.float64 or np.isfinite(array).all(), key


# -- models ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_models_on_a_gpu(place, name):
    with PLACES[place]():
        MODELS[name](Golden(name), np.float32, "cuda")


# -- GPT-2 -------------------------------------------------------------------------------------------------------------
@each_way
def test_the_transformer_equals_gpt2(kernel, dtype):
    with use(kernel=kernel):
        verify_gpt2(Golden("gpt2"), dtype)


@each_way
def test_the_transformer_equals_gpt2_token_by_token(kernel, dtype):
    golden = Golden("gpt2")
    ids, expected, model = golden["ids"], golden["logits"], transformer(golden, "gelu_tanh", dtype)
    with use(kernel=kernel), no_grad():
        logits, state = model.prefill(ids[:, :4], model.init_state(len(ids)))
        close(logits.numpy(), expected[:, :4], dtype, "logits of the first tokens")
        for t in range(4, ids.shape[1]):
            logits, state = model.prefill(ids[:, t : t + 1], state)
            close(logits.numpy()[:, 0], expected[:, t], dtype, f"logits at position {t}")


# -- RetNet ------------------------------------------------------------------------------------------------------------
@each_route("kernel cpu", "form parallel", "form recurrent", "form chunkwise")
def test_every_form_of_retnet_equals_the_parallel_one_of_torchscale(route, dtype):
    with use("retention", **route):
        verify_retnet(Golden("retnet"), dtype)


@each_way
def test_retnet_token_by_token_equals_torchscale(kernel, dtype):
    """torchscale's recurrent form divides by √n only: it equals our "decay", and not its own parallel form."""
    golden = Golden("retnet")
    ids, model = golden["ids"], retnet(golden, dtype, normalization="decay")
    state = model.init_state(len(ids))
    with use(kernel=kernel), no_grad():
        for t in range(ids.shape[1]):
            logits, state = model.prefill(ids[:, t : t + 1], state)
            close(logits.numpy()[:, 0], golden["logits_recurrent"][:, t], dtype, f"logits at position {t}")
        close(model(ids).numpy(), golden["logits_recurrent"], dtype, "logits of all positions at once")


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_the_forms_of_torchscale_are_different_models(form):
    """They divide by other sums than its parallel form, which the norm of heads undoes only where its eps is 0."""
    golden = Golden("retnet")
    assert 1e-6 < distance(golden[f"logits_{form}"], golden["logits"]) < 0.1


# -- RWKV --------------------------------------------------------------------------------------------------------------
def verify_states(state, expected, dtype):
    """Arrays [L B D] by the names of the vectors that a layer keeps."""
    found = [(*mixed._asdict().items(), *fed._asdict().items()) for mixed, fed in state.blocks]
    assert {name for name, _ in found[0]} == set(expected)
    for layer in zip(*found, strict=True):
        (name, *_), values = layer[0], [value.numpy() for _, value in layer]
        close(np.stack(values), expected[name], dtype, f"state {name}")


@each_route("kernel cpu", "form recurrent", "form chunkwise")
def test_rwkv_equals_transformers(route, dtype):
    with use("wkv", **route):
        verify_rwkv(Golden("rwkv"), dtype)


@each_way
def test_the_state_of_rwkv_equals_transformers(kernel, dtype):
    """Its steps of one token mix up a batch of states, so the state after several tokens is what is compared."""
    golden = Golden("rwkv")
    ids, model = golden["ids"], rwkv(golden, dtype)
    with use(kernel=kernel), no_grad():
        logits, state = model.prefill(ids[:, :4], model.init_state(len(ids)))
        close(logits.numpy(), golden["logits"][:, :4], dtype, "logits of the first tokens")
        verify_states(state, golden.below("state/"), dtype)
        for t in range(4, ids.shape[1]):
            logits, state = model.prefill(ids[:, t : t + 1], state)
            close(logits.numpy()[:, 0], golden["logits"][:, t], dtype, f"logits at position {t}")


def test_rwkv_equals_the_package_of_its_author():
    golden = Golden("rwkv")
    ids, model = golden["ids"][:1], rwkv(golden, np.float32)
    with no_grad():
        logits, state = model.prefill(ids, model.init_state(1))
    close(logits.numpy()[0], golden["logits_rwkv"], np.float32, "logits")
    verify_states(state, {name: value[:, None] for name, value in golden.below("state_rwkv/").items()}, np.float32)


# -- Reformer ----------------------------------------------------------------------------------------------------------
@each_way
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_reformer_equals_transformers(kernel, dtype, chunks):
    """Its reversible chain, and feed-forward networks whose hidden values are computed again."""
    golden = Golden("reformer")
    with use(kernel=kernel):
        model = reformer(golden, dtype, "cpu")
        for block in model.blocks:
            block.ffn.chunks = chunks
        verify(golden, model, dtype)
    assert not golden.unread, f"nothing reads {sorted(golden.unread)}"


# -- Hyena -------------------------------------------------------------------------------------------------------------
HYENA = {"order2": "filters", "order3": "filters", "order3_training": "channels"}  # what the windows are ordered by


def hyena(golden, case, dtype):
    """The mixer of one case, every size from the shapes of its weights."""
    golden.only(case)
    weights = {name: w.astype(dtype) for name, w in golden.below(f"{case}/param/").items()}
    (context, features), width = golden[f"{case}/grad/filters.features"].shape, weights["out.bias"].size
    hidden, depth = weights["filters.frequency"].size, 1 + sum("layers" in name for name in weights) // 2
    options = HyenaOptions(order=1 + weights["skip"].size // width, filter_width=hidden, filter_depth=depth,
                           filter_bands=features // 2, features_lr=1.0, window_order=HYENA[case])
    mixer = Hyena(Random(0), ModelOptions(context=context, width=width, bias=True), options, dtype=dtype)
    mixer.load({**weights, "filters.features": np.zeros((context, features), dtype)})
    return mixer


def verify_hyena(golden, case, dtype, place="cpu"):
    verify_mixer(golden, case, hyena(golden, case, dtype), dtype, place)


def verify_mixer(golden, case, mixer, dtype, place="cpu"):
    """The output, and the gradients of the input and of all parameters."""
    mixer.to(place)
    x, cotangent = (Tensor(move(golden[f"{case}/{name}"].astype(dtype), place), requires_grad=name == "in")
                    for name in ("in", "cotangent"))
    y = mixer(x)
    close(y.numpy(), golden[f"{case}/out"], dtype, "output")
    y.backward(cotangent)
    close(x.grad.numpy(), golden[f"{case}/grad"], dtype, "gradient of the input")
    gradients, parameters = golden.below(f"{case}/grad/"), dict(mixer.named_parameters())
    assert set(parameters) == set(gradients)
    for name, parameter in parameters.items():
        close(parameter.grad.numpy(), gradients[name], dtype, f"gradient of {name}")
    assert not golden.unread, f"nothing reads {sorted(golden.unread)}"


@each_way
@pytest.mark.parametrize("case", HYENA)
def test_the_mixer_of_hyena_equals_that_of_torch(kernel, case, dtype):
    with use(kernel=kernel):
        verify_hyena(Golden("hyena"), case, dtype)


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_the_mixer_of_hyena_equals_that_of_torch_on_a_gpu(place):
    with PLACES[place]():
        verify_hyena(Golden("hyena"), "order3", np.float32, "cuda")


@each_way
@pytest.mark.parametrize("case", HYENA)
def test_hyena_position_by_position_equals_torch(case, kernel, dtype):
    golden = Golden("hyena")
    mixer = hyena(golden, case, dtype)
    x, expected = golden[f"{case}/in"].astype(dtype), golden[f"{case}/out"]
    with use(kernel=kernel), no_grad():
        state = mixer.init_state(len(x))
        for t in range(x.shape[1]):
            y, state = mixer.prefill(Tensor(x[:, t : t + 1]), state)
            close(y.numpy()[:, 0], expected[:, t], dtype, f"output at position {t}")


# -- the mixer of Linformer --------------------------------------------------------------------------------------------
LINFORMER = {"headwise": {}, "short": {}, "none": dict(sharing="none"), "key-value": dict(sharing="key-value"),
             "convolution": dict(projection="convolution")}


def verify_linformer(golden, case, dtype, place="cpu"):
    golden.only(case)
    weights = {name: w.astype(dtype) for name, w in golden.below(f"{case}/param/").items()}
    width, context, heads = len(weights["q.weight"]), golden[f"{case}/context"].item(), golden[f"{case}/heads"].item()
    rows = context // weights["E.weight"].shape[1] if case == "convolution" else weights["E.weight"].shape[1]
    options = LinformerOptions(heads=heads, projected_length=rows, **LINFORMER[case])
    mixer = Linformer(Random(0), ModelOptions(context=context, width=width), options, dtype=dtype)
    mixer.load(weights)
    verify_mixer(golden, case, mixer, dtype, place)


@each_way
@pytest.mark.parametrize("case", LINFORMER)
def test_the_mixer_of_linformer_equals_those_of_two_packages(kernel, case, dtype):
    with use(kernel=kernel):
        verify_linformer(Golden("linformer"), case, dtype)


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_the_mixer_of_linformer_equals_those_of_two_packages_on_a_gpu(place):
    with PLACES[place]():
        verify_linformer(Golden("linformer"), "none", np.float32, "cuda")


# -- the mixer of LongNet ----------------------------------------------------------------------------------------------
LONGNET = {"causal": {}, "detached": dict(detach_mixture=True), "xpos": dict(xpos=True, sub_norm=True), "encoder": {}}


def verify_longnet(golden, case, dtype, place="cpu"):
    golden.only(case)
    weights = {name: w.astype(dtype) for name, w in golden.below(f"{case}/param/").items()}
    segments = ",".join(f"{w}:{r}" for w, r in zip(golden[f"{case}/segments"], golden[f"{case}/dilations"], strict=True))
    options = LongNetOptions(heads=golden[f"{case}/heads"].item(), segments=segments, offsets="block", **LONGNET[case])
    model = ModelOptions(width=len(weights["out.weight"]), bias=True, positions="rope" if case == "xpos" else "none")
    mixer = (Bidirectional if case == "encoder" else Dilated)(Random(0), model, options, dtype=dtype)
    mixer.load(weights)
    verify_mixer(golden, case, mixer, dtype, place)


@each_way
@pytest.mark.parametrize("case", LONGNET)
def test_the_mixer_of_longnet_equals_that_of_torchscale(kernel, case, dtype):
    with use(kernel=kernel):
        verify_longnet(Golden("longnet"), case, dtype)


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_the_mixer_of_longnet_equals_that_of_torchscale_on_a_gpu(place):
    with PLACES[place]():
        verify_longnet(Golden("longnet"), "xpos", np.float32, "cuda")


# -- simplified blocks -------------------------------------------------------------------------------------------------
SIMPLIFIED = {"sas-p": {}, "sas": dict(block="serial"), "first-without-norms": dict(normed_layers="first"),
              "later-without-norms": dict(normed_layers="first", block="serial"), "both-directions": {},
              "everything": dict(block="serial", value_matrices="all", output_matrices=True, qk_norm=True, skip=True)}


def verify_simplified(golden, case, dtype, place="cpu"):
    golden.only(case)
    weights = {name: w.astype(dtype) for name, w in golden.below(f"{case}/param/").items()}
    hidden, width = weights["ffn.up.weight"].shape
    options = SimplifiedOptions(heads=golden[f"{case}/heads"].item(), **SIMPLIFIED[case])
    model = ModelOptions(width=width, ffn_multiple=hidden / width, bias="ffn.up.bias" in weights, norm="rms_norm",
                         activation="relu", layers=2)
    kind = simplified.Bidirectional if case == "both-directions" else simplified.ShapedAttention
    layer = 0 if case in ("first-without-norms", "both-directions") else 1
    made = (part(Random(0), model, options, layer, dtype) for part in (kind, simplified.FeedForward))
    block = simplified.Simplified(model, *made, dtype=dtype)
    block.load(weights)
    verify_mixer(golden, case, block, dtype, place)


@each_way
@pytest.mark.parametrize("case", SIMPLIFIED)
def test_the_simplified_blocks_equal_those_with_matrices(kernel, case, dtype):
    with use(kernel=kernel):
        verify_simplified(Golden("simplified"), case, dtype)


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_the_simplified_blocks_equal_those_with_matrices_on_a_gpu(place):
    with PLACES[place]():
        verify_simplified(Golden("simplified"), "everything", np.float32, "cuda")


# -- encoder-decoders ---------------------------------------------------------------------------------------------------
ENCDEC = {"encoder-decoder": {}, "one-wide": {}, "all": dict(share="all", drop="none"),
          "no-encoder": dict(share="none", drop="encoder", widen=1.0)}


def verify_encdec(golden, case, dtype, place="cpu"):
    golden.only(case)
    weights = {name: w.astype(dtype) for name, w in golden.below(f"{case}/param/").items()}
    numbers = {side: [int(name.split(".")[1]) for name in weights if name.startswith(side)] for side in ("encoder", "decoder")}
    vocab, width = weights["embed.weight"].shape
    source, target = golden[f"{case}/source"], golden[f"{case}/target"]
    model = models.build("one-wide-ffn" if ENCDEC[case] or case == "one-wide" else case, vocab, dtype, width=width,
                         layers=1 + max(numbers["encoder"]), decoder_layers=1 + max(numbers["decoder"]),
                         ffn_multiple=6 / width, heads=golden[f"{case}/heads"].item(),
                         positions=str(golden[f"{case}/positions"]), bias=True, context=source.shape[1], **ENCDEC[case])
    if model.target_positions is not None:  # torch's is as long as its targets
        for table in (weights, rest := golden.below(f"{case}/grad/")):
            table["target_positions"] = np.pad(table["target_positions"], ((0, 1), (0, 0)))
    else:
        rest = golden.below(f"{case}/grad/")
    model.load(weights)
    model.to(place)
    logits = model(*(move(ids, place) for ids in (source, target)))
    seen = target >= 0
    close(logits.numpy()[seen], golden[f"{case}/logits"][seen], dtype, "logits")
    logits.backward(Tensor(move(golden[f"{case}/cotangent"].astype(dtype), place)))
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(rest)
    for name, parameter in parameters.items():
        close(parameter.grad.numpy(), rest[name], dtype, f"gradient of {name}")
    assert not golden.unread, f"nothing reads {sorted(golden.unread)}"


@each_way
@pytest.mark.parametrize("case", ENCDEC)
def test_encoder_decoders_equal_those_of_torchs_layers(kernel, case, dtype):
    with use(kernel=kernel):
        verify_encdec(Golden("one_wide_ffn"), case, dtype)


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_encoder_decoders_equal_those_of_torchs_layers_on_a_gpu(place):
    with PLACES[place]():
        verify_encdec(Golden("one_wide_ffn"), "one-wide", np.float32, "cuda")


# -- AdamW -------------------------------------------------------------------------------------------------------------
@each_way
def test_five_steps_of_the_optimiser_equal_pytorch(kernel, dtype):
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
        with use(kernel=kernel):
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
@pytest.mark.parametrize("route", [r for r in routes(OPERATORS["layer_norm"])[1:]
                                   if np.float64 in dtypes(OPERATORS["layer_norm"], r)])
def test_an_operator_that_is_off_is_noticed(route, entry):
    golden = Golden("ops").only("layer_norm")
    golden[f"layer_norm/{entry}"] = golden[f"layer_norm/{entry}"] * (1 + 1e-9)
    with pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify_call(OPERATORS["layer_norm"], "layer_norm", golden, route, np.float64)


def entries():
    """What a model is compared with; without --full its logits, its loss and one gradient."""
    for name in MODELS:
        first, *others = [key for key in Golden(name) if key.startswith("grad/")]
        yield from ((name, key) for key in ("logits", "logits_erf", "loss", "loss_erf", first) if key in Golden(name))
        yield from (pytest.param(name, key, marks=pytest.mark.full) for key in others)


@pytest.mark.parametrize(("name", "entry"), list(entries()))
def test_a_model_that_is_off_is_noticed(name, entry):
    golden = Golden(name)
    golden[entry] = golden[entry] * (1 + 1e-9)
    with use(kernel="none"), pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        MODELS[name](golden, np.float64)


@pytest.mark.parametrize("entry", [
    pytest.param(key, marks=[] if key in ("order3/out", "order3/grad") else pytest.mark.full)
    for key in Golden("hyena") if key.startswith(("order3/out", "order3/grad"))])
def test_a_hyena_that_is_off_is_noticed(entry):
    golden = Golden("hyena")
    golden[entry] = golden[entry] * (1 + 1e-9)
    with use(kernel="none"), pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify_hyena(golden, "order3", np.float64)


@pytest.mark.parametrize("entry", [key for key in Golden("linformer") if key.startswith(("none/out", "none/grad"))])
def test_a_linformer_that_is_off_is_noticed(entry):
    golden = Golden("linformer")
    golden[entry] = golden[entry] * (1 + 1e-9)
    with use(kernel="none"), pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify_linformer(golden, "none", np.float64)


@pytest.mark.parametrize("entry", [key for key in Golden("longnet") if key.startswith(("detached/out", "detached/grad"))])
def test_a_longnet_that_is_off_is_noticed(entry):
    golden = Golden("longnet")
    golden[entry] = golden[entry] * (1 + 1e-9)
    with use(kernel="none"), pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify_longnet(golden, "detached", np.float64)


@pytest.mark.parametrize("entry", [
    pytest.param(key, marks=[] if key.endswith(("out", "grad", "gamma")) else pytest.mark.full)
    for key in Golden("simplified") if key.startswith(("everything/out", "everything/grad"))])
def test_a_simplified_block_that_is_off_is_noticed(entry):
    golden = Golden("simplified")
    golden[entry] = golden[entry] * (1 + 1e-9)
    with use(kernel="none"), pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify_simplified(golden, "everything", np.float64)


@pytest.mark.parametrize("entry", [
    pytest.param(key, marks=[] if key.endswith(("logits", "ffn.down.weight", "embed.weight")) else pytest.mark.full)
    for key in Golden("one_wide_ffn") if key.startswith(("one-wide/logits", "one-wide/grad"))])
def test_an_encoder_decoder_that_is_off_is_noticed(entry):
    golden = Golden("one_wide_ffn")
    golden[entry] = golden[entry] * (1 + 1e-9)
    with use(kernel="none"), pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify_encdec(golden, "one-wide", np.float64)


@pytest.mark.parametrize("entry", ["in/gain", "grad/eps", "out/1", "cotangent/1", "note"])
def test_an_entry_of_a_call_that_nothing_reads_is_noticed(entry):
    golden = Golden("ops").only("layer_norm")
    golden.add(f"layer_norm/{entry}")
    with pytest.raises(AssertionError):
        verify_call(OPERATORS["layer_norm"], "layer_norm", golden, "form composed", np.float64)


@pytest.mark.parametrize("entry", ["grad/blocks.2.norm1.weight", "note"])
def test_an_entry_of_gpt2_that_nothing_reads_is_noticed(entry):
    golden = Golden("gpt2")
    golden.add(entry)
    with use(kernel="none"), pytest.raises(AssertionError):
        verify_gpt2(golden, np.float64)
