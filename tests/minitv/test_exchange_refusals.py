"""Folders that are no models: each is refused in a sentence, within seconds, in little memory, and nothing is written.

A sound folder is made malformed in one place, by a kind of harm and random numbers that follow from the kind and a seed.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minitv.errors import UserError
from minitv.exchange import CONFIG, INDEX, TOKENIZER, WEIGHTS, find, import_weights
from minitv.goldens import FOLDER
from minitv.options import ImportOptions
from tests.conftest import full

SOUND = FOLDER / "weights" / "gpt2"
MANY, FEW = 40, 3  # of every kind, with --full and without
SECONDS, MEGABYTES = 5, 300

HARMS: dict[str, Callable] = {}


def harm(function: Callable) -> Callable:
    """A function that makes the folder of a model malformed, by a random generator."""
    HARMS[function.__name__] = function
    return function


class Model:
    """A copy of the sound folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        for path in SOUND.iterdir():
            shutil.copy(path, folder)
        (folder / "expected.npz").unlink()
        data = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        self.header, self.data = json.loads(data[8 : 8 + size]), data[8 + size :]
        self.header.pop("__metadata__", None)
        self.config = json.loads((folder / CONFIG).read_text())

    def write(self, header: bytes | None = None, length: int | None = None, data: bytes | None = None) -> None:
        """The file of weights with this header."""
        text = json.dumps(self.header).encode() if header is None else header
        size = struct.pack("<Q", len(text) if length is None else length)
        (self.folder / WEIGHTS).write_bytes(size + text + (self.data if data is None else data))

    def configure(self, **values) -> None:
        """The description with other entries."""
        (self.folder / CONFIG).write_text(json.dumps({**self.config, **values}))

    def name(self, rng) -> str:
        """An array of the model."""
        return str(rng.choice(sorted(self.header)))

    def shards(self) -> dict[str, str]:
        """The same arrays in two files, and the map that names them."""
        names, places = sorted(self.header), {}
        for number in range(2):
            entries, data = {}, b""
            for name in names[number::2]:
                start, stop = self.header[name]["data_offsets"]
                entries[name] = {**self.header[name], "data_offsets": [len(data), len(data) + stop - start]}
                data += self.data[start:stop]
                places[name] = f"model-{number + 1}-of-2.safetensors"
            text = json.dumps(entries).encode()
            (self.folder / f"model-{number + 1}-of-2.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        (self.folder / WEIGHTS).unlink()
        return places

    def index(self, weight_map) -> None:
        """The index of several files."""
        (self.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pick(rng, values):
    return values[rng.integers(len(values))]


NO_SIZE = [0, -1, -(2**40), 2**31, 2**63, 10**30, 1.5, "12", True, [], {}, [1], "", float("nan"), float("inf"), 1e400]
NO_SHAPE = [[-1], [2**64], ["3"], [1.5], [True], 3, "x", None, {}, [[1]], [10**18, 10**18], [0], []]
NO_TEXT = [b"", b"\xff\xfe", b"{", b"[]", b"null", b"3", b'"x"', b"{" * 10**5, b'{"a":' * 10**5, b"[" * 10**5, b"\x00" * 64,
           b'{"model_type": NaN}', b"{}" * 2, b"\xef\xbb\xbf{}", b"{'a': 1}"]


# -- the description
@harm
def a_size_that_is_none(rng, model):
    name = pick(rng, ["n_embd", "n_positions", "n_layer", "n_head", "vocab_size", "n_inner"])
    model.configure(**{name: pick(rng, NO_SIZE)})


@harm
def a_size_that_is_another_one(rng, model):
    name = pick(rng, ["n_embd", "n_positions", "n_layer", "n_head", "vocab_size", "n_inner"])
    value = model.config[name] or 4 * model.config["n_embd"]
    model.configure(**{name: pick(rng, [value + 1, value * 7, 10**9, 2**31 - 1, 10**5, 9999])})


@harm
def an_entry_of_another_type(rng, model):
    name = pick(rng, ["activation_function", "layer_norm_epsilon", "tie_word_embeddings", "scale_attn_weights", "model_type",
                      "add_cross_attention", "scale_attn_by_inverse_layer_idx"])
    model.configure(**{name: pick(rng, [[], {}, "nonsense", -3, [[]], {"a": 1}, 10**400])})


@harm
def a_number_that_is_none(rng, model):
    model.configure(layer_norm_epsilon=pick(rng, [float("nan"), float("inf"), -1.0, 0, -float("inf"), 2, 10**400]))


@harm
def an_entry_that_nobody_knows(rng, model):
    model.configure(**{pick(rng, ["sliding_window", "rope_scaling", "x" * 10**5, "\n", "é\x1b[2J", "n_embd "]): pick(
        rng, [1, True, "x", [1], {"a": [1] * 100}, -0.5])})


@harm
def an_entry_that_is_missing(rng, model):
    del model.config[pick(rng, ["model_type", "vocab_size"])]
    model.configure()


@harm
def a_description_that_is_none(rng, model):
    (model.folder / CONFIG).write_bytes(pick(rng, NO_TEXT))


@harm
def a_description_with_a_wrong_byte(rng, model):
    text = bytearray((model.folder / CONFIG).read_bytes())
    place = text.index(b'"model_type"') + int(rng.integers(1, 18))
    text[place] = (text[place] + int(rng.integers(1, 128))) % 256
    (model.folder / CONFIG).write_bytes(text)


# -- the header of the weights
@harm
def a_length_that_is_a_lie(rng, model):
    model.write(length=int(pick(rng, [0, 1, 2, 7, 10**6, 10**8, 10**12, 2**40, 2**63, 2**64 - 1, rng.integers(2**62)])))


@harm
def a_header_that_is_none(rng, model):
    text = pick(rng, NO_TEXT)
    model.write(text, data=b"" if rng.integers(2) else None)


@harm
def an_entry_of_a_header_that_is_none(rng, model):
    model.header[model.name(rng)] = pick(rng, [None, 3, [], "x", {}, {"dtype": "F32"}, {"shape": [], "dtype": "F32"},
                                              {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": {"a": 1}}])
    model.write()


@harm
def a_shape_that_is_none(rng, model):
    model.header[model.name(rng)]["shape"] = pick(rng, NO_SHAPE)
    model.write()


@harm
def a_shape_of_as_many_numbers(rng, model):
    entry = model.header[model.name(rng)]
    size = int(np.prod(entry["shape"]))
    entry["shape"] = pick(rng, [[1, size, 1], [size, 1, 1], [1] * 20 + [size], [1] * 60 + [size], [size, 1], [1, 1, size]])
    model.write()


@harm
def a_dtype_that_is_none(rng, model):
    model.header[model.name(rng)]["dtype"] = pick(rng, ["F31", "I64", "I32", "U8", "BOOL", "F8_E4M3", "", None, 3, [], "f64",
                                                        "F32", "F16", "BF16", "C64", "F4"])
    model.write()


@harm
def offsets_that_are_none(rng, model):
    entry, end = model.header[model.name(rng)], len(model.data)
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = pick(rng, [[stop, start], [-4, stop], [start, 2**63], [2**64 - 4, 2**64], [end, end + stop - start],
                                       [start + 1, stop + 1], [start + 4, stop + 4], [start - 4, stop - 4], [0, end], [start],
                                       [], None, "x", [start, stop, stop], [0.5, 4.5], [True, stop], [start, start],
                                       ["0", "4"], {}])
    model.write()


@harm
def two_arrays_at_one_place(rng, model):
    one, two = (model.header[name] for name in rng.choice(sorted(model.header), 2, replace=False))
    one.update({key: two[key] for key in ("shape", "data_offsets")})
    model.write()


@harm
def weights_that_end_early(rng, model):
    whole = (model.folder / WEIGHTS).read_bytes()
    (model.folder / WEIGHTS).write_bytes(whole[: int(rng.integers(len(whole)))])


@harm
def weights_that_go_on(rng, model):
    with open(model.folder / WEIGHTS, "ab") as file:
        file.write(bytes(int(rng.integers(1, 100))))


@harm
def a_name_twice(rng, model):
    text = json.dumps(model.header)
    again = json.dumps({model.name(rng): model.header[model.name(rng)]})[1:-1]
    model.write(f"{text[:-1]}, {again}}}".encode())


@harm
def random_bytes_in_the_header(rng, model):
    text = bytearray(json.dumps(model.header).encode())
    begin = text.index(b'"data_offsets"')
    for place in rng.integers(begin, begin + 12, 3):
        text[place] = int(rng.integers(128, 256))
    model.write(bytes(text))


# -- the arrays
@harm
def numbers_that_are_none(rng, model):
    data = np.frombuffer(model.data, np.float64).copy()
    data[rng.integers(len(data))] = pick(rng, [np.nan, np.inf, -np.inf, 1e300, -1e39])  # the last ones are none in float32
    model.write(data=data.tobytes())


@harm
def an_array_that_is_missing(rng, model):
    name = model.name(rng)
    start, stop = model.header.pop(name)["data_offsets"]
    for entry in model.header.values():
        entry["data_offsets"] = [place - (stop - start) * (place >= stop) for place in entry["data_offsets"]]
    model.write(data=model.data[:start] + model.data[stop:])


@harm
def an_array_that_nobody_knows(rng, model):
    end = len(model.data)
    name = pick(rng, ["transformer.h.2.ln_1.weight", "x", "", "\n\x1b[2J", "y" * 10**5, "transformer.h.-1.ln_1.weight",
                      "score.weight", "transformer.transformer.wte.weight", "é" * 1000, "transformer.h.0.ln_1.weight "])
    model.header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]}
    model.write(data=model.data + bytes(8))


@harm
def names_that_are_the_same(rng, model):
    name, end = model.name(rng), len(model.data)
    entry = model.header[name]
    start, stop = entry["data_offsets"]
    other = name.removeprefix("transformer.") if name.startswith("transformer.") else f"transformer.{name}"
    model.header[other] = {**entry, "data_offsets": [end, end + stop - start]}
    model.write(data=model.data + model.data[start:stop])


# -- several files
@harm
def an_index_that_names_another_place(rng, model):
    places = model.shards()
    name = pick(rng, sorted(places))
    model.index({**places, name: pick(rng, ["../secret", "/etc/passwd", "", ".", "..", "a/b", "\x00", "missing.safetensors",
                                            "model-1-of-2.safetensors/", CONFIG, 3, None, [], {}, "x" * 5000, "~", "..\\x"])})


@harm
def an_index_that_is_none(rng, model):
    model.shards()
    if rng.integers(2):
        (model.folder / INDEX).write_bytes(pick(rng, NO_TEXT))
    else:
        model.index(pick(rng, [None, [], {}, "x", 3, [[]], {"a": 1}, {"": ""}]))


@harm
def an_index_that_lies(rng, model):
    places = model.shards()
    names = sorted(places)
    if rng.integers(2):
        other = {name: places[names[1]] if places[name] == places[names[0]] else places[names[0]] for name in names}
        places[name] = other[name := pick(rng, names)]
    else:
        del places[pick(rng, names)]
    model.index(places)


@harm
def a_part_that_is_no_file(rng, model):
    places = model.shards()
    model.index(places)
    path = model.folder / pick(rng, sorted(set(places.values())))
    path.unlink()
    not_a_file(rng, path)


def not_a_file(rng, path: Path) -> None:
    """Something of this name that cannot be read as a file."""
    kinds = ["nothing", "folder", "empty", "loop", "broken", "device", "folder behind a link", "pipe"]
    kind = pick(rng, kinds[:3] if os.name == "nt" else kinds)
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "broken":
        path.symlink_to(path.parent / "there is none")
    elif kind == "device":
        path.symlink_to(pick(rng, ["/dev/zero", "/dev/null", "/dev/random"]))
    elif kind == "folder behind a link":
        path.symlink_to(path.parent)
    elif kind == "pipe":
        os.mkfifo(path)


@harm
def what_should_be_a_file(rng, model):
    path = model.folder / pick(rng, [CONFIG, WEIGHTS])
    path.unlink()
    not_a_file(rng, path)


@harm
def a_pickle_in_place_of_weights(rng, model):
    name = pick(rng, ["pytorch_model.bin", "model.pt", "x.pth"])
    (model.folder / WEIGHTS).rename(model.folder / name)
    (model.folder / name).write_bytes(b"cos\nsystem\n(S'echo'\ntR.")


# -- the tokenizer
@harm
def a_tokenizer_that_is_none(rng, model):
    path = model.folder / TOKENIZER
    if rng.integers(2):
        path.write_bytes(pick(rng, [text for text in NO_TEXT if text != b"{}"]))
    else:
        not_a_file(rng, path)
        if not path.exists() and not path.is_symlink():
            path.mkdir()


@harm
def a_file_that_is_too_large(rng, model):
    name = pick(rng, [CONFIG, INDEX, TOKENIZER])
    if name == INDEX:
        model.shards()
    with open(model.folder / name, "wb") as file:
        file.truncate(2**36)  # it takes no room on the disk


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("harm")


def peak() -> float:
    """The largest memory of this process so far, in MB."""
    if sys.platform == "win32":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def test_the_sound_folder_is_sound(place):
    """And what holds its arrays in two files."""
    (place / "sound").mkdir()
    model = Model(place / "sound")
    out, found = import_weights(str(model.folder), ImportOptions(out=str(place / "whole")))
    assert out == place / "whole"
    model.index(model.shards())
    _, again = import_weights(str(model.folder), ImportOptions(out=str(place / "parts")))
    assert again.shapes == found.shapes
    assert (place / "whole" / "last" / WEIGHTS).read_bytes() == (place / "parts" / "last" / WEIGHTS).read_bytes()


def test_there_are_a_thousand_with_every_test():
    assert len(HARMS) * MANY >= 1000


@pytest.mark.parametrize("kind", HARMS)
def test_a_malformed_folder_is_refused(kind, place):
    for number in range(MANY if full() else FEW):
        rng = np.random.default_rng([list(HARMS).index(kind), number])
        folder, out = place / f"{kind}-{number}", place / "runs" / "new"
        folder.mkdir()
        HARMS[kind](rng, Model(folder))
        before, start = peak(), time.monotonic()
        with pytest.raises(UserError) as error:
            import_weights(str(folder), ImportOptions(out=str(out)))
        message = str(error.value)
        where = f"{kind}, number {number}: {message}"
        assert time.monotonic() - start < SECONDS and peak() - before < MEGABYTES, where
        assert "\n" not in message and 20 < len(message) < 2500 and str(place) in message, where
        assert not (place / "runs").exists(), where


@pytest.mark.parametrize("name", [pytest.param(path.name, marks=pytest.mark.full) for path in sorted(SOUND.parent.iterdir())])
def test_whatever_stands_in_a_description_there_is_no_traceback(name, place):
    """Any entry of any architecture may have any value: the model is described, or refused in a sentence."""
    folder = Path(shutil.copytree(SOUND.parent / name, place / name))
    config = json.loads((folder / CONFIG).read_text())
    values = [*NO_SIZE, None, False, 2, 10**9, 9999, -0.5, 1e-300, "gelu", [1, 2, 3], [[]],
              {"rope_type": "linear", "factor": 2.0}, {"a": {"b": []}}, 10**400, "x" * 10**5]
    for key in config:
        for value in values:
            (folder / CONFIG).write_text(json.dumps({**config, key: value}))
            start = time.monotonic()
            try:
                find(str(folder))
            except UserError as error:
                assert "\n" not in str(error) and str(place) in str(error), (key, value)
            assert time.monotonic() - start < SECONDS, (key, value)
