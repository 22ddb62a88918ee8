"""LanguageModel: token ids to the logits of the next token, for every causal variant, and how it goes on writing."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor

from .encoder import Encoder


class State(NamedTuple):
    """How many tokens have been read, and the state of every block."""

    position: int
    blocks: tuple[Any, ...]


class LanguageModel(Encoder):
    """An Encoder whose logits depend on the past alone, so that it can read a text in parts.

    Prefill over any split gives what the call gives; a step of writing is a prefill of one token.
    """

    def init_state(self, batch: int) -> State:
        """The state before the first token."""
        return State(0, self.blocks.init_state(batch))

    def prefill(self, ids: np.ndarray, state: State, last: bool = False) -> tuple[Tensor, State]:
        """Logits [B T V] of a segment that continues ``state``, or [B 1 V] of its last token alone; and the state after it."""
        x, blocks = self.blocks.prefill(self.embedded(ids, state.position), state.blocks, last)
        return self.logits(x), State(state.position + ids.shape[1], blocks)
