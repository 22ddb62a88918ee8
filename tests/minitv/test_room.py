"""The memory that a model takes is known before it is taken, and a size that no machine holds is refused with it."""

import math
import tracemalloc

import numpy as np
import pytest

from autograd.cpu import process
from minitv import room, variants
from minitv.errors import UserError
from minitv.experiment import possible
from minitv.nn import Linear
from minitv.trainer import Trainer

VARIANTS = [name for name in variants.variants() if possible(variants.load(name))]


def experiment(name, **values):
    return variants.load(name).configure("tiny", **values)


def bytes_of(model):
    return sum(array.data.nbytes for _, array in model._arrays())


@pytest.mark.full
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("values", [{}, {"width": 64, "layers": 3, "context": 16, "bias": True, "tied": False}])
def test_the_size_of_a_model_is_that_of_its_arrays(name, values):
    small = experiment(name, **{k: v for k, v in values.items() if k not in variants.load(name).without})
    made = small.build(11)
    real, size = bytes_of(made), small.size(11)
    # A number a head, such as RetNet's decays, is not measured; RWKV's tables replace the embedding that was made before.
    assert 0.999 * real < size <= real + (2 * made.embed.weight.data.nbytes if name == "rwkv" else 0)
    state = small.build(11).state()
    again = small.build(11).state()
    assert all(np.array_equal(state[key], again[key]) for key in state), "measuring draws nothing"


HUGE = [
    ("rwkv", {"ffn_width": 4366691617789590193840.0}, "an array of 5.6e+23 x 128 numbers in the model would take"),
    ("retnet", {"ffn_width": 1e300}, "EiB"),
    ("retnet", {"value_width": 1e300}, "EiB"),
    ("rwkv", {"ffn_width": 1e300}, "EiB"),
    ("aft-full", {"context": 10**6}, "aft-full's bias for every pair of 1000000 positions would take 3.6 TiB"),
    *(pytest.param(name, {"width": 10**6}, "1000000 ", marks=[pytest.mark.full] * (name != "longnet")) for name in VARIANTS),
    *(pytest.param(name, {"width": 4096, "layers": 64}, "the model would take ", marks=pytest.mark.full) for name in VARIANTS),
    ("hyena", {"context": 2**20, "filter_bands": 2**16}, "an array of 1048576 x 131073 numbers in the model would take 512.0"),
    ("hyena", {"filter_width": 2**15, "filter_depth": 30}, "the model would take"),
]


@pytest.mark.parametrize("name, values, said", HUGE)
def test_what_no_machine_holds_is_refused_before_anything_is_allocated(name, values, said, monkeypatch):
    monkeypatch.setattr(room, "memory", lambda: 16 * 2**30)
    heads = {"heads": 2} if name in ("transformer", "retnet") and "width" in values else {}
    huge = experiment(name, **values, **heads)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            huge.build(100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert said in str(error.value) and "and this machine has 16.0 GiB: choose a smaller model" in str(error.value)
    assert len(str(error.value)) < 300
    assert peak < 32e6  # positions of a context, and objects


def test_training_needs_the_model_several_times(monkeypatch):
    small = experiment("transformer", threads=2)
    task = type("Task", (), {"vocab": 50})
    size = small.size(50)
    monkeypatch.setattr(room, "memory", lambda: 4 * size)
    small.build(50)
    with pytest.raises(UserError, match=r"training the model \(5 arrays of its size\) would take \d\.\d MiB of memory"):
        Trainer(small, task)


def test_a_module_of_its_own_is_refused_too():
    with pytest.raises(UserError, match=r"an array of 1\.0e\+15 x 1048576 numbers in the model would take 3637 EiB"):
        Linear(None, 2**20, 10**15)


@pytest.mark.parametrize("size, text", [(1, "0.0 KiB"), (2**20, "1.0 MiB"), (4 * 10**12, "3.6 TiB"), (2**70, "1024 EiB"),
                                        (4 * 10**302, "3.5e+284 EiB"), (10**4000, "8.7e+3981 EiB")])
def test_sizes_in_words(size, text):
    assert room.text(size) == text


def test_the_memory_of_this_machine():
    assert 2**28 < process.memory() <= 2**47 and math.log2(process.memory()) > 28
