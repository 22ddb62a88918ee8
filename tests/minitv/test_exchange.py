"""Weights of other programs: what they compute, what export writes, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from autograd import cross_entropy, no_grad
from autograd.random import Random
from minitv import checkpoint, exchange, weights
from minitv.exchange import WEIGHTS, find, import_weights
from minitv.goldens import FOLDER, close
from minitv.options import ExportOptions, ImportOptions
from minitv.sample import load

GOLDENS = FOLDER / "weights"
NAMES = sorted(path.name for path in GOLDENS.iterdir())


@pytest.fixture
def folder(tmp_path):
    """A copy of a model's folder, by its name."""
    def copy(name: str = "gpt2") -> Path:
        return Path(shutil.copytree(GOLDENS / name, tmp_path / name))

    return copy


def built(found: exchange.Found, dtype=np.float64):
    """The model of a folder, with its weights."""
    experiment = found.experiment
    model = experiment.variant.build(experiment.model, experiment.mixer, found.vocab, Random(0), dtype,
                                     **experiment.task.shape(experiment.data))
    model.load({name: array.make() for name, array in found.arrays(dtype).items()})
    return model


def theirs(found: exchange.Found, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of ours, such as gradients, by their names."""
    values, there = found.experiment.values, {}
    for rule in found.rules:
        if not rule.ours or not all(name in arrays for name in rule.ours):  # tables, and buffers without gradients
            continue
        there |= dict(zip(rule.theirs, rule.way.write([arrays[name] for name in rule.ours], values), strict=True))
    return there


# -- what they compute -------------------------------------------------------------------------------------------------
def test_every_architecture_has_a_golden_model():
    assert {find(str(GOLDENS / name)).architecture.name for name in NAMES} == set(weights.architectures())


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_computes_what_the_other_program_computes(name, forms_unless_full):
    found = find(str(GOLDENS / name))
    expected = dict(np.load(GOLDENS / name / "expected.npz"))
    model = built(found)
    for key, buffer in model.named_buffers():
        if f"buffer/{key}" in expected:
            buffer.assign_(expected[f"buffer/{key}"])
    logits = model(expected["ids"] if "ids" in expected else expected["samples"])
    close(logits.numpy(), expected["logits"], np.float64, "logits")
    if "hidden" in expected:
        with no_grad():
            close(model.hidden(expected["ids"]).numpy(), expected["hidden"], np.float64, "what the last layer gives")
    loss = cross_entropy(logits, expected["labels"])
    loss.backward()
    close(loss.numpy(), expected["loss"], np.float64, "loss")
    gradients = theirs(found, {key: parameter.grad.numpy() for key, parameter in model.named_parameters()})
    wanted = {key.removeprefix("grad/"): value for key, value in expected.items() if key.startswith("grad/")}
    assert set(gradients) == set(wanted)
    for key, gradient in gradients.items():
        close(gradient, wanted[key], np.float64, f"gradient of {key}")


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_reads_in_parts_as_the_other_program_does(name, forms_unless_full):
    expected = dict(np.load(GOLDENS / name / "expected.npz"))
    if "cached" not in expected:
        pytest.skip("it does not go on from a past")
    model, parts = built(find(str(GOLDENS / name))), []
    with no_grad():
        state = model.init_state(len(expected["ids"]))
        for part in np.split(expected["ids"], [4, 5], axis=1):
            logits, state = model.prefill(part, state)
            parts.append(logits.numpy())
    close(np.concatenate(parts, axis=1), expected["cached"], np.float64, "logits of parts")


# -- in and out --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_export_writes_what_was_imported_bit_for_bit(name, tmp_path):
    run, _ = import_weights(str(GOLDENS / name), ImportOptions(out=str(tmp_path / "run")))
    out, architecture = exchange.export(str(run), ExportOptions(out=str(tmp_path / "out")))
    before, after = (safetensors.numpy.load_file(place / WEIGHTS) for place in (GOLDENS / name, out))
    unread = {key for key in before if any(re.fullmatch(pattern, key) for pattern in architecture.ignored_arrays)}
    assert after.keys() == before.keys() - (unread - after.keys())
    for key, array in after.items():
        np.testing.assert_array_equal(array, before[key].astype(np.float32), strict=True)
    again, second = import_weights(str(out), ImportOptions(out=str(tmp_path / "again")))
    assert second.architecture is architecture
    assert second.experiment.identity("model", "mixer", "data") == find(str(GOLDENS / name)).experiment.identity(
        "model", "mixer", "data")
    first = checkpoint.load(run).model
    assert all(np.array_equal(array, first[key]) for key, array in checkpoint.load(again).model.items())


def test_a_model_without_biases_is_written_with_zeros(tmp_path):
    made = minitv_run(tmp_path, "transformer", bias=False, activation="gelu_tanh")
    out, _ = exchange.export(made, ExportOptions(out=str(tmp_path / "out")))
    ids = np.arange(6)[None]
    with no_grad():
        np.testing.assert_array_equal(built(find(str(out)), np.float32)(ids).numpy(), load(made).model(ids).numpy())


def minitv_run(tmp_path: Path, variant: str, **values) -> str:
    """A run that has done no step, of a small model with ids for tokens."""
    from minitv import variants

    experiment = variants.load(variant).configure(width=16, heads=2, layers=1, context=8, **values)
    state = {"config": experiment.to_json(), "tokenizer": {"kind": "byte"}, "corpus_sha256": None, "vocab": 256, "step": 0,
             "best_loss": None, "elapsed_s": 0.0, "threads": 1}
    checkpoint.save(tmp_path / "made", "last", model=experiment.build(256).state(), optimizer={}, state=state)
    return str(tmp_path / "made")
