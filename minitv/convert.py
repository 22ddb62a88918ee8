"""A trained model with fewer heads of keys and values: what Ainslie et al. (2023, arXiv 2305.13245, section 2.1) begin with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from . import checkpoint, variants
from .errors import UserError
from .optim import AdamW
from .options import ConvertOptions
from .sample import load
from .variant import Variant
from .variants.transformer import Attention

VARIANT = "grouped-query"


def convert(directory: str, options: ConvertOptions) -> Path:
    """Write a run of ``grouped-query`` with the weights of another run, and return its folder.

    The G heads of keys and values are made of the groups of the old ones by ``options.pool``; all other weights are the same.
    It has done no step of training: ``minitv train --resume`` or ``--init-from`` goes on. UserError if the model has other
    mixers than attention, if G does not divide the old number of heads, or if a run is in the new folder already.
    """
    old = load(directory, options.checkpoint)
    experiment = old.experiment
    def fits(variant: Variant) -> bool:
        return variant.mixer is Attention and variant.reads == variants.load(VARIANT).reads

    if not fits(experiment.variant):
        having = [name for name in variants.variants() if fits(variants.load(name))]
        raise UserError(f"{directory}: {experiment.variant.name} is no language model with heads of keys and values that could "
                        f"be shared, allowed: {', '.join(having)}")
    out = Path(options.out or f"{checkpoint.run_folder(directory)}-{options.kv_heads}-kv-heads")
    if any(checkpoint.exists(out, name) for name in checkpoint.NAMES):
        raise UserError(f"--out {out}: there is a run in this folder, give another one")
    variant = variants.load(VARIANT)
    mixer = variant.options(heads=experiment.mixer.heads, kv_heads=options.kv_heads)
    run = dataclasses.replace(experiment.run, out=str(out), seed=options.seed, init_from=None, resume=None)
    new = dataclasses.replace(experiment, variant=variant, mixer=mixer, run=run)
    model = new.build(experiment.task.stored_vocab(old.saved))
    pairs = list(zip(*([module for module in each.modules() if isinstance(module, Attention)] for each in (old.model, model)),
                     strict=True))
    drawn = model.state()  # new heads, where they are to be random
    kept = old.model.state()
    model.load({name: kept[name] if kept[name].shape == array.shape else array for name, array in drawn.items()})
    for before, after in pairs:
        if before.kv_heads % after.kv_heads:
            raise UserError(f"--kv-heads: {after.kv_heads} does not divide the {before.kv_heads} heads of keys and values of "
                            f"{directory}")
        for old_rows, new_rows in zip(before.qkv.parameters(), after.qkv.parameters(), strict=True):
            new_rows.assign_(_pooled(old_rows.data, new_rows.data, before, after, options.pool))
    state = {"config": new.to_json(), **old.saved, "step": 0, "best_loss": None, "elapsed_s": 0.0, "threads": 1}
    checkpoint.save(out, "last", model=model.state(), optimizer=AdamW.fresh(), state=state)
    return out


def _pooled(old: np.ndarray, new: np.ndarray, before: Attention, after: Attention, pool: str) -> np.ndarray:
    """Rows of queries, keys and values [(H + 2 G) K ..]: those of the queries stay, a group of the others becomes one."""
    heads, size = before.heads, len(old) // sum(before.parts)
    queries = old[: heads * size]
    if pool == "random":
        return np.concatenate([queries, new[heads * size :]])
    # [2 G' G/G' K ..]: keys and values, groups, heads of a group, channels
    rows = old[heads * size :].reshape(2, after.kv_heads, before.kv_heads // after.kv_heads, size, *old.shape[1:])
    shared = rows.mean(axis=2) if pool == "mean" else rows[:, :, 0]
    return np.concatenate([queries, shared.reshape(-1, *old.shape[1:])]).astype(old.dtype)
