"""ListOps: the value of nested lists of digits, such as [MAX 2 9 [MIN 4 7 ] 0 ] = 9.

Nangia and Bowman 2018, arXiv 1804.06028, in the distribution of Long Range Arena (Tay et al. 2020, arXiv 2011.04006), but for
lengths that a small model reads. A node of the tree is an operator with probability 1/4 and a digit otherwise; at the greatest
depth it is a digit. An operator has 2 ... --arguments children and is MIN, MAX, MED (the median, of an even number the mean of
the middle two without its fraction) or SM (the sum modulo 10), all alike. Expressions of other lengths than asked for are drawn
again. Long Range Arena draws 100,000 expressions once and removes equal ones; here each step draws new ones.

Two baselines stand beside every result: the commonest answer, and the commonest answer of the outermost operator, which is one
token. Only what lies above the second one shows that a model reads the nesting.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from autograd import no_grad, to_numpy
from autograd.random import Random

from ..config import check, option
from ..errors import UserError
from ..options import STEPS
from ..task import NOTHING, Batch
from ._drawn import Drawn, DrawnOptions

OPERATOR_SHARE = 0.25
WORDS = [*map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]", "=", ""]  # a digit's id is its value
MIN, MAX, MED, SM, CLOSE, EQUALS, PADDING = range(10, 17)
TRIAL, RULES = Random(1).split(2**63), Random(2).split(2**63)  # the same for every seed of a run
RARE = 1000  # of so many expressions at least one must have the lengths that are asked for
RULE_EXAMPLES = 5000


@dataclass(frozen=True)
class ListOpsOptions(DrawnOptions):
    """listops"""

    eval_examples: int = option(2000, "held-out sequences read at an evaluation", low=1, high=2**20,
                               group=STEPS, resumable=True)
    shortest: int = option(20, "tokens of an expression, at least", low=4, high=2**20)
    longest: int | None = option(None, "tokens of an expression, at most; none = all but one of --context", low=4, high=2**20)
    depth: int = option(5, "levels of an expression, at most, digits included", low=2, high=100)
    arguments: int = option(5, "arguments of an operator, at most", low=2, high=1000)

    __post_init__ = check


class Level(NamedTuple):
    """The nodes of one depth of several trees; children of one parent follow each other."""

    token: np.ndarray  # the digit or the operator [N]
    tree: np.ndarray  # the number of its tree [N]
    parent: np.ndarray  # its number in the level above [N]
    children: np.ndarray  # how many, 0 for digits [N]

    @property
    def operators(self) -> np.ndarray:
        return np.flatnonzero(self.children)


class ListOps(Drawn, name="listops", summary="the value of an expression of nested lists, such as [MAX 2 9 [MIN 4 7 ] 0 ]"):
    """An expression, the sign =, at which its value is asked for, and padding up to the longest length."""

    Options = ListOpsOptions
    causal = None
    vocab = len(WORDS)

    def prepare(self, context: int) -> None:
        options = self.options
        self._longest = options.longest or context - 1
        if self._longest >= context:
            raise UserError(f"--longest: an expression of {self._longest} tokens and the sign after it do not fit --context "
                            f"{context}: give at most {context - 1}, or a longer --context")
        if self._longest < options.shortest:
            limit = "--longest" if options.longest else f"one token less than --context {context}, which is"
            raise UserError(f"--shortest: {options.shortest} is more than {limit} {self._longest}")
        fits = trials = 0
        while fits < 100 and trials < 100 * RARE:
            fits += len(self._candidates(TRIAL.split(trials), 2000)[1])
            trials += 2000
        if fits * RARE < trials:
            raise UserError(f"--shortest: fewer than one of {RARE} expressions of this --depth and these --arguments have "
                            f"{options.shortest} to {self._longest} tokens; allow more lengths with --shortest and --longest")
        self._share = fits / trials

    def draw(self, random: Random, count: int) -> Batch:
        inputs = np.full((count, self._longest + 1), PADDING)  # [B T]
        labels = np.full(inputs.shape, NOTHING)
        start = turn = 0
        while start < count:
            levels, roots, sizes, values = self._candidates(random.split(turn), int(1.2 * (count - start) / self._share) + 10)
            rows = slice(start, min(count, start + len(roots)))
            roots = roots[: rows.stop - rows.start]
            _write(levels, sizes, roots, inputs[rows])
            ends = sizes[0][roots]
            places = np.arange(rows.start, rows.stop)
            inputs[places, ends], labels[places, ends] = EQUALS, values[roots]
            start, turn = rows.stop, turn + 1
        return Batch(inputs, labels)

    def _candidates(self, random: Random, count: int) -> tuple[list[Level], np.ndarray, list[np.ndarray], np.ndarray]:
        """Trees, the numbers of those of a length asked for, the sizes of all nodes by level, and the values of all trees."""
        tree = parent = np.arange(count)
        levels, length = [], np.zeros(count, int)
        for depth in range(1, self.options.depth + 1):
            share = 1.0 if depth == 1 else OPERATOR_SHARE if depth < self.options.depth else 0.0
            level = _level(random.split(depth), tree, parent, share, self.options.arguments)
            length += np.bincount(tree, 1 + (level.children > 0), count).astype(int)
            lost = length[tree] > self._longest  # such a tree need not grow
            level.children[lost] = level.token[lost] = 0
            levels.append(level)
            parent = np.repeat(np.arange(len(tree)), level.children)
            tree = tree[parent]
        fits = np.flatnonzero((length >= self.options.shortest) & (length <= self._longest))
        return levels, fits, *_measure(levels)

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """The accuracy of answers that follow from nothing, or from the first token alone, learned from other expressions."""
        first, answers = _questions(self.draw(RULES, RULE_EXAMPLES))
        held_first, held_answers = _questions(self.held_out())
        counts = np.zeros((self.vocab, 10), int)  # [first token, answer]
        np.add.at(counts, (first, answers), 1)
        return {"chance": 0.1,
                "majority class": float((held_answers == counts.sum(axis=0).argmax()).mean()),
                "root operator": float((held_answers == counts.argmax(axis=1)[held_first]).mean())}

    def word(self, token: int) -> str:
        return WORDS[token]

    def show(self, model: Any, rng: Random) -> str:
        """A held-out expression, the model's answer and the right one."""
        held_out = self.held_out()
        row = int(rng.integers(0, len(held_out.inputs)))
        with no_grad():
            logits, labels = self.answers(model, held_out.part(slice(row, row + 1)))
        answer, right = int(to_numpy(logits.data).argmax()), int(labels[0])
        verdict = "right" if answer == right else f"wrong, it is {right}"
        return f"{write(held_out.inputs[row])} {WORDS[answer] or 'nothing'} ({verdict})"


def write(ids: np.ndarray) -> str:
    """The text of ids, without padding."""
    return " ".join(WORDS[i] for i in ids if i != PADDING)


def _questions(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens [B] and the answers [B]."""
    return batch.inputs[:, 0], batch.labels[batch.labels != NOTHING]


def _level(random: Random, tree: np.ndarray, parent: np.ndarray, share: float, arguments: int) -> Level:
    """Nodes below the given parents, of which a share are operators."""
    operator = random.split(0).uniform(parent.shape) < share
    kinds, digits = SM + 1 - MIN, 10
    code = random.split(1).integers(0, kinds * digits * (arguments - 1), parent.shape)  # three independent numbers in one
    token = np.where(operator, MIN + code % kinds, code // kinds % digits)
    return Level(token, tree, parent, np.where(operator, 2 + code // (kinds * digits), 0))


def _measure(levels: list[Level]) -> tuple[list[np.ndarray], np.ndarray]:
    """How many tokens each node takes with all below it, by level, and the values of the roots."""
    sizes, values = [np.ones(len(levels[-1].token), int)], levels[-1].token
    for level in reversed(levels[:-1]):
        at = level.operators
        size, value = np.ones(len(level.token), int), level.token.copy()
        if len(at):
            count = level.children[at]
            start = np.cumsum(count) - count  # the first child in the level below
            size[at] = 2 + np.add.reduceat(sizes[0], start)
            ordered = np.sort(np.repeat(np.arange(len(at)), count) * 10 + values) % 10  # the children's values, in order
            median = (ordered[start + (count - 1) // 2] + ordered[start + count // 2]) // 2
            results = [ordered[start], ordered[start + count - 1], median, np.add.reduceat(values, start) % 10]
            value[at] = np.choose(level.token[at] - MIN, results)
        sizes, values = [size, *sizes], value
    return sizes, values


def _write(levels: list[Level], sizes: list[np.ndarray], roots: np.ndarray, out: np.ndarray) -> None:
    """The tokens of some of the trees, a row of ``out`` [B T] each."""
    row = np.full(len(levels[0].token), -1)  # of each tree, -1 for none
    row[roots] = np.arange(len(roots))
    place = np.zeros(len(row), int)  # of each node in its row
    for above, level, size in zip([None, *levels[:-1]], levels, sizes, strict=True):
        if above is not None:
            before = np.cumsum(size) - size
            first = (np.cumsum(above.children) - above.children)[level.parent]  # the first of the siblings
            place = place[level.parent] + 1 + before - before[first]
        nodes = np.flatnonzero(row[level.tree] >= 0)
        out[row[level.tree[nodes]], place[nodes]] = level.token[nodes]
        nodes = nodes[level.children[nodes] > 0]
        out[row[level.tree[nodes]], place[nodes] + size[nodes] - 1] = CLOSE
