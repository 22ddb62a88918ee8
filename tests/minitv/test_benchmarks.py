"""What benchmarks say of a machine and of a step: the arithmetic that a token needs, the width of vectors, facts of a host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autograd.cpu.compile import vector_bits
from minitv import results
from minitv.variants import load


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


@pytest.mark.parametrize("variant", ["transformer", "grouped-query"])
def test_the_arithmetic_of_a_step(benchmarks, variant):
    """Products with the weights of blocks and head, and the pairs that attention sees; backward is two more of each."""
    from arithmetic import of_step
    from train import Random, batches

    from minitv.trainer import Trainer

    setup = load(variant).configure("tiny", context=24, layers=2, width=32, heads=4, batch=3, threads=2)
    trainer = Trainer(setup, Random())
    counted = of_step(trainer, batches(setup, 1)[0])
    trainer.close()
    model = trainer.model
    weights = sum(p.size for block in model.blocks for p in block.parameters() if p.ndim >= 2) + model.head.weight.size
    pairs = 4 * 24 * 25 // 2  # of all heads of a layer
    assert counted == 3 * 2 * (3 * 24 * weights + 2 * 3 * 2 * 8 * pairs)


def test_the_arithmetic_of_a_window(benchmarks):
    from arithmetic import PRODUCTS

    q, k, v = np.empty((2, 4, 6, 3)), np.empty((2, 1, 8, 3)), np.empty((2, 1, 8, 5))
    assert PRODUCTS["attention"](q, k, v, window=2) == 2 * 8 * (6 * 2) * (3 + 5)
    assert PRODUCTS["attention"](q, k, v, np.arange(8) < 3, causal=False) == 2 * 8 * (6 * 3) * (3 + 5)
    assert PRODUCTS["attention"](q, k, v) == 2 * 8 * (3 + 4 + 5 + 6 + 7 + 8) * (3 + 5)
    assert PRODUCTS["matmul"](np.empty((2, 1, 3, 4)), np.empty((5, 4, 6))) == 2 * (2 * 5) * 3 * 4 * 6


def test_narrow_vectors_are_those_of_avx2(benchmarks):
    from rounds import narrow

    environment = narrow()
    assert vector_bits(environment["NUMBA_CPU_FEATURES"]) <= 256 and "+avx512" not in environment["NUMBA_CPU_FEATURES"]


def test_shares_of_the_peak(benchmarks):
    from rounds import of_peak

    numbers = {"mflop_per_token": 5.0, "tokens_per_s": {"minitv": 20_000, "eager": 10_000}}
    assert of_peak(numbers, 2, {"gflops": 100.0}) == {"minitv": "50 %", "eager": "25 %"}
    assert of_peak(numbers, 2, None) == of_peak({"tokens_per_s": numbers["tokens_per_s"]}, 2, {"gflops": 1.0}) == {
        "minitv": "–", "eager": "–"}  # older results lack one or the other


def test_what_is_measured_of_a_machine_is_the_best_that_its_results_say(benchmarks, tmp_path, monkeypatch):
    import limits
    import rounds

    now = {"gflops": 90.0, "read_gb_s": [9.0, 22.0]}
    monkeypatch.setattr(limits, "limits", lambda: now)
    for name, before in (("old", {}), ("new", {"limits": {"gflops": 100.0, "read_gb_s": [10.0, 20.0]}})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"host": before}))
    assert rounds.measured(tmp_path)["limits"] == {"gflops": 100.0, "read_gb_s": [10.0, 22.0]}
    assert now == {"gflops": 90.0, "read_gb_s": [9.0, 22.0]}


def test_the_foot_of_a_table_says_where(benchmarks):
    from report import machine

    assert machine({"processor": "AMD EPYC"}) == "AMD EPYC"
    host = {"processor": "X (family 1, model 2)", "core": "znver4", "vectors": "256-bit vectors", "cores": 2,
            "limited_by": ["NUMBA_CPU_FEATURES"],
            "limits": {"gflops": 114.6, "read_gb_s": [10.2, 20.4], "triad_gb_s": [9.0, 18.0]}}
    assert machine(host) == ("X (family 1, model 2), znver4, 256-bit vectors (wider ones are switched off for both sides), "
                             "115 GFLOP/s a core, memory read at 10 GB/s by one core and 20 by 2, triad at 9 GB/s by one core "
                             "and 18 by 2")


def test_measured_facts_do_not_part_results_of_one_machine(tmp_path):
    path = tmp_path / "train.json"
    results.write(path, {"variants": {"a": {"tiny": 1}}}, "variants", limits={"gflops": 1.0})
    both = results.write(path, {"variants": {"b": {"tiny": 2}}}, "variants", limits={"gflops": 2.0})
    assert both["variants"] == {"a": {"tiny": 1}, "b": {"tiny": 2}} and both["host"]["limits"] == {"gflops": 2.0}
    assert json.loads(path.read_text(encoding="utf-8")) == both


@pytest.mark.full
def test_limits_are_plausible(benchmarks, monkeypatch):
    """The kernels that measure do their work: the best of three ways to multiply is at least one of them."""
    import limits

    monkeypatch.setattr(limits, "SECONDS", 0.0)
    monkeypatch.setattr(limits, "LEAST", 2**20)
    monkeypatch.setattr(limits, "cache_bytes", lambda: 0)
    assert limits.gflops() > 0.1
    found = limits.bandwidths()
    assert found.keys() == {"read_gb_s", "triad_gb_s"} and all(value > 0.01 for values in found.values() for value in values)
    numbers = np.arange(12 * limits.LANES, dtype=np.float32) / 1000
    expected = numbers.astype(float)
    limits.multiply_adds(3, numbers)
    y = np.tile(expected[:limits.LANES], 12)
    for _ in range(3):
        expected = expected * y + y
    np.testing.assert_allclose(numbers, expected, rtol=1e-6)
    a, b, c = (np.arange(10, dtype=np.float32) for _ in range(3))
    limits.triad(a, b, c, np.float32(0.5), 2, 9)
    np.testing.assert_array_equal(a, [0, 1, *(1.5 * np.arange(2, 9)), 9])
    assert limits.read(b, 2, 5) == 9


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system counts the parent's memory too")
def test_the_memory_of_a_contender_is_its_own():
    held = np.ones(4 * 10**7)  # 320 MB
    command = [sys.executable, "-c", "from autograd.cpu.process import peak_mb; print(peak_mb())"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert float(subprocess.run(command, capture_output=True, text=True, env=environment).stdout) < held.nbytes / 1e6


def test_ranks_in_a_chain_wait_for_those_before(benchmarks):
    """Each computes 1 s, waits for a state, computes 5 s, sends its own, which takes 0.5 s and then 1 s more, computes 2 s."""
    from scale import Event, breaks_first, chained

    forward = [Event(1, {}, {-1: 8}), Event(5, {1: 8}, {}), Event(2, {}, {})]
    assert chained(forward, 3, [0.0] * 3, -1, 0.5, 1 / 8) == [8.5, 15, 21.5]
    backward = [Event(1, {}, {1: 8}), Event(5, {-1: 8}, {}), Event(2, {}, {})]
    assert chained(backward, 3, [0.0, 0.0, 9.0], 1, 0.5, 1 / 8) == [30.5, 24, 17.5]
    parts = dict(compute=1.0, exchange=0.1, gradients=0.0)
    some = {"1": parts | {"efficiency": 1.0}, "2": parts | {"efficiency": 0.9}}
    assert breaks_first(some).startswith("above one half up to 2 ranks; most of the loss there is what layers exchange")
    assert breaks_first(some | {"4": parts | {"gradients": 1.5, "efficiency": 0.4}}).startswith(
        "below one half from 4 ranks on: first of all by the sum of the gradients")


@pytest.mark.full
@pytest.mark.parametrize("variant", ["retnet", "longnet"])
def test_a_rank_among_others_that_do_not_exist_sends_what_it_sends_to_real_ones(benchmarks, variant):
    from scale import LAYERS, Traces, sent

    traces = Traces(variant, 64)
    model = traces.model(4)
    events = [event for rank in range(4) for half in traces.of(model, rank, 4) for event in half]
    assert all(event.seconds >= 0 for event in events)
    most = max(sum(sum(event.out.values()) for half in traces.of(model, rank, 4) for event in half) for rank in range(4))
    assert most * 2 == sent(variant, 256, 4) * LAYERS  # that model has two layers
