"""Simplified blocks: weights, time and loss beside the usual block."""

from __future__ import annotations

from typing import Any

from autograd import cross_entropy

from . import CONDITIONS, RIGHT, WRONG, Finding, claim
from ._shapes import above, outline, weights
from .measure import Measure, span

USUAL = dict(norm="rms_norm", activation="relu")  # as the simplified blocks have them


@claim(58, "simplified blocks", "They are 15 % faster with 15 % fewer weights and lose nothing.",
       place="section simplified Transformer blocks",
       paper="They have 15 % fewer weights, and are 15 % faster in the first version of 2311.01906; in the newer one SAS-P is "
             "16 % faster and SAS 9 % (table 1). The model of 18 layers has 13 % fewer weights.")
def trade(measure: Measure) -> Finding:
    """Weights counted for the paper's model, the time of a training step, and held-out losses after as many steps."""
    counts = {}
    for name, options in (("usual", {}), ("simplified", dict(ffn_multiple=4.0))):
        model = outline("transformer" if name == "usual" else name, vocab=50_000, layers=18, width=768, heads=12, context=128,
                        **USUAL, **options)
        counts[name] = weights(model.blocks[1]), weights(model)  # a block behind the first, and all
    block, whole = (1 - other / one for one, other in zip(*counts.values(), strict=True))
    ids = measure.ids(measure.sizes(4, 8), 128)

    def step(variant: str, **options: Any) -> Any:
        model = measure.model(variant, context=128, layers=4, width=measure.sizes(128, 384), heads=4, **USUAL, **options)
        return lambda: cross_entropy(model(ids), ids).backward(sink=lambda leaf, gradient: None)

    faster = measure.ratio(step("transformer"), step("simplified", ffn_multiple=4.0))
    size = measure.sizes(dict(width=48, layers=3, steps=80, seeds=1), dict(width=96, layers=4, steps=300, seeds=3))
    options = dict(task="text", width=size["width"], layers=size["layers"], steps=size["steps"], lr=1e-3, warmup=20,
                   eval_every=size["steps"], sample_tokens=0, eval_tokens=20_000, **USUAL)
    losses = {name: [measure.train(variant, seed=seed, **options, **more).loss for seed in range(size["seeds"])]
              for name, variant, more in (("usual", "transformer", {}), ("simplified", "simplified", dict(ffn_multiple=4.0)))}
    lost = above(losses["simplified"], losses["usual"])
    text = (f"a block has {100 * block:.1f} % fewer weights, and the paper's model of 18 layers {100 * whole:.1f} %; a "
            f"training step was {faster} times as fast; held-out nats a token after {size['steps']} steps were "
            f"{span(losses['simplified'])} in place of {span(losses['usual'])}")
    numbers = dict(fewer_in_a_block=block, fewer_in_all=whole, faster=faster.value, loss=losses)
    if block > 0.14:
        holds = {"smaller": True, "more than 10 % faster": faster.low > 1.1, "as good": not lost}
        if all(holds.values()):
            return RIGHT(f"It is so: {text}.", **numbers)
        does, misses = (word.join(name for name, so in holds.items() if so is kind)
                        for word, kind in ((" and ", True), (" or ", False)))
        return CONDITIONS(f"Here they are {does}, and not {misses}: {text}.", **numbers)
    return WRONG(f"They are not smaller: {text}.", **numbers)
