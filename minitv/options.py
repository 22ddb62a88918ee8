"""The options of the commands, and the presets; a variant and a task add their own in their modules."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from .config import check, option, settings
from .errors import UserError

DATA, STEPS, OPTIMIZER, SCREEN = "data and output", "length and evaluation", "optimizer (AdamW)", "machine and screen"


def _device(**kwargs: Any) -> Any:
    return option("cpu", "where to compute: cpu, cuda (an NVIDIA GPU), or cuda:1 for the second one", **kwargs)


def _threads(what: str, **kwargs: Any) -> Any:
    return option(None, f"worker threads on the CPU, {what}", low=1, high=1024, **kwargs)


def _checkpoint() -> Any:
    return option("last", "the newest weights, or those with the lowest held-out loss", choices=("last", "best"))


def _encoding() -> Any:
    return option("utf-8", "how characters are written in --data: utf-8, utf-16, latin-1, cp1252, ...", metavar="NAME")


def _window() -> Any:
    return option(None, "recent tokens that the cache of a Transformer with relative positions keeps, so that its memory is "
                  "constant; none = as many as the context has room for", low=1, high=2**20)


def _sinks() -> Any:
    return option(None, "first tokens that also stay in the cache; none = 4, or as many as the model was trained with", low=0,
                  high=2**20)


@dataclass(frozen=True)
class ModelOptions:
    """model: every variant"""

    context: int = option(64, "characters (tokens, or frames of sound) the model sees at once", low=1, high=2**20)
    layers: int = option(2, "number of blocks", low=1, high=10_000)
    width: int = option(128, "size of the vector of one token", low=1, high=2**20)
    ffn_multiple: float = option(4.0, "hidden size of the feed-forward network, in widths", above=0, high=1024)
    activation: str = option(
        "gelu", "activation function of the feed-forward network",
        choices=("gelu", "gelu_tanh", "relu", "relu_squared", "silu"),
    )
    ffn_gate: bool = option(False, "a second matrix of the same size multiplies what the activation function gives: a gated "
                            "feed-forward network, with silu SwiGLU", newer=True)
    norm: str = option("layer_norm", "normalisation", choices=("layer_norm", "rms_norm"))
    norm_eps: float = option(1e-5, "what a norm adds to the mean square before it takes the root", above=0, below=1, newer=True)
    positions: str = option(
        "learned", "what tells the model where a token stands: a learned vector for each position, a vector of sines, queries "
        "and keys that are turned by their position (rope), scores that fall with the distance (alibi), or nothing",
        choices=("learned", "sinusoidal", "rope", "alibi", "none"), newer=True,
    )
    token_shift: bool = option(
        False, "a mixer reads half of its channels from the position before, so that one layer can look up what followed "
        "a token",
        newer=True,
    )
    embed_norm: bool = option(False, "the embedding is normalised before the first block", newer=True)
    bias: bool = option(False, "biases in linear layers (where the paper has them) and in norms")
    stack: str | None = option(
        None, "how x passes through the layers: residual adds to it; reversible trains in the memory of one layer, and "
        "computes every layer twice; none = as the variant has it", choices=("residual", "reversible"), newer=True,
    )
    tied: bool = option(True, "the output layer is the embedding, transposed: one matrix for both")
    dropout: float = option(0.0, "probability that a value is dropped while training", low=0, below=1)
    init_std: float | None = option(
        None, "standard deviation of the weights at the start; none = 0.02·√(768/width), GPT-2's at its width", above=0
    )

    def __post_init__(self) -> None:
        check(self)
        if self.init_std is None:
            object.__setattr__(self, "init_std", float(f"{0.02 * math.sqrt(768 / self.width):.4g}"))

    @property
    def output_std(self) -> float:
        """The deviation of weights whose output is added to x: GPT-2's, because a model adds 2 · layers outputs."""
        return self.init_std / math.sqrt(2 * self.layers)

    def head_dim(self, heads: int) -> int:
        """K, the channels of each of ``heads`` heads; UserError if they do not divide the width."""
        if self.width % heads:
            raise UserError(f"--heads: {heads} heads do not divide the width {self.width}")
        return self.width // heads

    def by_layer(self, flag: str, numbers: str) -> list[int]:
        """The numbers of an option that has one for each layer, as "4,2,2,1"; UserError for other text."""
        words = numbers.split(",")
        if len(words) != self.layers or not all(word.strip().isdecimal() and int(word) for word in words):
            raise UserError(f"{flag}: {numbers!r} is not one number for each of {self.layers} layers, allowed: {self.layers} "
                            "positive integers separated by commas")
        return [int(word) for word in words]


@dataclass(frozen=True)
class TrainOptions:
    """training"""

    out: str | None = option(
        None, "folder of the run: checkpoints, log.jsonl, curve.png; none = runs/VARIANT, or the next free one",
        metavar="DIR", group=DATA, harmless=True
    )
    overwrite: bool = option(False, "replace a run that is already in the folder", group=DATA, harmless=True)
    resume: str | None = option(
        None, "continue the run in this folder, with its own options", metavar="DIR", group=DATA, harmless=True
    )

    init_from: str | None = option(
        None, "begin with the weights of the run in this folder, on other data or another task", metavar="DIR", group=DATA,
        newer=True,
    )

    steps: int = option(1500, "optimizer steps; with --resume, counted from the very first", low=1, high=2**63 - 1, group=STEPS,
                        resumable=True)
    batch: int = option(16, "sequences in a step", low=1, high=2**20, group=STEPS)
    seed: int = option(
        0, "seed of the weights, the batches and dropout: the same seed gives the same run", low=0, high=2**63 - 1, group=STEPS
    )
    eval_every: int = option(
        250,
        "steps between evaluations on held-out data, each with an example and a checkpoint; 0 = never",
        low=0,
        group=STEPS,
        resumable=True,
    )
    save_every: int = option(0, "steps between checkpoints besides those of evaluations; 0 = none", low=0, group=STEPS,
                             resumable=True, newer=True, harmless=True)
    minutes: float | None = option(None, "end, and save, after this time; none = no limit", above=0, group=STEPS,
                                   resumable=True, newer=True)
    patience: int = option(0, "end when so many evaluations in a row did not improve the held-out loss; 0 = never", low=0,
                           group=STEPS, resumable=True, newer=True)

    lr: float = option(3e-3, "highest learning rate", above=0, group=OPTIMIZER)
    min_lr: float | None = option(
        None, "learning rate at the end of the cosine; none = a tenth of --lr", low=0, group=OPTIMIZER
    )
    warmup: int = option(100, "steps in which the learning rate rises from 0", low=0, high=2**63 - 1, group=OPTIMIZER)
    beta1: float = option(0.9, "decay of the mean of gradients", low=0, below=1, group=OPTIMIZER)
    beta2: float = option(0.99, "decay of the mean of squared gradients", low=0, below=1, group=OPTIMIZER)
    weight_decay: float = option(0.1, "per step and learning rate, on matrices only", low=0, group=OPTIMIZER)
    clip: float = option(1.0, "longest gradient, as a norm over all parameters; 0 = no limit", low=0, group=OPTIMIZER)

    device: str = _device(group=SCREEN, resumable=True)
    matmul: str = option(
        "float32", "how dense layers multiply in training steps, forward and backward: factors are float32, or rounded to "
        "11 bits (tf32, on a GPU) or 8 bits (bf16, on a GPU or a CPU with AVX512-BF16); sums, weights and all else, "
        "evaluation and sampling among it, are float32", choices=("float32", "tf32", "bf16"), group=SCREEN, resumable=True,
        newer=True,
    )
    threads: int | None = _threads("of each rank; none = every usable core, which the ranks of a machine share", group=SCREEN,
                                   resumable=True, harmless=True)
    micro_batch: int | None = option(
        None, "sequences that a thread computes at once, on which the last bits of the results depend; none = as many as have "
        "512 tokens, but at most half of --batch", low=1, high=2**20, group=SCREEN, newer=True)
    sequence_ranks: int = option(
        1, "ranks that share each sequence, where it is too long for one: each holds a part of the positions; several groups "
        "of so many ranks share the batch", low=1, high=2**20, group=SCREEN, resumable=True, newer=True, harmless=True)
    log_every: int = option(10, "steps between records in log.jsonl", low=1, group=SCREEN, resumable=True, harmless=True)
    check: bool = option(
        False, "look for NaN after every operator and name the first that makes one (slow)", group=SCREEN, resumable=True,
        harmless=True
    )

    def __post_init__(self) -> None:
        check(self)
        _check_device(self.device)
        if self.matmul == "tf32" and self.device == "cpu":
            raise UserError("--matmul tf32: this concerns a GPU, and --device is cpu, allowed: float32, bf16")
        if self.min_lr is None:
            object.__setattr__(self, "min_lr", float(f"{self.lr / 10:.6g}"))
        elif self.min_lr > self.lr:
            raise UserError(f"--min-lr: {self.min_lr} is above --lr, which is {self.lr}")


OF_SOME = ("window", "sinks", "prompt", "tokens", "stop", "beam", "length_penalty", "out", "complete", "seconds"
           )  # of sampling; Task.writes says of which


@dataclass(frozen=True)
class SampleOptions:
    """sampling"""

    prompt: str = option("", "text to continue, or the source that a model of pairs answers; - reads it from standard input")
    tokens: int | None = option(
        None, "tokens to write, of an answer at most; none = 500, or without end, until Ctrl-C, with --window or --sinks", low=1
    )
    temperature: float | None = option(
        None, "below 1 = safer, above 1 = wilder, 0 = always the likeliest token; none = 0.8, for an answer 0", low=0
    )
    top_k: int | None = option(None, "draw among the k likeliest tokens only", low=1)
    top_p: float = option(1.0, "draw among the likeliest tokens that together have this probability", above=0, high=1)
    min_p: float = option(0.0, "never draw a token that is less likely than this times the likeliest", low=0, high=1)
    repetition_penalty: float = option(
        1.0,
        "divide the logits of all tokens that stand in the prompt or the text so far by this; a negative logit is "
        "multiplied instead (Keskar et al. 2019); 1 = no penalty",
        above=0,
        high=1000,
    )
    stop: str | None = option(None, "end before this text appears in what is written")
    seed: int = option(0, "same seed, same text", low=0, high=2**63 - 1)
    count: int | None = option(None, "texts, images or sounds to write, side by side, with the seeds from --seed on; none = 1, "
                               "or 16 images", low=1, high=2**20)
    beam: int | None = option(
        None, "beginnings of an answer that are followed at once, the best one is written; none = the likeliest token is taken "
        "again and again", low=1, high=1000)
    length_penalty: float = option(
        1.0, "with --beam: the sum of an answer's log-probabilities is divided by its length to this power; 0 = not at all",
        low=0, high=100)
    out: str | None = option(None, "file for images (.png) or sounds (.wav); none = sample.png or sample.wav in DIR",
                             metavar="FILE")
    complete: float | None = option(None, "share of each image or sound that is given: the beginning of one that was held out",
                                    above=0, below=1)
    seconds: float = option(2.0, "length of a sound", above=0, high=3600)
    window: int | None = _window()
    sinks: int | None = _sinks()
    checkpoint: str = _checkpoint()

    device: str = _device()
    threads: int | None = _threads("which share what is written side by side; none = every usable core")

    def __post_init__(self) -> None:
        check(self)
        _check_device(self.device)
        if self.beam is None and self.length_penalty != 1:
            raise UserError(f"--length-penalty {self.length_penalty:g}: it ranks the answers of a beam, give --beam N")
        if self.beam is not None and (self.temperature or (self.count or 1) > 1):
            raise UserError(f"--beam {self.beam}: a beam draws nothing, so --temperature and --count do not go with it")
        declared = settings(type(self))
        for name in ("top_k", "top_p", "min_p", "repetition_penalty") if self.beam is not None else ():
            if getattr(self, name) != declared[name].default:
                raise UserError(f"{declared[name].flag}: this changes what is drawn, and --beam {self.beam} draws nothing")
        if self.stop == "":
            raise UserError("--stop: an empty text is everywhere, give at least one character")
        if self.seed + (self.count or 1) > 2**63:
            raise UserError(f"--count: {self.count} seeds from {self.seed} on end above 2**63 - 1: give a smaller --seed")
        if self.tokens is None and self.window is None and self.sinks is None:
            object.__setattr__(self, "tokens", 500)
        if self.tokens is None and (self.count or 1) > 1:
            raise UserError(f"--count {self.count}: the first text has no end without --tokens, allowed: 1")

    def drawing(self, usual: float = 0.8) -> dict[str, Any]:
        """How ``together`` writes, by its arguments; ``usual`` is the temperature of what is written, if none was given."""
        return {"temperature": usual if self.temperature is None else self.temperature, "top_k": self.top_k,
                "top_p": self.top_p, "min_p": self.min_p, "repetition_penalty": self.repetition_penalty,
                "threads": self.threads}


ONE_TEXT = "--data and --text: give one of them, the text that the model is to predict"


@dataclass(frozen=True)
class EvalOptions:
    """evaluation"""

    data: str = option("", "the text of a file, of a folder (every file in it), or of standard input (-); images, sound, "
                       "pairs, or recordings with transcripts for a model of them", metavar="PATH")
    text: str | None = option(None, "the text itself; none = that of --data")
    encoding: str = _encoding()
    per_character: bool = option(False, "list every character of the text with the bits that it cost")
    strided: bool = option(False, "a model that reads patches (megabyte) takes two passes, half a patch apart, each of which "
                           "predicts the first halves of its patches")
    checkpoint: str = _checkpoint()
    device: str = _device()

    def __post_init__(self) -> None:
        check(self)
        _check_device(self.device)
        if self.data and self.text is not None:
            raise UserError(ONE_TEXT)


@dataclass(frozen=True)
class ConvertOptions:
    """conversion"""

    kv_heads: int = option(1, "heads of keys and values of the new model; they divide those of the old one", low=1)
    pool: str = option("mean", "what a new head is made of: the mean of the old heads of its group, the first of them, or "
                       "random numbers", choices=("mean", "first", "random"))
    out: str | None = option(None, "folder of the new run; none = DIR-N-kv-heads", metavar="DIR")
    seed: int = option(0, "seed of random heads and of further training", low=0, high=2**63 - 1)
    checkpoint: str = _checkpoint()

    __post_init__ = check


@dataclass(frozen=True)
class ImportOptions:
    """import"""

    out: str | None = option(None, "folder of the new run; none = runs/ and the name of FOLDER", metavar="DIR")

    __post_init__ = check


@dataclass(frozen=True)
class ExportOptions:
    """export"""

    format: str = option("huggingface", "how the model is written: config.json and model.safetensors, as the package "
                         "transformers reads them", choices=("huggingface",))
    out: str | None = option(None, "new folder for the files; none = DIR-huggingface", metavar="DIR")
    checkpoint: str = _checkpoint()

    __post_init__ = check


@dataclass(frozen=True)
class StreamOptions:
    """streaming"""

    data: str = option("", "the text of a file, of a folder (every file in it), or of standard input (-); without it, the "
                       "source of Python's standard library", metavar="PATH")
    encoding: str = _encoding()
    window: int | None = _window()
    sinks: int | None = _sinks()
    tokens: int | None = option(None, "read no more than this of the text; none = all of it", low=2)
    recompute: int = option(100, "tokens in each range of positions that recomputation, which is slow, predicts; 0 = none",
                            low=0)
    out: str | None = option(None, "picture to write: .png, .svg or .pdf; none = DIR/stream.png", metavar="FILE")
    checkpoint: str = _checkpoint()
    device: str = _device()

    def __post_init__(self) -> None:
        check(self)
        _check_device(self.device)


@dataclass(frozen=True)
class ExploreOptions:
    """exploring"""

    text: str = option("", "text to show, of a file, of a folder, or of standard input (-); without it, what the run held out",
                       metavar="PATH")
    encoding: str = option("utf-8", "how characters are written in --text: utf-8, utf-16, latin-1, cp1252, ...", metavar="NAME")
    tokens: int = option(64, "positions that the matrices show, at most; fewer where the page would become too large", low=2,
                         high=512)
    out: str | None = option(None, "page to write, .html; none = explore.html in the folder", metavar="FILE")
    checkpoint: str = _checkpoint()

    __post_init__ = check


@dataclass(frozen=True)
class TranscribeOptions:
    """transcription"""

    beam: int = option(1, "transcripts that are followed at a time (prefix beam search); 1 = the best class of every frame",
                       low=1, high=1000)
    stream: bool = option(False, "read the sound piece by piece and write words when they are known, with a model that was "
                                 "trained with --chunk")
    say: str | None = option(None, "digits, such as three one four, that a computed voice says in place of a file",
                             metavar="WORDS")
    speaker: int = option(2_000_000, "number of that voice; training hears none from 1,000,000 on, "
                         "where those that are held out begin", low=0, high=2**31)
    picture: str | None = option(None, "picture of the spectrogram, the probabilities and the alignment: .png, .svg or .pdf",
                                 metavar="FILE")
    checkpoint: str = _checkpoint()
    device: str = _device()

    def __post_init__(self) -> None:
        check(self)
        _check_device(self.device)
        if self.say is None and self.speaker != 2_000_000:
            raise UserError("--speaker: this is the voice of --say, which is not given")
        if self.stream and self.beam > 1:
            raise UserError(f"--beam {self.beam}: a stream is read by the best class of every frame, allowed with --stream: 1")


@dataclass(frozen=True)
class CheckOptions:
    """checking"""

    all: bool = option(False, "check every operator and every variant, and print a summary")
    shape: str = option("", "sizes at which values and gradients are compared as well, by the letters of the signature, as in "
                        "\"B=2 T=1000 H=4 K=64\"; of models B T D H L: batch, context, width, heads, layers", metavar="SIZES")
    dtype: str | None = option(None, "dtype of what is compared with float64; none = kernels in float32, as models train, and "
                               "forms in both", choices=("float32", "float64"))
    forms: str | None = option(None, "forms and kernels, with commas between their names; none = all", metavar="NAMES")
    scale: str = option("1,10,100", "sizes (root mean squares) of the keys, or else of the first input, with which errors are "
                        "measured over the length T", metavar="NUMBERS")
    draws: int = option(5, "calls of an operator for each check", low=1, high=10**6)
    models: int = option(1, "models of a variant for each law", low=1, high=10**6)
    seed: int = option(0, "seed of all draws", low=0, high=2**31)
    processes: int | None = option(None, "processes that share the work; none = one for each core", low=1, high=1024)
    json: str | None = option(None, "file for everything that was found", metavar="FILE")
    device: str = _device()

    def __post_init__(self) -> None:
        check(self)
        _check_device(self.device)
        _check_json(self.json)


@dataclass(frozen=True)
class ClaimsOptions:
    """measurement"""

    fast: bool = option(False, "few and small sizes and short trainings, as it is without --full: some minutes for all")
    full: bool = option(False, "more and larger sizes and longer trainings: most of an hour for all")
    json: str | None = option(None, "file for all that was measured; rows that it has already are replaced", metavar="FILE")

    def __post_init__(self) -> None:
        check(self)
        _check_json(self.json)
        if self.fast and self.full:
            raise UserError("--fast and --full: give one of them")


def _check_json(path: str | None) -> None:
    """What takes minutes to measure has a place where it can be written."""
    if path is None:
        return
    if not path:
        raise UserError("--json: an empty text is no file")
    folder = os.path.dirname(path) or "."
    if "\0" in path or not os.path.isdir(folder):
        raise UserError(f"--json {path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise UserError(f"--json {path}: this is a folder, allowed: a file")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"--json {path}: it cannot be written there")


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device: {device!r} is unknown, allowed: cpu, cuda, cuda:0, cuda:1, ...")


# A preset states what differs from the defaults above; "tiny" is the defaults. A variant without one of the options
# (heads, for example) ignores that entry.
# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "nanogpt-cpu": dict(
        context=64, batch=12, layers=4, heads=4, width=128, dropout=0.0, bias=False, tied=True,
        steps=2000, lr=1e-3, warmup=100, beta1=0.9, beta2=0.99, weight_decay=0.1, clip=1.0,
    ),
    "small": dict(
        context=256, batch=16, layers=6, heads=6, width=384, dropout=0.2, bias=False, tied=True,
        steps=5000, lr=1e-3, warmup=100, beta1=0.9, beta2=0.99, weight_decay=0.1, clip=1.0,
    ),
}
DEFAULT_PRESET = "tiny"

# What other programs call the same thing: suggested in the error for an unknown option.
SYNONYMS = {
    "batch_size": "batch", "block_size": "context", "context_length": "context", "d_model": "width", "dataset": "data",
    "dim": "width", "epochs": "steps", "eval_interval": "eval_every", "force": "overwrite",
    "gpu": "device", "grad_clip": "clip", "input": "data", "learning_rate": "lr", "length": "tokens",
    "log_interval": "log_every",
    "max_iters": "steps", "max_new_tokens": "tokens", "max_steps": "steps", "n_embd": "width", "n_head": "heads",
    "n_layer": "layers", "n_layers": "layers", "n_heads": "heads", "num_heads": "heads", "num_layers": "layers",
    "num_samples": "count", "num_threads": "threads", "out_dir": "out", "output": "out",
    "rep_penalty": "repetition_penalty", "seq_len": "context", "start": "prompt", "warmup_iters": "warmup",
}
# fmt: on
