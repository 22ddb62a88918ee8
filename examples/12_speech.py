# %% [markdown]
# # Speech: CTC and Conformer
#
# A recording has hundreds of frames and its text a few letters, and nobody has marked which frame belongs to which letter. How
# can a model learn from that, and what does its network look like?

# %%
from itertools import product

import numpy as np

from autograd import Tensor, depthwise_conv1d, distance, linear, softmax, use
from minitv.ops import ctc_loss, relative_attention

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## CTC: the formula
#
# A frame is a few numbers for every 10 ms of sound: how strong it is in each band of frequency. CTC (Graves et al. 2006,
# connectionist temporal classification) gives the model one more class, the blank, written _. It means "no new label here". A
# path names a class for every frame. It is read by a rule: equal neighbours become one, then blanks are dropped. So `a a _ b`
# and `_ a b b` both read "a b", and `a _ a` reads "a a". The model gives a probability p_t(c) of class c at frame t, and no
# path is chosen:
#
#     p(text) = Σ over all paths that read as the text of Π_t p_t(path_t),        loss = -ln p(text)
#
# ## CTC: the loop
#
# This is the sum as it stands. It tries V^T paths, so T must be small.

# %%
BLANK = 0


def read(path):
    return [c for c, before in zip(path, (None, *path)) if c != before and c != BLANK]


def all_paths_loop(p, text):
    total = 0.0
    for path in product(range(p.shape[1]), repeat=len(p)):
        if read(path) == text:
            total += np.prod([p[t, c] for t, c in enumerate(path)])
    return -np.log(total)


# %% [markdown]
# A faster way: all that matters of the first t frames is how far in the text they have come. Write the text with blanks around
# its labels, e = _ a _ b _. Then α_t(s) is the probability of all paths that have reached place s of e at frame t. From frame
# to frame, a path stays, goes on by one, or leaves out the blank between two different labels. This takes T (2 U + 1) steps for
# U labels.

# %%
def alpha_loop(p, text):
    e = [BLANK, *(c for label in text for c in (label, BLANK))]
    alpha = np.zeros(len(e))
    alpha[0], alpha[1] = p[0, BLANK], p[0, e[1]]
    for row in p[1:]:
        before = alpha
        alpha = np.zeros(len(e))
        for s in range(len(e)):
            skip = before[s - 2] if s > 1 and e[s] not in (BLANK, e[s - 2]) else 0.0
            alpha[s] = row[e[s]] * (before[s] + (before[s - 1] if s else 0.0) + skip)
    return -np.log(alpha[-1] + alpha[-2])  # it ends in the last label or in the last blank


# %% [markdown]
# ## CTC: the library

# %%
T, V, text = 6, 4, [1, 2, 2]
logits = rng.standard_normal((1, T, V))  # [B T V]
p = np.exp(logits[0]) / np.exp(logits[0]).sum(axis=1, keepdims=True)
expected = all_paths_loop(p, text)
largest = abs(alpha_loop(p, text) - expected)
print(f"all {V**T} paths: loss {expected:.6f}; by α: difference {largest:.0e}")
targets = np.array([text])  # [B U]
print(f"    definition         {abs(ctc_loss.definition(logits, targets, reduction='sum') - expected).item():.0e}")
for kind, name in (("form", "recurrent"), ("kernel", "cpu")):
    with use(ctc_loss, **{kind: name}):
        error = abs(ctc_loss(logits, targets, reduction="sum").item() - expected)
    largest = max(largest, error)
    print(f"    {kind:6} {name:11} {error:.0e}")

# %% [markdown]
# ## An experiment: sounds that nobody has marked
#
# Three sounds, each a pattern of 8 numbers, are spoken in words of three to five sounds. Each lasts 2 to 5 frames, between two
# sounds may be a pause, and there is noise. The model is one linear layer, frame by frame. It is trained with the words alone.
#
# The gradient of the loss with respect to the logits is p - γ, where γ_t(c) is the probability that frame t belongs to class c
# if the word is known. So the gradient tells γ: this is the alignment that the model believes in.

# %%
BANDS, SOUNDS, FRAMES, WORDS = 8, 3, 32, 48
patterns = rng.standard_normal((SOUNDS + 1, BANDS))
patterns[BLANK] = 0.0  # a pause


def speak():
    """A word [U], its frames [FRAMES BANDS], and which sound is in each frame."""
    word = rng.integers(1, SOUNDS + 1, size=rng.integers(3, 6)).tolist()
    truth = [0] * int(rng.integers(1, 4))
    for before, sound in zip([None, *word], word):
        pause = int(rng.integers(0, 3)) + (sound == before)  # equal sounds have a pause between them
        truth += [BLANK] * pause + [sound] * int(rng.integers(2, 6))
    truth = (truth + [BLANK] * FRAMES)[:FRAMES]
    return word, patterns[truth] + 0.25 * rng.standard_normal((FRAMES, BANDS)), truth


spoken = [(word, sound, truth) for word, sound, truth in (speak() for _ in range(2 * WORDS)) if read(truth) == word]
sounds = np.stack([sound for _, sound, _ in spoken])  # [B T BANDS]
lengths = np.array([len(word) for word, _, _ in spoken])
words = np.array([word + [1] * (5 - len(word)) for word, _, _ in spoken])  # [B U]; what stands behind a word is not read
train, test = slice(0, WORDS), slice(WORDS, None)


def wrong_words(weight, bias):
    best = linear(sounds[test], weight.numpy(), bias.numpy()).numpy().argmax(axis=2)  # the best class of each frame
    return np.mean([read(path.tolist()) != word for path, (word, _, _) in zip(best, spoken[test])]).item()


weight = Tensor(np.zeros((SOUNDS + 1, BANDS)), requires_grad=True)
bias = Tensor(np.zeros(SOUNDS + 1), requires_grad=True)
STEPS, SHOWN = 200, {}
print("step    loss    words that are read wrongly")
for step in range(STEPS + 1):
    logits = Tensor(linear(sounds[train], weight, bias).numpy(), requires_grad=True)  # [B T V], cut off from the weights
    loss = ctc_loss(logits, words[train], target_lengths=lengths[train], reduction="batch")
    loss.backward()
    g = logits.grad.numpy()  # (p - γ) / B
    if step in (0, 20, 50, STEPS):
        gamma = softmax(logits, axis=2).numpy() - WORDS * g
        SHOWN[step] = gamma[0], wrong_words(weight, bias), loss.item()
        print(f"{step:4}{loss.item():8.2f}{SHOWN[step][1]:12.0%}")
    weight = Tensor(weight.numpy() - 0.3 * np.einsum("btv,btc->vc", g, sounds[train]), requires_grad=True)
    bias = Tensor(bias.numpy() - 0.3 * g.sum(axis=(0, 1)), requires_grad=True)

word, sound, truth = spoken[0]
print(f"the word is {word}; the most probable class of each frame, given the word")
print("truth    ", "".join("_123"[c] for c in truth))
for step, (gamma, _, _) in SHOWN.items():
    print(f"step {step:4}", "".join("_123"[c] for c in gamma.argmax(axis=1)))

# %% [markdown]
# At the start γ spreads the labels evenly over the word, whatever is heard. That is enough of a hint: a sound that stands in
# many words is at many places in them, and only the right label fits all of these. To read a new recording, take the best class
# of each frame and apply the rule (`wrong_words` does). What CTC cannot learn is language: given the sound, it takes the
# classes of different frames as independent.
#
# ## Conformer: the formula
#
# The network of a **Conformer** (Gulati et al. 2020, arXiv 2005.08100, section 2.4) has four modules in each block. Attention
# sees what is far, and a convolution sees what is near. Each adds what it finds to x. Two halves of a feed-forward network
# (ffn), which computes with each position by itself, stand around them:
#
#     x̃ = x + ½ ffn(x),    x' = x̃ + attention(x̃),    x'' = x' + convolution(x'),    y = norm(x'' + ½ ffn(x''))
#
# Its attention counts distances and not places: what was said 0.2 s ago matters everywhere in the same way. A score has a part
# for the content and one for the distance n = i - j, with a vector p_n, and learned vectors u and w, which say which keys and
# which distances every query looks at (Transformer-XL, section 3.3):
#
#     s_ij = ((q_i + u) · k_j + (q_i + w) · p_{i-j}) / √K
#
# Its convolution has a filter for each channel alone, of W taps around the position.

# %%
def relative_loop(q, k, v, p, u, w):
    y, T = np.zeros_like(v), len(q)
    for i in range(T):
        scores = np.zeros(T)
        for j in range(T):
            place = p[T - 1 - (i - j)]  # p has the largest distance first, T - 1, and the smallest last, -(T - 1)
            scores[j] = ((q[i] + u) @ k[j] + (q[i] + w) @ place) / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        y[i] = weights @ v / weights.sum()
    return y


def filter_loop(x, taps):
    y, ahead = np.zeros_like(x), len(taps) // 2
    for t in range(len(x)):
        for j in range(len(taps)):
            if 0 <= t + j - ahead < len(x):
                y[t] += taps[j] * x[t + j - ahead]
    return y


T, K = 12, 4
q, k, v = rng.standard_normal((3, T, K))
p, u, w = rng.standard_normal((2 * T - 1, K)), rng.standard_normal(K), rng.standard_normal(K)
one = [x[None, None] for x in (q, k, v)]  # [B H T K]
y = relative_attention(*one, p[None], u[None], w[None])
errors = [distance(y[0, 0], relative_loop(q, k, v, p, u, w))]
taps = rng.standard_normal((5, K))  # [W K]
for kind, name in (("form", "composed"), ("kernel", "cpu")):
    with use(depthwise_conv1d, **{kind: name}):
        errors.append(distance(depthwise_conv1d(v[None], taps.T, ahead=2)[0], filter_loop(v, taps)))
largest = max(largest, *errors)
print("relative attention, and the filter as form and kernel: differences " + ", ".join(f"{error:.0e}" for error in errors))

# %% [markdown]
# Both are linear in what they sum, so the identity matrix shows what a position sees. These vectors p prefer the distance 4.

# %%
T = 24
distances = np.arange(T - 1, -T, -1)
p = np.zeros((2 * T - 1, K))
p[distances == 4] = 3.0
zeros, eye = np.zeros((1, 1, T, K)), np.eye(T)[None, None]
keys = rng.standard_normal((1, 1, T, K))
far = relative_attention(zeros, keys, eye, p[None], np.full((1, K), 0.3), np.ones((1, K)))[0, 0].numpy()
near = depthwise_conv1d(eye[0], np.tile([0.1, 0.2, 0.4, 0.2, 0.1], (T, 1)), ahead=2)[0].numpy()
print(f"position 12 takes most from position {far[12].argmax()} by attention, and from {near[12].argmax()} by the filter")

if plt:
    figure, axes = plt.subplots(2, 4, figsize=(14, 5), layout="constrained")
    axes[0, 0].imshow(sound.T, aspect="auto", cmap="magma")
    axes[0, 0].set(title=f"the frames of the word {' '.join(map(str, word))}", xlabel="frame", ylabel="band")
    axes[1, 0].imshow(np.eye(SOUNDS + 1)[truth].T, aspect="auto", cmap="Greys")
    axes[1, 0].set(title="what was said", xlabel="frame", yticks=range(SOUNDS + 1), yticklabels=["blank", 1, 2, 3])
    for axis, (step, (gamma, _, _)) in zip((axes[0, 1], axes[1, 1], axes[0, 2], axes[1, 2]), SHOWN.items()):
        axis.imshow(gamma.T, aspect="auto", cmap="Greys", vmin=0, vmax=1)
        axis.set(title=f"γ at step {step}", xlabel="frame", yticks=range(SOUNDS + 1), yticklabels=["blank", 1, 2, 3])
    axes[0, 3].imshow(far, cmap="magma")
    axes[0, 3].set(title="attention that likes distance 4", xlabel="position j", ylabel="position i")
    axes[1, 3].imshow(near, cmap="magma")
    axes[1, 3].set(title="filter of 5 taps", xlabel="position j", ylabel="position i")
    plt.show()

# %% [markdown]
# ## Exercises
#
# 1. A text with two equal labels in a row needs a blank between them. Which T is the smallest for `[2, 2]` in `all_paths_loop`?
#    What does `ctc_loss` say of a shorter one?
# 2. Leave out the third way, the skip, in `alpha_loop`: what do the paths look like that are still counted?
# 3. Set the noise of `speak` to 0.5. What happens to the wrong words, and to γ? A Conformer would look at neighbouring frames:
#    give the linear layer the frames before and after as well.
#
# Further: `minitv explain ctc_loss`, `minitv explain conformer`, `minitv train conformer`.
