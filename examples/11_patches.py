# %% [markdown]
# # Patches of bytes: MEGABYTE
#
# A text is about five times as long in bytes as in words, and a picture has a million bytes. How can a model read and write
# bytes, if every byte passes through all layers and meets all bytes before it?

# %%
import numpy as np

import minitv
from autograd import distance, no_grad, use
from minitv.ops import attention

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## The formula
#
# MEGABYTE (Yu et al. 2023, arXiv 2305.07185) cuts the text into patches of P bytes. A large **global** model has one position
# for each patch, where it reads the patch before. A small **local** model guesses the bytes of one patch, one after the other.
# It sees what the global model says of this patch, and the bytes of the patch so far.
#
#     h_t = E₀[x_t]                                   embedding of byte t, D/P numbers                        (1)
#     in_k = h of the patch before, side by side      [D]; in front of the text stand learned pads            (2)
#     out_k = global blocks(in_0 .. in_k)             [D], causal attention among patches                     (3)
#     in_{k,p} = W (part p of out_k) + E₁[x_{kP+p}]   [d]; at p = 0 a learned pad in place of E₁              (4)
#     out_{k,p} = local blocks(in_{k,0} .. in_{k,p})  [d], causal attention inside the patch alone            (5)
#
# The output at patch k, place p, is the guess for byte k P + p + 1. The bytes of a patch stand side by side in one vector and
# are not added up, because a sum would not tell which byte stood where. And there is a local model, because bytes that are
# guessed all at once would not know of each other: for cat or dog, it might write cag. Two shifts make it causal: patch k reads
# patch k - 1, and place p reads the byte that is guessed at place p - 1.
#
# ## The loop
#
# A model with one layer of attention in each part. To keep it short, queries, keys and values are the input itself.

# %%
T, P, D, d = 24, 4, 16, 8
h = rng.standard_normal((T, D // P))  # [T D/P], embeddings for the global model
e = rng.standard_normal((T, d))  # [T d], embeddings for the local model
pads, pad = rng.standard_normal((P - 1, D // P)), rng.standard_normal(d)
W = rng.standard_normal((d, D // P)) / 2


def attend(x):
    y = np.zeros_like(x)
    for i in range(len(x)):
        weights = np.exp(x[: i + 1] @ x[i] / np.sqrt(x.shape[1]))
        y[i] = x[i] + weights @ x[: i + 1] / weights.sum()  # the input and what attention adds
    return y


def megabyte_loop(h, e, pads, pad, W, P):
    entered = np.concatenate([pads, h])[: len(h)].reshape(len(h) // P, -1)  # (2): [T/P D], moved by P - 1 bytes
    out = attend(entered)  # (3)
    local = []
    for k in range(len(out)):
        row = out[k].reshape(P, -1) @ W.T  # [P d]: each place gets its part of the global output ...
        row[0] += pad
        row[1:] += e[k * P + 1 : (k + 1) * P]  # ... and the byte before the one that it guesses (4)
        local.append(attend(row))  # (5)
    return np.concatenate(local)  # [T d]


# %% [markdown]
# ## The library
#
# The local model runs all patches at once: its attention has `segment=P`, so no query sees beyond its own patch.

# %%
def megabyte(h, e, pads, pad, W, P):
    def attend(x, **structure):
        y, _ = attention(*[x[None, None]] * 3, **structure)
        return x + y.numpy()[0, 0]

    out = attend(np.concatenate([pads, h])[: len(h)].reshape(len(h) // P, -1))  # (2), (3)
    place = (np.arange(len(h)) % P)[:, None]
    local = out.reshape(len(h), -1) @ W.T + np.where(place == 0, pad, e)  # (4)
    return attend(local, segment=P)  # (5)


expected, largest = megabyte_loop(h, e, pads, pad, W, P), 0.0
print("largest difference from the loop, relative to the largest output")
for kind, name in (("form", "parallel"), ("kernel", "cpu")):
    with use(attention, **{kind: name}):
        error = distance(megabyte(h, e, pads, pad, W, P), expected)
    largest = max(largest, error)
    print(f"    {kind:6} {name:11} {error:.0e}")

# %% [markdown]
# A whole model of the library has several layers in each part, norms and feed-forward networks. Its weights are random here.

# %%
VOCAB = 11
model = minitv.build("megabyte", vocab=VOCAB, context=T, width=16, patch=str(P), heads=2)
ids = rng.integers(VOCAB, size=(1, T))
with no_grad():
    logits = model(ids).numpy()  # [1 T VOCAB]
    with use(kernel="none"):
        forms = model(ids).numpy()
print(f"a model with kernels and with forms: difference {distance(logits, forms):.0e} in {logits.dtype}")

# %% [markdown]
# ## An experiment: what a guess depends on
#
# Change one byte, and see which guesses change and how much. Each must depend on exactly the bytes before the one that is
# guessed.

# %%
influence = np.zeros((T, T))
with no_grad():
    for s in range(T):
        other = ids.copy()
        other[0, s] = (ids[0, s] + 1) % VOCAB
        influence[:, s] = np.abs(model(other).numpy() - logits).max(axis=(0, 2))
future = influence[np.triu_indices(T, 1)].max()
past = influence[np.tril_indices(T)].min()
print(f"largest change by a later byte {future:.0e}, smallest change by an earlier one {past:.0e}")
same_patch = np.arange(T)[:, None] // P == np.arange(T) // P
print(f"mean change by a byte of the running patch {influence[same_patch & (influence > 0)].mean():.3f}, "
      f"of an earlier patch {influence[~same_patch & (influence > 0)].mean():.3f}")

# %% [markdown]
# ## An experiment: what it costs
#
# Attention compares (T/P)² pairs of patches and T P pairs of bytes. Both halves count half of that, because a byte sees the
# past alone. A long patch makes the first small and the second large, so there is a best P. With the best P for each length the
# cost grows as T^(4/3), where a flat Transformer has T² (section 3.1 of the paper). All widths are 1 in the first table.

# %%
lengths, patches = [1024, 4096, 16384, 65536, 262144], [2**n for n in range(12)]
costs = {t: [(t / p) ** 2 / 2 + t * p / 2 for p in patches if p <= t] for t in lengths}
best = {t: patches[int(np.argmin(row))] for t, row in costs.items()}
print(f"{'bytes T':>9}{'flat':>14}{'best P':>9}{'MEGABYTE':>14}{'flat / MEGABYTE':>18}")
for t, row in costs.items():
    print(f"{t:9}{t * t / 2:14.2e}{best[t]:9}{min(row):14.2e}{t * t / 2 / min(row):18.0f}")
exponent = np.polyfit(np.log(lengths), np.log([min(row) for row in costs.values()]), 1)[0].item()
print(f"the cost grows as T to the power of {exponent:.2f}")

# %% [markdown]
# Attention is not all. A layer of width D has 12 D² weights, each of which works once for each position: in the global model
# once for each patch. So a global layer may have P times as many weights at the same cost. And writing is faster, because
# layers that run one after the other decide it: a patch takes L_g global layers once and L_l local layers P times.

# %%
LAYERS_GLOBAL, LAYERS_LOCAL, WIDE, NARROW, P = 14, 14, 1024, 512, 8
flat = (LAYERS_GLOBAL + LAYERS_LOCAL) * 12 * WIDE**2
split = LAYERS_GLOBAL * 12 * WIDE**2 / P + LAYERS_LOCAL * 12 * NARROW**2
serial = {"flat": LAYERS_GLOBAL + LAYERS_LOCAL, "MEGABYTE": LAYERS_GLOBAL / P + LAYERS_LOCAL}
print(f"{'':30}{'flat':>12}{'MEGABYTE':>12}")
print(f"{'products of weights for a byte':30}{flat / 1e6:11.0f}M{split / 1e6:11.0f}M")
print(f"{'layers in a row for a byte':30}{serial['flat']:12}{serial['MEGABYTE']:12.2f}")

if plt:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    image = axes[0].imshow(np.log10(np.where(influence > 0, influence, np.nan)))
    axes[0].set(title="change of the guesses, log₁₀", xlabel="byte that is changed", ylabel="guess for the byte after")
    figure.colorbar(image, ax=axes[0])
    for t, row in costs.items():
        axes[1].loglog(patches[: len(row)], row, marker="o", label=f"T = {t}")
    axes[1].set(title="pairs that attention compares", xlabel="patch P")
    axes[1].legend(fontsize=8)
    axes[2].loglog(lengths, [t * t / 2 for t in lengths], marker="o", label="flat")
    axes[2].loglog(lengths, [min(row) for row in costs.values()], marker="o", label="MEGABYTE, best P")
    axes[2].set(title="pairs over the length", xlabel="bytes T")
    axes[2].legend(fontsize=8)
    plt.show()

# %% [markdown]
# In the first picture, the bright cells lie near the diagonal: inside its own patch a byte acts through the local model, and
# from the next patch on through the global one. What is lost: the global model never reacts to bytes of the running patch.
#
# ## Exercises
#
# 1. Leave out the first shift: let `entered` be `h.reshape(len(h) // P, -1)`. Which guesses can now see the byte that they
#    guess?
# 2. Leave out the local attention: let (5) be `local.append(row)`. What does the guess at place 3 not know any more?
# 3. Three levels (`patch="4,2"` in `minitv.build`): patches of p bytes, and groups of r patches. Let `costs` have `((t / (p *
#    r)) ** 2 + t * r / p + t * p) / 2` for all p and r. Which exponent do you find? For m levels, theory says 1 + 1 / (2^m -
#    1).
#
# Further: `minitv explain megabyte`.
