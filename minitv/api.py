"""What `import minitv` offers to Python: build a model, train one, load what was trained."""

from __future__ import annotations

from typing import Any

from . import variants
from .sample import Trained, load
from .training import OnStep
from .training import train as _train

__all__ = ["build", "load", "train"]


def build(variant: str = "transformer", *, vocab: int, preset: str | None = None, **options: Any) -> Any:
    """A new model of a variant for ``vocab`` ids: model(ids [B T]) -> logits [B T vocab].

    ``options`` are those of ``minitv train`` (width=64, layers=2, ...); the weights follow from ``seed``. UserError names an
    option that the variant does not have.
    """
    return variants.load(variant).configure(preset, **options).build(vocab)


def train(variant: str = "transformer", *, preset: str | None = None, task: str | None = None, on_step: OnStep | None = None,
          **options: Any) -> Trained:
    """Train as ``minitv train`` does, with its options, and return what it left in the folder of the run.

    ``on_step(record)`` sees after each step its number, loss in nats, learning rate and speed, at an evaluation also the
    held-out loss; the run ends when it returns False. UserError tells a mistake, RunError what went wrong on the way.
    """
    experiment = variants.load(variant).configure(preset, task=task, **options)
    return load(str(_train(experiment, on_step=on_step).directory))
