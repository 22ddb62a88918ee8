"""Does the loss rise when the first tokens leave the cache, and what keeps it from rising? The claim of StreamingLLM.

    python benchmarks/streaming.py [--data TEXT] [--steps 3000] [--contexts 100] [--save]

Four models are trained alike, as the variant attention-sinks: on the text alone (first-tokens), after a learned token, with a
sink of zeros (SoftMax1), with a learned logit in each head. Each then reads the held-out text from several places on, so many
contexts at a time, with a cache that has C = S + W tokens whatever S is. C and the token itself are the context of training.

- ``beyond``   bits per character of all tokens that have more before them than the cache holds
- ``rise``     the same less that of the reference, S = 4, or S = 1 after a learned token, on the same tokens, and the standard
               error of the mean of the places; a ``jump`` is a rise of more than 0.05 bits and more than two standard errors
- ``curve``    bits per character by ranges of positions that double
- ``mass``     of each layer, the share of attention that the tokens of the second half of a context give to the first four
               positions, and to the sink without a value

Recomputation reads the last C + 1 tokens anew for each of some tokens, on which ``rise`` compares it. ``--save`` writes
benchmarks/results/streaming.json and draws streaming.png beside it (with matplotlib). Runs are kept in ``--out``, and trained
once.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rounds import RESULTS, ROOT, save, warn_if_busy

from autograd import no_grad
from autograd.cpu.process import blas_threads, cores
from minitv.picture import COLOURS, DASHES, MARKERS, Line, Look, draw
from minitv.sample import load
from minitv.stream import Cached, Sums, mass, surprise
from minitv.variants.attention_sinks import streaming

SINKS = {"first-tokens": (0, 1, 2, 4), "learned-token": (0, 1, 4), "zero": (0, 1, 4), "logit": (0, 1, 4)}
JUMP = 0.05  # bits per character


def trained(kind: str, arguments: argparse.Namespace):
    """The run of a kind of sink, trained if it is not there yet."""
    folder = Path(arguments.out) / kind
    if not (folder / "last").exists():
        command = [sys.executable, "-m", "minitv", "train", "attention-sinks", "--sink-kind", kind, "--preset", "nanogpt-cpu",
                   "--context", arguments.context, "--batch", arguments.batch, "--steps", arguments.steps, "--eval-every",
                   arguments.steps, "--sample-tokens", 0, "--out", folder]
        if arguments.data:
            command += ["--data", arguments.data]
        if subprocess.run(list(map(str, command))).returncode:
            raise SystemExit(f"{kind}: the training failed, see above")
    return load(str(folder))


def curves(nats: np.ndarray, per_character: float) -> list[tuple[int, float]]:
    """(position, bits per character) of the surprise [places N - 1], by ranges of positions that double."""
    sums, positions = Sums(), np.arange(1, nats.shape[1] + 1)
    for row in nats:
        sums.add(positions, row)
    return [(round(1.5 * 2**part) if part else 1, round(float(mean) * per_character / math.log(2), 4))
            for part, mean in enumerate(sums.means) if math.isfinite(mean)]


def anew(model, text: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The surprise of tokens at some positions of a text [N], by reading a context anew for each."""
    windows = text[positions[:, None] + np.arange(-model.context, 1)]  # [n context + 1]
    with no_grad():
        logits = [model(part[:, :-1], at=np.arange(1, len(part) + 1) * model.context - 1).numpy().astype(np.float64)
                  for part in np.array_split(windows, max(1, len(windows) // 16))]
    logits = np.concatenate(logits)
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(len(logits)), text[positions]]


def rise(nats: np.ndarray, reference: np.ndarray, per_character: float) -> dict:
    """How much more bits per character one way costs than another on the same tokens [places n]."""
    each = (nats - reference).mean(1) * per_character / math.log(2)  # one number for each place
    mean, error = float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))
    return {"rise": round(mean, 4), "error": round(error, 4), "jump": mean > max(JUMP, 2 * error)}


def measured(run, texts: np.ndarray, kind: str, per_character: float) -> dict:
    """Every number of S of one model, on texts [places N]."""
    model, cache = run.model, run.model.context - 1 + (kind == "learned-token")
    nats, result = {}, {"mass": mass(model, texts[:, :model.context]), "cache": cache, "sinks": {}}
    for sinks in SINKS[kind]:
        streamed, start = streaming(model, cache - sinks, sinks), time.perf_counter()
        with no_grad(), blas_threads(1):
            nats[sinks] = np.stack([Cached(streamed)(text, 0)[1] for text in texts])
        seconds = time.perf_counter() - start
        result["sinks"][str(sinks)] = {"us_per_token": round(1e6 * seconds / nats[sinks].size, 1)}
        print(f"{kind}, S = {sinks}: {nats[sinks].size} tokens in {seconds:.1f} s", file=sys.stderr)
    beyond, reference = slice(model.context, None), nats[1 if kind == "learned-token" else 4]
    for sinks, values in nats.items():
        result["sinks"][str(sinks)] |= {
            "beyond": round(float(values[:, beyond].mean()) * per_character / math.log(2), 4),
            **rise(values[:, beyond], reference[:, beyond], per_character), "curve": curves(values, per_character)}
    positions = np.arange(model.context, texts.shape[1], max(1, (texts.shape[1] - model.context) // 100))
    start = time.perf_counter()
    again = np.stack([anew(model, text, positions) for text in texts])
    result["recomputation"] = {**rise(again, reference[:, positions - 1], per_character),
                               "us_per_token": round(1e6 * (time.perf_counter() - start) / again.size, 1)}
    dense = np.stack([surprise(model, text) for text in texts])
    result["dense"] = round(float(dense.mean()) * per_character / math.log(2), 4)
    return result


def verdict(models: dict[str, dict], context: int) -> str:
    """What the figures say of the paper's finding, in a sentence or two."""
    plain = models["first-tokens"]["sinks"]["0"]
    most = max(sum(layer[:4]) for layer in models["first-tokens"]["mass"])
    equal = float(np.mean(4 / np.arange(context // 2 + 1, context + 1)))
    rise = round(plain["rise"], 3) + 0.0  # no -0.000
    text = (f"Without its first tokens the plain model loses {rise:.3f} ± {plain['error']:.3f} bits per character "
            f"beyond the cache: the jump of the paper {'occurs' if plain['jump'] else 'does not occur'} at this size. Four "
            f"tokens get {100 * most:.0f} % of the attention of a layer at most; equal weights would give them "
            f"{100 * equal:.0f} %.")
    others = [kind for kind in models if kind != "first-tokens" and models[kind]["sinks"]["0"]["jump"]]
    return text + (f" It occurs with S = 0 in {', '.join(others)}." if others else "")


def picture(result: dict) -> None:
    lines = []
    for i, (kind, numbers) in enumerate(result["models"].items()):
        for j, (sinks, values) in enumerate(numbers["sinks"].items()):
            lines.append(Line([tuple(point) for point in values["curve"]], f"{kind}, S = {sinks}",
                              Look(COLOURS[2 * i % len(COLOURS)], DASHES[j % len(DASHES)], MARKERS[j]), 1.6, marker="full"))
    cache = result["models"]["first-tokens"]["cache"]
    draw(RESULTS / "streaming.png", lines, {}, "bits per character", title="streaming with a cache of fixed size",
         about=result["data"], axis="tokens before", mark=(cache + 1, "the cache is full"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="the text (default: the source of Python's standard library)")
    parser.add_argument("--context", type=int, default=128, help="of training (default: 128)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step (default: 8)")
    parser.add_argument("--steps", type=int, default=3000, help="of training (default: 3000)")
    parser.add_argument("--contexts", type=int, default=100, help="that are read from each place on (default: 100)")
    parser.add_argument("--places", type=int, default=8, help="where reading begins (default: 8, or what the text has)")
    parser.add_argument("--out", default=str(ROOT / "runs" / "streaming"), help="folder of the runs (default: runs/streaming)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/streaming.json and streaming.png")
    arguments = parser.parse_args()
    warn_if_busy()
    models, texts = {}, None
    for kind in SINKS:
        run = trained(kind, arguments)
        if texts is None:
            task = run.experiment.begin(run.saved)
            held_out, length = task.corpus.held_out, arguments.contexts * arguments.context + 1
            places = min(arguments.places, len(held_out) // length)
            if places < 2:
                raise SystemExit(f"the held-out text has {len(held_out)} tokens, and two places of {length} are needed: give a "
                                 "longer text, or fewer --contexts")
            starts = np.linspace(0, len(held_out) - length, places).astype(int)
            texts = np.stack([np.asarray(held_out[start:start + length]).astype(np.intp) for start in starts])
            per_character, data = task.tokens_per_char["held_out"], task.corpus.description
        models[kind] = measured(run, texts, kind, per_character)
        for sinks, values in models[kind]["sinks"].items():
            print(f"{kind:<14} S = {sinks}  beyond {values['beyond']:.4f} bits  rise {values['rise']:+.4f} ± "
                  f"{values['error']:.4f}{'  JUMP' if values['jump'] else ''}")
        print(f"{kind:<14} dense {models[kind]['dense']:.4f}  recomputation {models[kind]['recomputation']['rise']:+.4f}")
    result = {"benchmark": "streaming", "threads": cores(), "rounds": 1, "data": data, "context": arguments.context,
              "steps": arguments.steps, "contexts": arguments.contexts, "places": len(texts),
              "verdict": verdict(models, arguments.context), "models": models}
    print(result["verdict"])
    if arguments.save:
        picture(save("streaming", result))
    print(json.dumps({key: value for key, value in result.items() if key != "models"}))


if __name__ == "__main__":
    main()
