# %% [markdown]
# # Fewer keys or features instead of all keys: Linformer and Performer
#
# In attention every query meets every key, so T tokens cost T² products. Can a few mixtures of the keys, or a few random
# features, stand for all of them, and how large is the error?

# %%
import numpy as np

from autograd import distance, use
from minitv.ops import attention, favor, project

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## Linformer: the formula
#
# Attention is y_i = Σ_j P_ij v_j, where the weights P_ij are a softmax of q_i · k_j / √K over the keys j. K is the number of
# channels. Linformer (Wang et al. 2020, arXiv 2006.04768) replaces the T keys by M weighted sums of them, and the values too.
# The learned matrices E and F [M T] hold the weights of these sums. Equation (7), for one head:
#
#     y = softmax(q (E k)ᵀ / √K) (F v)                                            (7)
#
# A query meets M mixtures instead of T keys, which costs T M products. For M, the paper takes 128 or 256, for texts of 512 and
# of 4096 tokens alike. Every mixture contains all tokens, later ones too, so this is for encoders, which see both sides. They
# guess hidden tokens and cannot write.
#
# ## Linformer: the loop

# %%
T, K, M = 32, 8, 8
q, k, v = rng.standard_normal((3, T, K))  # [T K] each
E, F = rng.standard_normal((2, M, T)) / np.sqrt(T)  # [M T] each


def linformer_loop(q, k, v, E, F):
    keys, values, y = np.zeros((len(E), k.shape[1])), np.zeros((len(F), v.shape[1])), np.zeros_like(v)
    for m in range(len(E)):
        for t in range(len(k)):
            keys[m] += E[m, t] * k[t]  # mixtures of tokens, each channel by itself
            values[m] += F[m, t] * v[t]
    for i in range(len(q)):
        weights = np.exp(keys @ q[i] / np.sqrt(q.shape[1]))  # [M]
        y[i] = weights @ values / weights.sum()  # (7)
    return y


batch = [x[None, None] for x in (q, k, v)]  # [B H T K] with one sequence and one head
mixed_k, mixed_v = project(batch[1], E[None]), project(batch[2], F[None])  # [1 1 M K]
y, _ = attention(batch[0], mixed_k, mixed_v, causal=False)
largest = distance(y[0, 0], linformer_loop(q, k, v, E, F))
print(f"project and attention against the loop: difference {largest:.0e}")
y, _ = attention(batch[0], *(project(x, np.eye(T)[None]) for x in batch[1:]), causal=False)
print(f"M = T, E = F = identity, against attention: difference {distance(y, attention(*batch, causal=False)[0]):.0e}")

# %% [markdown]
# ## Performer: the formula
#
# If the weight of key k for query q were a product φ(q) · φ(k) of features, the query could leave the sum:
#
#     Σ_j φ(q_i) · φ(k_j) v_j = φ(q_i) · (Σ_j φ(k_j) v_jᵀ)
#
# The matrix in brackets is the same for all queries, so no pair (i, j) is computed. But no finite number of features gives the
# softmax's weight exp(q · k). Performer (Choromanski et al. 2020, arXiv 2009.14794) takes random ones, which give it on
# average. Let w be a vector of independent Gaussian numbers and E[..] the mean over all w, which is no matrix here. Equation
# (7) of that paper:
#
#     exp(q · k) = E[exp(w · q - |q|²/2) exp(w · k - |k|²/2)]                      (7)
#
# It holds because w · (q + k) is Gaussian with the variance |q + k|², and E[exp(w · z)] = exp(|z|²/2). So N draws of w make N
# features exp(w · x - |x|²/2) of every query and key, and the mean of their products estimates the weight. All features are
# positive, so a sum of weights, by which the output is divided, cannot come near 0. Queries and keys are first divided by
# K^(1/4), so that their product is q · k / √K. The paper takes 256 features for heads of 64 channels, and draws new ones from
# time to time.
#
# ## Performer: the loop
#
# For a model that writes, query i needs the sums over j ≤ i, equation (11). They are kept as a state.

# %%
N = 24
W = rng.standard_normal((N, K))  # [N K], a random direction in each row


def features(x, W):
    x = x / x.shape[-1] ** 0.25
    return np.exp(x @ W.T - np.sum(x * x, axis=-1, keepdims=True) / 2)  # (7)


def performer_loop(q, k, v, W):
    S, z, y = np.zeros((len(W), v.shape[1])), np.zeros(len(W)), np.zeros_like(v)
    for i in range(len(q)):
        key, query = features(k[i : i + 1], W)[0], features(q[i : i + 1], W)[0]  # [N] each
        S += np.outer(key, v[i])  # (11), the state [N K] of all tokens so far
        z += key
        y[i] = query @ S / (query @ z)
    return y


# %% [markdown]
# ## Performer: the library
#
# The operator is called favor, after the paper's name for the method, FAVOR+. It keeps logarithms, so that no exponential
# overflows.

# %%
expected = performer_loop(q, k, v, W)
error = distance(favor.definition(*batch, W)[0][0, 0], expected)
print("largest difference from the loop, relative to the largest output")
print(f"    definition         {error:.0e}")
largest = max(largest, error)
for kind, name in (("form", "parallel"), ("form", "recurrent"), ("form", "chunkwise"), ("kernel", "cpu")):
    with use(favor, **{kind: name}):
        y, mean, logsum = favor(*batch, W)
    largest = max(largest, distance(y[0, 0], expected))
    print(f"    {kind:6} {name:11} {distance(y[0, 0], expected):.0e}")

# %% [markdown]
# ## An experiment: the error of the features
#
# There is an older way: cosines and sines of w · x estimate the same weight. But their products may be negative, and their
# error is large where the weight is small. Most weights of a softmax are small. Lemma 2, equation (8), has the mean squared
# error of N positive features, relative to the square of the weight. Here q and k have been divided by K^(1/4):
#
#     (exp(|q + k|²) - 1) / N                                                     (8)
#
# It is 0 for opposite vectors, which have the smallest weight. Besides, the paper makes the directions w orthogonal, K at a
# time: independent ones may say the same thing twice. The tables have the root of the mean squared error, relative to the
# weight, over many draws.

# %%
K, DRAWS = 8, 400
ANGLES = [60, 90, 120, 150, 180]  # between q and k, in degrees


def gaussian(n):
    return rng.standard_normal((DRAWS, n, K))


def orthogonal(n):
    blocks, r = np.linalg.qr(rng.standard_normal((DRAWS, -(-n // K), K, K)))
    blocks *= np.sign(np.diagonal(r, axis1=2, axis2=3))[:, :, None, :]  # now each block is a random rotation
    rows = np.swapaxes(blocks, 2, 3).reshape(DRAWS, -1, K)[:, :n]
    return rows * np.linalg.norm(gaussian(n), axis=2, keepdims=True)  # with the lengths of Gaussian rows


def waves(x, W):
    turned, size = W @ x, np.exp(x @ x / 2)
    return size * np.concatenate([np.cos(turned), np.sin(turned)], axis=-1)


def positive(x, W):
    return np.exp(W @ x - x @ x / 2)


def error_of(phi, W, degrees, length=1.0):
    """Root of the mean squared error, relative to the weight, for two vectors of this length and with this angle."""
    q, k = np.zeros((2, K))  # divided by K^(1/4) already
    q[0], k[0], k[1] = length, length * np.cos(np.radians(degrees)), length * np.sin(np.radians(degrees))
    estimate = np.sum(phi(q, W) * phi(k, W), axis=1) / W.shape[1]  # [DRAWS]
    return np.mean((estimate / np.exp(q @ k) - 1) ** 2) ** 0.5


N, counts, norms = 64, [16, 32, 64, 128, 256], [0.5, 1.0, 1.5]
kinds = {"cosines and sines": (waves, gaussian, 2), "positive": (positive, gaussian, 1),
         "positive, orthogonal": (positive, orthogonal, 1)}  # a direction gives a cosine and a sine, or one positive feature
by_angle, curves = {}, {}
for name, (phi, draw, each) in kinds.items():
    by_angle[name] = [error_of(phi, draw(N // each), degrees) for degrees in ANGLES]
    curves[name] = [error_of(phi, draw(n // each), 135) for n in counts]
by_angle["positive, by (8)"] = [((np.exp(2 + 2 * np.cos(np.radians(d))) - 1) / N) ** 0.5 for d in ANGLES]
slopes = {name: np.polyfit(np.log(counts), np.log(curve), 1)[0].item() for name, curve in curves.items()}

print(f"{N} features; angle".ljust(24) + "".join(f"{degrees:>8}°" for degrees in ANGLES))
for name, row in by_angle.items():
    print(name.ljust(24) + "".join(f"{error:9.3f}" for error in row))
print("\n135°; features".ljust(25) + "".join(f"{n:9}" for n in counts) + "   exponent")
for name, row in curves.items():
    print(name.ljust(24) + "".join(f"{error:9.3f}" for error in row) + f"{slopes[name]:11.2f}")
print(f"\n{N} features, 90°; length".ljust(25) + "".join(f"{length:9.1f}" for length in norms))
by_length = [error_of(positive, orthogonal(N), 90, length) for length in norms]
print("positive, orthogonal".ljust(24) + "".join(f"{error:9.3f}" for error in by_length))

# %% [markdown]
# Where the weight is small, from 120° on, positive features are far better. At 135° orthogonal directions take about a tenth
# off. The error falls with the exponent -1/2 of their number: four times as many features halve it. And it grows fast with the
# length of queries and keys. A sharp softmax, which picks one key of many, needs long ones: that is what random features are
# worst at.
#
# ## An experiment: how many mixtures
#
# Linformer rests on an observation: a few singular vectors carry most of the matrix P. Here neighbouring tokens are alike, as
# in a text. A mixture is the mean of T / M neighbours, or one of them. Nothing is learned; the last row has the first M
# singular vectors of P: no matrix of rank M is nearer to P. The first table has the error of the outputs, relative to those of
# attention. The second one counts products for longer and longer texts.

# %%
T, mixtures = 128, [2, 4, 8, 16, 32, 64]
steps = rng.standard_normal((3, T + 15, K))
q, k, v = 2 * sum(steps[:, i : i + T] for i in range(16)) / 4  # [T K] each: means over 16 tokens, so neighbours are alike
P = attention(q[None, None], k[None, None], np.eye(T)[None, None], causal=False)[0].numpy()[0, 0]  # the weights [T T]
exact = P @ v
left, values, right = np.linalg.svd(P)
rows = {"means of neighbours": [], "one of neighbours": [], "singular vectors": []}
for M in mixtures:
    means = np.kron(np.eye(M), np.ones((1, T // M)) * M / T)  # [M T]
    single = np.eye(T)[T // M // 2 :: T // M]  # [M T]
    for name, E in (("means of neighbours", means), ("one of neighbours", single)):
        mixed = [project(x[None, None], E[None]) for x in (k, v)]
        y = attention(q[None, None], *mixed, causal=False)[0].numpy()[0, 0]
        rows[name].append(np.linalg.norm(y - exact) / np.linalg.norm(exact))
    rows["singular vectors"].append(np.linalg.norm((left[:, :M] * values[:M]) @ right[:M] @ v - exact) / np.linalg.norm(exact))
print(f"{'error with M =':20}" + "".join(f"{M:>8}" for M in mixtures))
for name, row in rows.items():
    print(f"{name:20}" + "".join(f"{error:8.3f}" for error in row))

tokens = [128, 512, 2048, 8192, 32768]
costs = {"attention": [2 * t * t * 64 for t in tokens], "Linformer, M = 128": [4 * t * 128 * 64 for t in tokens],
         "Performer, N = 256": [4 * t * 256 * 64 for t in tokens]}  # products of a head with 64 channels
print(f"\n{'millions of products':20}" + "".join(f"{t:>9}" for t in tokens))
for name, row in costs.items():
    print(f"{name:20}" + "".join(f"{cost / 1e6:9.0f}" for cost in row))

if plt:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for name, row in by_angle.items():
        axes[0].plot(ANGLES, row, label=name, **({"ls": ":", "color": "black"} if "(8)" in name else {"marker": "o"}))
    axes[0].set(title=f"Performer: error of {N} features", xlabel="angle between q and k, in degrees", ylim=(0, 1))
    for name, row in curves.items():
        axes[1].loglog(counts, row, marker="o", label=name)
    axes[1].set(title="Performer: error at 135°", xlabel="features")
    for name, row in rows.items():
        axes[2].loglog(mixtures, row, marker="o", label=name)
    axes[2].set(title="Linformer: error of outputs", xlabel="mixtures M")
    for name, row in costs.items():
        axes[3].loglog(tokens, row, marker="o", label=name)
    axes[3].set(title="products for one head", xlabel="tokens T")
    for axis, ticks in zip(axes[1:3], (counts, mixtures)):
        axis.set_xticks(ticks, labels=ticks)
        axis.minorticks_off()
    for axis in axes:
        axis.legend(fontsize=8)
    plt.show()

# %% [markdown]
# Means are better than single tokens, and singular vectors are better than both: with 32 of them for 128 tokens the error is
# about a twentieth. But the vectors belong to one P, and another text has another one. Learned E and F stand between. The
# products of attention grow with T², those of the others with T. At 512 tokens Performer costs as much as attention, and
# Linformer half of it; at 32,768 tokens both cost less than a sixtieth.
#
# ## Exercises
#
# 1. Hyperbolic features have both w and -w: let `hyperbolic(n)` draw half as many rows as `gaussian` does, and join them with
#    their negatives along axis 1. Give `kinds` the row `(positive, hyperbolic, 1)`. For which angles is it better?
# 2. The paper's ReLU kernel estimates no softmax: let `features` return `np.maximum(x @ W.T, 0) + 1e-3`, and compare
#    `performer_loop` with `favor(*batch, W, features="relu")`.
# 3. Make the tokens of the Linformer experiment independent: `q, k, v = 2 * rng.standard_normal((3, T, K))`. What happens to
#    the means of neighbours, and to the singular vectors?
#
# Further: `minitv explain linformer`, `minitv explain performer`, `minitv explain favor`.
