# %% [markdown]
# # Positions: RoFormer
#
# Attention compares a query with a key by their product, and the product does not know where the two stand. How can it learn
# the distance between two tokens, at no cost and without a largest position?

# %%
import numpy as np

from autograd import distance, use
from minitv.ops import attention, rope, rotary_linear

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## The problem
#
# The last token of a text attends to all tokens. If the tokens before it are shuffled, its output stays the same: attention
# sees a set, and not a sequence. Earlier models add a learned vector for each position to the input. Then "two tokens back"
# must be learned anew at every position, and beyond the last learned vector there is nothing.

# %%
T, K = 10, 8
q, k, v = rng.standard_normal((3, 1, 1, T, K))  # [B H T K] each
order = np.append(rng.permutation(T - 1), T - 1)  # the last token stays where it is
tidy, shuffled = attention(q, k, v)[0], attention(q, k[:, :, order], v[:, :, order])[0]
print(f"shuffled: the last output changes by {distance(shuffled[0, 0, -1], tidy[0, 0, -1]):.0e}")

# %% [markdown]
# ## The formula
#
# RoPE (Su et al. 2021, arXiv 2104.09864) turns queries and keys before they are compared. The K channels are taken as K/2
# pairs, and a pair is a point of the plane. At position m, pair j is turned by the angle m θ_j. Equations (15) and (34):
#
#     θ_j = 10000^(-2j / K),  j = 0 .. K/2 - 1                                    (15)
#     (a, b) → (a cos mθ - b sin mθ, a sin mθ + b cos mθ)                         (34)
#
# The product of two vectors depends on their lengths and on the angle between them. If the query is turned by m θ and the key
# by n θ, the angle between them changes by (m - n) θ. So the product knows the distance m - n and nothing else of the
# positions, equation (16), where R_m is the matrix that turns by the angles of position m:
#
#     (R_m q) · (R_n k) = q · R_{n-m} k                                           (16)
#
# Values are not turned: they would carry their absolute position into the output. Nothing is learned here, and a turn costs six
# operations a pair.

# %% [markdown]
# ## The loop

# %%
def turn(x, position, base=10_000.0):
    y = np.zeros_like(x)  # [K]
    for j in range(len(x) // 2):
        angle = position * base ** (-2 * j / len(x))  # (15)
        a, b = x[2 * j], x[2 * j + 1]
        y[2 * j] = a * np.cos(angle) - b * np.sin(angle)  # (34)
        y[2 * j + 1] = a * np.sin(angle) + b * np.cos(angle)
    return y


expected = np.stack([turn(x, m) for m, x in enumerate(q[0, 0])])  # [T K]

# %% [markdown]
# ## The library
#
# The angles are an argument, so that other speeds can be tried.

# %%
angles = tuple(10_000.0 ** (-2 * j / K) for j in range(K // 2))
largest = distance(rope.definition(q, angles=angles)[0, 0], expected)
print("largest difference from the loop, relative to the largest output")
print(f"    definition         {largest:.0e}")
for kind, name in (("form", "composed"), ("kernel", "cpu")):
    with use(rope, **{kind: name}):
        y = rope(q, angles=angles)
    largest = max(largest, distance(y[0, 0], expected))
    print(f"    {kind:6} {name:11} {distance(y[0, 0], expected):.0e}")

tidy, _ = attention(rope(q, angles=angles), rope(k, angles=angles), v)
moved, _ = attention(rope(q, angles=angles), rope(k[:, :, order], angles=angles), v[:, :, order])
print(f"shuffled, with turns: the last output changes by {distance(moved[0, 0, -1], tidy[0, 0, -1]):.2f}")

print("\nscore of a query and a key that stand 3 positions apart, where the text begins at position")
scores = {}
for start in (0, 10, 1000, 100_000):
    turned_q, turned_k = rope(q, angles=angles, start=start).numpy(), rope(k, angles=angles, start=start).numpy()
    scores[start] = (turned_q[0, 0, 7] @ turned_k[0, 0, 4]).item()
    print(f"{start:10} {scores[start]:.9f}")

# %% [markdown]
# ## Linear attention with positions
#
# Without the exponential, the weight of key n for query m is the product q_m · k_n, and the query leaves the sum:
#
#     Σ_n (q_m · k_n) v_n = q_m · (Σ_n k_n v_nᵀ)
#
# The matrix in brackets is a state of fixed size in place of a cache. This is called linear attention. Its scores are never
# computed, so nothing could be added to them. But turns act on single vectors, so they still fit. Equation (19), for positive q
# and k:
#
#     y_m = Σ_n (R_m q_m) · (R_n k_n) v_n / Σ_n q_m · k_n,  n ≤ m                 (19)
#
# The denominator is not turned, because turned products may be negative and their sum may be 0.

# %%
def rotary_linear_loop(q, k, v):
    S, z, y = np.zeros((q.shape[1], v.shape[1])), np.zeros(q.shape[1]), np.zeros_like(v)
    for m in range(len(q)):
        S += np.outer(turn(k[m], m), v[m])  # [K V]: all that is kept of the past ...
        z += k[m]  # [K]: ... with this for the denominator
        y[m] = turn(q[m], m) @ S / (q[m] @ z)  # (19)
    return y


positive_q, positive_k = np.exp(q), np.exp(k)
expected = rotary_linear_loop(positive_q[0, 0], positive_k[0, 0], v[0, 0])
for kind, name in (("form", "parallel"), ("form", "recurrent"), ("form", "chunkwise"), ("kernel", "cpu")):
    with use(rotary_linear, **{kind: name}):
        y, state, z = rotary_linear(positive_q, positive_k, v, angles=angles)
    largest = max(largest, distance(y[0, 0], expected))
    print(f"rotary_linear, {kind:6} {name:11} {distance(y[0, 0], expected):.0e}")
print(f"numbers that are kept: {state.size + z.size}, after {T} tokens as after a million")

# %% [markdown]
# ## An experiment: why many speeds
#
# The query and the key are the same vector here, with length 1 in every pair. At distance d their score, divided by K/2, is the
# mean of cos(d θ_j). With one speed for all pairs, two distances that differ by a full turn look alike: 44 is almost 7 full
# turns. With many speeds the score falls: the fast pairs tell neighbours apart, and the slow ones tell regions of the text
# apart.

# %%
K = 64
speeds = {"one speed": np.ones(K // 2), "base 100": 100.0 ** (-2 * np.arange(K // 2) / K),
          "base 10000": 10_000.0 ** (-2 * np.arange(K // 2) / K)}
distances = np.arange(512)
same = np.tile([1.0, 0.0], (1, 1, len(distances), K // 2))  # [1 1 512 K]
curves = {}
for name, theta in speeds.items():
    turned = rope(same, angles=tuple(theta.tolist())).numpy()[0, 0]
    curves[name] = turned @ turned[0] / (K // 2)  # [512]

shown = [0, 1, 2, 4, 8, 16, 44, 128, 256, 511]
print(f"{'score at distance':18}" + "".join(f"{d:>7}" for d in shown))
for name, curve in curves.items():
    print(f"{name:18}" + "".join(f"{curve[d]:7.2f}" for d in shown))

if plt:
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for name, curve in curves.items():
        axes[0].plot(distances[:100], curve[:100], label=name)
    axes[0].set(title="score of a vector with itself", xlabel="distance in tokens", ylabel="score / (K/2)")
    axes[0].legend(fontsize=8)
    axes[1].plot(distances, curves["base 10000"], color="C2")
    axes[1].set(title="base 10000, farther away", xlabel="distance in tokens", ylim=axes[0].get_ylim())
    image = axes[2].imshow(np.cos(np.outer(speeds["base 10000"], distances)), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
    axes[2].set(title="the 32 pairs one by one", xlabel="distance in tokens", ylabel="pair j: fast above, slow below")
    figure.colorbar(image, ax=axes[2], label="cos(d θ_j)")
    plt.show()

# %% [markdown]
# The curve of base 10000 falls with the distance, but not in a straight line: it is a sum of waves. The slowest pair takes
# about 47,000 positions for a turn. A text longer than those of training shows the slow pairs at angles that they never had,
# and models fail there unless their speeds are changed (`minitv train roformer --scaling`).
#
# ## Exercises
#
# 1. LLaMA pairs channel j with channel j + K/2. Change the indices of x and y in the last three lines of `turn`, and compare
#    with `rope(q, angles=angles, pairing="half")`.
# 2. Texts of 8192 tokens: add "base 500000", as in Llama 3, to `speeds` and lengthen `distances`. Which base tells 4000 from
#    8000?
# 3. Turn a part of the channels: pass the first half of `angles` to `rope`. What can a head do with channels that are not
#    turned?
#
# Further: `minitv explain roformer`, `minitv explain rope`.
