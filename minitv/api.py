"""What `import minitv` offers to Python: build a model, train one, load what was trained."""

from __future__ import annotations

from typing import Any

from . import variants
from .request import Request
from .sample import Trained, load
from .signals import Stopped
from .training import OnStep
from .training import train as _train

__all__ = ["build", "load", "train"]


def build(variant: str = "transformer", *, vocab: int, preset: str | None = None, **options: Any) -> Any:
    """A new model of a variant for ``vocab`` ids: model(ids [B T]) -> logits [B T vocab].

    ``options`` are those of ``minitv train`` (width=64, layers=2, ...); the weights follow from ``seed``. UserError names an
    option that the variant does not have.
    """
    return variants.load(variant).configure(preset, **options).build(vocab)


def train(variant: str | None = None, *, preset: str | None = None, task: str | None = None, on_step: OnStep | None = None,
          **options: Any) -> Trained:
    """Train as ``minitv train`` does, with its options, and return what it left in the folder of the run.

    ``on_step(record)`` sees after each step its number, loss in nats, learning rate and speed, at an evaluation also the
    held-out loss; the run ends when it returns False. UserError tells a mistake, RunError what went wrong on the way. Ctrl-C
    saves the run, and is then raised as a KeyboardInterrupt.
    """
    chosen = {"variant": variant, "task": task, "preset": preset, "resume": options.pop("resume", None),
              "init_from": options.pop("init_from", None)}
    experiment, _ = Request(chosen).experiment(("arguments", options))
    outcome = _train(experiment, on_step=on_step)
    if outcome.signal is not None:
        raise Stopped(outcome.signal)
    return load(str(outcome.directory))
