# %% [markdown]
# # Attention without products of queries and keys: AFT
#
# In attention, the weight of a token depends on the query and the key, so all pairs must be compared. What is left if it
# depends on the key and on the two positions alone?

# %%
import numpy as np

from autograd import Tensor, distance, mean, use
from minitv.ops import aft_conv, aft_full, aft_local, aft_simple

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## The formula
#
# AFT (Zhai et al. 2021, arXiv 2105.14103) takes a mean of the values with two weights: e^(k_s), which token s computes from
# itself, and e^(w_ts), a learned number for the positions t and s, whichever tokens stand there. The query is a gate: it
# decides in each channel how much of the mean passes. This happens in every channel by itself, so all letters are numbers.
# Equation (2), for a model that sees the past alone:
#
#     y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_ts) v_s / Σ_{s ≤ t} e^(k_s + w_ts)
#
# Four operators differ in the bias w. The less freedom it has, the cheaper is the mean of T tokens with C channels:
#
#     aft_full     w_ts is any number                                             (2)    time T² C
#     aft_local    w_ts is any number within a window, and 0 outside              (4)    time T window C
#     aft_conv     w_ts depends on t - s alone, and is 0 outside a window         (6)    time T window C
#     aft_simple   w_ts is 0                                                      (5)    time T C
#
# In models w is a product of two matrices with few columns, U Vᵀ, because T² numbers in each layer are too many to learn. 0
# outside the window does not hide anything: a token far away still has the weight e^(k_s).
#
# ## The loop

# %%
T, C, WINDOW = 16, 4, 5
q, k, v = rng.standard_normal((3, T, C))  # [T C] each
w = rng.standard_normal((T, T))


def aft_loop(q, k, v, w):
    y = np.zeros_like(v)
    for t in range(len(q)):
        for c in range(q.shape[1]):
            weights = np.exp(k[: t + 1, c] + w[t, : t + 1])  # of the tokens s ≤ t
            average = weights @ v[: t + 1, c] / weights.sum()
            y[t, c] = average / (1 + np.exp(-q[t, c]))  # (2), sigmoid(q) = 1 / (1 + e^-q)
    return y


# %% [markdown]
# Without a bias the sums of token t are those of token t - 1 and one term more. So two numbers a channel are enough of a state:

# %%
def simple_loop(q, k, v):
    N, Z, y = np.zeros(q.shape[1]), np.zeros(q.shape[1]), np.zeros_like(v)
    for t in range(len(q)):
        N += np.exp(k[t]) * v[t]
        Z += np.exp(k[t])
        y[t] = N / Z / (1 + np.exp(-q[t]))  # (5)
    return y


# %% [markdown]
# ## The library
#
# Its operators take a batch, `[B T C]`. All four are compared with `aft_loop`, each with the w that it stands for.

# %%
one = [x[None] for x in (q, k, v)]  # [1 T C] each
local, filters = np.zeros((T, WINDOW)), rng.standard_normal((1, WINDOW))  # biases of the lag t - s: for each t, for one head
banded, striped = np.zeros((2, T, T))  # the same two as w[t, s]
for t in range(T):
    for lag in range(min(WINDOW, t + 1)):
        local[t, lag] = banded[t, t - lag] = w[t, t - lag]
        striped[t, t - lag] = filters[0, lag]
same_key = np.repeat(k[:, :1], C, axis=1)  # in aft_conv the channels of a head share a key

cases = {  # operator: a call, what the loop says, the forms
    aft_full: (lambda: aft_full(*one, w), aft_loop(q, k, v, w), ("parallel", "tiled")),
    aft_local: (lambda: aft_local(*one, local)[0], aft_loop(q, k, v, banded), ("lagged", "parallel")),
    aft_conv: (lambda: aft_conv(one[0], k[None, :, :1], one[2], filters)[0], aft_loop(q, same_key, v, striped),
               ("lagged", "parallel")),
    aft_simple: (lambda: aft_simple(*one)[0], aft_loop(q, k, v, np.zeros((T, T))), ("scan", "recurrent", "parallel")),
}
largest = max(distance(aft_full.definition(*one, w)[0], aft_loop(q, k, v, w)),
              distance(simple_loop(q, k, v), aft_loop(q, k, v, np.zeros((T, T)))))
print(f"the definition, and simple_loop: difference {largest:.0e}")
print("largest difference from the loop, relative to the largest output")
for op, (call, expected, forms) in cases.items():
    for kind, name in [*(("form", name) for name in forms), ("kernel", "cpu")]:
        with use(op, **{kind: name}):
            error = distance(call()[0], expected)
        largest = max(largest, error)
        print(f"    {op.name:12}{kind:6} {name:11} {error:.0e}")

# %% [markdown]
# ## An experiment: the same formula, and wrong
#
# Equation (6) of the paper adds all keys with the weight e^k, and corrects those in the window by e^k (e^w - 1). That is the
# same in mathematics. In float32 it subtracts numbers that are nearly equal where w is very negative. Here the window holds all
# tokens, and its bias is the number in the first column:

# %%
x, y, z = (a.astype(np.float32) for a in (q, k[:, :1], v))
errors = {}
print(f"{'w':>6}{'as printed in (6)':>20}{'library':>12}")
for bias in (0, -5, -10, -15):
    flat = np.full((1, T), bias, np.float32)
    exact = aft_conv(q[None], k[None, :, :1], v[None], flat.astype(np.float64))[0].numpy()[0]
    change = np.tril(np.broadcast_to(np.exp(flat) - np.float32(1), (T, T)))  # e^w - 1
    sums = [np.cumsum(np.exp(y) * a, axis=0) + change @ (np.exp(y) * a) for a in (z, np.ones_like(z))]
    printed = sums[0] / np.where(sums[1] == 0, 1, sums[1]) / (1 + np.exp(-x))
    library = aft_conv(x[None], y[None], z[None], flat)[0][0]
    errors[bias] = distance(printed, exact), distance(library, exact)
    print(f"{bias:6}" + "{:20.0e}{:12.0e}".format(*errors[bias]))

# %% [markdown]
# A formula is not yet an algorithm. The library adds positive terms alone: the tokens outside the window, and those inside with
# their weight e^(k + w).
#
# ## An experiment: what the bias learns
#
# The task: give back the value that stood three tokens before. The keys are random, so only w can find it. It starts at 0,
# where every output is a mean of all past values, and takes steps against the gradient of the mean squared error. `backward`
# computes that through the library's kernel.

# %%
STEPS, BACK = 200, 3
T, C = 24, 64
k, v = (Tensor(rng.standard_normal((4, T, C))) for _ in range(2))
open_gate = Tensor(np.full((4, T, C), 10.0))  # sigmoid(10) is nearly 1
target = np.concatenate([np.zeros((4, BACK, C)), v.numpy()[:, :-BACK]], axis=1)
asked = (np.arange(T)[:, None] >= BACK).astype(float)  # [T 1]: the first three tokens have nothing to give back
w, history = Tensor(np.zeros((T, T)), requires_grad=True), []
for _ in range(STEPS):
    loss = mean(((aft_full(open_gate, k, v, w) - target) * asked) ** 2)
    loss.backward()
    history.append(loss.item())
    w = Tensor(w.numpy() - 400 * w.grad.numpy(), requires_grad=True)

lag = np.arange(T)[:, None] - np.arange(T)
learned = [w.numpy()[lag == d].mean().item() for d in range(8)]
print("step        " + "".join(f"{step:8}" for step in (0, 20, 50, 100, STEPS - 1)))
print("loss        " + "".join(f"{history[step]:8.3f}" for step in (0, 20, 50, 100, STEPS - 1)))
print("distance t-s" + "".join(f"{d:8}" for d in range(8)))
print("mean bias w " + "".join(f"{bias:8.2f}" for bias in learned))

if plt:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    axes[0].semilogy(history)
    axes[0].set(title=f"give back the value {BACK} tokens before", xlabel="step", ylabel="mean squared error")
    limit = abs(w.numpy()).max()
    image = axes[1].imshow(np.where(lag >= 0, w.numpy(), np.nan), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes[1].set(title="the learned bias w", xlabel="token s", ylabel="token t")
    figure.colorbar(image, ax=axes[1])
    axes[2].bar(range(8), learned)
    axes[2].set(title="its mean at each distance", xlabel="distance t - s")
    plt.show()

# %% [markdown]
# The stripe at distance 3 depends on the distance alone: aft_conv could learn it with one number, and aft_local needs a window
# of 4. The paper saw such local patterns in trained models, which is why it added a window. What no bias can learn is to look
# for a content: whichever token stands at t, it reads the same mean.
#
# ## Exercises
#
# 1. Take the gate out of `aft_loop`. With which q does `aft_full` still agree?
# 2. Let the task be the value of the first token, wherever t stands: `target = np.broadcast_to(v.numpy()[:, :1], (4, T, C))`.
#    What does w look like? Which of the four operators can learn it?
# 3. Hide what is outside of a window: let w be -100 there in `aft_loop`. How far can two such layers see? And two with 0 there?
#
# Further: `minitv explain aft-full`, `minitv explain aft_conv`.
