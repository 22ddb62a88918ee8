"""Weights in and out: a folder as other programs keep models becomes an ordinary run, and a run becomes such a folder.

Both directions are made of the table of an architecture (minitv/architecture.py). Import reads config.json, finds the options
of the model, and knows from them the name and the shape of every array that the files must hold. Only when all that fits is
anything written, and then array after array: the files are mapped, and no more than one array is in memory. Export goes the
same way back: what the architecture cannot express is refused before a file is made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from . import checkpoint, files, tensors, variants, weights
from .architecture import Architecture, Rule, Values, worded
from .config import did_you_mean, settings, shown
from .errors import CheckpointError, UserError, naming, quoted
from .experiment import Experiment, from_checkpoint, merge
from .optim import AdamW
from .options import ExportOptions, ImportOptions, ModelOptions
from .tensors import Planned, Stored
from .tokenizer import HuggingFaceTokenizer, IdTokenizer, Tokenizer, from_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
LARGEST = {CONFIG: 10**7, TOKENIZER: 10**8}  # bytes of a file that is read whole
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = ("F32", "F16", "BF16", "F64")  # of weights
SHOWN = 8  # names in an error
FREE = ("init_std",)  # options of ours that say nothing of a trained model

# What config.json says of other things than what the model computes: the program that wrote it, and how text is made with it.
ELSEWHERE = frozenset("""
    architectures model_type transformers_version _name_or_path name_or_path dtype torch_dtype use_cache initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    task_specific_params id2label label2id num_labels _num_labels problem_type finetuning_task tokenizer_class
    return_dict output_hidden_states output_attentions gradient_checkpointing auto_map attn_implementation
    _attn_implementation _attn_implementation_autoset chunk_size_feed_forward torchscript use_bfloat16 output_past
    max_length min_length max_new_tokens do_sample temperature top_k top_p typical_p num_beams num_beam_groups
    num_return_sequences repetition_penalty length_penalty diversity_penalty transformers.js_config
""".split())


class Pickled(UserError):
    """The weights lie in pickles, which can hold any program: ``lines`` are Python that converts them elsewhere."""

    def __init__(self, folder: Path, names: list[str]):
        super().__init__(f"{folder / names[0]} is a pickle, which may run any program when it is read, so it is never loaded "
                         "here; where torch and safetensors are installed, run these three lines of Python in its folder, and "
                         f"import {folder}")
        self.lines = ("import torch; from safetensors.torch import save_file",
                      f"parts = [torch.load(name, map_location='cpu', weights_only=True) for name in {names!r}]",
                      "save_file({name: array.contiguous().clone() for part in parts for name, array in part.items()}, "
                      f"{WEIGHTS!r})")


class Found(NamedTuple):
    """A model of another program, as its files describe it: nothing but the description has been read."""

    architecture: Architecture
    folder: Path
    config: dict[str, Any]
    experiment: Experiment
    vocab: int
    stored: dict[str, Stored]  # by the names of the architecture, with its prefix
    rules: list[Rule]
    tokenizer: Tokenizer
    shapes: dict[str, tuple[int, ...]]  # of our arrays

    def arrays(self, dtype: Any = np.float32) -> dict[str, Planned]:
        """Our arrays by name, each of which is made when it is asked for."""
        values, planned = self.experiment.values, {}
        for rule in self.rules:
            for number, name in enumerate(rule.ours):
                planned[name] = Planned(self.shapes[name], np.dtype(dtype), lambda rule=rule, number=number: self._made(
                    rule, number, values, dtype))
        return planned

    def _made(self, rule: Rule, number: int, values: Values, dtype: Any) -> np.ndarray:
        array = rule.way.read([self.stored[name].array() for name in rule.theirs], values)[number]
        with np.errstate(over="ignore"):
            array = array.astype(dtype, order="C")
        if not np.isfinite(array).all():
            raise CheckpointError(f"{self.stored[rule.theirs[0]].path}: {' and '.join(rule.theirs)} holds numbers that are not "
                                  f"finite in {np.dtype(dtype).name}, so that the model would compute nothing")
        return array

    @property
    def dtypes(self) -> str:
        """The dtypes of the arrays in the files, in the words of the format."""
        return ", ".join(sorted({array.dtype for array in self.stored.values()}))

    @property
    def vocabulary(self) -> str:
        """How many ids the model knows, and what makes ids of a text."""
        if self.experiment.task.reads != "tokens":
            return f"{self.vocab} classes, the blank among them"
        if self.tokenizer.kind == IdTokenizer.kind:
            return f"{self.vocab} ids: there is no {TOKENIZER}, so a text is numbers with spaces between them"
        return f"{self.vocab} ids of {self.folder / TOKENIZER}"

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())


# -- in ----------------------------------------------------------------------------------------------------------------
def find(source: str) -> Found:
    """What the files of a folder, or one file of weights with config.json beside it, describe; every name and shape is checked.

    UserError where the architecture is unknown or has what our models have not, CheckpointError where the files do not fit.
    """
    path = Path(source)
    folder, weights_of = _places(path)
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder / CONFIG}: there is no such file, and it says which model the weights are of")
    _, config = _json(folder / CONFIG)
    with naming(folder / CONFIG):
        architecture = _architecture(config)
        values = _options(architecture, config)
        vocab = architecture.vocab.read(config)["vocab"]
    with naming(folder):
        experiment, _ = merge(variants.load(architecture.variant), architecture.task, None, (CONFIG, values))
    rules = architecture.expanded(experiment.values)
    stored = _named(architecture, weights_of(), rules, folder)
    with naming(folder / CONFIG):
        shapes = experiment.shapes(vocab)
    _check_rules(architecture, rules, shapes)
    _check_shapes(rules, stored, shapes, experiment.values, folder)
    return Found(architecture, folder, config, experiment, vocab, stored, rules, _tokenizer(folder, config, vocab), shapes)


def import_weights(source: str, options: ImportOptions) -> tuple[Path, Found]:
    """Write a run with the weights of another program's model, and return its folder and what was found.

    It has done no step of training: ``minitv train --init-from`` or ``--resume`` goes on. UserError as of ``find``, or if a run
    is in the new folder already.
    """
    out = Path(options.out) if options.out is not None else Path("runs", _name(Path(source)))
    if any(checkpoint.exists(out, name) for name in checkpoint.NAMES):
        raise UserError(f"--out {out}: there is a run in this folder, give another one")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: this is a file, a folder is needed")
    found = find(source)
    experiment, saved = found.experiment.replace(out=str(out)), found.experiment.task.imported(found.folder, found.vocab)
    if saved is None:
        saved = {"tokenizer": found.tokenizer.to_json(), "corpus_sha256": None}
        experiment = experiment.replace(tokenizer=found.tokenizer.kind)
    state = {"config": experiment.to_json(), **saved, "vocab": found.vocab, "step": 0, "best_loss": None, "elapsed_s": 0.0,
             "threads": 1}
    checkpoint.save(out, "last", model=found.arrays(), optimizer=AdamW.fresh(), state=state)
    return out, found


def _tokenizer(folder: Path, config: Values, vocab: int) -> Tokenizer:
    """What the file beside the weights says of texts, or ids in and out; CheckpointError for one of another model.

    Where the tokenizers library is missing, the file is kept as it is, for the day on which it is there.
    """
    path = folder / TOKENIZER
    first, mask = (value if type(value) is int and 0 <= value < vocab else None
                   for value in (config.get("bos_token_id"), config.get("mask_token_id")))
    if not os.path.lexists(path):  # a link that leads nowhere is a damaged folder
        return IdTokenizer(vocab, mask)
    text, _ = _json(path)
    tokenizer = HuggingFaceTokenizer(text, vocab, first)
    if importlib.util.find_spec("tokenizers") is not None:
        with naming(folder):
            tokenizer.check()
    return tokenizer


def _places(path: Path) -> tuple[Path, Callable[[], dict[str, Stored]]]:
    """The folder of a model, and what reads the descriptions of its arrays; errors for what is no model."""
    if not path.exists():
        raise UserError(f"FOLDER: {path}: there is no such folder or file")
    if path.is_dir():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES and file.is_file())
        if (path / WEIGHTS).exists() or (path / INDEX).exists():
            return path, lambda: tensors.of_folder(path)
        if pickles:  # others may be of an optimizer
            raise Pickled(path, [name for name in pickles if name.startswith("pytorch_model")] or pickles[:1])
        raise UserError(f"FOLDER: {path}: there is no {WEIGHTS} in it, and no {INDEX}")
    if path.suffix in PICKLES:
        raise Pickled(path.parent, [path.name])
    if path.name == INDEX:
        return path.parent, lambda: tensors.of_folder(path.parent)
    if path.suffix != ".safetensors":
        raise UserError(f"FOLDER: {path}: this file is no {WEIGHTS}, allowed: a folder with {CONFIG} and {WEIGHTS}, or a file "
                        "*.safetensors beside its config.json")
    return path.parent, lambda: tensors.stored(path)


def _json(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file that is a JSON object, and the object."""
    if not path.is_file():
        raise UserError(f"{path}: a file is needed, and this is none")
    if (size := path.stat().st_size) > LARGEST[path.name]:
        raise UserError(f"{path}: it has {size} bytes, allowed are {LARGEST[path.name]}")

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = files.read(path).decode()
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=tensors.unique)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is needed, got {quoted(value)}")
    return text, value


def _architecture(config: Values) -> Architecture:
    every = [entry.load() for entry in weights.architectures().values()]
    known = list(dict.fromkeys(one.model_type or one.name for one in every))
    name = config.get("model_type")
    if name is None:
        name = next((one.name for one in every if one.signs and all(sign in config for sign in one.signs)), None)
    if not isinstance(name, str) or name not in known:
        given = "is not there" if name is None else f"is {quoted(name)}"
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        raise UserError(f"model_type {given}, allowed: {', '.join(known)}{hint}")
    return next(one for one in every if (one.model_type or one.name) == name and one.describes(config))


def _options(architecture: Architecture, config: Values) -> dict[str, Any]:
    """The options of our model; UserError for an entry that nobody knows, or whose value our models do not have."""
    known = {name for key in (*architecture.keys, architecture.vocab) for name in key.theirs}
    known |= ELSEWHERE
    unknown = [name for name, value in config.items()
               if name not in known and name not in architecture.ignored and value not in (None, False, "", [], {})]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        shown = ", ".join(f"{_short(name)} = {worded(config[name])}" for name in unknown[:SHOWN])
        raise UserError(f"{shown}{more}: not known of {architecture.name}, and it may change what the model computes; if it "
                        "does not, remove it")
    values = dict(architecture.fixed)
    for key in architecture.keys:
        values |= key.read(config)
    architecture.check(config, values)
    return values


def _named(architecture: Architecture, found: dict[str, Stored], rules: list[Rule], folder: Path) -> dict[str, Stored]:
    """The arrays by the names of the architecture; CheckpointError lists those that are missing and those that nobody knows."""
    expected = [name for rule in rules for name in rule.theirs]
    known = set(expected) | set(architecture.copies)
    masks = [re.compile(pattern) for pattern in architecture.ignored_arrays]
    stored, left = {}, []
    for name, array in found.items():
        full = name if name in known or not architecture.prefix else next(
            (other for other in (architecture.prefix + name,) if other in known), name)
        if full in known:
            if full in stored:
                raise CheckpointError(f"{folder}: {full} is there twice, with {architecture.prefix!r} before its name and "
                                      "without")
            stored[full] = array
        elif not any(mask.fullmatch(other) for mask in masks for other in (name, architecture.prefix + name)):
            left.append(name)
    missing = [name for name in expected if name not in stored]
    problems = [f"{label}: {', '.join(map(_short, names[:SHOWN]))}" + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))
                for label, names in (("missing", missing), ("not known", left)) if names]
    if problems:
        raise CheckpointError(f"{folder}: the arrays are not those of {architecture.name} as {CONFIG} describes it; "
                              + "; ".join(problems))
    for copy, original in architecture.copies.items():
        if copy in stored and copy not in expected:
            _check_copy(copy, stored.pop(copy), original, stored[original])
    return stored


def _short(name: str) -> str:
    return name if len(name) <= 100 and name.replace(".", "").isidentifier() else quoted(name)


def _check_copy(copy: str, array: Stored, original: str, other: Stored) -> None:
    if (array.dtype, array.shape) != (other.dtype, other.shape) or not np.array_equal(array.array(), other.array()):
        raise CheckpointError(f"{array.path}: {CONFIG} says that {copy} and {original} are one array, and they differ")


def _check_rules(architecture: Architecture, rules: list[Rule], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The declaration names every array of the model once."""
    ours = [name for rule in rules for name in rule.ours]
    if sorted(ours) != sorted(shapes):
        wrong = sorted(set(ours) ^ set(shapes)) or ours
        raise TypeError(f"{architecture.name}: these arrays are not named by one rule each: {', '.join(wrong[:SHOWN])}")


def _stand_in(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _shapes_there(rule: Rule, shapes: Mapping[str, tuple[int, ...]], values: Values) -> list[tuple[int, ...]]:
    """The shapes of the arrays of theirs in a rule: stand-ins of ours go the way, so they need no declaration of their own."""
    return [array.shape for array in rule.way.write([_stand_in(shapes[name], np.bool_) for name in rule.ours], values)]


def _check_shapes(rules: list[Rule], stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], values: Values,
                  folder: Path) -> None:
    """CheckpointError unless every array in the files has the shape that the options ask for, and a dtype of weights."""
    wrong = []
    for rule in rules:
        if not rule.ours:  # what follows from the options: no array is made of them, whose sizes nothing has bounded yet
            with naming(folder):
                rule.way.read([stored[name].array() for name in rule.theirs], values)
            continue
        for name, shape in zip(rule.theirs, _shapes_there(rule, shapes, values), strict=True):
            if stored[name].dtype not in DTYPES:
                wrong.append(f"{name} is of the dtype {stored[name].dtype}, allowed: {', '.join(DTYPES)}")
            elif stored[name].shape != shape:
                wrong.append(f"{name} has the shape {_shape(stored[name].shape)} instead of {_shape(shape)}")
    if wrong:
        raise CheckpointError(f"{folder}: the arrays do not fit {CONFIG}: {'; '.join(wrong[:SHOWN])}"
                              + f" and {len(wrong) - SHOWN} more" * (len(wrong) > SHOWN))


def _shape(shape: tuple[int, ...]) -> str:
    return quoted(list(shape))


def _name(path: Path) -> str:
    """What a run is called after the model that it came from."""
    path = path.resolve()
    return (path.name if path.is_dir() else path.parent.name) or "imported"


# -- out ---------------------------------------------------------------------------------------------------------------
def export(directory: str, options: ExportOptions) -> tuple[Path, Architecture]:
    """Write config.json, model.safetensors and what there is of a tokenizer of a run's model for other programs.

    Returns their folder and the architecture. UserError says what the model has that no architecture of its variant can
    express, before anything is written.
    """
    snapshot = checkpoint.map_run(directory, options.checkpoint)
    with closing(snapshot.model) as kept:
        with naming(directory, CheckpointError):
            experiment = from_checkpoint(snapshot.state.config)
            vocab = experiment.task.stored_vocab(snapshot.state.task)
            shapes = experiment.shapes(vocab)
        checkpoint.check_arrays({name: _stand_in(shape, np.float32) for name, shape in shapes.items()}, kept,
                                f"{directory}: the model")
        with naming(directory):
            architecture, config = expressed(experiment, vocab)
        out = Path(options.out or f"{checkpoint.run_folder(directory)}-{options.format}")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: there is something already, give a new folder")
        whole = experiment.replace(**{name: architecture.fixed[name] for name in architecture.filled})
        shapes, values = whole.shapes(vocab), {**architecture.always(whole.variant.name), **whole.values}
        rules = architecture.expanded(values)
        _check_rules(architecture, rules, shapes)

        def ours(name: str) -> np.ndarray:
            return kept[name] if name in kept else _stand_in(shapes[name], np.float32)

        arrays = {}
        for rule in rules:
            for number, (name, shape) in enumerate(zip(rule.theirs, _shapes_there(rule, shapes, values), strict=True)):
                arrays[name] = Planned(shape, np.dtype(np.float32), lambda rule=rule, number=number: rule.way.write(
                    list(map(ours, rule.ours)), values)[number])
        contents = {WEIGHTS: tensors.blocks(arrays, {"format": "pt"})}
        tokenizer = snapshot.state.task.get("tokenizer")
        if isinstance(tokenizer, dict) and tokenizer.get("kind") == HuggingFaceTokenizer.kind:
            tokenizer = from_json(tokenizer)
            contents[TOKENIZER] = [tokenizer.definition.encode()]
            config["bos_token_id"] = tokenizer.first
        elif isinstance(tokenizer, dict) and "mask" in tokenizer:
            config["mask_token_id"] = tokenizer["mask"]
        contents |= {name: [data] for name, data in experiment.task.exported(snapshot.state.task).items()}
        contents[CONFIG] = [json.dumps(config, indent=2).encode() + b"\n"]
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: this folder cannot be made: {error.strerror or error}") from None
        for name, parts in contents.items():
            files.replace(out / name, parts)
    return out, architecture


def expressed(experiment: Experiment, vocab: int) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that can express what a model computes, and its config.json; UserError with reasons where none can."""
    known = [entry.load() for entry in weights.architectures().values()]
    having = [one for one in known if experiment.variant.name in (one.variant, *one.likewise)]
    if not having:
        raise UserError(f"no architecture of other programs that is known here is a {experiment.variant.name}, allowed: runs "
                        f"of {', '.join(sorted({name for one in known for name in (one.variant, *one.likewise)}))}")
    reasons = []
    for architecture in having:
        try:
            return architecture, _entries(architecture, experiment, vocab)
        except UserError as error:
            reasons.append(f"{architecture.name} cannot express it: {error}")
    raise UserError("; ".join(reasons))


def _entries(architecture: Architecture, experiment: Experiment, vocab: int) -> dict[str, Any]:
    """config.json of a model; UserError lists the options of it that the architecture has not."""
    variant, always = experiment.variant, architecture.always(experiment.variant.name)
    values = {**always, **experiment.values}
    config: dict[str, Any] = {"architectures": [architecture.task_class],
                              "model_type": architecture.model_type or architecture.name, "dtype": "float32"}
    wrong = []
    for part in (ModelOptions, variant.options):
        for name, setting in settings(part).items():
            if name in architecture.ours or name in FREE or name in variant.without:
                continue
            usual = always.get(name, variant.overrides.get(name, setting.default))
            if values[name] != usual and (name not in architecture.filled or values[name] != architecture.filled[name]):
                wrong.append(f"{setting.flag} is {shown(values[name])}, and there it is always {shown(usual)}")
    for key in (*architecture.keys, architecture.vocab):
        try:
            config |= key.write({**values, "vocab": vocab})
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(wrong))
    architecture.check(config, values)
    return config
