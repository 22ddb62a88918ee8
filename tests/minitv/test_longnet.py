"""LongNet: its options, its cache, what it is equal to, ranks that share a sequence, and what it refuses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from autograd import Tensor, assert_close, gradients, no_grad, use
from autograd.random import Random
from minitv.errors import UserError
from minitv.ops import attention, dilated_attention
from minitv.ops.dilated_attention import counts, detached, over_ranks
from minitv.options import ModelOptions
from minitv.variants.longnet import Dilated, LongNetOptions, patterns
from tests.minitv import models

pytestmark = pytest.mark.usefixtures("either_way")
OPTIONS = {
    "default": {}, "list": dict(segments="4:1,8:2,24:4"), "not nested": dict(segments="5:1,12:3"), "thin": dict(segments="6:2"),
    "block": dict(segments="4:1,16:4", offsets="block"), "learned": dict(positions="learned", segments="8:1,80:2"),
    "xpos": dict(segments="8:1,32:4", xpos=True), "backbone": dict(segments="8:1,32:4", xpos=True, sub_norm=True, bias=True),
    "detached": dict(segments="8:1,16:2", detach_mixture=True), "by layer": dict(segments="4:1/8:2,16:1"),
}


def build(dtype=np.float64, **options):
    """A small model whose weights are large enough that everything counts."""
    made = models.build("longnet", 11, dtype, **{"context": 80, "layers": 2, "width": 16, "heads": 4, **options})
    rng = np.random.default_rng(0)
    for parameter in made.parameters():
        parameter.assign_((parameter.numpy() + 0.3 * rng.normal(size=parameter.shape)).astype(dtype))
    return made


def tokens(length, batch=2):
    return np.random.default_rng(1).integers(0, 11, (batch, length))


def arrays(length, heads=4, width=6, dtype=np.float64, keys=None):
    rng = np.random.default_rng(2)
    return [Tensor(rng.normal(size=(2, heads, n, width)).astype(dtype), requires_grad=True)
            for n in (length, keys or length, keys or length)]


# -- the model ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_any_split_gives_what_the_call_gives(options):
    """Over several of the longest segments, the last of which is not full."""
    model, ids = build(**options), tokens(77)
    with no_grad():
        expected, state, parts = model(ids).numpy(), model.init_state(2), []
        for first, last in pairwise((0, 1, 1, 2, 3, 24, 31, 33, 70, *range(71, 78))):
            logits, state = model.prefill(ids[:, first:last], state)
            parts.append(logits.numpy())
            mixer, cache = model.blocks[0].mixer, state.blocks[0][0]
            assert cache.position == last
            assert cache.keys.shape[2] == last - min(max(last - 1, 0) // w * w for w in mixer.segments)  # no more is kept
    assert_close(np.concatenate(parts, axis=1), expected, terms=10_000)


@pytest.mark.parametrize("scale", [1, 3, 10, 100])
@pytest.mark.parametrize("options", [OPTIONS["not nested"], OPTIONS["backbone"]], ids=["not nested", "backbone"])
def test_what_comes_later_changes_nothing(options, scale):
    """With larger and larger keys: one bit of the future would weigh more and more."""
    model, ids = build(layers=1, **options), tokens(40)
    mixer = model.blocks[0].mixer
    weight = mixer.qkv.weight.numpy().copy()
    weight[16:32] *= scale
    mixer.qkv.weight.assign_(weight)
    before = model(ids).numpy()
    for cut in (1, 12, 25, 39):
        other = ids.copy()
        other[:, cut:] = (other[:, cut:] + 1 + np.arange(40 - cut) % 9) % 11
        after = model(other).numpy()
        assert np.array_equal(after[:, :cut], before[:, :cut]) and not np.array_equal(after[:, cut], before[:, cut])


def test_the_encoder_sees_both_sides_of_its_segments():
    model = models.build("longnet-encoder", context=24, layers=1, width=16, segments="4:1,12:2")
    ids, other = tokens(23), tokens(23)
    other[:, 10] = (other[:, 10] + 1) % 11
    changed = (model(ids).numpy() != model(other).numpy()).any(axis=(0, 2))
    seen = counts(4, 23, 23, (4, 12), (1, 2), "modulo", False, 0)[:, :, 10].any(axis=0)  # by a head
    assert np.array_equal(changed, seen) and seen[:10].any() and seen[11:].any() and not seen.all()


def test_the_default_patterns_reach_the_context():
    assert patterns(None, 20) == patterns(None, 32) == ((32,), (1,))
    assert patterns(None, 64) == ((32, 64), (1, 2)) and patterns(None, 65) == ((32, 64, 128), (1, 2, 4))
    segments, dilations = patterns(None, 32768)
    assert segments[-1] == 32768 and sum(w / r**2 for w, r in zip(segments, dilations, strict=True)) < 64
    assert patterns(" 32:1, 064:2 ", 8) == ((32, 64), (1, 2))


def test_each_layer_may_have_its_own_patterns():
    mixers = [block.mixer for block in build(segments="4:1/8:2,4:1").blocks]
    assert [(mixer.segments, mixer.dilations) for mixer in mixers] == [((4,), (1,)), ((8, 4), (2, 1))]


@pytest.mark.parametrize(("options", "sentence"), [
    ({"segments": "4:1/8:1/8:2"}, "--segments: '4:1/8:1/8:2' has 3 lists of patterns, allowed: one for all layers, or one for "
                                  "each of the 2 layers, separated by /"),
    ({"heads": 3}, "--heads: 3 heads do not divide the width 16"),
    ({"segments": "32:1,64:3"}, "--segments: the dilation 3 does not divide the segment 64, allowed: a dilation that divides "
                                "its segment, such as 64:2"),
    ({"segments": "2:4"}, "--segments: the dilation 4 does not divide the segment 2, allowed: a dilation that divides its "
                          "segment, such as 2:2"),
    ({"segments": "32"}, "--segments: '32' in '32' is no pattern, allowed: segment:dilation with integers from 1, several "
                         "separated by commas, such as 32:1,64:2,128:4"),
    *(({"segments": text}, f"--segments: {part!r} in {text!r} is no pattern") for text, part in
      [("", ""), ("8:1,", ""), ("0:1", "0:1"), ("8:0", "8:0"), ("8:-1", "8:-1"), ("8.0:1", "8.0:1"), ("8:1;16:2", "8:1;16:2"),
       ("٣:1", "٣:1"), ("9999999999:1", "9999999999:1")]),
    ({"offsets": "random"}, "offsets: 'random' is unknown, allowed: modulo, block"),
    ({"xpos": True, "positions": "learned"}, "--xpos: it changes how queries and keys are turned, and --positions is learned, "
                                             "allowed: --positions rope"),
])
def test_wrong_options(options, sentence):
    with pytest.raises(UserError) as caught:
        models.build("longnet", **{"width": 16, **options})
    assert sentence in str(caught.value)


# -- the operator ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.full)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_over_many_tiles(dtype, causal):
    """Segments of many tiles of queries and of keys, whose last is not full, and keys from before the queries."""
    params = dict(segments=(64, 300, 450), dilations=(1, 2, 7), offsets="block", causal=causal)
    outputs = []
    for route in (dict(kernel="cpu"), dict(form="counted")):
        q, k, v = arrays(310, heads=3, dtype=dtype, keys=420)
        with use("dilated_attention", **route):
            y, lse = dilated_attention(q, k, v, **params)
        g = np.random.default_rng(3).normal(size=(*y.shape[:3], y.shape[3] + 1)).astype(dtype)
        grads = gradients([y, lse], [q, k, v], [Tensor(g[..., :-1]), Tensor(g[..., -1])])
        outputs.append([x.numpy() for x in (y, lse, *grads)])
    for name, one, two in zip(("y", "lse", "dq", "dk", "dv"), *outputs, strict=True):
        assert_close(one, two, f"{name} of the kernel", terms=10_000)


def test_a_key_in_two_patterns_counts_twice():
    q, k, v = arrays(12)
    C = counts(4, 12, 12, (4, 12), (1, 3), "modulo", True, 0)
    weights = C * np.exp(q.numpy() @ k.numpy().swapaxes(2, 3) / np.sqrt(6))
    y, lse = dilated_attention(q, k, v, segments=(4, 12), dilations=(1, 3))
    assert C.max() == 2
    assert_close(y.numpy(), weights @ v.numpy() / weights.sum(-1, keepdims=True), terms=100)
    assert_close(lse.numpy(), np.log(weights.sum(-1)), terms=100)


def test_detached_weights_give_another_gradient_of_queries_and_keys():
    q, k, v = arrays(24)
    params = dict(segments=(4, 8, 24), dilations=(1, 2, 4), offsets="modulo", causal=True, start=0)
    (y, _), (other, _) = dilated_attention(q, k, v, **params), detached(q, k, v, **params)
    assert_close(other.numpy(), y.numpy(), terms=100)
    g = Tensor(np.random.default_rng(4).normal(size=y.shape))
    right, wrong = ([x.numpy() for x in gradients([output], [q, k, v], [g])] for output in (y, other))
    assert_close(wrong[2], right[2], terms=100)
    for one, two in zip(wrong[:2], right[:2], strict=True):
        assert np.linalg.norm(one - two) > 0.05 * np.linalg.norm(two)


# -- ranks -------------------------------------------------------------------------------------------------------------
LADDER = dict(segments=(4, 8, 16, 64), dilations=(1, 2, 4, 8), offsets="modulo", scale=None, start=0)


@pytest.mark.parametrize(("length", "causal"), [(64, False), (61, True)])
def test_the_result_does_not_depend_on_the_number_of_ranks(length, causal):
    q, k, v = arrays(length)
    g = [Tensor(np.random.default_rng(5).normal(size=shape)) for shape in (q.shape, q.shape[:3])]
    results = []
    for ranks in (1, 2, 4, 8):
        y, lse, received = over_ranks(q, k, v, **LADDER, causal=causal, ranks=ranks)
        results.append([x.numpy() for x in (y, lse, *gradients([y, lse], [q, k, v], g))])
        assert ranks > 1 or received == [[0, 0, 0, 0]]
    for other in results[1:]:
        for one, two in zip(other, results[0], strict=True):
            assert_close(one, two, terms=100)


def test_what_a_rank_receives_does_not_grow_with_the_sequence():
    """At most w / r keys and values of 6 channels for each of the 4 heads, and nothing for segments within a rank."""
    amounts = {}
    for length in (64, 128):
        *_, received = over_ranks(*arrays(length), **LADDER, causal=False, ranks=length // 8)
        amounts[length] = {tuple(numbers) for numbers in received}
        for numbers in received:
            assert numbers == [4 * (6 + 6) * (w - 8) // r if w > 8 else 0
                               for w, r in zip(LADDER["segments"], LADDER["dilations"], strict=True)]
    assert amounts[64] == amounts[128]
    *_, received = over_ranks(*arrays(64), **LADDER, causal=True, ranks=8)  # the past alone
    assert received[0] == [0, 0, 0, 0] and [numbers[3] for numbers in received] == [4 * 12 * n for n in range(8)]


def test_the_first_gradients_are_those_of_attention_where_there_is_one_pattern():
    q, k, v = arrays(9)
    whole, part = (gradients([y], [q, k, v], [Tensor(np.ones(y.shape))])
                   for y in (attention(q, k, v)[0], dilated_attention(q, k, v, segments=(9,), dilations=(1,))[0]))
    for one, two in zip(part, whole, strict=True):
        assert_close(one.numpy(), two.numpy(), terms=100)


def test_a_mixer_alone_drops_values_while_training():
    mixer = Dilated(Random(0), ModelOptions(width=16, dropout=0.5), LongNetOptions(), dtype=np.float64)
    x = Tensor(np.random.default_rng(6).normal(size=(1, 40, 16)))
    assert (mixer(x, Random(1)).numpy() == 0).any() and not (mixer(x).numpy() == 0).any()
