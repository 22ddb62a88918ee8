"""Attention sinks: the cache, the mask that it is equal to, the sinks that are trained, and streaming other models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autograd import Tensor, assert_close, distance, no_grad
from autograd.random import Random
from minitv.errors import UserError
from minitv.nn import full
from minitv.ops import attention, split_heads
from minitv.options import ModelOptions
from minitv.variants.attention_sinks import Cache, SinkAttention, SinkOptions, Streamed, streaming
from minitv.variants.transformer import Attention, TransformerOptions
from tests.minitv import models

pytestmark = pytest.mark.usefixtures("either_way")
SMALL = dict(context=12, layers=3, width=16, heads=2)
GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = ("first-tokens", "learned-token", "zero", "logit")


def build(variant="attention-sinks", **options):
    """A model whose weights are large enough that attention is uneven."""
    made = models.build(variant, 11, np.float64, **{**SMALL, **options})
    rng = np.random.default_rng(0)
    for parameter in made.parameters():
        parameter.assign_(parameter.numpy() + 0.5 * rng.normal(size=parameter.shape))
    return made


def turned(x, positions, width):
    """RoPE of x[n K] by complex numbers, neighbours as pairs."""
    angles = np.multiply.outer(positions, 10_000.0 ** (-2 * np.arange(width // 2) / width))
    z = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


class Oracle:
    """The paper's cache for one head of one sequence: keys are kept before they are turned, all are turned for every token."""

    def __init__(self, window, sinks, positions, logit=None):
        self.window, self.sinks, self.positions, self.logit, self.cache = window, sinks, positions, logit, []

    def step(self, q, k, v, slope=0.0):
        cache = [*self.cache, (k, v)]
        keys, values = (np.array(x) for x in zip(*cache, strict=True))
        n, width = keys.shape
        if self.positions == "rope":
            keys, q = turned(keys, np.arange(n), width), turned(q[None], np.array([n - 1]), width)[0]
        scores = keys @ q / np.sqrt(width) + slope * (np.arange(n) - (n - 1))
        top = scores.max()
        weights = np.exp(scores - top)
        rest = 0.0 if self.logit is None else np.exp(self.logit - top)
        if len(cache) > self.sinks + self.window:
            cache = cache[:self.sinks] + cache[len(cache) - self.window:]
        self.cache = cache
        return weights @ values / (weights.sum() + rest)


def oracle(model, ids, window, sinks, positions="rope", token=None):
    """Logits [T V] of a model of this file, token by token, by the oracle's cache in every layer and head."""
    layers = [getattr(block.mixer, "layer", block.mixer) for block in model.blocks]
    logits = [getattr(block.mixer, "logit", None) for block in model.blocks]
    caches = [[Oracle(window, sinks, positions, None if logit is None else logit.numpy()[h]) for h in range(layer.heads)]
              for layer, logit in zip(layers, logits, strict=True)]
    out = []
    rows = [model.embed.weight.numpy()[i] for i in ids]
    for x in ([token] if token is not None else []) + rows:
        for block, layer, heads in zip(model.blocks, layers, caches, strict=True):
            x1 = split_heads(layer.qkv(block.norm1(Tensor(x[None, None]))), heads=layer.parts)
            q, k, v = (part.numpy()[0, :, 0] for part in x1)
            share, slopes = layer.heads // layer.kv_heads, [0.0] * layer.heads if layer.slopes is None else layer.slopes.numpy()
            y = np.concatenate([cache.step(q[h], k[h // share], v[h // share], slopes[h]) for h, cache in enumerate(heads)])
            x = x + layer.out(Tensor(y[None, None])).numpy()[0, 0]
            x = x + block.ffn(block.norm2(Tensor(x[None, None]))).numpy()[0, 0]
        out.append(model.logits(Tensor(x[None, None])).numpy()[0, 0])
    return np.array(out[1:] if token is not None else out)


def read(model, ids, cuts):
    """Logits [B T V] of ids that are read in parts."""
    state, parts = model.init_state(ids.shape[0]), []
    for part in np.split(ids, cuts, axis=1):
        logits, state = model.prefill(part, state)
        parts.append(logits.numpy())
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(("window", "sinks"), [(3, 2), (4, 0), *(pytest.param(*size, marks=pytest.mark.full)
                                                                for size in ((1, 1), (5, 4)))])
def test_the_mask_and_the_cache_are_a_cache_that_turns_all_keys_anew(window, sinks):
    """For three layers: one pass over the text, parts of it, and single tokens."""
    model, ids = build(window=window, sinks=sinks), np.random.default_rng(1).integers(0, 11, (1, 25))
    with no_grad():
        expected = np.stack([oracle(model, row, window, sinks) for row in ids])
        assert_close(model(ids).numpy(), expected, terms=10_000)
        assert_close(read(model, ids, [1, 2, 9, 21]), expected, terms=10_000)
        assert_close(read(model, ids, range(1, 25)), expected, terms=10_000)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sink_equals_the_oracle(kind):
    model, ids = build(window=3, sinks=2, sink_kind=kind), np.random.default_rng(1).integers(0, 11, (1, 20))
    blocks = model.blocks
    token = None
    with no_grad():
        whole, parts = model(ids).numpy(), read(model, ids, [3, 4, 11])
        if kind == "learned-token":
            token, model.blocks = blocks.token.numpy(), blocks.stack
        expected = oracle(model, ids[0], 3, 2, token=token)[None]
    assert_close(whole, expected, terms=10_000)
    assert_close(parts, expected, terms=10_000)


def test_an_endless_window_is_the_transformer():
    """And so is the default within its context: training is that of the paper."""
    ids = np.random.default_rng(1).integers(0, 11, (2, 12))
    plain = build("transformer", positions="rope")
    with no_grad():
        for options in ({}, dict(window=7, sinks=4), dict(window=11, sinks=0)):
            model = models.build("attention-sinks", 11, **{**SMALL, **options})
            model.load({name.replace("mixer.", "mixer.layer."): array for name, array in plain.state().items()})
            assert_close(model(ids).numpy(), plain(ids).numpy(), terms=1000)
            assert_close(read(model, ids, [5]), plain(ids).numpy(), terms=1000)


@pytest.mark.parametrize("window", [3, None])
def test_a_zero_sink_is_a_key_and_a_value_of_zeros_before_the_text(window):
    """SoftMax1, equation (2), in one attention: exp(s) / (1 + Σ exp(s))."""
    layer = Attention(Random(0), ModelOptions(width=8, positions="none"), TransformerOptions(heads=2), dtype=np.float64)
    x = np.random.default_rng(0).normal(size=(1, 9, 8)) * 3
    size = window or 9
    ours = Streamed(layer, size, 1, full((2,), 0, np.float64))(Tensor(x)).numpy()
    q, k, v = (part.numpy()[0] for part in split_heads(layer.qkv(Tensor(x)), heads=layer.parts))
    k, v = (np.concatenate([np.zeros((2, 1, 4)), part], axis=1) for part in (k, v))
    t, j = np.arange(9)[:, None], np.arange(-1, 9)
    weights = np.exp(q @ k.transpose(0, 2, 1) / 2) * ((j <= t) & ((t - j <= size) | (j < 1)))  # the zeros are always seen
    y = weights @ v / weights.sum(-1, keepdims=True)
    assert_close(ours, layer.out(Tensor(y.transpose(1, 0, 2).reshape(1, 9, 8))).numpy(), terms=100)


def test_the_gradient_of_the_logit_is_what_the_queries_left_there():
    """db = -Σ_t P_t (g_t · y_t) in every head, where P_t = exp(b - lse_t) is the weight that query t leaves at the sink."""
    rng = np.random.default_rng(0)
    q, k, v, g = rng.normal(size=(4, 2, 3, 9, 4))
    b = full((3,), 0.3, np.float64)
    y, lse = attention(q, k, v, sink=b, window=4, sinks=1)
    (y * Tensor(g)).sum().backward()
    left = np.exp(0.3 - lse.numpy())
    assert 0.01 < left.min() < left.max() < 0.9
    assert_close(b.grad.numpy(), -(left * (y.numpy() * g).sum(-1)).sum((0, 2)), terms=100)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_slopes_beyond_the_window(kind):
    """In a random direction, by differences of fourth order."""
    model = build(window=3, sinks=2, sink_kind=kind, layers=2, width=8, context=8)
    ids, rng = np.random.default_rng(0).integers(0, 11, (1, 12)), np.random.default_rng(1)

    def loss():
        return models.mean_loss(model, ids[:, :-1], ids[:, 1:])

    loss().backward()
    before, gradients = model.state(), {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert all(np.abs(g).max() > 0 for g in gradients.values())
    direction = {name: rng.normal(size=g.shape) / max(1.0, np.linalg.norm(g)) for name, g in gradients.items()}

    def along(h):
        model.load({name: value + h * direction[name] for name, value in before.items()})
        return loss().item()

    h = 1e-5
    slope = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    assert slope == pytest.approx(sum((g * direction[name]).sum() for name, g in gradients.items()), rel=1e-7)


@pytest.mark.parametrize("scale", [1, 3, 10, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_token_changes_nothing_before_it(kind, scale):
    model = build(window=3, sinks=2, sink_kind=kind)
    for block in (model.blocks.stack if kind == "learned-token" else model.blocks):
        weight = block.mixer.layer.qkv.weight
        rows = weight.numpy().copy()
        rows[16:32] *= scale  # the keys
        weight.assign_(rows)
    ids = np.random.default_rng(1).integers(0, 11, (1, 20))
    with no_grad():
        before = model(ids).numpy()
        for t in (0, 1, 5, 13):
            other = ids.copy()
            other[0, t] = (other[0, t] + 1) % 11
            np.testing.assert_array_equal(model(other).numpy()[0, :t], before[0, :t])


def test_what_left_the_cache_is_forgotten():
    """One layer: a token sees the sinks and its window alone. It is the paper's: the context is not extended."""
    model, ids = build(window=3, sinks=2, layers=1), np.random.default_rng(1).integers(0, 11, (1, 20))
    with no_grad():
        before = model(ids).numpy()
        for t in range(20):
            other = ids.copy()
            other[0, t] = (other[0, t] + 1) % 11
            changed = np.flatnonzero(np.abs(model(other).numpy() - before)[0].max(-1) > 1e-12)
            assert changed.tolist() == (list(range(t, 20)) if t < 2 else list(range(t, min(t + 4, 20))))


def test_the_state_stops_growing():
    model, sizes = build(window=3, sinks=2), []
    with no_grad():
        state = model.init_state(2)
        for t in range(16):
            _, state = model.prefill(np.full((2, 1), t % 11), state)
            sizes.append(sum(array.size for cache in state.blocks for part in cache[:1] for array in part[:4]))
    assert sizes[5:] == [3 * 2 * 2 * 5 * 16] * 11 and sizes[0] == 3 * 2 * 2 * 16
    (cache, _), *_ = state.blocks
    assert type(cache) is Cache and cache.position - cache.base <= 4  # angles do not grow either


STREAMED = {
    "rope": ("transformer", dict(positions="rope")), "none": ("transformer", dict(positions="none")),
    "alibi": ("transformer", dict(positions="alibi")), "grouped": ("grouped-query", dict(kv_heads=1, positions="rope")),
    "shift": ("transformer", dict(positions="rope", token_shift=True)),
    "reversible": ("transformer", dict(positions="rope", stack="reversible")),
    "roformer": ("roformer", dict(pairing="half", rotated=0.5)), "xpos": ("roformer", dict(xpos=True, xpos_base=2.0)),
    "yarn": ("roformer", dict(scaling="yarn", scaling_factor=2.0)), "logit": ("attention-sinks", dict(sink_kind="logit")),
}


@pytest.mark.parametrize("case", STREAMED)
def test_a_trained_model_is_streamed_with_its_own_weights(case):
    """Within the cache it is the model, beyond it is the oracle's, read at once or in parts."""
    variant, options = STREAMED[case]
    plain, ids = build(variant, **{"layers": 2, **options}), np.random.default_rng(1).integers(0, 11, (1, 26))
    model = streaming(plain, 5, 2)
    assert {id(p) for p in model.parameters()} == {id(p) for p in plain.parameters()}
    with no_grad():
        whole = plain(ids).numpy()
        assert_close(model(ids[:, :8]).numpy(), whole[:, :8], terms=1000)
        assert np.abs(model(ids).numpy() - whole)[:, 9:].max() > 1e-3
        assert_close(read(model, ids, [7, 8, 20]), model(ids).numpy(), terms=10_000)
        if case in ("rope", "none", "alibi", "grouped"):
            assert_close(model(ids).numpy()[0], oracle(plain, ids[0], 5, 2, options["positions"]), terms=10_000)


def test_far_positions_are_as_good_as_near_ones():
    """Ten million tokens later, in float32, the same recent tokens give the same: angles are those of the cache."""
    model = models.build("attention-sinks", 11, np.float32, **{**SMALL, "window": 5, "sinks": 2})
    ids = np.random.default_rng(1).integers(0, 11, (1, 30))
    with no_grad():
        _, state = model.prefill(ids[:, :12], model.init_state(1))
        later = [(cache._replace(position=cache.position + 10**7, base=cache.base + 10**7), *more)
                 for cache, *more in state.blocks]
        near, far = (model.prefill(ids[:, 12:], state._replace(blocks=blocks))[0] for blocks in (state.blocks, tuple(later)))
    assert_close(far.numpy(), near.numpy(), terms=1000)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"window": 0}, "window: 0 is too small, allowed: an integer from 1"),
    ({"window": 3, "sinks": 4}, "--sinks 4: the cache would have more sinks than recent tokens (--window 3), allowed: 0 to 3"),
    ({"window": 12}, "--window 12 and --sinks 4: a token would see 16 others, and in training, by --context, it sees at most "
                     "11, allowed: a window of 1 to 7"),
    ({"positions": "learned"}, "--positions learned: a vector for each place of the text is in the keys already"),
    ({"positions": "sinusoidal"}, "--positions sinusoidal: a vector for each place"),
    ({"sink_kind": "learned-token", "sinks": 0}, "--sinks 0: the token of --sink-kind learned-token stands"),
    ({"sink_kind": "bos"}, "sink_kind: 'bos' is unknown, allowed: first-tokens, learned-token, zero, logit"),
])
def test_wrong_options(options, sentence):
    with pytest.raises(UserError) as caught:
        build(**options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("variant", "options", "window", "sinks", "sentence"), [
    ("retnet", {}, 4, 2, "--window: retnet has no cache of keys and values that could be cut, allowed: "),
    ("roformer", dict(scaling="dynamic-ntk", scaling_factor=2.0), 4, 2, "--window: the keys of --scaling dynamic-ntk turn by"),
    ("transformer", {}, 4, 2, "--window: this model was trained with --positions learned: a vector for each place"),
    ("transformer", dict(positions="none"), 10, 2, "--window 10 and --sinks 2: a token would see 12 others"),
    ("transformer", dict(positions="none"), 2, 3, "--sinks 3: the cache would have more sinks than recent tokens"),
])
def test_what_cannot_be_streamed_is_a_sentence(variant, options, window, sinks, sentence):
    with pytest.raises(UserError) as caught:
        streaming(models.build(variant, 11, **{"context": 12, "layers": 1, "width": 16, **options}), window, sinks)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("context", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_fit_into_any_context(context, kind):
    window, sinks = SinkOptions(sink_kind=kind).cache(context)
    assert window >= 1 and 0 <= sinks <= window and window + sinks <= max(context - 1, 1) + (kind == "learned-token")


# -- the package's cache


@pytest.mark.parametrize("case", ["rope", "none", "alibi", "zero", "logit"])
def test_the_layer_equals_the_cache_of_the_package_attention_sinks(case):
    """At once, in parts and with all gradients; goldens/make_attention_sinks.py says what the file holds."""
    with np.load(GOLDENS / "attention_sinks.npz") as file:
        golden = {name.removeprefix(f"{case}/"): file[name] for name in file if name.startswith(f"{case}/")}
    heads, window, sinks = (golden.pop(name).item() for name in ("heads", "window", "sinks"))
    positions, kind = case if case in ("none", "alibi") else "rope", case if case in ("zero", "logit") else "first-tokens"
    mixer = SinkAttention(Random(0), ModelOptions(width=golden["in"].shape[2], context=16, positions=positions),
                          SinkOptions(heads=heads, window=window, sinks=sinks, sink_kind=kind), dtype=np.float64)
    for name, parameter in mixer.named_parameters():
        parameter.assign_(golden.pop(f"param/{name.removeprefix('layer.')}"))
    x = Tensor(golden.pop("in"), requires_grad=True)
    y = mixer(x)
    (y * Tensor(golden.pop("cotangent"))).sum().backward()
    with no_grad():
        state, parts = mixer.init_state(2), []
        for part in np.split(x.numpy(), [1, 4, 9], axis=1):
            out, state = mixer.prefill(Tensor(part), state)
            parts.append(out.numpy())
    expected = golden.pop("out")
    for found in (y.numpy(), np.concatenate(parts, axis=1)):
        assert distance(found, expected) < 1e-10
    assert distance(x.grad.numpy(), golden.pop("grad")) < 1e-10
    for name, parameter in mixer.named_parameters():
        assert distance(parameter.grad.numpy(), golden.pop(f"grad/{name.removeprefix('layer.')}")) < 1e-10, name
    assert not golden, f"nothing reads {sorted(golden)}"
