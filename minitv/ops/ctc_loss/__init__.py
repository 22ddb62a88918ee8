"""ctc_loss: the loss of a sequence of labels where nobody says which frame belongs to which label (CTC).

Connectionist temporal classification: Graves, Fernández, Gomez and Schmidhuber, ICML 2006.

The problem. A recording has T frames, and its transcript has U labels, of which there are fewer. A frame is here a position for
which the model has an output: often it stands for four frames of the sound. A model gives a distribution over the labels for
every frame. A loss per frame would need to know where each label is spoken, and nobody has marked that.
The idea. The model has one more class, the blank, which says "no new label here". A *path* names one class for each frame. It
is read by a fixed rule: runs of the same class become one, then blanks are dropped. With _ for the blank,

    a a _ b b _    and    _ a _ _ _ b    both read  a b;         a _ a    reads  a a;         a a    reads  a

CTC does not choose a path. The probability of a transcript is the sum over all paths that read as it, and the loss is minus
its logarithm. So the model is free to find out where the labels are. Two equal labels in a row need a blank between them,
because they would become one without it. Therefore a transcript of U labels with R equal neighbours needs U + R frames or more.
What is lost. Given the recording, the classes at different frames are independent of each other. So the loss knows no language:
that a "u" follows a "q" must be heard in the frames, or be added by a language model (decoding.py). A transcript cannot have
more labels than the recording has frames. Trained models say the blank almost everywhere and each label in a frame or two, so
they do not tell how long a label lasts.

    logits[B T V]            what the model says of every frame; V counts the blank too
    p_t(v)                   the probability of class v at frame t: softmax(logits)
    targets[B U]             labels l_1 ... l_U without blanks; the first target_lengths[b] of them count
    input_lengths[B]         how many of the T frames count
    e                        the extended target _ l_1 _ l_2 _ ... l_U _. Its S = 2U + 1 places are the *states* s = 0 ... S-1
    α_t(s)                   the probability of the frames up to t, of paths that are in state s at frame t
    β_t(s)                   the probability of the frames after t, of paths that are in state s at frame t
    γ_t(s)                   the probability that the path is in state s at frame t, given that it reads as the transcript

Forward. There are far too many paths to add one by one, but all that matters of the first t frames is how far into e they
have come. From frame to frame, a path stays in its state, goes on to the next, or leaves out the blank between two labels that
differ. The first frame is the first blank or the first label, the last frame is the last label or the last blank:

    α_0(0) = p_0(_),  α_0(1) = p_0(l_1),  else 0
    α_t(s) = p_t(e_s) (α_{t-1}(s) + α_{t-1}(s-1) + [e_s is a label and e_s ≠ e_{s-2}] α_{t-1}(s-2))
    Z      = α_{T-1}(S-1) + α_{T-1}(S-2)                (the first term alone if U = 0)
    loss   = -ln Z

Backward. β runs from the end. It leaves out the frame t itself, so that the product α_t(s) β_t(s) is a sum over whole paths:

    β_{T-1}(S-1) = β_{T-1}(S-2) = 1,  else 0
    β_t(s) = Σ p_{t+1}(e_r) β_{t+1}(r)     over r = s, r = s+1, and r = s+2 if e_r is a label and e_r ≠ e_s
    γ_t(s) = α_t(s) β_t(s) / Z,            and Σ_s γ_t(s) = 1 at every t

Gradient. ∂loss/∂p_t(v) = -Σ_{s: e_s = v} γ_t(s) / p_t(v), and through the softmax

    ∂loss/∂logits_t(v) = p_t(v) - Σ_{s: e_s = v} γ_t(s)

This is the difference between what the model says and what it would say if it knew the transcript. In cross_entropy the second
part is 1 for the label and 0 for the others; here it is spread over the classes. Frames that do not count have gradient 0.

An example: two frames, the transcript "a", and the classes _ and a. Three paths read as "a": a a, a _ and _ a. With the
probabilities 0.4 and 0.9 of a, they have 0.36, 0.04 and 0.54, together Z = 0.94. Given the transcript, the path is at "a" in
the first frame with the probability γ = (0.36 + 0.04) / 0.94 = 0.4255. The model says 0.4. So the gradient of that logit is
0.4 - 0.4255 = -0.0255.

>>> import numpy as np
>>> from autograd import Tensor
>>> from minitv.ops import ctc_loss
>>> p = np.array([[[0.6, 0.4], [0.1, 0.9]]], np.float32)    # [B T V]
>>> logits = Tensor(np.log(p), requires_grad=True)
>>> loss = ctc_loss(logits, np.array([[1]]))
>>> round(float(np.exp(-loss.item())), 4)
0.94
>>> loss.backward()
>>> print(logits.grad.numpy().round(4))
[[[ 0.0255 -0.0255]
  [ 0.0574 -0.0574]]]

Cost. O(T (U + V)) time for each utterance. The recursions go frame after frame, and all states of a frame next to each other. α
takes T (2U + 1) numbers for each utterance. The probability of a long path
is far below what a float holds, so numbers are kept as logarithms, or with exponents of their own (cpu.py). All of that is
float64, for float32 logits too: a loss of 1000 has an error of 1e-4 in float32. decoding.py beside this page turns frames into
labels.

``reduction`` names what is done with the B losses, because "mean" means different things in different libraries:

    "none"     the losses [B]                     "mean"     Σ_b loss_b / max(U_b, 1) / B, which PyTorch calls "mean" too
    "sum"      Σ_b loss_b                         "batch"    Σ_b loss_b / B
                                                  "frames"   Σ_b loss_b / Σ_b T_b
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from autograd import Tensor
from autograd.device import check_range, namespace, to_numpy
from autograd.errors import DomainError
from autograd.laws import becomes, law, shift_invariant
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, log_softmax, logsumexp, stack, sum, take_along_axis, where

from .decoding import collapse

REDUCTIONS = ("mean", "sum", "none", "batch", "frames")


@op("logits[B T V], targets:int[B U], input_lengths?:int[B], target_lengths?:int[B] -> loss[*]", tolerance=4.0,
    laws=[shift_invariant("logits", "all logits")])
def ctc_loss(logits, targets, input_lengths=None, target_lengths=None, *, blank=0, reduction="mean", zero_infinity=False):
    """-ln of the probability that the frames read as the targets, a sum over all alignments, in nats; see the page's formulas.

    logits[B T V]; targets[B U] in 0 .. V-1 without ``blank``; input_lengths[B] from 0 to T and target_lengths[B] from 0 to U,
    by default all. What lies behind them may hold anything. -> the loss [], or [B] with ``reduction`` "none"; "mean" is
    PyTorch's, over labels, then over the batch; "sum", "batch" and "frames" say what they divide the sum by.

    A target that needs more frames than it has raises DomainError, which says how many do; with ``zero_infinity`` its loss and
    its gradient are 0. A probability of 0 gives the loss ∞ (0 with ``zero_infinity``) and the gradient 0. frames_needed tells
    beforehand. DomainError too for labels and lengths out of range.
    """
    losses, frames, labels = [], *lengths_of(logits, targets, input_lengths, target_lengths)
    for rows, target, T, U in zip(logits.tolist(), targets.tolist(), frames.tolist(), labels.tolist(), strict=True):
        e = [blank, *(symbol for label in target[:U] for symbol in (label, blank))]
        alpha = [0.0] + (len(e) - 1) * [-math.inf]  # before the first frame: nothing but a place from which e_0, e_1 are near
        skip = [s > 1 and e[s] not in (blank, e[s - 2]) for s in range(len(e))]
        for row in rows[:T]:
            top = max(row)
            total = _logsum([x - top for x in row])
            alpha = [(row[e[s]] - top) - total
                     + _logsum([alpha[s], *alpha[s - 1 : s], *(alpha[s - 2 : s - 1] if skip[s] else ())])
                     for s in range(len(e))]
        loss = -_logsum(alpha[-2:])
        losses.append(0.0 if zero_infinity and loss == math.inf else loss)
    if reduction == "none":
        return np.asarray(losses, logits.dtype)
    parts = [loss / max(U, 1) for loss, U in zip(losses, labels, strict=True)] if reduction == "mean" else losses
    count = {"mean": len(losses), "batch": len(losses), "sum": 1, "frames": int(frames.sum())}[reduction]
    return np.asarray(math.fsum(parts) / max(count, 1), logits.dtype)


def _logsum(values):
    """ln Σ e^x; -∞ for nothing."""
    top = max(values, default=-math.inf)
    return top if math.isinf(top) else top + math.log(math.fsum(math.exp(x - top) for x in values))


# -- lengths -----------------------------------------------------------------------------------------------------------
def lengths_of(logits, targets, input_lengths, target_lengths):
    """Both lengths, all frames and all labels where they are not given."""
    xp, (batch, length, _), most = namespace(logits), logits.shape, targets.shape[1]
    return (xp.full(batch, length) if input_lengths is None else input_lengths,
            xp.full(batch, most) if target_lengths is None else target_lengths)


def frames_needed(targets, target_lengths=None):
    """The fewest frames [B] that can read as targets [B U]: the number of labels, and a blank between equal neighbours."""
    xp, most = namespace(targets), targets.shape[1]
    labels = xp.full(len(targets), most) if target_lengths is None else target_lengths
    repeats = (targets[:, 1:] == targets[:, :-1]) & (xp.arange(1, most) < labels[:, None])
    return labels + repeats.sum(axis=1)


def weights(reduction, frames, labels):
    """What each of the losses [B] is multiplied by before their sum, in float64."""
    xp, batch = namespace(frames), max(len(frames), 1)
    if reduction == "mean":
        return 1.0 / (batch * xp.maximum(labels, 1))
    return xp.ones(len(frames)) / {"batch": batch, "frames": xp.maximum(frames.sum(), 1)}.get(reduction, 1)


# -- forms and kernels -------------------------------------------------------------------------------------------------
@ctc_loss.form
def recurrent(logits, targets, input_lengths, target_lengths, blank, reduction, zero_infinity):
    """The forward recursion over logarithms, one frame after the other, all utterances and states at once."""
    xp, dtype, (batch, length, _) = namespace(logits.data), logits.dtype, logits.shape
    frames, labels = lengths_of(logits.data, targets, input_lengths, target_lengths)
    e = xp.full((batch, 2 * targets.shape[1] + 1), blank)  # [B S]
    e[:, 1::2] = xp.where(xp.arange(targets.shape[1]) < labels[:, None], targets, blank)
    before = xp.concatenate([xp.full((batch, 2), blank), e], axis=1)[:, :-2]  # e_{s-2}
    skip = (e != blank) & (e != before)
    inside = xp.arange(length) < frames[:, None]  # [B T]
    p = log_softmax(where(inside[..., None], logits, 0.0).astype(dtype=np.float64))  # ln p [B T V]
    p = take_along_axis(p, xp.broadcast_to(e[:, None], (batch, length, e.shape[1])), axis=-1)  # ln p_t(e_s) [B T S]
    nothing = Tensor.wrap(xp.full((batch, 2), -math.inf))
    alpha = Tensor.wrap(xp.where(xp.arange(e.shape[1]) == 0, 0.0, -math.inf) + xp.zeros((batch, 1)))  # ln α [B S]
    for t in range(length):
        near = concat([nothing, alpha], axis=1)  # by two states later
        sums = logsumexp(stack([alpha, near[:, 1:-1], where(skip, near[:, :-2], -math.inf)], axis=0), axis=0)
        alpha = where(inside[:, t, None], p[:, t] + sums, alpha)
    last = 2 * labels[:, None] + xp.arange(1, 3)  # S_b - 2 and S_b - 1, counted with ``nothing`` before them
    losses = -logsumexp(take_along_axis(concat([nothing, alpha], axis=1), last, axis=1), axis=1)
    if zero_infinity:
        losses = where(losses.data == math.inf, 0.0, losses)
    if reduction == "none":
        return losses.astype(dtype=dtype)
    return sum(losses * Tensor.wrap(weights(reduction, frames, labels))).astype(dtype=dtype)


ctc_loss.kernel("cpu")
ctc_loss.kernel("cuda")


@ctc_loss.validate
def _(logits, targets, input_lengths, target_lengths, blank, reduction, zero_infinity):
    size, xp = logits.shape[2], namespace(logits, targets)
    if reduction not in REDUCTIONS:
        raise DomainError(f"ctc_loss: reduction {reduction!r}, allowed: {', '.join(REDUCTIONS)}")
    if not isinstance(zero_infinity, bool):
        raise DomainError(f"ctc_loss: zero_infinity {zero_infinity!r}, allowed: True or False")
    if type(blank) is not int or not 0 <= blank < size:
        raise DomainError(f"ctc_loss: blank {blank!r}, allowed: a class of the {size} of logits, 0 .. {size - 1}")
    frames, labels = lengths_of(logits, targets, input_lengths, target_lengths)
    _check(frames, 0, logits.shape[1], "ctc_loss: input_lengths[{b}] is {value}, allowed: 0 .. {high}, the frames of logits")
    _check(labels, 0, targets.shape[1], "ctc_loss: target_lengths[{b}] is {value}, allowed: 0 .. {high}, the labels of targets")
    used = xp.arange(targets.shape[1]) < labels[:, None]
    _check(xp.where(used, targets, 0), 0, size - 1, "ctc_loss: targets[{b}] has the label {value}, allowed: 0 .. {high}")
    _check(used & (targets == blank), 0, 0, f"ctc_loss: targets[{{b}}] has the label {blank}, which is the blank, allowed: "
           "others (target_lengths says how many labels count)")
    if not zero_infinity:
        needed = frames_needed(targets, labels)
        _check(needed - frames, -2**62, 0, "ctc_loss: targets[{b}] needs {needed} frames, for its labels and a blank between "
               "equal ones, and has {frames}; {count} of {batch} targets need too many, and zero_infinity=True gives these "
               "the loss 0", needed=needed, frames=frames)


def _check(values, low, high, sentence, **more):
    """DomainError if a value lies outside low .. high, with the sentence about the first such row b."""
    def fail(value):
        found = to_numpy(values).astype(np.int64)
        wrong = ((found < low) | (found > high)).reshape(len(found), -1)
        b = int(np.argmax(wrong.any(axis=1)))
        value = int(found.reshape(len(found), -1)[b, np.argmax(wrong[b])])
        raise DomainError(sentence.format(b=b, value=value, high=high, count=int(wrong.any(axis=1).sum()), batch=len(found),
                                          **{name: int(to_numpy(x)[b]) for name, x in more.items()}))

    check_range(values.astype(np.int64), low, high, fail)


@ctc_loss.inputs
def _(draw):
    batch, length, size, most = draw.size(0, 2, "B"), draw.size(0, 6, "T"), draw.size(1, 4, "V"), draw.size(0, 3, "U")
    blank, zero_infinity, generator = draw.integer(0, size - 1), draw.boolean(), draw.generator()
    others = [v for v in range(size) if v != blank]
    targets = draw.layout(generator.choice(others or [blank], (batch, most)).astype(np.intp))
    frames = generator.integers(0, length + 1, batch) if draw.boolean() else None
    labels = generator.integers(0, most + 1, batch) if draw.boolean() else None
    if not (zero_infinity and others):  # as many labels as fit
        limits, counts = (np.full(batch, n) if x is None else x for n, x in ((length, frames), (most, labels)))
        most_frames = limits if others else np.zeros(batch, np.intp)
        fitting = np.array([max(n for n in range(counts[b] + 1)
                                if frames_needed(targets[b : b + 1], np.array([n]))[0] <= most_frames[b])
                            for b in range(batch)], np.intp)
        labels = labels if (fitting == counts).all() else fitting
    logits = draw.floats(batch, length, size) * draw.dtype.type(draw.choice((1, 1, 30)))
    return (logits, targets, frames, labels), {"blank": blank, "reduction": draw.choice(REDUCTIONS),
                                               "zero_infinity": zero_infinity}


# -- laws --------------------------------------------------------------------------------------------------------------
def _alone(case):
    """Each utterance without padding: (number, its frames [1 T_b V], its labels [1 U_b])."""
    frames, labels = lengths_of(case.logits, case.targets, case.input_lengths, case.target_lengths)
    for b in range(len(frames)):
        yield b, case.logits[b : b + 1, : frames[b]], case.targets[b : b + 1, : labels[b]]


def _losses(case, **changes):
    return case(**{"reduction": "none", **changes}).loss


def _loss(case, logits, targets, **changes):
    """The loss of one utterance of which everything counts."""
    return _losses(case, logits=logits, targets=targets, input_lengths=None, target_lengths=None, **changes)


@becomes(ctc_loss, "sum over all alignments", "there are few frames")
def _(case, draw):
    for b, logits, targets in _alone(case):
        p = np.exp(logits[0].astype(np.float64) - logits[0].max(axis=-1, keepdims=True, initial=-math.inf))
        p /= p.sum(axis=-1, keepdims=True)  # [T V]
        paths = np.indices((p.shape[1],) * len(p)).reshape(len(p), -1).T if len(p) else np.zeros((1, 0), int)  # [V^T T]
        wanted = targets[0].tolist()
        reads = [collapse(path, blank=case.blank) == wanted for path in paths.tolist()]
        total = np.prod(p[np.arange(len(p)), paths[reads]], axis=1).sum()
        if total > 1e-250 or not any(reads):
            expected = np.array([-math.log(total) if total else 0.0], logits.dtype)
            assert_close(_loss(case, logits, targets), expected, f"utterance {b}", terms=64)


@law(ctc_loss, "the probabilities of all targets sum to 1")
def _(case, draw):
    for b, logits, _ in _alone(case):
        length, symbols = min(logits.shape[1], 3), [v for v in range(logits.shape[2]) if v != case.blank]
        every = [target for n in range(length + 1) for target in itertools.product(symbols, repeat=n)]
        counts = np.array([len(target) for target in every])
        targets = np.array([[*target, *[case.blank] * (length - len(target))] for target in every], np.intp)
        fits = frames_needed(targets, counts) <= length
        losses = _losses(case, logits=np.repeat(logits[:, :length], fits.sum(), axis=0), targets=targets[fits],
                         input_lengths=None, target_lengths=counts[fits], zero_infinity=False)
        assert_close(np.exp(-losses).sum(), logits.dtype.type(1), f"utterance {b}", terms=64 * len(losses) ** 2)


@law(ctc_loss, "an utterance alone, without padding, has the loss that it has in a batch")
def _(case, draw):
    losses = _losses(case)
    for b, logits, targets in _alone(case):
        assert_close(_loss(case, logits, targets), losses[b : b + 1], f"utterance {b}", terms=64)


@law(ctc_loss, "what lies behind the lengths may hold anything")
def _(case, draw):
    frames, labels = lengths_of(case.logits, case.targets, case.input_lengths, case.target_lengths)
    logits, targets = case.logits.copy(), case.targets.copy()
    logits[np.arange(logits.shape[1]) >= frames[:, None]] = draw.choice((math.nan, math.inf, -math.inf, 5.0))
    targets[np.arange(targets.shape[1]) >= labels[:, None]] = draw.choice((-1, case.blank, 10**6))
    assert_close(_losses(case, logits=logits, targets=targets), _losses(case))


@law(ctc_loss, "read backwards, frames and target have the same loss")
def _(case, draw):
    for b, logits, targets in _alone(case):
        assert_close(_loss(case, logits[:, ::-1], targets[:, ::-1]), _loss(case, logits, targets), f"utterance {b}", terms=64)


@law(ctc_loss, "the numbers of the classes do not count, and neither does that of the blank")
def _(case, draw):
    order = draw.generator().permutation(case.logits.shape[2])  # new class i is the old one order[i]
    place = np.argsort(order)
    renamed = _losses(case, logits=case.logits[..., order], targets=place[case.targets], blank=int(place[case.blank]))
    assert_close(renamed, _losses(case), terms=64)


@law(ctc_loss, "a large constant added to all logits of a frame changes nothing")
def _(case, draw):
    logits = np.rint(case.logits * 256) / 256  # so that the sum loses nothing
    large = 2**12 if draw.dtype.itemsize == 4 else 2**40
    constants = draw.generator().integers(-large, large, (*logits.shape[:2], 1)).astype(logits.dtype)
    logits = logits.astype(case.logits.dtype)
    assert_close(_losses(case, logits=logits + constants), _losses(case, logits=logits), terms=64)


@law(ctc_loss, "each reduction is what it says of the losses")
def _(case, draw):
    frames, labels = lengths_of(case.logits, case.targets, case.input_lengths, case.target_lengths)
    losses = _losses(case).astype(np.float64)
    batch = max(len(losses), 1)
    expected = {"sum": losses.sum(), "batch": losses.sum() / batch, "frames": losses.sum() / max(frames.sum(), 1),
                "mean": (losses / np.maximum(labels, 1)).sum() / batch}
    for reduction, value in expected.items():
        assert_close(case(reduction=reduction).loss, np.asarray(value), reduction, terms=64)
