"""Conformer: what its convolution adds."""

from __future__ import annotations

from . import RIGHT, UNDECIDED, WRONG, Finding, claim
from ._shapes import above
from .measure import Measure, span


@claim(54, "Conformer", "Convolution adds the local part that attention lacks.", place="section Conformer",
       paper="Without the convolution there are 0.4 points more word errors on test-other, more than without any other part "
             "but positions (2005.08100, table 3).")
def convolution(measure: Measure) -> Finding:
    """Held-out loss on spoken digits with the convolution, without it, and without it at equal weights, for several seeds."""
    size = measure.sizes(dict(layers=1, steps=160, seeds=1, longest=1, lr=1e-2, utterances=200, eval_examples=40),
                         dict(layers=2, steps=250, seeds=3, longest=2, lr=5e-3, utterances=1000, eval_examples=100))
    seeds, options = range(size.pop("seeds")), dict(task="speech", width=32, batch=8, ffn_multiple=4.0, dropout=0.0, snr=30.0,
                                                    frequency_masks=0, time_masks=0, warmup=20, eval_every=size["steps"])
    modes = {"with it": {}, "without it": dict(convolution=False),
             "wider networks in its place": dict(convolution=False, ffn_multiple=4.75)}
    runs = {name: [measure.train("conformer", seed=seed, **{**options, **size, **more}) for seed in seeds]
            for name, more in modes.items()}
    losses = {name: [run.loss for run in each] for name, each in runs.items()}
    parts = "; ".join(f"{name}, {runs[name][0].parameters} weights, {span(losses[name])}" for name in modes)
    text = f"held-out nats after {size['steps']} steps of {options['batch']} utterances: {parts}"
    numbers = dict(loss=losses, error_rate={name: [run.value for run in each] for name, each in runs.items()})
    others = [losses[name] for name in modes if name != "with it"]
    if all(above(each, losses["with it"]) for each in others):
        return RIGHT(f"Attention alone learns less, at equal weights too: {text}.", **numbers)
    if any(above(losses["with it"], each) for each in others):
        return WRONG(f"It does not help: {text}.", **numbers)
    return UNDECIDED(f"Seeds differ by as much: {text}.", **numbers)
