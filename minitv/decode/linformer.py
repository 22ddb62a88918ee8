"""The causal relative of Linformer: the Transformer's attention of one token, whose cache has mixtures of complete segments.

When a segment is complete, its c exact columns become s mixtures, in the same place: the cache never has a gap. That happens
once in c tokens, by the model's own operators.
"""

from __future__ import annotations

from autograd import Tensor, no_grad

from ..variants import linformer
from .shared import FeedForward
from .transformer import Attention


class SegmentAttention(Attention):
    module = linformer.SegmentAttention

    def wire(self, norm, module, model):
        self._module, segment, mixtures = module, module.segment, module.rows
        columns = model.context // segment * mixtures + segment
        return self.wired(norm, module, module.heads, None, columns, segment=segment, mixtures=mixtures)

    def load(self, state, position, rows=slice(None)):
        self.write(0, state.mixed_keys, state.mixed_values, rows)
        self.write(state.mixed_keys.shape[2], state.keys, state.values, rows)

    def __call__(self, x, position):
        super().__call__(x, position)
        segment, mixtures = self.weights.segment, self.weights.mixtures
        if (position + 1) % segment:
            return
        first, module = position // segment * mixtures, self._module
        with no_grad():
            keys, values = (part.reshape(self.batch, -1, *part.shape[1:]) for part in self.state)
            keys = module.mixtures(module.E, Tensor(keys[..., first : first + segment].swapaxes(2, 3)), 1)
            values = module.mixtures(module.F, Tensor(values[:, :, first : first + segment]), 1)
        self.write(first, keys, values)


HALVES = SegmentAttention, FeedForward
