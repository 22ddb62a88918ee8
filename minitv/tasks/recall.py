"""Recall: sequences whose answers stand in the sequence itself, so that a model needs memory and no knowledge.

    mqar                 k v k v k v . . k . . . k . k       after each key of the second part: its value
    associative-recall   k v k v k v k v => k                after the last key: its value
    induction            c a b => d a c b b =>               after the last =>: what followed the first one
    copy                 a c b c | a c b                     after | and all that follows: the first part again
    selective-copy       . a . . c . b . ? ? ?               at each ?: the next of the letters

An answer is asked at the position of the token after which it would come. Every step draws new sequences. An accuracy near that
of the baseline "commonest value seen" means that a model knows which values are there, and not what belongs to what.
"""

from __future__ import annotations

import functools
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np

from autograd import no_grad, to_numpy
from autograd.random import Random

from ..config import check, option
from ..errors import UserError
from ..task import NOTHING, Batch
from ._drawn import Drawn, DrawnOptions, choose, fitting_length

LENGTH = "tokens of a sequence; none = --context"
EVERY_TOKEN = "train on every next token of the sequence, not on the answer alone"


class Recall(Drawn):
    """What the tasks of this module share: baselines and how a sequence is shown."""

    goal = 0.9

    values: int  # how many different answers there are

    def seen(self, inputs: np.ndarray) -> np.ndarray:
        """Where the inputs [B T] hold what may be an answer, as bool[B T]."""
        raise NotImplementedError

    def word(self, token: int) -> str:
        """How a token is written."""
        raise NotImplementedError

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """A guess among all values, and a guess among those that are commonest in the sequence: 1/K for K distinct ones."""
        batch = self.held_out()
        places = self.seen(batch.inputs)
        counts = np.zeros((len(batch.inputs), self.vocab), int)  # [B V]
        np.add.at(counts, (np.nonzero(places)[0], batch.inputs[places]), 1)
        commonest = counts == counts.max(axis=1, keepdims=True)
        rows, positions = np.nonzero(batch.labels != NOTHING)
        hits = commonest[rows, batch.labels[rows, positions]] / commonest[rows].sum(axis=1)
        return {"chance": 1 / self.values, "commonest value seen": float(hits.mean())}

    def show(self, model: Any, rng: Random) -> str:
        """A held-out sequence with the model's answers."""
        held_out = self.held_out()
        row = int(rng.integers(0, len(held_out.inputs)))
        batch = held_out.part(slice(row, row + 1))
        with no_grad():
            logits, labels = self.answers(model, batch)
        answers = iter(to_numpy(logits.data).argmax(axis=-1).reshape(-1).tolist())
        words, right = [], 0
        for token, label in zip(batch.inputs[0].tolist(), batch.labels[0].tolist(), strict=True):
            text = self.word(token)
            if label != NOTHING:
                answer = next(answers)
                right += answer == label
                text += f":{self.word(answer)}" + ("" if answer == label else f"({self.word(label)})")
            words.append(text)
        note = "after a colon stands the model's answer, and in brackets the right one where it differs"
        return "\n".join([
            *textwrap.wrap(" ".join(words), width=100, break_long_words=False, break_on_hyphens=False),
            f"{right} of {labels.size} right; {note}",
        ])


def _letter(i: int, count: int) -> str:
    return chr(ord("a") + i) if count <= 26 else f"s{i}"


def _following(inputs: np.ndarray, answers: np.ndarray, every_token: bool) -> np.ndarray:
    """Labels [B T]: the answers [B] at the last position, and before it what comes next if every token is asked."""
    labels = np.full(inputs.shape, NOTHING)  # [B T]
    if every_token:
        labels[:, :-1] = inputs[:, 1:]
    labels[:, -1] = answers
    return labels


class LastAnswer(Recall):
    """One answer at the end; held-out sequences ask for it alone, training sequences for every token if an option says so."""

    def held_out(self) -> Batch:
        inputs, labels = super().held_out()
        return Batch(inputs, _following(inputs, labels[:, -1], False))


# -- mqar --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MQAROptions(DrawnOptions):
    """mqar"""

    pairs: int = option(8, "keys of a sequence, each with a value; every one is asked for once", low=1, high=2**16)
    symbols: int = option(128, "different tokens: one that fills, keys in the lower half, values in the upper half", low=4,
                          high=2**14)
    length: int | None = option(None, LENGTH, low=4, high=2**20)
    power: float = option(0.01, "a question at the g-th place after the pairs has the weight g^(power - 1); 1 = all alike",
                          above=0, high=1)
    random_fillers: bool = option(False, "between the questions stand tokens of any kind instead of one that fills")

    __post_init__ = check


class MQAR(Recall, name="mqar", summary="many keys with values, then each key again (multi-query associative recall)"):
    """Arora et al. 2023, arXiv 2312.04927, in the distribution of their program zoology (multiquery_ar, one pass).

    K distinct keys of 1 ... V/2 - 1 and K distinct values of V/2 ... V - 1 stand first, in turn. The rest is cut into slots of
    two tokens; slot g has the weight a (g + 1)^(a - 1). One slot a key is drawn without replacement, in the order of the keys,
    and the key stands at its first token, where its value is asked for. All other tokens are 0, or any of the V.
    zoology trains on a stored set of sequences and asks for V > T; here each is new, and V may be as small as the keys allow.
    """

    Options = MQAROptions

    def prepare(self, context: int) -> None:
        options = self.options
        self.vocab, pairs = options.symbols, options.pairs
        length = fitting_length(options.length, context)
        if options.length and length % 2:
            raise UserError(f"--length: {length} is odd, and pairs of tokens need an even number")
        self.length = length - length % 2
        if 4 * pairs > self.length:
            raise UserError(f"--pairs: {pairs} pairs and their questions take {4 * pairs} tokens, and a sequence has "
                            f"{self.length}: give at most {self.length // 4} pairs, or longer sequences with --context")
        if pairs > self.vocab // 2 - 1:
            raise UserError(f"--symbols: of {self.vocab} tokens {self.vocab // 2 - 1} are keys, fewer than --pairs {pairs}: "
                            f"give at least {2 * pairs + 2} symbols")
        self.values = self.vocab - self.vocab // 2
        slots = (self.length - 2 * pairs) // 2
        self._weights = np.arange(1.0, slots + 1) ** (options.power - 1)  # [slots]

    def draw(self, random: Random, count: int) -> Batch:
        pairs, half = self.options.pairs, self.vocab // 2
        keys = 1 + choose(random.split(0), count, half - 1, pairs)  # [B K]
        values = half + choose(random.split(1), count, self.values, pairs)  # [B K]
        slots = choose(random.split(2), count, len(self._weights), pairs, self._weights)  # [B K]
        shape = count, self.length
        fillers = self.vocab if self.options.random_fillers else 1
        inputs = random.split(3).integers(0, fillers, shape)  # [B T]
        inputs[:, : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        labels = np.full(shape, NOTHING)  # [B T]
        np.put_along_axis(inputs, 2 * pairs + 2 * slots, keys, axis=1)
        np.put_along_axis(labels, 2 * pairs + 2 * slots, values, axis=1)
        return Batch(inputs, labels)

    def seen(self, inputs: np.ndarray) -> np.ndarray:
        mask = np.zeros(inputs.shape, bool)
        mask[:, 1 : 2 * self.options.pairs : 2] = True
        return mask

    def word(self, token: int) -> str:
        half = self.vocab // 2
        return "." if token == 0 else f"k{token}" if token < half else f"v{token - half}"


# -- associative recall ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AssociativeRecallOptions(DrawnOptions):
    """associative-recall"""

    symbols: int = option(20, "different tokens: keys, as many values, and two signs", low=4, high=2**14)
    length: int | None = option(None, LENGTH, low=4, high=2**20)
    absent: bool = option(False, "ask for any key; the answer is a full stop when the sequence does not have it")
    question_first: bool = option(
        False, "the key that is asked for stands before the pairs, so that a model knows what to look for while it reads them",
        newer=True)
    every_token: bool = option(True, EVERY_TOKEN)

    __post_init__ = check


class AssociativeRecall(LastAnswer, name="associative-recall", summary="pairs of key and value, then one key: which value?"):
    """Dao et al. 2022, arXiv 2212.14052 (H3), in the distribution of the program safari (Poli et al. 2023, arXiv 2302.10866).

    Each sequence has its own map from keys to values. Its pairs have random keys, which repeat; the last key is one of them.
    With ``--question-first`` it stands at the beginning, and the sign => at the end, as the question stands in prompts of
    Peng et al. 2023, arXiv 2305.13048.
    """

    Options = AssociativeRecallOptions

    def prepare(self, context: int) -> None:
        options = self.options
        self.vocab, self._keys = options.symbols, (options.symbols - 2) // 2
        self._stop, self._arrow = self.vocab - 2, self.vocab - 1
        self.values = self._stop - self._keys + options.absent
        self._pairs = (fitting_length(options.length, context) - 2) // 2
        if self._pairs < 1:
            raise UserError(f"--context: {context} is too short, a pair, a sign and a key need at least 4 tokens")

    def draw(self, random: Random, count: int) -> Batch:
        rows = np.arange(count)
        values = random.split(0).integers(self._keys, self._stop, (count, self._keys))  # [B keys]
        keys = random.split(1).integers(0, self._keys, (count, self._pairs))  # [B pairs]
        present = np.zeros((count, self._keys), bool)
        np.put_along_axis(present, keys, True, axis=1)
        score = random.split(2).uniform((count, self._keys), np.float64)
        queries = np.argmax(score if self.options.absent else np.where(present, score, -1), axis=1)  # [B]
        inputs = np.empty((count, 2 * self._pairs + 2), int)  # [B T]
        first = int(self.options.question_first)
        pairs = inputs[:, first : first + 2 * self._pairs]
        pairs[:, ::2], pairs[:, 1::2] = keys, np.take_along_axis(values, keys, axis=1)
        asked, sign = (0, -1) if first else (-1, -2)
        inputs[:, asked], inputs[:, sign] = queries, self._arrow
        answers = np.where(present[rows, queries], values[rows, queries], self._stop)  # [B]
        return Batch(inputs, _following(inputs, answers, self.options.every_token))

    def seen(self, inputs: np.ndarray) -> np.ndarray:
        return (inputs >= self._keys) & (inputs < self._stop)

    def word(self, token: int) -> str:
        if token >= self._stop:
            return "=>" if token == self._arrow else "."
        return f"k{token}" if token < self._keys else f"v{token - self._keys}"


# -- induction ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InductionOptions(DrawnOptions):
    """induction"""

    symbols: int = option(20, "different tokens: the sign => and those that stand around it", low=3, high=2**14)
    length: int | None = option(None, LENGTH, low=3, high=2**20)
    every_token: bool = option(False, EVERY_TOKEN)

    __post_init__ = check


class Induction(LastAnswer, name="induction", summary="which token followed the sign => when it stood there before?"):
    """Dao et al. 2022, arXiv 2212.14052 (H3): random tokens, the sign => at a random place among them, and again at the end."""

    Options = InductionOptions

    def prepare(self, context: int) -> None:
        self.vocab, self.values = self.options.symbols, self.options.symbols - 1
        self.length = fitting_length(self.options.length, context)
        if self.length < 3:
            raise UserError(f"--context: {context} is too short, two signs and a token between them need at least 3 tokens")

    def draw(self, random: Random, count: int) -> Batch:
        rows, arrow = np.arange(count), self.values
        inputs = random.split(0).integers(0, arrow, (count, self.length))  # [B T]
        place = random.split(1).integers(0, self.length - 2, (count,))  # [B]
        inputs[rows, place] = inputs[:, -1] = arrow
        return Batch(inputs, _following(inputs, inputs[rows, place + 1], self.options.every_token))

    def seen(self, inputs: np.ndarray) -> np.ndarray:
        return inputs < self.values

    def word(self, token: int) -> str:
        return "=>" if token == self.values else _letter(token, self.values)


# -- copy --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyOptions(DrawnOptions):
    """copy"""

    symbols: int = option(17, "different tokens: those that are copied, and a sign after them", low=2, high=2**14)
    length: int | None = option(None, LENGTH, low=2, high=2**20)
    repeats: int = option(1, "how often the first part is to be written", low=1, high=2**16)
    reverse: bool = option(False, "it is to be written from its end to its beginning")

    __post_init__ = check


class Copy(Recall, name="copy", summary="write the first part of the sequence again"):
    """n random tokens, a sign, and the tokens again: at the sign and after it, the next one is asked for."""

    Options = CopyOptions

    def prepare(self, context: int) -> None:
        options = self.options
        self.vocab, self.values = options.symbols, options.symbols - 1
        length = fitting_length(options.length, context)
        self._part = length // (1 + options.repeats)
        if self._part < 1:
            raise UserError(f"--repeats: a token and {options.repeats} copies do not fit sequences of {length} tokens: "
                            f"give at most {length - 1} repeats, or longer sequences with --context")

    def draw(self, random: Random, count: int) -> Batch:
        part = random.integers(0, self.values, (count, self._part))  # [B n]
        copies = np.tile(part[:, ::-1] if self.options.reverse else part, (1, self.options.repeats))  # [B n·repeats]
        sign = np.full((count, 1), self.values)
        inputs = np.concatenate([part, sign, copies[:, :-1]], axis=1)  # [B T]
        labels = np.full(inputs.shape, NOTHING)
        labels[:, self._part :] = copies
        return Batch(inputs, labels)

    def seen(self, inputs: np.ndarray) -> np.ndarray:
        mask = np.zeros(inputs.shape, bool)
        mask[:, : self._part] = True
        return mask

    def word(self, token: int) -> str:
        return "|" if token == self.values else _letter(token, self.values)


# -- selective copy ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelectiveCopyOptions(DrawnOptions):
    """selective-copy"""

    items: int = option(8, "tokens of a sequence that are to be copied", low=1, high=2**16)
    symbols: int = option(10, "different tokens: those that are copied, one that fills, and the question mark", low=3,
                          high=2**14)
    length: int | None = option(None, LENGTH, low=2, high=2**20)

    __post_init__ = check


class SelectiveCopy(Recall, name="selective-copy", summary="write the tokens again that stand at random places among fillers"):
    """Gu and Dao 2023, arXiv 2312.00752 (Mamba), section 4.1.1: at each question mark, the next token is asked for.

    The distances vary, so that a model needs to know what it reads: a fixed filter of the inputs cannot do it.
    """

    Options = SelectiveCopyOptions

    def prepare(self, context: int) -> None:
        options = self.options
        self.vocab, self.values = options.symbols, options.symbols - 2
        self.length = fitting_length(options.length, context)
        if 2 * options.items > self.length:
            raise UserError(f"--items: {options.items} tokens and as many question marks do not fit sequences of {self.length} "
                            f"tokens: give at most {self.length // 2} items, or longer sequences with --context")

    def draw(self, random: Random, count: int) -> Batch:
        items, filler, mark = self.options.items, self.values, self.values + 1
        places = np.sort(choose(random.split(0), count, self.length - items, items), axis=1)  # [B items]
        tokens = random.split(1).integers(0, self.values, (count, items))  # [B items]
        inputs = np.full((count, self.length), filler)  # [B T]
        np.put_along_axis(inputs, places, tokens, axis=1)
        inputs[:, -items:] = mark
        labels = np.full(inputs.shape, NOTHING)
        labels[:, -items:] = tokens
        return Batch(inputs, labels)

    def seen(self, inputs: np.ndarray) -> np.ndarray:
        return inputs < self.values

    def word(self, token: int) -> str:
        return {self.values: ".", self.values + 1: "?"}.get(token) or _letter(token, self.values)
