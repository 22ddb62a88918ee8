"""Sequences that are split over ranks: the loss and all gradients are those of one rank, and what travels does not grow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autograd import GraphError, Tensor, cross_entropy, gradients, sum
from autograd.random import Random
from autograd.ranks import Communicator
from autograd.ranks.threads import run
from minitv import variants
from minitv.errors import UserError
from minitv.ops.dilated_attention import between_shares, dilated_attention, over_ranks
from minitv.sequence import Share, before, columns, gathered, relay, scattered, share, sharing
from minitv.task import Batch
from minitv.together import check, check_sharing
from minitv.trainer import Trainer

SPLIT = [name for name in variants.variants() if variants.load(name).on_ranks]
VOCAB = 11
ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("ranks", [*(pytest.param(ranks, marks=pytest.mark.full) for ranks in (1, 2)), 4])
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


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.full), 4])
@pytest.mark.parametrize("name, values", [pytest.param(*other, marks=[pytest.mark.full] * (other[0] in ("rwkv", "retnet")))
                                          for other in OTHERS])
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


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name not in ("longnet", "hyena")))
                                  for name in SPLIT])
@pytest.mark.usefixtures("forms_unless_full")
def test_bytes_do_not_grow_with_the_text(name):
    short, long = (max(bytes_sent(name, 2, length)) for length in (32, 64))
    assert short < long < 2 * short if name == "hyena" else short == long > 0


# -- exchanges ---------------------------------------------------------------------------------------------------------
def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("ranks, count", [(2, 1), (4, 3), (4, 9)])
def test_before_gives_what_earlier_ranks_hold(ranks, count):
    x, weights = array(2, 4 * ranks, 3), array(2, ranks, count, 3, seed=1)

    def work(part):
        mine = Tensor(x[:, part.start:part.start + 4], requires_grad=True)
        same, found = before(mine, count, None)
        (gradient,) = gradients(sum(found * weights[:, part.rank]) + sum(same), [mine])
        return found.data, gradient.data

    parts, _ = on_ranks(ranks, 4 * ranks, work)
    padded = np.concatenate([np.zeros((2, count, 3)), x], axis=1)
    expected = np.ones((2, count + 4 * ranks, 3))
    for rank, (found, _) in enumerate(parts):
        assert np.array_equal(found, padded[:, 4 * rank:4 * rank + count])
        expected[:, 4 * rank:4 * rank + count] += weights[:, rank]
    np.testing.assert_allclose(np.concatenate([g for _, g in parts], axis=1), expected[:, count:], rtol=1e-14)


@pytest.mark.parametrize("width", [4, 7])
def test_gathered_channels_come_back_and_so_do_their_gradients(width):
    x, weights = array(2, 12, width), array(2, 12, width, seed=1)

    def work(part):
        mine = Tensor(x[:, part.start:part.start + 3], requires_grad=True)
        block = gathered(mine)
        back = scattered(block * weights[:, :, columns(width)], width)
        (gradient,) = gradients(sum(back * back), [mine])
        return block.data, back.data, gradient.data

    parts, _ = on_ranks(4, 12, work)
    assert np.array_equal(np.concatenate([block for block, _, _ in parts], axis=2), x)
    assert np.array_equal(np.concatenate([back for _, back, _ in parts], axis=1), x * weights)
    np.testing.assert_allclose(np.concatenate([g for *_, g in parts], axis=1), 2 * x * weights**2, rtol=1e-14)


def test_a_state_goes_through_all_ranks_and_its_gradient_comes_back():
    """The state is the sum of what came before; a state that nobody reads has the gradient 0."""
    x = array(8, 1)

    def work(part):
        mine = Tensor(x[2 * part.rank:2 * part.rank + 2], requires_grad=True)
        y, *_ = relay(lambda x, a, b: (x * a, a + sum(x), b), mine, None, None,
                                 begin=lambda: [Tensor(np.ones(())), Tensor(np.zeros(()))])
        return y.data, gradients(sum(y), [mine])[0].data

    parts, _ = on_ranks(4, 8, work)
    states = 1 + np.concatenate([[0], np.cumsum(x.reshape(4, 2).sum(axis=1))[:-1]])
    sums = x.reshape(4, 2).sum(axis=1)
    for rank, (y, gradient) in enumerate(parts):
        np.testing.assert_allclose(y, states[rank] * x[2 * rank:2 * rank + 2], rtol=1e-14)
        np.testing.assert_allclose(gradient, states[rank] + sums[rank + 1:].sum() + np.zeros((2, 1)), rtol=1e-13)


def test_without_a_share_nothing_is_exchanged():
    x = Tensor(array(1, 4, 2))
    assert share() is None and before(x, 1, None) == (x, None) and gathered(x) is x and scattered(x, 2) is x
    assert relay(lambda x, past: (x, past), x, None, begin=None) == (x, None)


def test_there_is_no_second_derivative():
    def work(part):
        x = Tensor(array(1, 2, 2), requires_grad=True)
        with pytest.raises(GraphError, match="exchange: there is no second derivative"):
            gradients(sum(gathered(x)), [x], create_graph=True)

    on_ranks(2, 4, work)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.usefixtures("forms_unless_full")
def test_longnet_receives_what_the_algorithm_needs(causal):
    """The same numbers as the form of ranks in one process, and the same outputs as one call."""
    q, k, v = (array(1, 4, 32, 3, seed=seed) for seed in range(3))
    params = dict(segments=(4, 16, 64), dilations=(1, 2, 8), offsets="modulo", causal=causal, scale=None)
    y, _ = dilated_attention(q, k, v, **params)
    *_, received = over_ranks(Tensor(q), Tensor(k), Tensor(v), **params, start=0, ranks=4)

    def work(part):
        cut = slice(part.start, part.start + 8)
        return between_shares(*(Tensor(x[:, :, cut]) for x in (q, k, v)), part, **params).data

    parts, sent = on_ranks(4, 32, work)
    np.testing.assert_allclose(np.concatenate(parts, axis=2), y.data, rtol=1e-12, atol=1e-13)
    assert np.sum(sent) == 8 * np.sum(received)


# -- training ----------------------------------------------------------------------------------------------------------
SMALL = dict(context=32, layers=1, width=16, batch=4, micro_batch=1, warmup=0, threads=1)


def trained(name, size, **options):
    """Losses, norms, held-out sums, weights and the bytes of two steps, by each rank."""
    experiment = variants.load(name).configure(**SMALL, **options)

    def rank(ranks):
        data = experiment.begin()
        trainer = Trainer(experiment, data, ranks)
        try:
            numbers = []
            for step in range(2):
                numbers += [trainer.step(data.batch(step), step), trainer.grad_norm]
            return numbers + trainer.evaluate(data.held_out().part(slice(0, 3))).tolist(), trainer.model.state(), trainer.sent
        finally:
            trainer.close()

    return run(size, rank)


@pytest.mark.parametrize("name, size, line", [
    ("longnet", 4, 2), *(pytest.param(name, 2, 2, marks=pytest.mark.full) for name in SPLIT)])
@pytest.mark.usefixtures("forms_unless_full")
def test_training_is_that_of_one_rank_to_rounding(name, size, line):
    task = {} if variants.load(name).causal else {"task": "masked"}
    (numbers, weights, sent), = trained(name, 1, **task)
    assert sent == 0
    for found, state, sent in trained(name, size, sequence_ranks=line, **task):
        np.testing.assert_allclose(found, numbers, rtol=2e-5)
        for key, expected in weights.items():
            np.testing.assert_allclose(state[key], expected, atol=2e-3 * np.abs(expected).max(), err_msg=key)
        assert sent > 0


@pytest.mark.parametrize("name, ranks, options, message", [
    ("transformer", 2, {}, "--sequence-ranks 2: transformer reads whole sequences only, allowed: 1, or one of the variants "
                           "aft-simple, hyena, longnet, longnet-encoder, performer, retnet, rwkv"),
    ("retnet", 3, {}, "--sequence-ranks 2: it does not divide the number of ranks, which is 3, allowed: a divisor of it; "
                      "mpiexec -n 2 minitv train ... starts 2"),
    ("retnet", 1, {}, "--sequence-ranks 2: it does not divide the number of ranks, which is 1, allowed: a divisor of it"),
    ("retnet", 2, dict(context=33), "--sequence-ranks 2: it does not divide --context, which is 33, allowed: a divisor of it"),
    ("retnet", 2, dict(dropout=0.1), "--sequence-ranks 2: ranks would drop other values than one rank does, and --dropout "
                                    "is 0.1, allowed: 0"),
    ("retnet", 2, dict(stack="reversible"), "--sequence-ranks 2: a reversible stack computes every layer again"),
    ("hyena", 32, dict(sequence_ranks=32), "--sequence-ranks 32: there are more ranks than channels, --width is 16"),
])
def test_what_ranks_cannot_share_is_refused(name, ranks, options, message):
    with pytest.raises(UserError) as caught:
        check_sharing(variants.load(name).configure(**{**SMALL, "sequence_ranks": 2, **options}), Communicator(0, ranks))
    assert str(caught.value).startswith(message)


def test_more_lines_of_ranks_than_sequences_are_refused():
    experiment = variants.load("retnet").configure(**{**SMALL, "batch": 1, "sequence_ranks": 2})
    with pytest.raises(UserError, match="--batch 1: 2 times 2 ranks share the sequences of a step, and each needs one, "
                                        "allowed: --batch 2 or more, or at most 2 ranks"):
        check(experiment, Communicator(0, 4))


def test_sequences_that_ranks_cannot_share_are_refused():
    class Trainers:
        task = variants.load("retnet").configure().task

    odd = Batch(*np.zeros((2, 3, 31), int))
    with pytest.raises(UserError, match="--sequence-ranks 2: it does not divide the 31 positions of a sequence, allowed: a "
                                        "divisor of 31"):
        Trainer._share(Trainers, odd, Communicator(0, 2))
    with pytest.raises(UserError, match="--sequence-ranks 2: the sequences of the task text are not of one kind, allowed: 1"):
        Trainer._share(Trainers, tuple(odd), Communicator(0, 2))
    assert Trainer._share(Trainers, odd, Communicator()) is None


@pytest.mark.usefixtures("forms_unless_full")
def test_a_number_that_is_not_finite_stops_all_ranks():
    """One rank alone has it, in the part of the text that it holds."""
    experiment = variants.load("retnet").configure(**SMALL, sequence_ranks=2)

    def rank(ranks):
        data = experiment.begin()
        trainer = Trainer(experiment, data, ranks)
        try:
            batch = data.batch(0)
            ids = batch.inputs % 10
            ids[:, -1] = 10  # a token that the second rank reads
            trainer.model.embed.weight.data[10] = np.inf
            batch = Batch(ids, ids)
            before = trainer.optimizer.param.copy()
            loss = trainer.step(batch, 0)
            assert np.array_equal(trainer.optimizer.param, before)
            return loss, trainer.find_nonfinite(batch, 0)
        finally:
            trainer.close()

    for loss, reason in run(2, rank):
        assert not np.isfinite(loss) and "NaN or infinite" in reason


@pytest.mark.full
@pytest.mark.parametrize("name", ["longnet", "rwkv"])
def test_processes_that_mpiexec_starts(name, tmp_path):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    if shutil.which("mpiexec") is None:
        pytest.skip("there is no mpiexec")
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 300)
    command = [sys.executable, "-m", "minitv", "train", name, "--data", str(text), "--steps", "3", "--batch", "2",
               "--eval-every", "3", "--context", "64", "--layers", "1", "--width", "32", "--threads", "1"]
    losses = []
    for launch, options in (([], []), (["mpiexec", "-n", "2"], ["--sequence-ranks", "2"])):
        out = tmp_path / str(len(launch))
        result = subprocess.run([*launch, *command, *options, "--out", str(out)], cwd=tmp_path, timeout=300, text=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True)
        assert result.returncode == 0, result.stderr
        assert bool(options) == ("2 share each sequence; the layers of a rank send up to" in result.stderr + result.stdout)
        losses.append(json.loads((out / "log.jsonl").read_text().splitlines()[-1])["val_loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
