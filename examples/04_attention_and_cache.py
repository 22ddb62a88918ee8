# %% [markdown]
# # Attention and its cache: Transformer, multi-query attention, attention sinks
#
# How can a token use what stands before it, wherever that stands? And what must a model keep in memory while it writes one
# token after the other?

# %%
import numpy as np

from autograd import distance, explain, use
from minitv.ops import attention

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## The formula
#
# A token is a row of numbers. Three learned matrices make three shorter rows of it, with K channels each:
#
# - the query q: what the token looks for,
# - the key k: what it can be found by,
# - the value v: what it hands over.
#
# Attention is equation (1) of Vaswani et al. 2017 (arXiv 1706.03762). For T tokens, Q, K and V are matrices with a row a token:
#
#     Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V
#
# The same for one token i, where K is the number of channels, the paper's d_k:
#
#     S_ij = q_i · k_j / √K                    score: how well key j fits query i
#     P_ij = exp(S_ij) / Σ_j exp(S_ij)         softmax: the weights are positive and sum to 1
#     y_i = Σ_j P_ij v_j                       a mean of the values
#
# - Why the exponential: every weight is positive, and a key that fits a little better gets much more weight.
# - Why √K: the product of two random rows of K numbers has a size of about √K. Without the division, wide rows would have large
#   scores, one weight would be near 1 and the others near 0, and gradients would vanish.
# - Why j ≤ i: the model learns to guess the next token, so a token must not see later ones. This is called causal.
#
# What it costs: T queries meet up to T keys of K channels, so time grows with T². What it does not know is the order of the
# keys; the notebook on positions adds that.
#
# A layer has several heads: attentions side by side, each with queries, keys and values of its own. Each can look elsewhere.

# %% [markdown]
# ## The loop
#
# Change it as you like: it is the whole of attention.

# %%
T, K = 12, 8
q, k, v = rng.standard_normal((3, T, K))  # [T K] each


def attention_loop(q, k, v):
    y = np.zeros_like(v)  # [T K]
    for i in range(len(q)):  # each query ...
        scores = np.zeros(i + 1)
        for j in range(i + 1):  # ... meets the keys up to its own
            scores[j] = q[i] @ k[j] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())  # the largest score cancels in the next line, and exp cannot overflow
        weights /= weights.sum()
        y[i] = weights @ v[: i + 1]  # (1)
    return y


expected = attention_loop(q, k, v)

# %% [markdown]
# ## The library
#
# Its operators take a batch of sequences with H heads, `[B H T K]`. There is one definition, an obvious loop; there are forms,
# which compute the same with whole matrices, on every device; and there is a compiled kernel for the processor. `use` forces
# one of them. `explain` says which one runs by itself, and why not the others.

# %%
one = [x[None, None] for x in (q, k, v)]  # [1 1 T K] each
largest = distance(attention.definition(*one)[0][0, 0], expected)
print("largest difference from the loop, relative to the largest output")
print(f"    definition         {largest:.0e}")
for kind, name in (("form", "parallel"), ("kernel", "cpu")):
    with use(attention, **{kind: name}):
        y, _ = attention(*one)  # [1 1 T K]; the second output is the logarithm of the softmax's sum
    largest = max(largest, distance(y[0, 0], expected))
    print(f"    {kind:6} {name:11} {distance(y[0, 0], expected):.0e}")
print(explain(attention, *one))

# %% [markdown]
# ## The cache
#
# A model that writes gets a new token in each step. It needs the query of this token alone, but the keys and values of all
# tokens so far. They do not change any more, so they are kept: this is the cache. One query with all keys gives the last row of
# y:

# %%
step, _ = attention(one[0][:, :, -1:], one[1], one[2])  # the query [1 1 1 K] meets T keys
print(f"the last token from the cache: difference {distance(step[0, 0, 0], expected[-1]):.0e}")

# %% [markdown]
# The cache has 2 T H K numbers in each layer, and all of them are read for each token. **Multi-query attention** (Shazeer 2019,
# arXiv 1911.02150) makes it H times as small: all heads keep their own queries and read the same keys and values. Grouped
# queries (Ainslie et al. 2023, arXiv 2305.13245) have G heads of keys and values. It is the same function as attention with
# copied keys. What is lost: heads still differ by their queries, but all of them look at the same K channels of a token. In the
# first paper the perplexity, which is better when lower, rises from 29.9 to 30.2.

# %%
H = 4
queries = rng.standard_normal((1, H, T, K))
keys, values = rng.standard_normal((2, 1, 1, T, K))  # G = 1
shared, _ = attention(queries, keys, values)
copied, _ = attention(queries, np.repeat(keys, H, axis=1), np.repeat(values, H, axis=1))
print(f"shared keys against copies of them: difference {distance(shared, copied):.0e}")

lengths = [256, 1024, 4096, 16384, 65536]
HEADS, CHANNELS, CACHE = 32, 128, 1024  # a model of 7 billion weights; the size of a cache with a window
caches = {"32 heads of keys": [2 * t * HEADS * CHANNELS for t in lengths],
          "8 heads of keys": [2 * t * 8 * CHANNELS for t in lengths],
          "1 head of keys": [2 * t * CHANNELS for t in lengths],
          "32 heads, window": [2 * min(t, CACHE) * HEADS * CHANNELS for t in lengths]}
print("\nmillions of numbers in the cache of one layer, after so many tokens")
print(f"{'':18}" + "".join(f"{t:>9}" for t in lengths))
for name, sizes in caches.items():
    print(f"{name:18}" + "".join(f"{size / 1e6:9.2f}" for size in sizes))

# %% [markdown]
# ## An experiment: why a window alone fails
#
# The last row of the table keeps the last 1024 tokens and forgets the others. The paper on **attention sinks** (Xiao et al.
# 2023, arXiv 2309.17453) finds that this breaks a trained model as soon as the very first token is forgotten. A softmax must
# put its weight somewhere, equation (1) there, also when nothing fits the query. Trained models put it on the first tokens,
# which every query can see: they become a sink. If the sink leaves, its weight falls on tokens that do not deserve it.
#
# Here are queries and keys with a sink, as in such a model: all queries have a direction in common, the first key has it too,
# and the value of the first token is small. The values are replaced by the identity matrix to see the weights: output i is then
# row i of P. This works for every layer of this library that is linear in its values.

# %%
T, K, WINDOW, SINKS = 64, 16, 16, 1
STRENGTH = 5.0  # how much better the first key fits all queries than the others do
q, k, v = rng.standard_normal((3, 1, 1, T, K))
q[..., 0] = 1.0
k[..., 0] = 0.0
k[..., 0, :] = 0.0
k[..., 0, 0] = STRENGTH * np.sqrt(K)
v[:, :, 0] *= 0.05
identity = np.eye(T)[None, None]  # [1 1 T T]

kinds = {"all tokens": {}, "window": {"window": WINDOW}, "window and sink": {"window": WINDOW, "sinks": SINKS}}
weights, outputs = {}, {}
for name, structure in kinds.items():
    weights[name] = attention(q, k, identity, **structure)[0].numpy()[0, 0]  # P [T T]
    outputs[name] = attention(q, k, v, **structure)[0].numpy()[0, 0]  # [T K]

late = slice(WINDOW, None)  # the tokens that have lost the first one
errors = {name: np.linalg.norm((y - outputs["all tokens"])[late], axis=1).mean() for name, y in outputs.items()}
print(f"{'means over late tokens':24}weight of token 0   size of y   error of y")
for name, y in outputs.items():
    print(f"{name:24}{weights[name][late, 0].mean():17.2f}{np.linalg.norm(y[late], axis=1).mean():12.2f}{errors[name]:13.2f}")

if plt:
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, (name, P) in zip(axes, weights.items()):
        image = axis.imshow(np.where(P > 0, P, np.nan) ** 0.5, vmin=0, vmax=1)
        axis.set(title=name, xlabel="key j", ylabel="query i")
    figure.colorbar(image, ax=axes[:3], label="√ of the weight", shrink=0.8)
    for name, sizes in caches.items():
        axes[3].loglog(lengths, np.array(sizes) / 1e6, marker="o", label=name)
    axes[3].set(title="cache of one layer", xlabel="tokens", ylabel="millions of numbers")
    axes[3].legend(fontsize=8)
    plt.show()

# %% [markdown]
# With all tokens, the first one takes most of the weight, and the outputs are small. With the window its weight is gone and the
# outputs are four times as large, which the next layer has never met in training. One kept token repairs most of it, and keeps
# the outputs at their size.
#
# What is lost all the same: the model knows nothing of the tokens that have left the cache. The context does not become longer,
# only the text may.
#
# ## Exercises
#
# 1. An encoder sees both sides. Change `i + 1` to `len(q)` in the three places of `attention_loop`, and compare with
#    `attention(*one, causal=False)`.
# 2. Take the sink away: set `STRENGTH = 0.0` and run the experiment again. How do the sizes of y differ now, and does the sink
#    help the window?
# 3. Give `attention_loop` a head that counts distances as ALiBi does: add `0.5 * (j - i)` to the score. Compare with
#    `attention(*one, slopes=np.array([0.5]))`, and look at the weights with `v = np.eye(T)`.
#
# Further: `minitv explain transformer`, `minitv explain multi-query`, `minitv explain attention-sinks`.
