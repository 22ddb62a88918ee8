# %% [markdown]
# # Memory that fades: RetNet and RWKV
#
# Attention trains on all positions at once, but keeps every token to write the next one. A recurrent network keeps a state of
# fixed size, but must be trained one position after the other. Can one function be both?

# %%
import numpy as np

from autograd import distance, use
from minitv.ops import retention, wkv

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## RetNet: the formula
#
# In attention, token t takes a mean of the values v_s with the weights exp(q_t · k_s), divided by their sum. Neither the
# exponential nor the sum can be split into a factor of t and a factor of s. Retention (Sun et al. 2023, arXiv 2307.08621)
# leaves both out. The query then leaves the sum, and what remains is a state S of K × V numbers, which fades by a factor γ < 1
# in each step. K and V are the channels of a key and of a value:
#
#     o_t = Σ_{s ≤ t} γ^(t-s) (q_t · k_s) v_s                                     (4), all positions at once: O(T²)
#     S_t = γ S_{t-1} + k_tᵀ v_t,    o_t = q_t S_t                                (6), position by position: O(T)
#
# Put (6) into itself and (4) comes out. So a model trains with one and writes with the other. A third way, (7), takes chunks of
# tokens: (4) within a chunk, and the state for all that came before. The factors γ^(t-s) are a matrix of decays, the paper's D.
#
# - Why fading: without a softmax, nothing pushes old tokens aside, and they would pile up in the state. γ is not learned.
# - Why a γ for each head, 1 - 2^(-5-h) in head h: some heads see the last words, others the last paragraphs.
#
# A layer of RetNet also turns queries and keys by their positions, as RoFormer does, and has a norm and a gate behind each
# head.
#
# ## RetNet: the loops

# %%
T, K, V = 24, 8, 8
q, k, v = rng.standard_normal((3, T, K))  # [T K] each; the values have V = K channels
GAMMA = 0.9


def recurrent_loop(q, k, v, gamma):
    S, o = np.zeros((q.shape[1], v.shape[1])), np.zeros_like(v)  # [K V], [T V]
    for t in range(len(q)):
        S = gamma * S + np.outer(k[t], v[t])  # (6)
        o[t] = q[t] @ S
    return o


def parallel_loop(q, k, v, gamma):
    o = np.zeros_like(v)
    for t in range(len(q)):
        for s in range(t + 1):
            o[t] += gamma ** (t - s) * (q[t] @ k[s]) * v[s]  # (4)
    return o


# %% [markdown]
# ## RWKV: the formula
#
# RWKV-4 (Peng et al. 2023, arXiv 2305.13048) keeps the exponential and the sum, and drops the query instead. In each channel by
# itself, token t takes a mean of the past values. The weight of a token is exp(k) at first, and fades by the factor exp(w) in
# every further step, w < 0. The present token has a factor exp(u) of its own. k, v, w and u are numbers here:
#
#     y_t = (A_{t-1} + e^(u + k_t) v_t) / (B_{t-1} + e^(u + k_t))                 (20)
#     A_t = e^w A_{t-1} + e^k_t v_t,    B_t = e^w B_{t-1} + e^k_t                 (21), (22); both begin at 0
#
# So the state is two numbers a channel. A mean lies between the smallest and the largest value, so nothing can grow. w and u
# are learned in each channel. u is there so that w need not serve the present token too. A layer of RWKV also mixes each token
# with the one before it, and multiplies y by a gate sigmoid(r), which is what is left of the query.
#
# ## RWKV: the loop

# %%
def wkv_loop(k, v, w, u):
    A, B, y = np.zeros_like(w), np.zeros_like(w), np.zeros_like(v)  # [C], [C], [T C]: all C channels at once
    for t in range(len(k)):
        y[t] = (A + np.exp(u + k[t]) * v[t]) / (B + np.exp(u + k[t]))  # (20)
        A = np.exp(w) * A + np.exp(k[t]) * v[t]  # (21)
        B = np.exp(w) * B + np.exp(k[t])  # (22)
    return y


# %% [markdown]
# ## The library

# %%
one = [x[None, None] for x in (q, k, v)]  # [B H T K]
decay = np.array([GAMMA])  # a number for each head
expected = recurrent_loop(q, k, v, GAMMA)
largest = distance(parallel_loop(q, k, v, GAMMA), expected)
print("largest difference from the recurrent loop, relative to the largest output")
print(f"retention  parallel loop     {largest:.0e}")
error = distance(retention.definition(*one, decay)[0][0, 0], expected)
print(f"retention  definition          {error:.0e}")
for kind, name in (("form", "parallel"), ("form", "recurrent"), ("form", "chunkwise"), ("kernel", "cpu")):
    with use(retention, **{kind: name}):
        y, state, _, _ = retention(*one, decay)
    largest = max(largest, distance(y[0, 0], expected))
    print(f"retention  {kind:6} {name:11}  {distance(y[0, 0], expected):.0e}")

w, u = -np.exp(np.linspace(-5, 3, K)), np.full(K, -0.5)  # [C] each; these rates of fading are those of a new model
expected = wkv_loop(k, v, w, u)
error = distance(wkv.definition(k[None], v[None], w, u)[0][0], expected)
print(f"wkv        definition          {error:.0e}")
for kind, name in (("form", "recurrent"), ("form", "chunkwise"), ("kernel", "cpu")):
    with use(wkv, **{kind: name}):
        y, *_ = wkv(k[None], v[None], w, u)
    largest = max(largest, distance(y[0], expected))
    print(f"wkv        {kind:6} {name:11}  {distance(y[0], expected):.0e}")

first, *state = retention(*(x[:, :, :10] for x in one), decay)  # a text in two parts, with the state in between
second, *_ = retention(*(x[:, :, 10:] for x in one), decay, *state)
whole, *_ = retention(*one, decay)
print(f"in two parts: difference {distance(np.concatenate([first.numpy(), second.numpy()], axis=2), whole):.0e}")

# %% [markdown]
# ## An experiment: exponentials without overflow
#
# e^k is too large for float32 from k = 89 on. The paper keeps A and B in units of their largest term, (23) to (28), and so does
# the library. The loop above does not. Keys may all be larger by a constant, which cancels in the mean:

# %%
small = [x.astype(np.float32) for x in (k, v, w, u)]
exact = wkv(k[None], v[None], w, u)[0].numpy()[0]
overflow = {}
print(f"{'constant':>8}{'loop in float32':>18}{'library in float32':>21}")
for constant in (0, 50, 100, 1000):
    with np.errstate(over="ignore", invalid="ignore"):
        loop = wkv_loop(small[0] + np.float32(constant), *small[1:])
    library = wkv((small[0] + np.float32(constant))[None], small[1][None], *small[2:])[0][0]
    overflow[constant] = distance(loop, exact), distance(library, exact)
    print(f"{constant:8}" + "{:18.0e}{:21.0e}".format(*overflow[constant]))

# %% [markdown]
# inf means that the loop gave values that are no numbers. The library's error grows a little, because a key near 1000 has only
# four decimal digits behind the point in float32.
#
# ## An experiment: what is left of a token
#
# The weight of a token halves every ln 2 / -ln γ tokens, where γ is e^w in RWKV. The tables have the share that is left after
# so many tokens, in the heads of RetNet and in some channels of RWKV.

# %%
after = [1, 10, 100, 1000]
spectra = {"RetNet": {f"head {h}": 1 - 2.0 ** (-5 - h) for h in range(8)},
           "RWKV": {f"channel {c:3} of 128": np.exp(-np.exp(-5 + 8 * c / 127)).item() for c in (0, 20, 40, 60, 80, 127)}}
half = {}
for model, rates in spectra.items():
    print(f"{model:20}" + f"{'γ':>9}{'halves in':>12}" + "".join(f"{f'after {n}':>12}" for n in after))
    for name, gamma in rates.items():
        half[model, name] = np.log(2) / -np.log(gamma)
        print(f"{name:20}{gamma:9.5f}{half[model, name]:12.1f}" + "".join(f"{gamma**n:12.1%}" for n in after))

# %% [markdown]
# ## An experiment: what each one looks at
#
# Both are linear in the values, so with the identity matrix as values the outputs are the weights M[t, s] of token s for token
# t. One token of this text, number 8, is special: its key points to e, and the queries from token 20 on ask for e. In RWKV the
# same token has a large key.

# %%
T = 40
e = np.zeros(K)
e[0] = 3.0
q, k = 0.3 * rng.standard_normal((2, 1, 1, T, K))
k[..., 8, :] += e
q[..., 20:, :] += e
identity = np.eye(T)
maps = {f"retention, γ = {gamma}": retention(q, k, identity[None, None], np.array([gamma]))[0].numpy()[0, 0]
        for gamma in (0.97, 0.7)}
keys = np.repeat(k[0, 0, :, :1], T, axis=1)  # [T T]: every channel has the same keys, channel s the value of token s
for rate in (0.03, 0.36):
    maps[f"wkv, e^w = {np.exp(-rate):.2f}"] = wkv(keys[None], identity[None], np.full(T, -rate), np.zeros(T))[0].numpy()[0]
print("weight of token 8 for token".ljust(28) + "".join(f"{t:>8}" for t in (8, 12, 19, 20, 28, 39)))
for name, M in maps.items():
    print(name.ljust(28) + "".join(f"{M[t, 8]:8.2f}" for t in (8, 12, 19, 20, 28, 39)))

lengths = [64, 1024, 16384]
print("\nnumbers that a layer of width 512 with 8 heads keeps, after so many tokens")
print(f"{'':20}" + "".join(f"{t:>12}" for t in lengths))
states = {"attention": [2 * t * 512 for t in lengths], "RetNet, V = 2 K": [8 * 64 * 128] * 3, "RWKV": [5 * 512] * 3}
for name, sizes in states.items():
    print(f"{name:20}" + "".join(f"{size:12,}" for size in sizes))

if plt:
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.4), layout="constrained", width_ratios=[1.3, 1, 1, 1, 1])
    for (model, rates), colour in zip(spectra.items(), ("C0", "C1")):
        for gamma in rates.values():
            axes[0].semilogx(np.arange(1, 2000), gamma ** np.arange(1, 2000), colour)
        axes[0].plot([], [], colour, label=f"{model}, {'a head' if model == 'RetNet' else 'a channel'} each")
    axes[0].set(title="what is left of a token", xlabel="tokens later")
    axes[0].legend(fontsize=8)
    for axis, (name, M) in zip(axes[1:], maps.items()):
        limit = abs(M).max()
        axis.imshow(M, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(title=name, xlabel="token s", ylabel="token t")
    plt.show()

# %% [markdown]
# Retention finds token 8 when a query asks for it, and its weights may be negative. In RWKV, token 8 is large for all that
# follow until it fades, whoever reads: a token can say that it is important, and not for whom. Both keep a state of fixed size,
# and both lose what has faded.
#
# ## Exercises
#
# 1. Set `GAMMA = 1.0` and lengthen T. How fast do the outputs of `recurrent_loop` grow? A norm in each head of RetNet takes
#    their size out.
# 2. Write the chunks of (7): for 8 tokens at a time, the output is that of `parallel_loop` and GAMMA^(i + 1) q_i S, where S is
#    the state before the chunk and i = 0 .. 7 counts its tokens. Then move S on by 8 steps of (6). Compare with
#    `parallel_loop`.
# 3. Let w be positive in `wkv_loop`. Which token wins? RWKV learns a number a and takes w = -e^a: why?
#
# Further: `minitv explain retnet`, `minitv explain rwkv`.
