"""Reading a prompt and writing after it with the weights of another program, beside the package transformers.

    python benchmarks/weights.py [--shape gpt2-small ...] [--rounds 3] [--seconds 4] [--threads N] [--save]

Weights are drawn here and written as a folder of config.json and model.safetensors, which is imported on our side and loaded on
theirs, in float32. Both read a prompt of 512 tokens and want the logits of the token that follows; and both write after a
prompt of 8 tokens, one token at a time, which they draw from the softmax of their logits. Both choose the same likeliest token
after the long prompt, or there is no figure. Rounds, ratios and --save as in benchmarks/rounds.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from rounds import alternate, machine, median, parse, ratios, run, save, warn_if_busy

from autograd.cpu.process import cores, peak_mb

SHAPES = {"gpt2-small": dict(context=1024, layers=12, width=768, heads=12), "tiny": dict(context=1024, layers=2, width=64)}
VOCAB, PROMPT, BEGIN, WRITTEN = 50_257, 512, 8, 64
FIGURES = {"written_per_s": "writing, batch 1", "read_per_s": f"reading {PROMPT} tokens"}


def prepare(shape: str, place: Path) -> tuple[Path, Path]:
    """A model with new weights: the folder of its run, and the same for the other program."""
    from minitv import checkpoint, variants
    from minitv.exchange import export
    from minitv.optim import AdamW
    from minitv.options import ExportOptions
    from minitv.tokenizer import IdTokenizer

    experiment = variants.load("transformer").configure(**SHAPES[shape], bias=True, tied=True, activation="gelu_tanh",
                                                        tokenizer=IdTokenizer.kind)
    state = {"config": experiment.to_json(), "tokenizer": IdTokenizer(VOCAB).to_json(), "corpus_sha256": None, "step": 0,
             "best_loss": None, "elapsed_s": 0.0, "threads": 1}
    run_folder = place / "run"
    checkpoint.save(run_folder, "last", model=experiment.build(VOCAB).state(), optimizer=AdamW.fresh(), state=state)
    return run_folder, export(str(run_folder), ExportOptions(out=str(place / "model")))[0]


def minitv(folder: Path):
    """What reads a prompt and gives the likeliest token after it, and what writes so many tokens."""
    from autograd.cpu.process import blas_threads
    from autograd.random import Random
    from minitv.decode import decoder
    from minitv.sample import generate, load

    model = load(str(folder)).model
    reader = decoder(model)
    blas_threads(1).__enter__()
    return (lambda ids: int(reader.prefill(ids[None]).argmax()),
            lambda ids, seed: sum(1 for _ in generate(model, ids, WRITTEN, Random(seed))))


def transformers(folder: Path, threads: int):
    """The same with theirs."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def read(ids: np.ndarray) -> int:
        return int(model(torch.from_numpy(ids)[None], use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    @torch.inference_mode()
    def write(ids: np.ndarray, seed: int) -> int:
        torch.manual_seed(seed)
        given = torch.from_numpy(ids)[None]
        made = model.generate(given, attention_mask=torch.ones_like(given), do_sample=True, top_k=0, max_new_tokens=WRITTEN,
                              min_new_tokens=WRITTEN, pad_token_id=0)
        return made.shape[1] - len(ids)

    return read, write


def work(contender: str, folder: Path, threads: int, seconds: float) -> dict:
    """Measure one contender in this process; ``skipped`` holds the reason if it cannot run here."""
    if contender == "transformers" and (missing := [name for name in ("torch", "transformers")
                                                    if importlib.util.find_spec(name) is None]):
        return {"skipped": f"{' and '.join(missing)} is not installed"}
    started = time.perf_counter()
    read, write = transformers(folder / "model", threads) if contender == "transformers" else minitv(folder / "run")
    result = {"load_s": time.perf_counter() - started}
    ids = np.random.default_rng(0).integers(0, VOCAB, PROMPT)
    result["likeliest"] = read(ids)
    write(ids[:BEGIN], 0)
    for name, do in (("written_per_s", lambda number: write(ids[:BEGIN], number)),
                     ("read_per_s", lambda number: len(ids) * (read(ids) >= 0))):
        tokens, number, start = 0, 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not tokens:
            number += 1
            tokens += do(number)
        result[name] = tokens / elapsed
    return {**result, "peak_mb": peak_mb()}


def compare(shape: str, arguments: argparse.Namespace) -> dict:
    """All rounds of a shape: prints its rows, returns its part of the JSON."""
    with tempfile.TemporaryDirectory() as place:
        prepare(shape, Path(place))

        def measure(name: str) -> dict:
            return run(__file__, ["--worker", name, "--folder", place, "--threads", arguments.threads,
                                  "--seconds", arguments.seconds], arguments.threads)

        results, skipped = alternate(["minitv", "transformers"], measure, arguments.rounds, "written_per_s", shape)
    ours, theirs = results["minitv"], results.get("transformers")
    if theirs and len({row["likeliest"] for row in (*ours, *theirs)}) > 1:
        raise SystemExit(f"{shape}: the likeliest tokens differ, {ours[0]['likeliest']} and {theirs[0]['likeliest']}")
    report = {"skipped": skipped, "ratio": {}}
    for key in (*FIGURES, "peak_mb", "load_s"):
        report[key] = {name: round(median(rows, key), 2) for name, rows in results.items()}
        if theirs:
            report["ratio"][key] = ratios(ours, theirs, key)
        unit = FIGURES.get(key, key)
        print(f"{shape:<12} {unit:<20} " + "  ".join(f"{name} {value:>9,.1f}" for name, value in report[key].items())
              + ("  {:.2f} ({:.2f} to {:.2f})".format(*report["ratio"][key]) if theirs else f"  {skipped}"))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="repeat for several (default: gpt2-small)")
    parser.add_argument("--rounds", type=int, default=3, help="processes per contender (default: 3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured time of each figure in a process (default: 4)")
    parser.add_argument("--threads", type=int, default=cores(), help="of both (default: all)")
    parser.add_argument("--save", action="store_true", help="write weights.json for this processor")
    parser.add_argument("--worker", choices=["minitv", "transformers"], help="measure this contender, and print one JSON line")
    parser.add_argument("--folder", type=Path, help="of a worker: where the weights are")
    arguments = parse(parser)
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments.folder, arguments.threads, arguments.seconds)))
        return
    warn_if_busy()
    report = {shape: compare(shape, arguments) for shape in arguments.shape or ["gpt2-small"]}
    result = {"benchmark": "weights", "threads": arguments.threads, "rounds": arguments.rounds, "shapes": report}
    if arguments.save:
        save("weights", result, "shapes", machine())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
