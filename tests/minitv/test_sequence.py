"""Sequences that are split over ranks: the loss and all gradients are those of one rank, and what travels does not grow."""

from __future__ import annotations

import numpy as np
import pytest

from autograd import cross_entropy
from autograd.random import Random
from autograd.ranks.threads import run
from minitv import variants
from minitv.sequence import Share, sharing

SPLIT = [name for name in variants.variants() if variants.load(name).on_ranks]
VOCAB = 11


def model(name, length, width=16, **values):
    """With weights that are not 0 anywhere, so that every gradient has something to say."""
    experiment = variants.load(name).configure(context=length, layers=2, width=width, **values)
    network = experiment.variant.build(experiment.model, experiment.mixer, VOCAB, Random(1), np.float64)
    rng = np.random.default_rng(5)
    for parameter in network.parameters():
        parameter.data = parameter.data + 0.1 * rng.standard_normal(parameter.shape)
    return network


def loss_and_gradients(network, ids, labels):
    loss = cross_entropy(network(ids), labels, reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad.data for name, p in network.named_parameters()}


def on_ranks(ranks, length, work):
    """``work(share)`` on every rank, and the bytes that each sent."""
    def one(communicator):
        part = Share(communicator, length // ranks)
        with sharing(part):
            return work(part), communicator.sent

    results = run(ranks, one)
    return [result for result, _ in results], [sent for _, sent in results]


def compare(name, ranks, length=32, batch=2, **values):
    """The loss and all gradients of so many ranks and of one."""
    ids, labels = np.random.default_rng(3).integers(0, VOCAB, (2, batch, length))
    loss, whole = loss_and_gradients(model(name, length, **values), ids, labels)

    def work(part):
        cut = slice(part.start, part.start + part.length)
        return loss_and_gradients(model(name, length, **values), ids[:, cut], labels[:, cut])

    parts, _ = on_ranks(ranks, length, work)
    np.testing.assert_allclose(np.sum([one for one, _ in parts]), loss, rtol=1e-12)
    for key, gradient in whole.items():
        total = np.sum([gradients[key] for _, gradients in parts], axis=0)
        np.testing.assert_allclose(total, gradient, rtol=0, atol=1e-12 * max(1, np.abs(gradient).max()), err_msg=key)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.usefixtures("forms_unless_full")
def test_loss_and_gradients_are_those_of_one_rank(name, ranks):
    compare(name, ranks)


OTHERS = [
    ("longnet", dict(segments="4:1,8:2,16:4", heads=4)),
    ("longnet", dict(segments="4:1,8:2,64:16", heads=4, offsets="block", xpos=True, sub_norm=True)),
    ("longnet", dict(segments="3:1,10:2,24:6/32:8,5:1", detach_mixture=True)),  # segments that shares cut
    ("longnet-encoder", dict(segments="3:1,10:2,24:6", heads=4)),
    ("retnet", dict(normalization="none", rotation="rope", token_shift=True)),
    ("rwkv", dict(positions="learned")),
    ("performer", dict(positions="rope", features="relu", heads=2)),
    ("aft-simple", dict(positions="sinusoidal")),
    ("hyena", dict(order=3, short_filter=12, width=18)),  # longer than a share of 8, and channels that 4 does not divide
]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name, values", OTHERS)
@pytest.mark.usefixtures("forms_unless_full")
def test_options_change_nothing_of_it(name, values, ranks):
    compare(name, ranks, **values)


@pytest.mark.full
@pytest.mark.parametrize("name", SPLIT)
def test_eight_ranks_with_two_positions_each(name):
    compare(name, 8, length=16)


def bytes_sent(name, ranks, length):
    """By each rank for one sequence, forward and backward."""
    ids = np.zeros((1, length), int)

    def work(part):
        loss_and_gradients(model(name, length), ids[:, :part.length], ids[:, :part.length])

    return on_ranks(ranks, length, work)[1]


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.usefixtures("forms_unless_full")
def test_bytes_do_not_grow_with_the_text(name):
    short, long = (max(bytes_sent(name, 2, length)) for length in (64, 128))
    assert short < long < 2 * short if name == "hyena" else short == long > 0
