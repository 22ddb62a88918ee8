"""Files of arrays: what is written is what the package safetensors reads, and what is mapped is what it wrote."""

from __future__ import annotations

import json
from contextlib import closing

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from minitv import tensors
from minitv.errors import CheckpointError
from minitv.tensors import Mapped, Planned

NUMBERS = st.sampled_from(["float32", "float64", "int64"]).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")


def equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(np.asarray(other[name]), array, strict=True)


@given(st.dictionaries(NAMES, NUMBERS, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("files") / "x"
    path.write_bytes(b"".join(tensors.blocks(made)))
    equal(made, safetensors.numpy.load_file(path))
    with closing(Mapped(path)) as mapped:
        equal(made, mapped)
        assert mapped.sha256() == mapped.sha256()
    equal(made, {name: stored.array() for name, stored in tensors.stored(path).items()})


def test_layouts_in_memory_do_not_matter(tmp_path):
    x = np.arange(12.0).reshape(3, 4)
    made = {"transposed": x.T, "strided": x[:, ::2], "big-endian": x.astype(">f8"), "repeated": np.broadcast_to(x[0], (2, 4))}
    (tmp_path / "x").write_bytes(b"".join(tensors.blocks(made)))
    equal({name: np.ascontiguousarray(array, array.dtype.newbyteorder("=")) for name, array in made.items()},
          safetensors.numpy.load_file(tmp_path / "x"))


def test_a_planned_array_is_made_when_it_is_written(tmp_path):
    order = []

    def planned(name: str) -> Planned:
        return Planned((2,), np.dtype(np.float32), lambda: order.append(name) or np.full(2, len(order)))

    parts = tensors.blocks({"a": planned("a"), "b": planned("b")})
    next(parts)  # the header
    assert order == []
    next(parts)
    assert order == ["a"]
    assert len(list(parts)) == 1 and order == ["a", "b"]
    with pytest.raises(AssertionError, match=r"a was planned with the shape \(2,\) and has \(3,\)"):
        list(tensors.blocks({"a": Planned((2,), np.dtype(np.float32), lambda: np.zeros(3))}))


def test_a_mapped_file_stays_the_one_that_was_opened(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"".join(tensors.blocks({"a": np.zeros(3)})))
    with closing(Mapped(path)) as mapped:
        (tmp_path / "y").write_bytes(b"".join(tensors.blocks({"a": np.ones(3)})))
        (tmp_path / "y").replace(path)
        assert not mapped["a"].any()


@pytest.mark.parametrize("data, sentence", [
    (b"", r"x is truncated or not a safetensors file: it has 0 bytes"),
    (b"\xff" * 16, r"its first eight bytes say that its header has 18446744073709551615 bytes"),
    (b"\x02" + bytes(7) + b"[]", r"x is truncated or not a safetensors file"),
    (b"".join(tensors.blocks({"a": np.zeros(3)}))[:-1], r"x is truncated or not a safetensors file"),
])
def test_another_file_is_refused(tmp_path, data, sentence):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match=sentence):
        tensors.stored(tmp_path / "x")
    with pytest.raises(CheckpointError, match=sentence):
        Mapped(tmp_path / "x")


def test_more_axes_than_numpy_has_are_refused(tmp_path):
    text = json.dumps({"a": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match="x: an array has 99 axes, allowed are 32"):
        tensors.stored(tmp_path / "x")["a"].array()
