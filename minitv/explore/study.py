"""What the page shows of one run, computed: curves, a text with what the model says of it, and what each layer mixes.

Losses, influence and the size of the state are those of the model as it is. Matrices are computed in float64 with the same
weights, so that what is checked about them is not rounding.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor, no_grad, to_numpy, use
from autograd.cpu.process import blas_threads
from autograd.random import Random

from ..checkpoint import run_folder
from ..compare import state_bytes
from ..errors import CheckpointError, UserError, naming, plain
from ..evaluate import TOKENS, check_length, read_text
from ..log import read_log
from ..options import ExploreOptions
from ..picture import curves, reach, readings, smooth
from ..report import count, duration
from ..sample import Trained, load
from ..task import NOTHING
from .mixing import Mixing, mixings, record, without_matrix

LIKELY = 5  # tokens that are named where the model would have said something else
TEXT = 1024  # tokens of a text that are shown, at most
HEADS = 16  # matrices of a call that are all shown; of more channels, some
CHANNELS = 4  # of the channels that are shown then
INFLUENCE = 128  # positions that are changed one by one, at most


class Example(NamedTuple):
    """What a model reads on the page: sequences, how a token is written, what it is, and how the task scores it."""

    batch: Any
    word: Callable[[int], str]
    about: str
    task: Any  # with data; None where only a text was given


def study(directory: str, options: ExploreOptions, tokens: int, name: str = "") -> dict[str, Any]:
    """Everything about one run, as JSON; ``tokens`` is how many positions the matrices have at most."""
    run = load(directory, options.checkpoint)
    example = example_of(run, directory, options)
    missing: list[str] = []
    result: dict[str, Any] = {
        "name": name or plain(directory, 60), "variant": run.experiment.variant.name, "summary": run.experiment.variant.summary,
        "paper": run.experiment.variant.paper, "curve": curve_of(directory, missing), "readings": readings_of(directory)}
    with blas_threads(1):
        if asks_tokens(example.batch):
            result["text"] = text_of(run, example)
            result["influence"] = influence_of(run, example, tokens, missing)
        else:
            missing.append(f"A model of the task {run.experiment.task.name} reads no tokens, so there is no text to colour, "
                           "and no token to change.")
        result["state"] = state_of(run, example, missing)
        result["sample"] = example.task.show(run.model, Random(0)) if example.task is not None else ""
        result["mixings"], result["words"] = mixings_of(run, example, tokens, missing)
    result["facts"] = facts_of(run, directory, example, result)
    result["missing"] = missing
    return result


# -- what is read ------------------------------------------------------------------------------------------------------
def example_of(run: Trained, directory: str, options: ExploreOptions) -> Example:
    """The sequences that a run is shown: of the text that was given, or of what the run held out."""
    experiment, context = run.experiment, run.model.context
    if options.text:
        with naming(directory):
            tokenizer = run.tokenizer
        ids, _, about, _ = read_text(options.text, tokenizer, options.encoding, "--text")
        with naming("--text"):
            check_length(len(ids))
        size = min(context, len(ids) - 1)
        windows = max(1, min(len(ids) - 1, TEXT) // size)
        parts = [experiment.task.asked_of(experiment.data, tokenizer, ids[i * size : (i + 1) * size + 1])
                 for i in range(windows)]
        batch = type(parts[0])(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

        def word(token: int) -> str:
            return tokenizer.decode([token]) if token < tokenizer.vocab else "▢"

        return Example(batch, word, about, None)
    try:
        task = experiment.begin(run.saved)
        held_out = task.held_out()
    except CheckpointError:
        raise
    except UserError as error:
        reason = str(error).partition(";")[0].removeprefix("--data: ")
        raise UserError(f"{directory}: the data of the run is not there as it was, {reason}; allowed: a text of your own with "
                        "--text FILE") from None
    rows = max(1, TEXT // max(held_out.inputs.shape[1], 1)) if asks_tokens(held_out) else 1
    about = getattr(task, "description", "") or (task.corpus.description if hasattr(task, "corpus") else "")
    return Example(held_out.part(slice(0, min(rows, 8))), task.word, f"held-out data ({about})", task)


def asks_tokens(batch: Any) -> bool:
    """Whether what is read and what is asked for are ids."""
    return batch.inputs.dtype.kind in "iu" and batch.labels.shape == batch.inputs.shape


# -- panels ------------------------------------------------------------------------------------------------------------
def curve_of(directory: str, missing: list[str]) -> dict[str, Any] | None:
    """The learning curve with its baselines."""
    try:
        curve = curves(run_folder(directory))
    except UserError as error:
        missing.append(f"There is no learning curve: {error}.")
        return None
    if not curve.training and not curve.held_out:
        missing.append("There is no learning curve: the log has no losses yet.")
        return None
    training = smooth(curve.training, reach(curve.training)) if curve.training else []
    return {"metric": curve.metric, "rising": curve.rising, "training": _points(training), "held_out": _points(curve.held_out),
            "baselines": curve.baselines, "data": curve.data, "identity": curve.identity}


def readings_of(directory: str) -> list[dict[str, Any]]:
    """The numbers that layers told of themselves while the run went on, such as gains: for each kind a line for each layer."""
    try:
        return [{"name": kind, "layers": [_points(points) for points in layers]}
                for kind, layers in readings(run_folder(directory)).items()]
    except UserError:
        return []  # the curve has said why


def text_of(run: Trained, example: Example) -> dict[str, Any]:
    """Each token with the bits that it cost, and the likeliest tokens in its place."""
    batch, items = example.batch, []
    rows = max(1, TOKENS // max(batch.inputs.shape[1], 1))
    for first in range(0, len(batch.inputs), rows):
        part = batch.part(slice(first, first + rows))
        with no_grad():
            logits, labels = run.experiment.task.answers(run.model, part)
        scores = to_numpy(logits.data).astype(np.float64)
        scores, labels = scores.reshape(-1, scores.shape[-1]), labels.reshape(-1)
        scores -= scores.max(axis=1, keepdims=True)
        p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        asked = iter(zip(p, labels.tolist(), strict=True))
        for row, (ids, answers) in enumerate(zip(part.inputs.tolist(), part.labels.tolist(), strict=True)):
            if (source := getattr(part, "source", None)) is not None:
                text = "".join(example.word(i) for i in source[row].tolist() if i >= 0)
                items.append({"word": f"{_shown(text)} → ", "row": first + row, "at": -1})
            items += _sequence(ids, answers, asked, example.word, first + row)
    bits = [item["bits"] for item in items if "bits" in item]
    return {"items": items, "mean": float(np.mean(bits)) if bits else None, "asked": len(bits), "about": example.about}


def _sequence(ids: list[int], answers: list[int], asked: Any, word: Callable[[int], str], row: int) -> list[dict[str, Any]]:
    """The tokens of one sequence. Where each answer is the next token, it stands there; else beside what asks for it."""
    follows = len(ids) > 1 and all(answer in (NOTHING, after) or after < 0
                                   for answer, after in zip(answers, ids[1:], strict=False))
    end = next((i for i, token in enumerate(ids) if token < 0), len(ids))
    items: list[dict[str, Any]] = []
    if follows:
        items.append({"word": _shown(word(ids[0])), "row": row, "at": -1})
    for i, (token, answer) in enumerate(zip(ids, answers, strict=True)):
        if answer == NOTHING:
            if follows or i >= end:
                continue
            items.append({"word": _shown(word(token)), "row": row, "at": i})
            continue
        p, label = next(asked)
        likely = np.argsort(-p, kind="stable")[:LIKELY].tolist()
        items.append({"word": _shown(word(label if follows else token)), "row": row, "at": i, "answer": _shown(word(label)),
                      "p": _round(p[label]), "bits": _round(-math.log2(max(p[label], 1e-300))),
                      "likely": [[_shown(word(other)), _round(p[other])] for other in likely]})
    return items


def influence_of(run: Trained, example: Example, tokens: int, missing: list[str]) -> dict[str, Any] | None:
    """How much each prediction changes, as a total variation, where one token before or after it is another one: I[t, s]."""
    batch = example.batch
    if len(batch) != 2:
        missing.append("Which token changes which prediction is not measured: the model reads more than one sequence.")
        return None
    ids = batch.inputs[0]
    if len(ids) > INFLUENCE:
        if not run.experiment.variant.causal:
            missing.append(f"Which token changes which prediction is not measured: that takes a pass for each of {len(ids)} "
                           "tokens.")
            return None
        ids = ids[:INFLUENCE]
    vocab = run.model.embed.weight.shape[0]
    changed = np.repeat(ids[None], len(ids) + 1, axis=0)  # the last row stays
    diagonal = np.arange(len(ids))
    changed[diagonal, diagonal] = (ids + 1 + Random(0).integers(0, max(vocab - 1, 1), ids.shape)) % vocab
    rows, parts = max(1, 4096 // len(ids)), []
    with no_grad():
        for i in range(0, len(changed), rows):
            logits = to_numpy(run.model(changed[i : i + rows]).data).astype(np.float64)
            logits -= logits.max(axis=2, keepdims=True)
            parts.append(np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True))
    p = np.concatenate(parts)  # [T+1 T V]
    moved = np.abs(p[:-1] - p[-1]).sum(axis=2).T / 2  # [T S]
    asked = np.flatnonzero(batch.labels[0, : len(ids)] != NOTHING)
    last = int(asked[-1]) if len(asked) else len(ids) - 1
    far = np.abs(np.flatnonzero(moved[last] > 0.01) - last)
    shown = moved[:tokens, :tokens]
    return {"matrix": _encode(shown), "rows": len(shown), "columns": len(shown), "last": last, "far": int(far.max(initial=0))}


def state_of(run: Trained, example: Example, missing: list[str]) -> dict[str, Any] | None:
    """The bytes of the state after 1, 2, 4, ... tokens."""
    if not run.experiment.variant.causal:
        return None
    model, ids = run.model, example.batch.inputs[:1]
    lengths = sorted({min(2**i, ids.shape[1]) for i in range(20)})
    sizes = []
    with no_grad():
        for length in lengths:
            _, state = model.prefill(ids[:, :length], model.init_state(1))
            sizes.append(state_bytes(state))
    return {"tokens": lengths, "bytes": sizes}


def mixings_of(run: Trained, example: Example, tokens: int, missing: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The matrices of all layers on the first sequence, and the tokens that stand at its positions, by their number."""
    model, batch = run.model, example.batch.part(slice(0, 1))
    if run.experiment.variant.causal and batch.inputs.shape[1] > tokens:
        batch = type(batch)(*(array[:, :tokens] if array.ndim > 1 else array for array in batch))
    for _, array in model._arrays():
        if array.data.dtype.kind == "f":
            array.data = array.data.astype(np.float64)
    with use(kernel="none"):  # forms, which need no compiling for this dtype
        calls = record(lambda: model(*batch[:-1]) if asks_tokens(batch) else example.task.score(model, batch))
        found = mixings(calls, model)
    shown = [_mixing(one, tokens) for one in found]
    for name in without_matrix(calls, found):
        missing.append(f"A call of {name} has no matrix here: it is no matrix of positions alone, or the sequence is too long.")
    if not shown:
        missing.append("No operator of the model is linear in values at positions, so there is no matrix of what it mixes.")
    words: dict[str, list[str]] = {}
    if asks_tokens(batch):
        arrays = {name: array[0].tolist() for name, array in zip(batch._fields, batch, strict=True) if name != "labels"}
        for ids in arrays.values():
            if sum(len(other) == len(ids) for other in arrays.values()) == 1:  # a length tells whose positions they are
                words[str(len(ids))] = [_shown(example.word(i)) for i in ids]
    return shown, words


def _mixing(one: Mixing, tokens: int) -> dict[str, Any]:
    """What is shown of a matrix: some of its channels, weights by distance, and what else the operator reads."""
    matrices, op = one.matrices, one.call.op
    values, every = matrices.values, len(matrices.values)
    if every <= (HEADS if matrices.heads else 2 * CHANNELS):
        picked, names = values, [matrices.name(i) for i in range(every)]
    else:
        chosen = np.unique(np.linspace(0, every - 1, CHANNELS).round().astype(int))
        picked = np.concatenate([np.abs(values).mean(axis=0)[None], values[chosen]])
        names = [f"mean of |M|, all {every}", *(matrices.name(i) for i in chosen)]
    rows, columns = picked.shape[1:]
    cut = picked[:, :tokens, :tokens]
    sums = picked.sum(axis=2)
    return {
        "place": one.place, "title": one.title, "whole": one.whole, "names": names, "rows": rows, "columns": columns,
        "shape": list(cut.shape[1:]), "values": _encode(cut), "error": matrices.error, "blocks": matrices.blocks,
        "signature": f"{op.name}: {op.signature}", "about": (op.__doc__ or "").strip().split("\n")[0].replace("``", ""),
        "seen": int((picked != 0).any(axis=0).sum()), "negative": bool((picked < 0).any()),
        "sums": [_round(float(sums.min())), _round(float(sums.max()))],
        "distances": _distances(picked) if rows == columns else None, "read": _read(picked), "inputs": _inputs(one, tokens)}


def _distances(matrices: np.ndarray) -> dict[str, Any]:
    """The mean of |M| at each distance t - s, and its spectrum; where all M depend on distances alone, M itself, a filter."""
    size = matrices.shape[1]
    lower = not np.triu(matrices, 1).any()
    lags = list(range(0 if lower else 1 - size, size))
    diagonals = [[np.diagonal(matrix, -lag) for lag in lags] for matrix in matrices]
    toeplitz = all(np.ptp(diagonal) <= 1e-9 * np.abs(matrix).max() for matrix, every in zip(matrices, diagonals, strict=True)
                   for diagonal in every)
    means = np.array([[(diagonal if toeplitz else np.abs(diagonal)).mean() for diagonal in every] for every in diagonals])
    spectrum = np.abs(np.fft.rfft(means, axis=1))
    frequencies = np.fft.rfftfreq(len(lags))
    return {"lags": lags, "weights": [[_round(x) for x in row] for row in means], "toeplitz": toeplitz,
            "frequencies": [_round(x) for x in frequencies], "gains": [[_round(x) for x in row] for row in spectrum]}


def _read(matrices: np.ndarray) -> list[list[float]]:
    """How much each position is read: the mean of |M[t, s]| over the positions t that read s at all in some matrix."""
    sees = (matrices != 0).any(axis=0).sum(axis=0)  # [S]
    return [[_round(x) for x in np.abs(matrix).sum(axis=0) / np.maximum(sees, 1)] for matrix in matrices]


def _inputs(one: Mixing, tokens: int) -> list[dict[str, Any]]:
    """What else the call reads that does not belong to one sequence alone, and integers such as buckets."""
    shown = []
    for argument, value in zip(one.call.op.signature.inputs, one.call.inputs, strict=False):
        array = value.data if isinstance(value, Tensor) else value
        if array is None or argument.kind == "bool" or not array.size:
            continue
        dims = argument.dims
        if argument.kind == "int" and len(dims) >= 2:
            maps = array.reshape(-1, *array.shape[-2:])[:HEADS, :, :tokens]
            shown.append({"name": argument.name, "axes": list(dims[-2:]), "integers": maps.astype(int).tolist()})
        elif argument.kind != "int" and "B" not in dims and array.ndim == 1 == len(dims):
            shown.append({"name": argument.name, "axes": list(dims), "values": [_round(x) for x in array.tolist()]})
        elif argument.kind != "int" and "B" not in dims and array.ndim == 2 == len(dims):
            cut = array[:tokens, :tokens]
            shown.append({"name": argument.name, "axes": list(dims), "matrix": _encode(cut), "shape": list(cut.shape)})
    return shown


def facts_of(run: Trained, directory: str, example: Example, result: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines (label, text) about the run."""
    experiment, model = run.experiment, run.model
    size = sum(p.size for p in model.parameters())
    options = experiment.model
    rows = [("variant", experiment.variant.summary), ("paper", experiment.variant.paper),
            ("run", f"{directory}, step {run.step}, task {experiment.task.name}"),
            ("size", f"{count(size)} parameters, {options.layers} layer{'s' * (options.layers != 1)}, width {options.width}, "
                     f"context {model.context}")]
    if (text := result.get("text")) and text["mean"] is not None:
        bits = f"{text['mean']:.3f} bits for each of {text['asked']} tokens"
        rows.append(("example", f"{bits}; {example.about}"))
    if influence := result.get("influence"):
        rows.append(("receptive field", f"tokens up to {influence['far']} position{'s' * (influence['far'] != 1)} away move "
                                        f"the prediction at position {influence['last']} by more than 1 %"))
    if state := result.get("state"):
        rows.append(("state", f"{count(state['bytes'][0])} bytes after {state['tokens'][0]} token, "
                              f"{count(state['bytes'][-1])} bytes after {state['tokens'][-1]}"))
    if elapsed := _elapsed(directory):
        rows.append(("trained", elapsed))
    return rows


def _elapsed(directory: str) -> str:
    try:
        _, records = read_log(run_folder(directory))
    except UserError:
        return ""
    return f"for {duration(records[-1]['elapsed_s'])}" if records and records[-1].get("elapsed_s") is not None else ""


# -- numbers -----------------------------------------------------------------------------------------------------------
def _points(points: list[tuple[int, float]]) -> list[list[Any]]:
    """[steps, values], without values that are no number, thinned to a thousand."""
    points = [point for point in points if math.isfinite(point[1])]
    points = points[:: max(1, len(points) // 1000)]
    return [[step for step, _ in points], [_round(value) for _, value in points]]


def _round(x: float) -> float:
    """Seven digits."""
    return float(f"{float(x):.7g}")


def _encode(array: np.ndarray) -> str:
    """A matrix as float32, in base64."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def _shown(word: str) -> str:
    """A token with what cannot be printed escaped; spaces and new lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in word)


def folder_name(path: str) -> str:
    """How a run is called on the page: the last part of its folder."""
    return plain(Path(path).resolve().name, 60)
