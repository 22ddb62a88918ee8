"""RWKV's first weights, sizes and state."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autograd.random import Random
from minitv.variants.rwkv import orthogonal
from tests.minitv import models
from tests.minitv.test_lm import tokens

LAYERS, WIDTH, VOCAB = 3, 12, 11


def build(**options):
    return models.build("rwkv", VOCAB, **{"layers": LAYERS, "width": WIDTH, "ffn_width": None, **options})


def test_blocks_start_as_the_identity():
    model, ids = build(), tokens(7)
    expected = model.norm(model.embed_norm(model.embed(ids))).numpy() @ model.head.weight.numpy().T
    np.testing.assert_allclose(model(ids).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert np.abs(model.embed.weight.numpy()).max() <= 1e-4


@pytest.mark.parametrize("layer", range(LAYERS))
def test_first_weights_are_those_of_the_official_code(layer):
    """Its loop over channels, written out."""
    block = build().blocks[layer]
    depth, height = layer / (LAYERS - 1), 1 - layer / LAYERS
    for j in range(WIDTH):
        expected = {
            "time_decay": -5 + 8 * (j / (WIDTH - 1)) ** (0.7 + 1.3 * depth),
            "time_first": math.log(0.3) + ((j + 1) % 3 - 1) * 0.5,
            "mix_k": (j / WIDTH) ** height,
            "mix_v": (j / WIDTH) ** height + 0.3 * depth,
            "mix_r": (j / WIDTH) ** (0.5 * height),
        }
        assert {name: getattr(block.mixer, name).numpy()[j] for name in expected} == pytest.approx(expected)
        assert block.ffn.mix_k.numpy()[j] == block.ffn.mix_r.numpy()[j] == pytest.approx((j / WIDTH) ** height)
    zero = [block.mixer.key, block.mixer.receptance, block.mixer.out, block.ffn.receptance, block.ffn.value]
    assert not any(weight.numpy().any() for weight in zero)
    value, key = block.mixer.value.numpy(), block.ffn.key.numpy()
    np.testing.assert_allclose(value @ value.T, np.eye(WIDTH), atol=1e-12)
    np.testing.assert_allclose(key.T @ key, 4 * np.eye(WIDTH), atol=1e-12)  # gain √(4 widths / width)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_orthogonal_matrices(shape):
    weight = orthogonal(Random(0), *shape, 0.5, np.float64).numpy()
    long = max(1, shape[0] / shape[1]) ** 0.5 * 0.5
    product = weight @ weight.T if shape[0] < shape[1] else weight.T @ weight
    np.testing.assert_allclose(product, long**2 * np.eye(4), atol=1e-12)


def test_one_layer_and_one_channel_divide_by_nothing():
    model = build(layers=1, width=1)
    assert all(np.isfinite(p.numpy()).all() for p in model.parameters())


def test_a_layer_keeps_five_vectors():
    model = build()
    _, state = model.prefill(tokens(9), model.init_state(3))
    for mixed, fed in state.blocks:
        vectors = mixed._asdict() | fed._asdict()
        assert list(vectors) == ["time_x", "a", "b", "p", "channel_x"]
        assert all(vector.shape == (3, WIDTH) for vector in vectors.values())
        assert (vectors["b"].numpy() >= 1).all()
