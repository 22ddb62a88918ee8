"""RWKV: its time and memory, what it remembers, and what its gates do."""

from __future__ import annotations

import math

import numpy as np

from autograd import no_grad, relu
from autograd.proof import verify

from ..ops import wkv
from ..task import NOTHING
from ..timing import inference, training
from ..variants.rwkv import ChannelMix, TimeMix
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from .measure import Measure, Run

PAPER = "2305.13048"
PLACE = "section RWKV"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384), (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
WIDTHS = (32, 64, 128, 256, 512, 1024), (32, 64, 128, 256, 512, 1024, 2048)


def _inputs(measure: Measure, length: int, width: int) -> tuple[np.ndarray, ...]:
    """k, v, w and u of the operator wkv."""
    k, v = measure.normal(1, length, width), measure.normal(1, length, width)
    return k, v, -np.exp(measure.normal(width)), measure.normal(width)


@claim(5, "RWKV", "The time of RWKV grows as T times d.", place=PLACE,
       paper=f"Table 1 of {PAPER} says so of the mean over the past; section 3.2 adds O(T d²) for the projections.")
def time(measure: Measure) -> Finding:
    """The exponents of the time of the mean WKV, and of a whole layer, in T and in d."""
    lengths, widths = measure.sizes(*LENGTHS), measure.sizes(*WIDTHS)
    wkv_t = measure.exponent("T", {t: inference(wkv, *_inputs(measure, t, 128)) for t in lengths})
    wkv_d = measure.exponent("d", {d: inference(wkv, *_inputs(measure, 2048, d)) for d in widths})
    layer_t = measure.exponent("T", {t: measure.layer("rwkv", t, 64) for t in lengths})
    wide = measure.sizes((128, 192, 256, 320, 384, 512), (128, 192, 256, 320, 384, 512, 768))
    layer_d = measure.exponent("d", {d: measure.layer("rwkv", 64, d) for d in wide})
    measured = f"The time of WKV grows as {wkv_t} and {wkv_d}, that of a layer as {layer_t} and {layer_d}."
    found = [fit.nearest({"1": 1, "2": 2}) for fit in (wkv_t, wkv_d, layer_t, layer_d)]
    verdict = {("1", "1", "1", "1"): RIGHT, ("1", "1", "1", "2"): CONDITIONS}.get(tuple(found), WRONG)
    return (UNDECIDED if None in found else verdict)(measured, wkv_in_T=wkv_t, wkv_in_d=wkv_d, layer_in_T=layer_t,
                                                     layer_in_d=layer_d)


@claim(6, "RWKV", "The space of RWKV grows as T times d.", place=PLACE,
       paper=f"Table 1 of {PAPER} says O(d), of inference; it is silent on the activations of training, which are O(T d).")
def space(measure: Measure) -> Finding:
    """The exponent in t of the state's bytes, and those in T and d of the memory of a layer with its gradients."""
    lengths, widths = (256, 384, 512, 768, 1024, 1536), (32, 48, 64, 96, 128, 192)
    model = measure.model("rwkv", width=64, layers=1)
    state = measure.exponent("t", {t: measure.state_bytes(model, t) for t in lengths})

    def memory(length: int, width: int) -> int:
        block = measure.model("rwkv", width=width, layers=1).blocks[0]
        return measure.memory(training(block, measure.normal(1, length, width)))

    in_t = measure.exponent("T", {t: memory(t, 64) for t in lengths})
    in_d = measure.exponent("d", {d: memory(512, d) for d in widths})
    measured = (f"The state has {state.points[0][1]:.0f} bytes in a layer of width 64 and grows as {state}; the memory of a "
                f"layer with its gradients grows as {in_t} and {in_d}.")
    growths = {"constant": 0, "1": 1, "2": 2}
    found = tuple(fit.nearest(growths) for fit in (state, in_t, in_d))
    verdict = {("constant", "1", "1"): CONDITIONS, ("1", "1", "1"): RIGHT}.get(found, WRONG)
    return (UNDECIDED if None in found else verdict)(measured, state=state, training_in_T=in_t, training_in_d=in_d)


@claim(7, "RWKV", "Inference takes the same memory and the same time for every token.", place=PLACE,
       paper=f"It is right: the state has 5 d numbers in each layer ({PAPER}, appendix D).")
def inference_is_constant(measure: Measure) -> Finding:
    """The bytes of the state and the time of the next token after one token, and after more and more of them."""
    positions = measure.sizes((1, 8, 64, 512, 2048, 8192), (1, 4, 16, 64, 256, 1024, 4096, 8192, 16384))
    model = measure.model("rwkv", width=64, layers=2)
    sizes = {t: measure.state_bytes(model, t) for t in positions}
    steps = measure.steps(model, positions, measure.sizes(100, 400))
    fit = measure.exponent("t", {t: min(seconds) for t, seconds in steps.items()})
    growth = fit.nearest({"constant": 0, "t": 1})
    size = " to ".join(f"{size:,}" for size in sorted({min(sizes.values()), max(sizes.values())}))
    measured = (f"After {positions[0]} to {positions[-1]:,} tokens the state has {size} bytes, and the time of a token grows "
                f"as {fit}.")
    verdict = WRONG if len(set(sizes.values())) > 1 or growth == "t" else RIGHT if growth and fit.high < 0.1 else UNDECIDED
    return verdict(measured, bytes=sizes, time=fit)


@claim(8, "RWKV", "Time mixing interpolates linearly between a token and the one before it.", place=PLACE,
       paper=f"It is right: each channel has μ x_t + (1 - μ) x_{{t-1}} with a learned μ ({PAPER}, (11) to (15)).")
def interpolation(measure: Measure) -> Finding:
    """The laws of the operator token_shift, and how many shares μ of a new model lie between 0 and 1."""
    report = verify("token_shift", draws=measure.sizes(4, 20))
    laws = [row for row in report.rows if row.check.startswith("law") or row.check == "values"]
    wrong = [row.check for row in laws if row.failure]
    model = measure.model("rwkv", width=64, layers=6)
    shares = np.concatenate([p.data for name, p in model.named_parameters() if ".mix_" in name])
    outside = float(np.mean((shares < 0) | (shares > 1)))
    measured = (f"{len(laws) - len(wrong)} of {len(laws)} checks hold, linearity in x among them. Of the shares of a new model "
                f"{100 * outside:.0f} % lie outside 0 to 1, up to {shares.max():.2f}: there it extrapolates.")
    verdict = WRONG if wrong else CONDITIONS if outside else RIGHT
    return verdict(measured, checks=len(laws), failed=wrong, outside=outside, largest_share=float(shares.max()))


@claim(9, "RWKV", "Channel mixing uses max pooling followed by a squared ReLU.", place=PLACE,
       paper=f"There is no pooling: max(k, 0)² is the squared ReLU of each number ({PAPER}, (18)).")
def pooling(measure: Measure) -> Finding:
    """On how many inputs an output of the activation depends, and how far it is from the square of the ReLU."""
    mixing = next(m for m in measure.model("rwkv", width=16, layers=1).modules() if isinstance(m, ChannelMix))
    k = measure.normal(1, 3, len(mixing.key.data))  # [B T F]
    with no_grad():
        y = mixing.activation(k).numpy()
        away = float(np.abs(y - relu(k).numpy() ** 2).max())
        moved = []  # how many outputs change with one input
        for place in np.ndindex(k.shape):
            other = k.copy()
            other[place] = abs(other[place]) + 1
            changed = mixing.activation(other).numpy() != y
            moved.append(int(changed.sum()) if changed[place] else -1)
    alone = y.shape == k.shape and set(moved) == {1}
    measured = (f"The activation makes {y.size} numbers of {k.size}; {'each' if alone else 'not each'} output depends on its "
                f"own input alone, and differs by at most {away:.1e} from the square of the ReLU.")
    return (WRONG if alone and away < 1e-5 else UNDECIDED if alone else RIGHT)(measured, inputs=k.size, outputs=y.size,
                                                                               difference=away)


@claim(10, "RWKV", "Its sigmoid gate forgets what is past.", place=PLACE,
       paper=f"The gate decides what is read of the past; what is forgotten follows from the decay w ({PAPER}, (17)).")
def gate(measure: Measure) -> Finding:
    """The output and the state of time mixing with an open and with a closed gate, and what of the past the decay leaves."""
    mixing = next(m for m in measure.model("rwkv", width=16, layers=1).modules() if isinstance(m, TimeMix))
    mixing.load({name: measure.normal(*array.shape) for name, array in mixing.state().items()})
    x = np.abs(measure.normal(1, 8, 16))  # positive, so that a matrix of one sign closes every gate
    mixing.mix_r.assign_(np.full(16, 0.5, np.float32))
    results = {}
    with no_grad():
        for name, value in (("open", 10.0), ("closed", -10.0)):
            mixing.receptance.assign_(np.full((16, 16), value, np.float32))
            results[name] = mixing.prefill(x, mixing.init_state(1))
    size = {name: float(np.abs(y.numpy()).max()) for name, (y, _) in results.items()}
    same = all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(results["open"][1], results["closed"][1], strict=True))
    kept = np.exp(-np.exp(mixing.time_decay.data))  # e^w, what is left of the past after a step
    measured = (f"With the gate closed the output is at most {size['closed']:.1e} instead of {size['open']:.1e}, and the state "
                f"is {'the same to the last bit' if same else 'another one'}; a step leaves {kept.min():.2f} to "
                f"{kept.max():.2f} of the past, whatever the gate does.")
    silent = size["closed"] < 1e-6 * size["open"]
    verdict = RIGHT if silent and not same else CONDITIONS if silent else WRONG
    return verdict(measured, largest_output=size, same_state=same, left_after_a_step=[kept.min(), kept.max()])


RECALL = dict(task="mqar", pairs=4, context=32, symbols=32, width=32, layers=2, batch=64, lr=0.005, warmup=20, token_shift=True,
              eval_examples=1000)


def recalling(measure: Measure, variant: str, **options) -> Run:
    """A model that learns to recall values by their keys."""
    steps = measure.sizes(150, 600)
    return measure.train(variant, **RECALL, steps=steps, eval_every=measure.sizes(150, 200), **options)


def error_of(accuracy: float, answers: int) -> float:
    """The standard error of an accuracy."""
    return math.sqrt(max(accuracy * (1 - accuracy), 1 / answers) / answers)


@claim(11, "RWKV", "It is weak at recalling information from far back.", place=PLACE,
       paper=f"Section 9 of {PAPER} says so, and table 4.2 of 2302.10866 has 12.4 % for it and 100 % for Hyena.")
def recall(measure: Measure) -> Finding:
    """Multi-query associative recall after the same steps: RWKV, attention, and attention whose state is as small as RWKV's."""
    rwkv = recalling(measure, "rwkv")
    dense = recalling(measure, "transformer", heads=2)
    size, length = measure.state_bytes(rwkv.model, 32), rwkv.model.context
    window = max(1, round(size / (measure.state_bytes(dense.model, length) / length)))
    small = recalling(measure, "attention-sinks", heads=2, window=window, sinks=0)
    batch = rwkv.trained.experiment.begin(rwkv.trained.saved).held_out()
    answers = int((batch.labels != NOTHING).sum())
    near, far = _by_distance(rwkv, batch)
    margin = 2 * math.hypot(error_of(rwkv.value, answers), error_of(dense.value, answers))
    measured = (f"RWKV answers {100 * rwkv.value:.0f} % ({100 * near:.0f} % of the nearer and {100 * far:.0f} % of the farther "
                f"half), attention {100 * dense.value:.0f} %, attention with {window} keys in a state of RWKV's size "
                f"{100 * small.value:.0f} %; the commonest value gives {100 * rwkv.baselines['commonest value seen']:.0f} %.")
    behind, behind_small = dense.value - rwkv.value > margin, small.value - rwkv.value > margin
    verdict = RIGHT if behind and behind_small else CONDITIONS if behind else UNDECIDED
    if rwkv.value - dense.value > margin:
        verdict = WRONG
    if verdict is CONDITIONS:
        measured += " So it is weaker than attention, but not than attention whose state is as small."
    return verdict(measured, rwkv=rwkv.value, attention=dense.value, small_attention=small.value, window=window, near=near,
                   far=far, answers=answers)


def _by_distance(run: Run, batch) -> tuple[float, float]:
    """The accuracy of the questions that are nearer to their pair than the median, and of the others."""
    rows, places = np.nonzero(batch.labels != NOTHING)
    pair = np.argmax(batch.inputs[rows] == batch.inputs[rows, places][:, None], axis=1)  # where the key stood first
    with no_grad():
        answers = run.model(batch.inputs).numpy().argmax(axis=-1)[rows, places]
    right, distance = answers == batch.labels[rows, places], places - pair
    near = distance <= np.median(distance)
    return float(right[near].mean()), float(right[~near].mean())


@claim(12, "RWKV", "It relies on a limited window between steps.", place=PLACE,
       paper=f"The state has no window; the decay limits how far it reaches ({PAPER}, (16)).")
def window(measure: Measure) -> Finding:
    """The influence of a value on later outputs over the distance, for the decays of a new and of a trained model."""
    trained = recalling(measure, "rwkv").model
    numbers, sentences, cut = {}, [], False
    for name, model in (("new", measure.model("rwkv", width=32, layers=2)), ("trained", trained)):
        decays = np.concatenate([m.time_decay.data for m in model.modules() if isinstance(m, TimeMix)]).astype(np.float64)
        reach, straight = _reach(-np.exp(decays), 2048)
        cut |= not straight
        numbers[name] = quartiles = np.percentile(reach, [25, 50, 75, 100]).round(1).tolist()
        sentences.append(f"in a {name} model it has fallen to 1 % after {quartiles[1]:.0f} positions in half of the channels, "
                         f"and after {quartiles[3]:.0f} in the slowest")
    measured = (f"The influence {'ends at a distance' if cut else 'falls by the same factor at every step, and ends nowhere'}; "
                f"{'; '.join(sentences)}.")
    return (RIGHT if cut else WRONG)(measured, positions_to_one_percent=numbers, ends=cut)


def _reach(w: np.ndarray, length: int) -> tuple[np.ndarray, bool]:
    """After how many positions a value's influence is below 1 %, by channel; whether it falls as e^w at every step.

    The influence is the numerator of wkv, by a value 1 at position 0 and keys that are equal, which without the denominator is
    e^((t - 1) w). It is read from the state of the operator.
    """
    shape = 1, 1, len(w)
    one, zero = np.ones(shape), np.zeros(shape)
    with no_grad():
        _, *state = wkv(zero, one, w, w * 0)
        a = [state[0].numpy()[0] * np.exp(state[2].numpy()[0])]  # the numerator A = a e^p [C]
        for _ in range(length - 1):
            _, *state = wkv(zero - 1e9, zero, w, w * 0, *state)  # positions that add nothing
            a.append(state[0].numpy()[0] * np.exp(state[2].numpy()[0]))
    expected = np.exp(np.arange(length)[:, None] * w)
    straight = np.allclose(a, expected, rtol=1e-6, atol=1e-290)
    return math.log(0.01) / w, straight


@claim(13, "RWKV", "A prompt helps it much more when the question stands first.", place=PLACE,
       paper=f"Its authors measured 44.2 and 74.8 F1 on RTE with 14B parameters ({PAPER}, importance of prompts).")
def question_first(measure: Measure) -> Finding:
    """Associative recall by RWKV after the same steps, with the question behind the pairs and before them."""
    steps = measure.sizes(400, 1000)
    options = dict(task="associative-recall", symbols=18, context=18, width=32, layers=2, batch=64, lr=0.01, warmup=20,
                   every_token=False, steps=steps, eval_every=steps, eval_examples=2000)
    after, before = (measure.train("rwkv", question_first=first, **options) for first in (False, True))
    margin = 2 * math.hypot(*(error_of(run.value, 2000) for run in (after, before)))
    base = max(after.baselines.values())
    measured = (f"RWKV answers {100 * after.value:.1f} % with the question last and {100 * before.value:.1f} % with the "
                f"question first, ± {100 * margin:.1f}; the commonest value gives {100 * base:.1f} %.")
    gain = before.value - after.value
    learned = max(after.value, before.value) - base > margin
    verdict = UNDECIDED if not learned or abs(gain) <= margin else RIGHT if gain > 0 else WRONG
    return verdict(measured, question_last=after.value, question_first=before.value, margin=margin, baseline=base)
