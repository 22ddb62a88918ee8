"""Steps of imported models whose library has another map for its steps: RetNet of torchscale, Reformer of transformers.

What those libraries compute is in tests/goldens/weights, made by make_weights_of_papers.py: the call, steps with what is kept
of the past, and the call on every beginning of a text.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from autograd import distance, no_grad
from minitv.exchange import find
from minitv.goldens import FOLDER, close
from tests.minitv.test_exchange import built, configured

GOLDENS = FOLDER / "weights"
CHUNK = 4  # of the orders of both Reformers
REFORMERS = ["reformer", "reformer-lsh"]


@pytest.fixture
def imported(tmp_path):
    """A golden model with another entry of config.json, as the end of a key says it, and with other options of its mixer."""
    def build(name: str, ending: str = "", **options):
        place = shutil.copytree(GOLDENS / name, tmp_path / name)
        entries = dict(part.split("=") for part in ending.split("/")[1:])
        found = find(str(configured(place, **{key: json.loads(value) for key, value in entries.items()})))
        mixer = replace(found.experiment.mixer, **options)
        model = built(found._replace(experiment=replace(found.experiment, mixer=mixer)))
        for key, buffer in model.named_buffers():
            if f"buffer/{key}{ending}" in (expected := golden(name)):
                buffer.assign_(expected[f"buffer/{key}{ending}"])
        return model

    return build


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / name / "expected.npz"))


def steps(model, ids: np.ndarray, first: int = 1) -> np.ndarray:
    """The logits of so many first tokens, and then of one token at a time."""
    parts = []
    with no_grad():
        state = model.init_state(len(ids))
        for part in np.split(ids, range(first, ids.shape[1]), axis=1):
            logits, state = model.prefill(part, state)
            parts.append(logits.numpy())
    return np.concatenate(parts, axis=1)


# -- where their steps are their call ----------------------------------------------------------------------------------
@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize(("name", "ending"), [
    ("retnet", "/layernorm_eps=1e-30"),  # the norm of a head takes away what a row is divided by
    ("reformer", "/lsh_attn_chunk_length=12"), ("reformer-lsh", "/lsh_attn_chunk_length=12")])  # a chunk shows the whole text
def test_steps_are_those_of_the_library_where_it_has_one_map(name, ending, first, imported):
    expected = golden(name)
    close(steps(imported(name, ending), expected["ids"], first), expected[f"steps{ending}"], np.float64, "logits of steps")


@pytest.mark.parametrize("name", REFORMERS)
def test_steps_of_one_round_are_those_of_transformers_where_the_text_fills_its_chunks(name, imported):
    """Up to a chunk all is seen. Then only a full chunk ends where the order does, and its end is that of the round before."""
    expected, ending = golden(name), "/num_hashes=1"
    ours, theirs = steps(imported(name, ending), expected["ids"]), expected[f"steps{ending}"]
    same = np.array([t < CHUNK or (t + 1) % CHUNK == 0 for t in range(ours.shape[1])])
    close(ours[:, same], theirs[:, same], np.float64, "logits where the chunks are full")
    assert all(distance(ours[:, t], theirs[:, t]) > 1e-3 for t in np.flatnonzero(~same))


# -- where they are not ------------------------------------------------------------------------------------------------
def test_the_steps_of_torchscale_are_another_map_than_its_call(imported):
    """They divide by √n alone, which is our "decay"; ours are its call."""
    expected = golden("retnet")
    assert distance(expected["steps"], expected["logits"]) == pytest.approx(3.4e-6, rel=0.02)
    close(steps(imported("retnet"), expected["ids"]), expected["logits"], np.float64, "logits of steps")


def test_the_steps_of_torchscale_are_ours_with_another_divisor(imported):
    expected = golden("retnet")
    close(steps(imported("retnet", normalization="decay"), expected["ids"]), expected["steps"], np.float64, "logits of steps")


@pytest.mark.parametrize("name", REFORMERS)
def test_a_step_of_reformer_is_the_call_of_transformers_on_the_text_so_far(name, imported):
    expected = golden(name)
    close(steps(imported(name), expected["ids"]), expected["so_far"], np.float64, "logits of steps")


def test_transformers_fills_a_text_up_with_whole_chunks_where_both_kinds_of_layers_ask_for_it(imported):
    """To a multiple of chunks of 4 and 6 here, so that the first one of an order has an empty one before it; ours never has."""
    expected, ending = golden("reformer"), "/local_attn_chunk_length=6"
    ours, theirs = steps(imported("reformer", ending), expected["ids"]), expected[f"so_far{ending}"]
    filled = np.array([CHUNK <= t < 2 * CHUNK for t in range(ours.shape[1])])  # 5 to 8 tokens become 12
    close(ours[:, ~filled], theirs[:, ~filled], np.float64, "logits where fewer tokens than a chunk are added")
    assert distance(ours[:, filled], theirs[:, filled]) > 1e-3


@pytest.mark.parametrize(("name", "step", "whole"), [("reformer", 0.053, 0.233), ("reformer-lsh", 0.120, 0.137)])
def test_steps_and_calls_of_transformers_are_different_maps(name, step, whole):
    """Its steps are the call on the text so far up to a chunk alone; and a longer call shows earlier tokens other keys."""
    expected = golden(name)
    so_far = expected["so_far"]
    close(expected["steps"][:, :CHUNK], so_far[:, :CHUNK], np.float64, "steps within a chunk")
    assert distance(expected["steps"], so_far) == pytest.approx(step, rel=0.02)
    close(so_far[:, -1], expected["logits"][:, -1], np.float64, "the last token of a call")
    assert distance(so_far, expected["logits"]) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize(("name", "apart"), [("reformer", 0.138), ("reformer-lsh", 0.283)])
def test_a_step_of_transformers_reads_the_keys_of_the_first_text_for_all(name, apart):
    """In LSH layers, once there are buckets."""
    alone, together = (golden(name)[key] for key in ("steps", "together"))
    close(together[0], alone[0], np.float64, "steps of the first text")
    close(together[1, :CHUNK], alone[1, :CHUNK], np.float64, "steps of the second text within a chunk")
    assert distance(together[1, CHUNK:], alone[1, CHUNK:]) == pytest.approx(apart, rel=0.02)
