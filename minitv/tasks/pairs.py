"""Pairs: a source is answered with a target, such as a string of digits with the same string reversed.

    --rule     source → target           what a model must learn
    reverse    31415 → 51413             to find the token at the same distance from the other end
    sort       31415 → 11345             to count each digit
    add        27+15 → 42                to add digits of the same place, and to carry
    all        r31415, s31415 and 27+15, a third of each: the source says what to do

The length of a string is drawn evenly from --shortest to --longest, and then its digits. A number has at most half of --longest
digits, rounded up, and does not begin with 0 unless it has one digit. Every step draws new pairs. With --data the pairs come
from a file: a line is a source, a tab, and its target; each pass over the file takes all of them in a new order.

A token is a character, and one more id is the end sign #. Two pairs in a batch, of the rule reverse:

    source    7 7 3 #      9 8 # -         what the encoder reads; - is padding
    inputs    # 3 7 7      # 8 9 -         what the decoder reads: the target, one place later
    labels    3 7 7 #      8 9 # -         what is asked after each token that it reads; nothing is asked at -

The loss is the mean cross-entropy of all labels, the end signs among them.

A tenth of all different sources is held out. The checksum of a source says on which side it is, so no source that is asked for
in an evaluation is ever trained on, however short it is and however often it comes.

The metric, sequence accuracy, is the share of targets that are right as a whole when the likeliest token is taken again and
again. An evaluation need not write for that. It reads the right target, and looks whether each of its tokens is the likeliest
after those before it. If all of them are, the model would write just this target. If not, it would write another token at the
first place where they differ. A single wrong digit makes a target wrong, so this share can be small while most digits are
right. ``minitv compare`` says after how many steps each variant reached 0.9.

Two baselines do not learn: they answer with the source itself, which is right where 454 is to be reversed, and with the
commonest target of other pairs.

    minitv train one-wide-ffn --rule add                               pairs that are drawn
    minitv train encoder-decoder --data pairs.tsv --context 128        a source and a target have at most 127 characters
    minitv sample DIR --prompt 27+15                                   the likeliest tokens; --beam 4 searches for more
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import numpy as np

from autograd import cross_entropy, no_grad, to_numpy
from autograd.device import beside
from autograd.random import Random

from ..config import check, option
from ..errors import CheckpointError, UserError, quoted
from ..models.encdec import PADDING, EncoderDecoder, padded
from ..options import DATA
from ..report import count, tell
from ..sources import Reader, check_encoding
from ..task import EVERYTHING, NOTHING, Batch, Task
from ..tokenizer import CharTokenizer, from_json
from ._drawn import HELD_OUT, DrawnOptions, check_drawn

DIGITS = "0123456789"
SHARE = 10  # one of so many sources is held out
TURNS = 200  # of drawing, for sources on the side that is asked for
COMMONEST = Random(3).split(2**63)  # pairs of which a baseline learns, the same for every seed of a run
LEARNED = 5000
SHOWN = 4  # pairs on the screen

Texts = list[tuple[str, str]]  # sources with their targets


@dataclass(frozen=True)
class PairsOptions(DrawnOptions):
    """pairs"""

    data: str = option("", "file, folder, pipe, or - for standard input, with a source, a tab and its target in each line; "
                       "without it, pairs are drawn", metavar="PATH", group=DATA, resumable=True, harmless=True)
    encoding: str = option("utf-8", "how characters are written in the file: utf-8, utf-16, latin-1, cp1252, ...",
                           metavar="NAME", group=DATA, resumable=True, harmless=True)
    rule: str = option(
        "reverse", "target of a string of digits: the string reversed, its digits sorted, the sum of two numbers, or all, "
        "where the source begins with r, with s, or with a number", choices=("reverse", "sort", "add", "all"))
    shortest: int = option(1, "digits of a string or a number, at least", low=1, high=2**16)
    longest: int = option(10, "digits of a string, at most; a number has at most half of that, rounded up", low=1, high=2**16)

    def __post_init__(self) -> None:
        check(self)
        check_encoding(self.encoding)
        if self.shortest > self.longest:
            raise UserError(f"--shortest: {self.shortest} is more than --longest {self.longest}")
        if self.rule in ("add", "all") and self.shortest > self.number:
            raise UserError(f"--shortest: {self.shortest} is more than the {self.number} digits that a number has with "
                            f"--longest {self.longest}")

    @property
    def number(self) -> int:
        """The digits of a number, at most."""
        return -(-self.longest // 2)


class Pair(NamedTuple):
    """Some pairs: the sources, the targets so far, and the token that is asked for after each; see models/encdec.py."""

    source: np.ndarray  # ids [B S], each row with its end sign, padded behind it
    inputs: np.ndarray  # ids [B T], each row begins with the end sign
    labels: np.ndarray  # ids [B T], NOTHING behind the end sign

    part = Batch.part

    @property
    def length(self) -> int:
        """The positions of a pair."""
        return self.source.shape[1] + self.inputs.shape[1]

    @property
    def tokens(self) -> int:
        """How many tokens are read, padding among them."""
        return self.source.size + self.inputs.size


class Pairs(Task, name="pairs", summary="an answer to each source: a string reversed or sorted, a sum, or what a file says"):
    """Ids of the characters, and one more, the last one, that ends each sequence and begins each target."""

    Options = PairsOptions
    causal = None
    reads = EncoderDecoder.reads
    defaults: ClassVar[dict[str, Any]] = {"batch": 64, "steps": 1000, "eval_every": 100}
    metric, goal = "sequence accuracy", 0.9
    hashed = "pairs_sha256"
    judged = "accuracy", "token", "pairs"
    writes = ("prompt", "tokens", "stop", "beam", "length_penalty")
    after = "ask it with: minitv sample {directory} --prompt SOURCE"

    def __init__(self, options: PairsOptions, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        self.options, self._context, self._count, self._random = options, context, batch, Random(seed)
        self._texts: dict[bool, Texts] | None = None  # of a file: False, those that are trained on, True, those held out
        self.sha256, self.description = None, "pairs that are drawn"
        began = None if saved is None else saved.get("pairs_sha256", EVERYTHING)
        if saved is None:
            check_drawn(options, "pairs that are drawn", "rule", "shortest", "longest")
        self._everything = self.holds_out_all(saved)  # is held out
        alphabet = self._open() if options.data else self._fitting()
        self.tokenizer = CharTokenizer.train(alphabet) if saved is None else self.stored_tokenizer(saved)
        if saved is not None and began not in (self.sha256, EVERYTHING):
            what = "pairs that are drawn, without --data" if began is None else "the pairs of another file"
            raise UserError(f"--data {options.data or 'is not given'}: this run began with {what}")
        if unknown := sorted(set(alphabet) - set(self.tokenizer.characters)):
            where = f"--data {options.data}" if options.data else f"--rule {options.rule}"
            raise UserError(f"{where}: the model does not know {quoted(''.join(unknown))}, it knows the characters "
                            f"{quoted(self.tokenizer.characters)}")
        self.end = self.tokenizer.vocab
        self.vocab = self.end + 1
        if self._texts is not None:
            encode = self.tokenizer.encode
            self._ids = [(encode(source), encode(target)) for source, target in self._texts[False]]
            self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.intp))

    # -- pairs that are drawn

    def _fitting(self) -> str:
        """The characters of the pairs; UserError where they do not fit the context."""
        rule, longest, number = self.options.rule, self.options.longest, self.options.number
        source = {"add": 2 * number + 1, "all": max(2 * number, longest) + 1}.get(rule, longest)
        if source >= self._context:
            raise UserError(f"--longest: a source of {source} characters and its end do not fit --context {self._context}: "
                            "give fewer digits, or a longer --context")
        return DIGITS + {"add": "+", "all": "+rs"}.get(rule, "")

    def draw(self, random: Random, number: int, held_out: bool) -> Texts:
        """So many pairs of one side, a function of the source of randomness alone."""
        texts: Texts = []
        share = 1 / SHARE if held_out else 1 - 1 / SHARE
        for turn in range(TURNS):
            candidates = self._candidates(random.split(turn), int(1.2 * number / share) + SHARE)
            texts += [pair for pair in candidates if is_held_out(pair[0]) == held_out]
            if len(texts) >= number:
                return texts[:number]
        raise UserError(f"--longest: {self.options.longest} digits make so few sources that {'none' if held_out else 'each'} "
                        "is held out: give a larger --longest")

    def _candidates(self, random: Random, count: int) -> Texts:
        options, rules, pairs = self.options, ("reverse", "sort", "add"), []
        digits = random.split(0).integers(0, 10, (count, options.longest + 1)).astype("U1")  # one more for a second number
        chosen = random.split(1).integers(0, 3, count) if options.rule == "all" else [rules.index(options.rule)] * count
        marks = ("r", "s") if options.rule == "all" else ("", "")
        uniforms = random.split(2).uniform((count, 4), np.float64)

        def size(uniform: float, longest: int) -> int:
            return options.shortest + int(uniform * (longest - options.shortest + 1))

        for row, rule, (one, two, *firsts) in zip(map("".join, digits), chosen, uniforms.tolist(), strict=True):
            if rules[rule] == "add":
                parts = row[: size(one, options.number)], row[options.number :][: size(two, options.number)]
                a, b = (part if len(part) == 1 else DIGITS[1 + int(9 * first)] + part[1:]
                        for part, first in zip(parts, firsts, strict=True))
                pairs.append((f"{a}+{b}", str(int(a) + int(b))))
            else:
                text = row[: size(one, options.longest)]
                pairs.append((marks[rule] + text, text[::-1] if rules[rule] == "reverse" else "".join(sorted(text))))
        return pairs

    # -- pairs of a file

    def _open(self) -> str:
        """Read the file into ``_texts``; returns its characters."""
        pairs, self.description, self.sha256 = read_pairs(self.options.data, self.options.encoding, self._context)
        if not pairs:
            raise UserError(f"--data: {self.description}: there is no pair, allowed: lines of a source, a tab and a target")
        self._texts = {side: [pair for pair in pairs if (self._everything or is_held_out(pair[0])) == side]
                       for side in (False, True)}
        for side, purpose in ((False, "to train on"), (True, "held out")):
            if not (self._texts[side] or self._everything):
                raise UserError(f"--data: {self.description} has {len(pairs)} pairs, and none of them is {purpose}: one of "
                                f"{SHARE} different sources is held out, by its checksum; give more pairs")
        return "".join(sorted(set().union(*map(set, chain.from_iterable(pairs)))))

    def _rows(self, step: int) -> list[int]:
        """The numbers of a step's pairs: each pass over the file takes all of them in a new order."""
        rows, pairs = [], len(self._ids)
        for i in range(step * self._count, (step + 1) * self._count):
            if self._order[0] != i // pairs:
                self._order = i // pairs, self._random.split(i // pairs).permutation(pairs)
            rows.append(int(self._order[1][i % pairs]))
        return rows

    # -- batches

    def batch(self, step: int) -> Pair:
        if self._texts is not None:
            return _batch([self._ids[row] for row in self._rows(step)], self.end)
        return encoded(self.draw(self._random.split(step), self._count, held_out=False), self.tokenizer)

    @functools.cached_property
    def examples(self) -> Texts:
        """The held-out pairs, the same at every evaluation and for every seed."""
        number = self.options.eval_examples
        if self._texts is None:
            return self.draw(HELD_OUT, number, held_out=True)
        number = None if self._everything else number
        return sorted(self._texts[True], key=lambda pair: hashlib.sha256("\t".join(pair).encode()).digest())[:number]

    @functools.cached_property
    def _held_out(self) -> Pair:
        return encoded(self.examples, self.tokenizer)

    def held_out(self) -> Pair:
        return self._held_out

    # -- figures

    def score(self, model: Any, batch: Pair) -> np.ndarray:
        """Sums: cross-entropy in nats, tokens, right tokens, pairs, pairs whose tokens are all right."""
        with no_grad():
            logits, labels = self.answers(model, batch)
            labels = labels.reshape(-1)
            nats = cross_entropy(logits.reshape(-1, logits.shape[-1]), beside(labels, logits.data), reduction="sum").item()
            right = to_numpy(logits.data).argmax(-1).reshape(-1) == labels
        rows = np.nonzero(batch.labels != NOTHING)[0]
        wrong = np.unique(rows[~right])
        return np.array([nats, labels.size, right.sum(), len(batch.labels), len(batch.labels) - len(wrong)])

    def value(self, sums: np.ndarray) -> float:
        return float(sums[4] / sums[3])

    def asked(self, sums: np.ndarray) -> int:
        return int(sums[3])

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """The share of targets that are the source itself, and that are the commonest target of other pairs."""
        others = self.draw(COMMONEST, LEARNED, held_out=False) if self._texts is None else self._texts[False] or self.examples
        commonest = Counter(target for _, target in others).most_common(1)[0][0]
        asked = self.examples
        return {"copy of the source": sum(source == target for source, target in asked) / len(asked),
                "commonest target": sum(target == commonest for _, target in asked) / len(asked)}

    def about(self) -> list[tuple[str, str]]:
        rows = super().about()
        if self._texts is not None:
            rows.insert(0, ("pairs", f"{self.description}: {count(len(self._texts[False]))} to train on, "
                                     f"{count(len(self._texts[True]))} held out, sha256 {self.sha256[:16]}"))
        return rows

    def word(self, token: int) -> str:
        return "#" if token == self.end else "-" if token == PADDING else self.tokenizer.decode([token])

    def show(self, model: Any, rng: Random) -> str:
        """Held-out sources with the model's targets, and the right ones where they differ."""
        rows = [int(i) for i in rng.integers(0, len(self.examples), SHOWN)]
        pairs = [self.examples[i] for i in rows]
        limit = self._held_out.labels.shape[1]
        answers = model.greedy(self._held_out.source[rows], limit)
        lines = []
        for (source, target), ids in zip(pairs, answers, strict=True):
            answer = self.tokenizer.decode(ids)
            lines.append(f"{source} → {answer}" + ("" if answer == target else f"   wrong, it is {target}"))
        return "\n".join(lines)

    # -- checkpoints

    def state(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.to_json(), "pairs_sha256": self.sha256}

    @classmethod
    def stored_tokenizer(cls, saved: Mapping[str, Any]) -> Any:
        if not isinstance(saved.get("tokenizer"), Mapping):
            raise CheckpointError("the checkpoint has no tokenizer")
        tokenizer = from_json(saved["tokenizer"])
        if tokenizer.kind != "char":
            raise CheckpointError(f"the checkpoint has a tokenizer of the kind {tokenizer.kind}, and pairs have characters")
        return tokenizer

    @classmethod
    def stored_vocab(cls, saved: Mapping[str, Any]) -> int:
        return cls.stored_tokenizer(saved).vocab + 1

    @staticmethod
    def inherited(saved: Mapping[str, Any]) -> dict[str, Any]:
        return {"tokenizer": saved.get("tokenizer")}


def read_pairs(path: str, encoding: str, context: int) -> tuple[Texts, str, str]:
    """The pairs of a file as ``--data`` names it, a few words about it, and the SHA-256 of its lines.

    UserError names a line that is no pair, or that does not fit a context.
    """
    source = Reader("--data", encoding, False, _tell, "").open(path)
    digest, pairs = hashlib.sha256(), []
    for document in source.documents:
        for number, line in enumerate("".join(document.texts()).removesuffix("\n").split("\n"), 1):
            digest.update(line.encode() + b"\n")
            pairs.append(_pair(line.removesuffix("\r"), f"{document.where}, line {number}", context))
    return pairs, source.description, digest.hexdigest()


def _pair(line: str, where: str, context: int) -> tuple[str, str]:
    """A source and its target; UserError if the line is no pair, or does not fit a context."""
    parts = line.split("\t")
    if len(parts) != 2 or not all(parts):
        wrong = ("it is empty" if not line else "it has no tab" if len(parts) == 1 else
                 f"it has {len(parts) - 1} tabs" if len(parts) > 2 else
                 f"its {'target' if parts[0] else 'source'} is empty")
        raise UserError(f"{where}, {quoted(line)}: {wrong}, allowed: a source, a tab and a target")
    for what, text in zip(("source", "target"), parts, strict=True):
        if len(text) >= context:
            raise UserError(f"{where}: its {what} has {len(text)} characters, and with its end it does not fit --context "
                            f"{context}: give a longer --context")
    return parts[0], parts[1]


def encoded(pairs: Texts, tokenizer: CharTokenizer) -> Pair:
    """A batch of pairs; UserError names a character that is not known."""
    return _batch([(tokenizer.encode(source), tokenizer.encode(target)) for source, target in pairs], tokenizer.vocab)


def _batch(pairs: list[tuple[np.ndarray, np.ndarray]], end: int) -> Pair:
    labels = padded([target for _, target in pairs], end)  # [B T]
    target = np.concatenate([np.full((len(labels), 1), end), labels[:, :-1]], axis=1)
    return Pair(padded([source for source, _ in pairs], end), np.where(labels == NOTHING, PADDING, target), labels)


def is_held_out(source: str) -> bool:
    """Whether a source is held out, by its checksum."""
    return zlib.crc32(source.encode()) % SHARE == 0


def _tell(text: str) -> None:
    tell(text, "note      ")
