# %% [markdown]
# # Attention to some of the tokens: Reformer and LongNet
#
# A softmax puts most of its weight on a few keys. How can a token find them without a look at all the others?

# %%
import numpy as np

from autograd import distance, use
from minitv.ops import attention, dilated_attention, lsh_attention, lsh_buckets

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## Reformer: the formula
#
# Reformer (Kitaev et al. 2020, arXiv 2001.04451) looks where a large score is likely: among the tokens that point the same way.
# A hash tells them. It turns a vector by a random matrix R, and the bucket is the axis that the turned vector lies nearest to,
# with its sign (section 2 of the paper). Two vectors with a small angle between them are likely to fall into the same bucket.
#
#     h(x) = argmax([x R ; -x R])                                                 n buckets, R [K n/2]
#     P_i = {j < i : h(q_j) = h(q_i) in some round}                               what token i sees, (4), (6)
#     y_i = Σ_{j in P_i} exp(q_i · k_j - z_i) v_j                                 (2)
#
# z_i is the logarithm of the sum of these exponentials, so the weights sum to 1. Each round has a matrix R of its own: a key
# that one round misses, another may find. The key of a token is its query, divided by its length, because a query and a key in
# different buckets would never meet. A token sees itself only where it sees nothing else: it would fit itself best. A bucket is
# an integer, so no gradient flows through the hash.
#
# What it costs: with n = 2 T / m buckets, m / 2 tokens share a bucket on average, and a round compares about T m / 2 pairs
# instead of T². What is lost: a key that fits is missed if no round brings it together with the query.
#
# ## Reformer: the loop

# %%
T, K, ROUNDS, BUCKETS = 24, 8, 2, 6
q, v = rng.standard_normal((2, T, K))  # [T K] each
rotations = rng.standard_normal((ROUNDS, K, BUCKETS // 2))  # [rounds K n/2]


def bucket(x, R):
    turned = x @ R
    return int(np.argmax(np.concatenate([turned, -turned])))


def reformer_loop(q, v, rotations, eps=1e-6):
    buckets = [[bucket(x, R) for x in q] for R in rotations]
    unit = q / np.sqrt(np.sum(q * q, axis=1, keepdims=True) + q.shape[1] * eps)  # keys have the length 1
    y = np.zeros_like(v)
    for i in range(len(q)):
        seen = [j for j in range(i) if any(row[i] == row[j] for row in buckets)] or [i]  # (4), (6)
        weights = np.exp([q[i] @ unit[j] for j in seen])
        y[i] = weights @ v[seen] / weights.sum()  # (2)
    return y


# %% [markdown]
# ## LongNet: the formula
#
# LongNet (Ding et al. 2023, arXiv 2307.02486) looks where it has decided before: densely near by, and thinly far away. A
# pattern (w, r) cuts the text into segments of w tokens and keeps every r-th token of each. The tokens that are kept see each
# other within their segment. Several patterns are mixed, each weighted by the sum Z of its softmax, equations (9) and (10). All
# Z cancel, and what is left is one softmax in which a key counts as often as there are patterns that show it:
#
#     y_p = Σ_i Z_i y_i / Σ_i Z_i = Σ_j C_pj exp(S_pj) v_j / Σ_j C_pj exp(S_pj)        S_pj = q_p · k_j / √K
#
# With w = 32, 64, 128, ... and r = 1, 2, 4, ... the patterns cost 32 T, 16 T, 8 T, ... products, less than 64 T together (18).
# Head h keeps the tokens h, h + r, h + 2 r, ... of a segment, so that different heads keep different tokens. What is lost: the
# pattern does not depend on the text, and a token far away is read directly by few heads and few tokens.
#
# ## LongNet: the loop

# %%
PATTERNS = [(4, 1), (8, 2), (16, 4)]  # (w, r)


def longnet_loop(q, k, v, patterns, head=0):
    y = np.zeros_like(v)
    for p in range(len(q)):
        weights = np.zeros(len(k))
        for w, r in patterns:
            for j in range(p + 1):
                if j // w == p // w and (j % w) % r == (p % w) % r == head % r:  # same segment, and both are kept
                    weights[j] += np.exp(q[p] @ k[j] / np.sqrt(q.shape[1]))
        if weights.any():  # a head may see nothing; then y is 0
            y[p] = weights @ v / weights.sum()  # (9), (10)
    return y


# %% [markdown]
# ## The library

# %%
one_q, one_v = q[None, None], v[None, None]  # [B H T K]
buckets = lsh_buckets(one_q, rotations[None])  # [B H rounds T]
expected = reformer_loop(q, v, rotations)
error = largest = distance(lsh_attention.definition(one_q, one_q, one_v, buckets)[0, 0], expected)
print("largest difference from the loop, relative to the largest output")
print(f"lsh_attention        definition          {error:.0e}")
for kind, name in (("form", "union"), ("form", "rounds"), ("kernel", "cpu")):
    with use(lsh_attention, **{kind: name}):
        error = distance(lsh_attention(one_q, one_q, one_v, buckets)[0, 0], expected)
    largest = max(largest, error)
    print(f"lsh_attention        {kind:6} {name:11}  {error:.0e}")

k = rng.standard_normal((T, K))
rule = {"segments": tuple(w for w, _ in PATTERNS), "dilations": tuple(r for _, r in PATTERNS)}
expected = longnet_loop(q, k, v, PATTERNS)
for kind, name in (("form", "counted"), ("form", "mixture"), ("form", "distributed"), ("kernel", "cpu")):
    with use(dilated_attention, **{kind: name}):
        error = distance(dilated_attention(one_q, k[None, None], one_v, **rule)[0][0, 0], expected)
    largest = max(largest, error)
    print(f"dilated_attention    {kind:6} {name:11}  {error:.0e}")
full, _ = attention(one_q, k[None, None], one_v)
single, _ = dilated_attention(one_q, k[None, None], one_v, segments=(T,), dilations=(1,))
print(f"one pattern (T, 1) is attention: difference {distance(single, full):.0e}")

# %% [markdown]
# ## An experiment: what the buckets find
#
# The tokens of this text are about 16 topics: each is the vector of its topic and noise. The table has two shares: how many of
# the pairs were compared, and how much of the weight of the full softmax lies on them. The last column takes as many pairs at
# random.

# %%
T, K, TOPICS, BUCKETS = 256, 16, 16, 16
topics = rng.standard_normal((TOPICS, K))
topic = rng.integers(TOPICS, size=T)
q = 6 * (topics[topic] / np.linalg.norm(topics[topic], axis=1, keepdims=True)) + 0.4 * rng.standard_normal((T, K))
q, identity = q[None, None], np.eye(T)[None, None]
past = np.tril(np.ones((T, T), bool), -1)
everyone = np.zeros((1, 1, 1, T), int)  # one bucket for all: full attention with shared queries and keys
weights = lsh_attention(q, q, identity, everyone).numpy()[0, 0]  # [T T], because the values are the identity
found = {}
print(f"{'rounds':>6}{'pairs compared':>17}{'weight found':>15}{'at random':>12}")
for rounds in (1, 2, 4, 8):
    rotations = rng.standard_normal((1, rounds, K, BUCKETS // 2))
    buckets = lsh_buckets(q, rotations)[0, 0]  # [rounds T]
    seen = (buckets[:, :, None] == buckets[:, None, :]).any(axis=0) & past
    chance = past & (rng.random((T, T)) < seen[past].mean())
    found[rounds] = seen[past].mean(), (weights * seen)[1:].sum() / (T - 1), (weights * chance)[1:].sum() / (T - 1)
    print(f"{rounds:6}" + "{:17.1%}{:15.1%}{:12.1%}".format(*found[rounds]))
    if rounds == 1:
        order = np.argsort(buckets[0], kind="stable")
        once = seen

# %% [markdown]
# One round compares a tenth of all pairs and finds two thirds of the weight. More rounds find more and cost more. At random, a
# tenth of the pairs has a tenth of the weight.
#
# ## An experiment: who reaches whom
#
# LongNet's matrix C does not depend on the text. A token that one layer does not reach may be reached through others. The table
# counts the layers until the last token knows of every token, for a window of 32 tokens and for LongNet with a first segment of
# 32, whose heads together keep all tokens.

# %%
def longnet_pairs(T, first):
    """Which tokens see which in some head, [T T], and how many products each token costs on average."""
    p = np.arange(T)
    seen, products, r, w = np.eye(T, dtype=bool), 0.0, 1, first
    while True:
        same = (p[:, None] // w == p // w) & (p[:, None] % w % r == p % w % r) & (p <= p[:, None])
        seen |= same  # over all heads, each offset is kept by one
        products += same.sum() / r / T  # one head has one offset of r
        if w >= T:
            return seen, products
        w, r = 2 * w, 2 * r


def layers_to_reach(seen):
    known, layers = seen[-1:], 1
    while not known.all():
        known, layers = (known.astype(np.float32) @ seen.astype(np.float32)) > 0, layers + 1
    return layers


lengths, reach = [128, 256, 512, 1024], {"window of 32": [], "LongNet": []}
costs = {"attention": [], "window of 32": [], "LongNet": []}
for length in lengths:
    p = np.arange(length)
    window = (p <= p[:, None]) & (p[:, None] - p < 32)
    thin, products = longnet_pairs(length, 32)
    reach["window of 32"].append(layers_to_reach(window))
    reach["LongNet"].append(layers_to_reach(thin))
    costs["attention"].append((length + 1) / 2)
    costs["window of 32"].append(window.sum() / length)
    costs["LongNet"].append(products)
print(f"{'tokens':40}" + "".join(f"{length:>7}" for length in lengths))
for name, row in reach.items():
    print(f"layers until all is known, {name}".ljust(40) + "".join(f"{layers:7}" for layers in row))
for name, row in costs.items():
    print(f"products for a token, {name}".ljust(40) + "".join(f"{products:7.0f}" for products in row))

if plt:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    axes[0].imshow(weights[np.ix_(order, order)] ** 0.5, cmap="magma")
    axes[0].set(title="√ weights, sorted by bucket", xlabel="key", ylabel="query")
    axes[1].imshow(once[np.ix_(order, order)], cmap="Greys")
    axes[1].set(title="what one round compares", xlabel="key", ylabel="query")
    C = np.zeros((64, 64), int)
    for head in range(4):  # the number of patterns and heads that show a key
        for w, r in ((16, 1), (32, 2), (64, 4)):
            p = np.arange(64)
            kept = p % w % r == head % r
            C += (p[:, None] // w == p // w) & kept[:, None] & kept & (p <= p[:, None])
    axes[2].imshow(np.where(C, C, np.nan), cmap="viridis")
    axes[2].set(title="LongNet: C, four heads", xlabel="key", ylabel="query")
    for name, row in costs.items():
        axes[3].plot(lengths, row, marker="o", label=name)
    axes[3].set(title="products a token, in one head", xlabel="tokens T")
    axes[3].legend(fontsize=8)
    plt.show()

# %% [markdown]
# ## Exercises
#
# 1. Take the noise of the topics from 0.4 to 1.2. How many rounds does it now take to find the same weight? Look at `found`.
# 2. Give queries and keys vectors of their own in `reformer_loop` (hash both). How often is a query alone in its bucket?
# 3. Leave out the heads' offsets: replace `head % r` by `0` in the picture of C. Which tokens does no distant token ever see?
#
# Further: `minitv explain reformer`, `minitv explain longnet`.
