"""Conformer: what it equals, what padding and streams do to it, its lengths, its norms, and what it refuses."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from autograd import Tensor, assert_close, no_grad, use
from autograd.errors import ShapeError
from autograd.random import Random
from autograd.verify import PLACES
from minitv import cli, variants
from minitv.errors import UserError
from minitv.experiment import default_task, possible
from minitv.models.conformer import BatchNorm, Conformer, Convolution, RelativeAttention, Subsampling
from minitv.nn import Statistics
from minitv.ops import ctc_loss, relative_attention
from minitv.ops.relative_attention import shifted
from minitv.options import ModelOptions
from minitv.variants.conformer import CONFORMER, ConformerOptions
from tests.autograd import emulator, fake_cupy
from tests.autograd.operator_checks import marks
from tests.test_goldens import Golden, close, each_way

WIDTH, BANDS, VOCAB = 8, 9, 5
WAVE = dict(subsampling="wave", wave_channels="4,6,5", wave_kernels="3,2,2", wave_strides="2,1,2")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def build(layers=2, width=WIDTH, dtype=np.float64, features=BANDS, vocab=VOCAB, model=(), **options):
    """A small model whose weights are large enough that everything counts."""
    shape = {"width": width, "layers": layers, "activation": "silu", "bias": True, "ffn_multiple": 1.5, **dict(model)}
    options = {"heads": 2, "kernel": 5, "subsampling": "2", **options}
    features = 1 if options["subsampling"] == "wave" else features
    made = Conformer(CONFORMER, ModelOptions(**shape), ConformerOptions(**options), vocab, Random(0), dtype, features)
    for i, parameter in enumerate(made.parameters()):
        parameter.assign_((parameter.numpy() + 0.3 * normal(*parameter.shape, seed=i)).astype(dtype))
    return made


# -- goldens -----------------------------------------------------------------------------------------------------------
CASES = {"layer": dict(layers=2, subsampling="4", kernel=3), "batch": dict(conv_norm="batch", kernel=5),
         "group": dict(conv_norm="group", conv_groups=2, kernel=3), "chunk": dict(kernel=4, chunk=2, left_chunks=1)}


def verify(golden, case, dtype, place="cpu"):
    """Logits, loss, and gradients of all parameters in training, and the running statistics after it."""
    golden.only(case)
    model = build(**{"dtype": dtype, "layers": 1, **CASES[case]})
    buffers = {name: buffer.numpy() for name, buffer in model.named_buffers()}
    model.load({**{name: w.astype(dtype) for name, w in golden.below(f"{case}/param/").items()}, **buffers})
    model.to(place)
    frames, lengths = golden[f"{case}/frames"], golden[f"{case}/lengths"]
    put = (lambda x: x) if place == "cpu" else __import__("cupy").asarray
    statistics = Statistics()
    with statistics.part(0):
        logits = model(frames, lengths=lengths)
        positions = model.positions(lengths)
        loss = ctc_loss(logits, put(golden[f"{case}/targets"]), put(positions), put(golden[f"{case}/counts"]), reduction="sum")
        loss.backward()
    statistics.apply()
    counted = np.arange(logits.shape[1]) < positions[:, None]
    close(logits.numpy() * counted[..., None].astype(dtype), golden[f"{case}/logits"], dtype, "logits")
    close(loss.numpy(), golden[f"{case}/loss"], dtype, "loss")
    gradients = golden.below(f"{case}/grad/")
    for name, parameter in model.named_parameters():
        expected = gradients.pop(name)
        if case == "batch" and name.endswith("depthwise_bias"):  # the mean is subtracted after it: rounding alone
            assert max(np.abs(expected).max(), np.abs(parameter.grad.numpy()).max()) < (1e-5 if dtype is np.float32 else 1e-13)
        else:
            close(parameter.grad.numpy(), expected, dtype, f"gradient of {name}")
    for name, buffer in model.named_buffers():
        close(buffer.numpy(), golden[f"{case}/after/{name}"], dtype, name)
    assert not gradients and not golden.unread


@each_way
@pytest.mark.parametrize("case", CASES)
def test_the_model_equals_that_of_torch(kernel, case, dtype):
    with use(kernel=kernel):
        verify(Golden("conformer"), case, dtype)


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
@pytest.mark.parametrize("case", ["batch", "chunk"])
def test_the_model_equals_that_of_torch_on_a_gpu(case, place):
    with PLACES[place]():
        verify(Golden("conformer"), case, np.float32, "cuda")


@pytest.mark.full
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_samples_are_read_on_a_gpu_as_on_the_cpu(norm):
    if emulator.missing:
        pytest.skip(emulator.missing)
    samples, lengths, made = normal(2, 40, 1).astype(np.float32), np.array([40, 27]), []
    for place in ("cpu", "cuda"):
        with fake_cupy.installed("fast") if place == "cuda" else nullcontext():
            model = build(dtype=np.float32, **WAVE, wave_norm=norm, final_norm=True).to(place)
            logits = model(samples, lengths=lengths)
            (logits * logits).sum().backward()
            made.append([logits.numpy()[0], *(p.grad.numpy() for p in model.parameters())])
    for one, two in zip(*made, strict=True):
        assert_close(two, one, terms=10_000)


@pytest.mark.parametrize("entry", [
    pytest.param(key, marks=[] if key.endswith(("logits", "loss", "bias_v", "positions.weight", "mean")) else pytest.mark.full)
    for key in Golden("conformer")
    if key.startswith(("batch/logits", "batch/loss", "batch/grad", "batch/after")) and not key.endswith("depthwise_bias")])
def test_a_model_that_is_off_is_noticed(entry):
    golden = Golden("conformer")
    golden[entry] = golden[entry] * (1 + 1e-9)
    with use(kernel="none"), pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify(golden, "batch", np.float64)


# -- the shift ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 4), (4, 1), (3, 3), (2, 5), (5, 2), (0, 3), (3, 0), (0, 0)])
def test_the_shift_takes_the_distance_of_each_pair(queries, keys):
    columns = max(queries + keys - 1, 0)
    m = Tensor(normal(2, queries, columns), requires_grad=True)
    y = shifted(m, keys)
    assert y.shape == (2, queries, keys)
    expected, slope, g = np.zeros(y.shape), np.zeros(m.shape), normal(*y.shape, seed=1)
    for i, j in np.ndindex(queries, keys):
        column = keys - 1 - ((i + keys - queries) - j)
        expected[:, i, j] = m.numpy()[:, i, column]
        slope[:, i, column] += g[:, i, j]
    assert np.array_equal(y.numpy(), expected)
    if y.size:
        y.backward(g)
        assert np.array_equal(m.grad.numpy(), slope)


def test_the_shift_of_a_causal_model_is_wrong_above_the_diagonal():
    """Transformer-XL's shift of T distances, as ESPnet had it: right where its mask lets it be seen, and nowhere else."""
    length = 5
    m = normal(length, length)  # distances T-1 .. 0
    theirs = np.concatenate([np.zeros((length, 1)), m], axis=1).reshape(length + 1, length)[1:]
    ours = shifted(Tensor(np.concatenate([m, normal(length, length - 1, seed=1)], axis=1)), length).numpy()
    past = np.tri(length, dtype=bool)
    assert np.array_equal(theirs[past], ours[past]) and not (theirs == ours)[~past].any()


def test_a_number_of_distances_that_does_not_fit_is_refused():
    q = normal(1, 2, 3, 4)
    with pytest.raises(ShapeError, match="p has 3 distances; T = 3 queries and S = 3 keys have 5"):
        relative_attention(q, q, q, normal(2, 3, 4), normal(2, 4), normal(2, 4))


# -- lengths and padding -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_positions_are_those_that_see_frames_of_the_utterance_alone(halvings):
    subsample = Subsampling(Random(0), ModelOptions(width=4), halvings, 31)
    for length in range(60):
        expected = sum(t * subsample.stride + subsample.window <= length for t in range(60))
        assert subsample.reduced(length) == expected
        assert subsample.reduced(np.array([length]))[0] == expected
        if expected:
            assert subsample(Tensor(np.zeros((1, length, 31), np.float32))).shape == (1, expected, 4)


def test_positions_of_samples_are_those_that_see_samples_of_the_utterance_alone():
    front = build(**WAVE, final_norm=True).subsample
    assert (front.stride, front.window) == (4, 7)
    for length in range(40):
        expected = sum(4 * t + 7 <= length for t in range(40))
        assert front.reduced(length) == front.reduced(np.array([length]))[0] == expected
        if expected:
            assert front(Tensor(normal(1, length, 1))).shape == (1, expected, WIDTH)


@pytest.mark.usefixtures("forms_unless_full")
@pytest.mark.parametrize("options", [{}, dict(conv_norm="batch"), dict(conv_norm="group"), dict(chunk=2),
                                     dict(subsampling="4"), dict(WAVE), dict(WAVE, wave_norm="layer", wave_bias=True)])
def test_padding_shows_nowhere(options):
    """Neither what stands in it nor how much there is, in the logits, in the loss and in gradients."""
    model = build(**options)
    frames, lengths = normal(3, 33, model.features), np.array([33, 21, 12])
    results = []
    for filling, more in ((0.0, 0), (1e3, 0), (5.0, 9)):
        x = np.pad(frames, ((0, 0), (0, more), (0, 0)))
        for row, length in enumerate(lengths):
            x[row, length:] = filling
        model.zero_grad()
        with Statistics().part(0):
            logits = model(x, lengths=lengths)
            positions = model.positions(lengths)
            loss = ctc_loss(logits, np.array([[1], [2], [3]]), positions)
            loss.backward()
        rows = [logits.numpy()[row, :n] for row, n in enumerate(positions)]
        results.append([*rows, loss.numpy(), *(p.grad.numpy() for p in model.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_close(two, one, "padding shows", terms=1000)
    if options.get("conv_norm") != "batch":
        for row, length in enumerate(lengths):
            assert_close(model(frames[row : row + 1, :length]).numpy()[0], results[0][row], "alone it is another", terms=1000)


def leaks():
    def into_the_filter(monkeypatch):
        call = Convolution.__call__
        monkeypatch.setattr(Convolution, "__call__", lambda self, x, rng=None, seen=None: call(self, x, rng, None))

    def into_attention(monkeypatch):
        visible = RelativeAttention.visible
        monkeypatch.setattr(RelativeAttention, "visible", lambda self, *places, seen=None: visible(self, *places[:4]))

    def into_lengths(monkeypatch):
        monkeypatch.setattr(Conformer, "positions", lambda self, lengths: np.minimum(lengths // 2 + 1, 16))

    return [into_the_filter, into_attention, into_lengths]


@pytest.mark.parametrize("leak", leaks(), ids=lambda leak: leak.__name__)
def test_a_leak_of_padding_is_noticed(leak, monkeypatch):
    leak(monkeypatch)
    with pytest.raises(AssertionError):
        test_padding_shows_nowhere({})


def test_utterances_without_a_position_have_no_logits_and_no_influence():
    model = build()
    assert model(normal(2, 2, BANDS)).shape[1] == 1 and model.positions(2) == 0
    frames, lengths = normal(2, 20, BANDS), np.array([20, 1])
    logits = model(frames, lengths=lengths).numpy()
    assert np.isfinite(logits).all()
    assert_close(logits[:1], model(frames[:1]).numpy(), terms=1000)
    loss = ctc_loss(model(frames, lengths=lengths), np.array([[1], [2]]), model.positions(lengths), zero_infinity=True)
    assert np.isfinite(loss.numpy())


def test_frames_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match=r"frames are \[B T 9\], of B utterances; got an array of shape \(20, 9\)"):
        build()(normal(20, 9))


# -- streams -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("chunk", "left"), [(1, None), (1, 0), (1, 3), (2, 1), (3, None), (4, 2)])
@pytest.mark.parametrize("length", [40, 53])
def test_a_stream_is_the_whole(chunk, left, length):
    less = {(1, 0): dict(convolution=False, kernel=15), (3, None): dict(macaron=False)}.get((chunk, left), {})
    model = build(**{"chunk": chunk, "left_chunks": left, "subsampling": "4" if chunk == 2 else "2", "kernel": 4, **less})
    frames = normal(2, length, BANDS)
    whole = model(frames).numpy()
    with no_grad():
        for cuts in ((), (7,), tuple(range(1, length)), (3, 4, 30)):
            state, parts = model.init_state(2), []
            for start, stop in zip((0, *cuts), (*cuts, length), strict=True):
                logits, state = model.prefill(frames[:, start:stop], state)
                parts.append(logits.numpy())
            logits, state = model.prefill(frames[:, :0], state, last=True)
            parts.append(logits.numpy())
            assert_close(np.concatenate(parts, axis=1), whole, f"cuts {cuts}", terms=1000)
    kept = state.blocks[0][0]
    assert kept.keys.shape[2] <= (whole.shape[1] if left is None else left * chunk + chunk)


def test_a_stream_of_samples_is_the_whole():
    model, samples = build(**WAVE, wave_norm="layer", chunk=2, left_chunks=1, final_norm=True), normal(1, 61, 1)
    with no_grad():
        state, parts = model.init_state(1), []
        for start in range(0, 61, 9):
            logits, state = model.prefill(samples[:, start : start + 9], state, last=start == 54)
            parts.append(logits.numpy())
        assert_close(np.concatenate(parts, axis=1), model(samples).numpy(), terms=1000)


def test_logits_of_a_chunk_depend_on_its_frames_and_those_before():
    model, frames = build(chunk=2, kernel=4), normal(1, 41, BANDS)
    whole, window, stride = model(frames).numpy(), model.subsample.window, model.subsample.stride
    for position in range(0, whole.shape[1] - 1, 2):
        end = (position + 1) * stride + window  # frames that the chunk sees
        later = frames.copy()
        later[:, end:] += 1
        assert np.array_equal(model(later).numpy()[:, : position + 2], whole[:, : position + 2])
    sees = build(kernel=5)
    later = frames.copy()
    later[:, -1] += 1
    assert (sees(later).numpy() != sees(frames).numpy()).any(axis=-1)[:, :-1].all()


def test_a_model_of_whole_utterances_has_no_state():
    with pytest.raises(UserError, match="--stream: this model sees a whole utterance at once, train one with --chunk"):
        build().init_state(1)


def test_without_its_convolution_a_block_is_one_whose_convolution_adds_nothing():
    whole, frames = build(kernel=15), normal(2, 40, BANDS)
    for block in whole.blocks:
        for parameter in (block.convolution.out.weight, block.convolution.out.bias):
            parameter.assign_(np.zeros(parameter.shape))
    part = build(kernel=15, convolution=False)
    part.load({name: array for name, array in whole.state().items() if ".convolution." not in name and ".norm3." not in name})
    assert np.array_equal(part(frames).numpy(), whole(frames).numpy())


def test_without_macaron_a_block_takes_one_whole_step():
    whole, frames = build(), normal(2, 40, BANDS)
    for block in whole.blocks:
        for parameter in (block.ffn.down.weight, block.ffn.down.bias):
            parameter.assign_(np.zeros(parameter.shape))
    part = build(macaron=False)
    part.load({name: array / 2 if ".ffn2.down." in name else array for name, array in whole.state().items()
               if ".ffn." not in name and ".norm1." not in name})
    assert_close(part(frames).numpy(), whole(frames).numpy(), terms=1000)
    assert build(macaron=False, chunk=2).init_state(1).blocks[0][0].keys.shape[2] == 0


# -- batch norm --------------------------------------------------------------------------------------------------------
def test_running_statistics_follow_the_whole_step_and_leave_padding_out():
    norm, x = BatchNorm(3, dtype=np.float64), 2 + 3 * normal(4, 6, 3)
    seen = np.arange(6) < np.array([6, 4, 5, 1])[:, None]
    whole, parts = Statistics(), Statistics()
    with whole.part(0):
        y = norm(Tensor(x), seen).numpy()
    assert_close(y[seen].mean(axis=0) + 1, np.ones(3), terms=100)
    assert_close(y[seen].var(axis=0), np.ones(3) / (1 + 1e-5 / x[seen].var(axis=0)), terms=100)
    other = BatchNorm(3, dtype=np.float64)
    for i in range(2):
        with parts.part(i):
            other(Tensor(x[2 * i : 2 * i + 2]), seen[2 * i : 2 * i + 2])
    whole.apply()
    parts.apply()
    for made in (norm, other):
        assert_close(made.mean.numpy(), 0.1 * x[seen].mean(axis=0), terms=100)
        assert_close(made.variance.numpy(), 0.9 + 0.1 * x[seen].var(axis=0, ddof=1), terms=100)
    expected = (x - norm.mean.numpy()) / np.sqrt(norm.variance.numpy() + norm.eps)
    assert_close(norm(Tensor(x), seen).numpy(), expected, terms=100)


def test_running_statistics_are_saved():
    model = build(conv_norm="batch")
    names = [name for name in model.state() if name.endswith(("norm.mean", "norm.variance"))]
    assert names == [f"blocks.{i}.convolution.norm.{kind}" for i in range(2) for kind in ("mean", "variance")]


# -- the record --------------------------------------------------------------------------------------------------------
def test_it_learns_speech_and_nothing_else():
    assert possible(CONFORMER) == ["speech"] and default_task(CONFORMER) == "speech" and not CONFORMER.causal
    with pytest.raises(UserError, match="--task text: conformer reads frames of sound, and this task has tokens; "
                                        "tasks for it: speech"):
        CONFORMER.configure(task="text")
    with pytest.raises(UserError, match=r"--task speech: transformer reads tokens, and this task has frames of sound; .* "
                                        r"conformer$"):
        variants.load("transformer").configure(task="speech")


@pytest.mark.parametrize(("options", "said"), [
    (dict(kernel=4), "--kernel: 4 taps have no middle, allowed: an odd number, or with --chunk any"),
    (dict(left_chunks=2), "--left-chunks: this concerns --chunk"),
    (dict(conv_groups=2), "--conv-groups: this concerns --conv-norm group, and --conv-norm is layer"),
    (dict(convolution=False, kernel=31), "--kernel: this concerns the convolution, which --no-convolution leaves out"),
    (dict(convolution=False, conv_norm="batch"), "--conv-norm: this concerns the convolution, which --no-convolution leaves"),
    (dict(heads=3), "--heads: 3 heads do not divide the width 64"),
    (dict(conv_norm="group", conv_groups=3), "--conv-groups: 3 groups do not divide the width 64"),
    (dict(wave_bias=True), "--wave-bias: this concerns --subsampling wave, and --subsampling is 4"),
    (dict(WAVE, wave_strides="2,2"), "--wave-channels, --wave-kernels and --wave-strides: they have 3, 3, 2 numbers, allowed"),
    (dict(WAVE, wave_kernels="3,0,2"), "--wave-kernels: '3,0,2', allowed: up to 32 integers from 1 to 2**20 separated by"),
    (dict(WAVE), "--subsampling wave: it reads samples of sound, allowed with --frames samples"),
    (dict(WAVE, chunk=2, frames="samples"), "--wave-norm group: it is a norm over the whole utterance, which a stream does"),
    (dict(frames="samples", mels=20), "--mels: this concerns --frames bands, and samples have no bands"),
    (dict(mels=6), "--mels: 6 bands are too few for --subsampling 4, allowed: at least 7")])
def test_options_that_do_not_fit(options, said):
    with pytest.raises(UserError) as error:
        CONFORMER.configure(**options).build(5)
    assert str(error.value).startswith(said)


@pytest.mark.full
def test_it_learns_from_samples_too(tmp_path):
    argv = ["train", "conformer", "--frames", "samples", "--subsampling", "wave", "--wave-channels", "4,6", "--wave-kernels",
            "20,16", "--wave-strides", "16,10", "--width", "8", "--layers", "1", "--heads", "2", "--kernel", "3",
            "--batch", "2", "--steps", "2", "--eval-every", "0", "--eval-examples", "3", "--utterances", "4",
            "--context", "100000", "--threads", "1", "--warmup", "1", "--out", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    assert cli.main(["transcribe", str(tmp_path / "run"), "--say", "one two"]) == 0


def test_dropout_is_that_of_its_random_source():
    model, frames = build(model=dict(dropout=0.2)), normal(1, 30, BANDS)
    one, two, three = (model(frames, Random(seed)).numpy() for seed in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, three) and not np.array_equal(one, model(frames).numpy())
