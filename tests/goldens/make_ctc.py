"""Makes ctc_loss.npz beside it: the CTC loss of PyTorch, in float64 on the CPU.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0
    python tests/goldens/make_ctc.py

The calls are named and held as make_goldens.py says. PyTorch's function takes log-probabilities [T B V]; its "mean" is ours,
and what we call "batch" and "frames" are quotients of its "sum".
"""

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import HERE, Calls

BATCH, LENGTH, CLASSES, LABELS = 4, 20, 6, 7


def loss(reduction="mean", blank=0, zero_infinity=False):
    def function(logits, targets, input_lengths=None, target_lengths=None):
        batch, length, _ = logits.shape
        frames = torch.full((batch,), length) if input_lengths is None else input_lengths
        labels = torch.full((batch,), targets.shape[1]) if target_lengths is None else target_lengths
        named = reduction if reduction in ("mean", "sum", "none") else "sum"
        total = F.ctc_loss(F.log_softmax(logits, -1).transpose(0, 1), targets, frames, labels, blank=blank, reduction=named,
                           zero_infinity=zero_infinity)
        return total / {"batch": batch, "frames": frames.sum()}.get(reduction, 1)

    return function


def main() -> None:
    calls = Calls(8)
    rng = calls.rng

    def inputs(blank=0, scale=2.0, **lengths):
        classes = [v for v in range(CLASSES) if v != blank]
        return {"logits": calls.normal(BATCH, LENGTH, CLASSES, scale=scale), "targets": rng.choice(classes, (BATCH, LABELS)),
                **{name: np.array(values) for name, values in lengths.items()}}

    ragged = {"input_lengths": [20, 14, 9, 1], "target_lengths": [7, 5, 0, 1]}
    calls.add("ctc_loss", loss(), inputs())
    calls.add("ctc_loss.ragged", loss(), inputs(**ragged))
    calls.add("ctc_loss.last_blank", loss("none", blank=CLASSES - 1), inputs(CLASSES - 1, **ragged), reduction="none",
              blank=CLASSES - 1)
    calls.add("ctc_loss.sharp", loss("sum", blank=2), inputs(2, 100.0, **ragged), reduction="sum", blank=2)
    for reduction in ("batch", "frames"):
        calls.add(f"ctc_loss.{reduction}", loss(reduction), inputs(**ragged), reduction=reduction)
    short = {**ragged, "input_lengths": [20, 4, 9, 0]}
    for reduction in ("none", "mean"):
        calls.add(f"ctc_loss.too_short_{reduction}", loss(reduction, zero_infinity=True), inputs(**short), reduction=reduction,
                  zero_infinity=True)
    same = inputs(target_lengths=[7, 6, 2, 1])
    same["targets"][:] = 3
    calls.add("ctc_loss.repeats", loss("none"), same, reduction="none")
    np.savez_compressed(HERE / "ctc_loss.npz", **calls.arrays)


if __name__ == "__main__":
    main()
