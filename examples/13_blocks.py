# %% [markdown]
# # Blocks and feed-forward networks: simplified blocks, One Wide FFN, reversible layers
#
# A Transformer block adds what attention and a feed-forward network find to its input, layer after layer. Which of its parts
# are needed, which can be shared, and which need not be kept in memory?

# %%
import tracemalloc

import numpy as np

import minitv
from autograd import Tensor, distance, gradients, linear, relu, tanh, use
from autograd.reversible import reversible
from minitv.ops import attention, shaping

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## Simplified blocks: the formula
#
# A usual block computes x ← x + attention(norm(x)), then x ← x + ffn(norm(x)). The sum with x is called a skip connection.
# Without it, attention takes a mean of tokens in each layer, and after many means all tokens are alike. This is rank collapse.
#
# He and Hofmann 2023 (arXiv 2311.01906) move the skip connection into the weights A of attention, equation (5):
#
#     y = (α I + β A - γ C) v
#
# I is the identity. C are the weights of attention if all scores are equal, so row t has 1 / (t + 1) at the tokens 0 .. t. α, β
# and γ are learned numbers that start at 1. The queries start at 0, so A = C at first and y = v: every token reads itself
# alone. What attention has learned since is A - C. Then the matrices of values and outputs can go too: the paper's blocks have
# 16.7 % less weights and learn as much in each step.
#
# ## Simplified blocks: the loop

# %%
T, K = 12, 8
q, k, v = rng.standard_normal((3, T, K))  # [T K] each


def shaped_loop(q, k, v, alpha, beta, gamma):
    y = np.zeros_like(v)
    for t in range(len(q)):
        weights = np.exp(k[: t + 1] @ q[t] / np.sqrt(q.shape[1]))
        a = weights @ v[: t + 1] / weights.sum()  # row t of A v
        m = v[: t + 1].mean(axis=0)  # row t of C v
        y[t] = alpha * v[t] + beta * a - gamma * m  # (5)
    return y


# %% [markdown]
# ## Simplified blocks: the library
#
# The operator `shaping` takes a = A v from `attention`. C v is a running mean, so no matrix is made.

# %%
gains = [np.array([x]) for x in (1.0, 0.7, 0.4)]  # α, β, γ of one head
a = attention(*(x[None, None] for x in (q, k, v)))[0].numpy()[:, 0]  # [1 T K]
expected = shaped_loop(q, k, v, 1.0, 0.7, 0.4)
largest = distance(shaping.definition(a, v[None], *gains)[0][0], expected)
print("largest difference from the loop, relative to the largest output")
print(f"    definition         {largest:.0e}")
for kind, name in (("form", "composed"), ("kernel", "cpu")):
    with use(shaping, **{kind: name}):
        y, _ = shaping(a, v[None], *gains)
    largest = max(largest, distance(y[0], expected))
    print(f"    {kind:6} {name:11} {distance(y[0], expected):.0e}")
start = shaped_loop(np.zeros_like(q), k, v, 1.0, 1.0, 1.0)
print(f"at the start, with queries of 0, it is the identity: difference {distance(start, v):.0e}")

# %% [markdown]
# ## An experiment: rank collapse
#
# 32 random tokens pass through 24 layers of attention with random weights. The table has the mean cosine of the angle between
# two tokens: 0 for different directions, and 1 if all tokens are alike. Rows of the table are ways to write the layer.

# %%
T, D, LAYERS = 32, 64, 24
x0 = rng.standard_normal((T, D))
weights = rng.standard_normal((LAYERS, 3, D, D)) / np.sqrt(D)  # Wq, Wk, Wv of each layer


def norm(x):
    return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True))


def attend(q, k, v):
    return attention(*(x[None, None] for x in (q, k, v)))[0].numpy()[0, 0]


def alike(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return (np.sum(unit @ unit.T) - T) / (T * (T - 1))


def layer(kind, x, Wq, Wk, Wv):
    z = norm(x)
    if kind == "attention alone":
        return attend(z @ Wq, z @ Wk, z @ Wv)
    if kind == "with a skip connection":
        return x + attend(z @ Wq, z @ Wk, z @ Wv)
    if kind == "I + A, without C":
        return z + attend(0 * z, z @ Wk, z)
    return shaping(attend(0 * z, z @ Wk, z)[None], z[None], *[np.ones(1)] * 3)[0][0].numpy()  # I + A - C


collapse = {}
for kind in ("attention alone", "with a skip connection", "I + A, without C", "I + A - C"):
    x, collapse[kind] = x0, [alike(x0)]
    for layer_weights in weights:
        x = layer(kind, x, *layer_weights)
        collapse[kind].append(alike(x))
shown = [0, 1, 2, 4, 8, 16, 24]
print("cosine after layer".ljust(26) + "".join(f"{n:>7}" for n in shown))
for kind, row in collapse.items():
    print(kind.ljust(26) + "".join(f"{round(row[n], 2) + 0.0:7.2f}" for n in shown))

# %% [markdown]
# Attention alone makes all tokens alike within a few layers. A skip connection delays this. I + A without C delays it less, and
# I + A - C leaves the tokens as they are, until attention has learned to change them.
#
# ## One Wide FFN: the formula
#
# The feed-forward network (FFN) computes with every token by itself, equation (2) of Vaswani et al. 2017: ffn(x) = max(0, x W₁)
# W₂, with a hidden size f of mostly 4 D. These networks hold two thirds of a layer's weights. Pires et al. 2023 (arXiv
# 2309.01826) let all layers of the encoder of a translation model share one of them, leave those of the decoder out, and make
# the one so wide that the model has as many weights as before. That can do what several did together, because networks of
# hidden size f that are added up are one of the sum of the sizes:

# %%
f, x = 4 * 8, rng.standard_normal((5, 8))
W1, W2 = rng.standard_normal((2, f, 8)), rng.standard_normal((2, 8, f))  # two networks, W₁ [f D] and W₂ [D f]


def ffn(x, W1, W2):
    return linear(relu(linear(x, W1)), W2)


two = ffn(x, W1[0], W2[0]) + ffn(x, W1[1], W2[1])
wide = ffn(x, np.concatenate(W1), np.concatenate(W2, axis=1))
error = distance(wide, two)
largest = max(largest, error)
print(f"two networks of size f are one of size 2 f: difference {error:.0e}")

models = {
    "a network in each layer": minitv.build("encoder-decoder", vocab=64, width=64, layers=4, decoder_layers=4),
    "one, no wider": minitv.build("one-wide-ffn", vocab=64, width=64, layers=4, decoder_layers=4, widen=1),
    "One Wide FFN": minitv.build("one-wide-ffn", vocab=64, width=64, layers=4, decoder_layers=4),
}
sizes = {name: sum(parameter.size for parameter in model.parameters()) for name, model in models.items()}
work = {"a network in each layer": 8, "one, no wider": 4, "One Wide FFN": 4 * 8}  # networks of the usual size for a token
print(f"{'4 + 4 layers of width 64':26}{'weights':>10}{'work of the FFNs':>19}")
for name, size in sizes.items():
    print(f"{name:26}{size:10,}{work[name]:19}")

# %% [markdown]
# So One Wide FFN has the weights of the usual model but more work for the encoder. It writes faster all the same: the encoder
# runs once for a sentence, and the decoder, which runs for every word, has no FFN.
#
# ## Reversible layers: the formula
#
# To compute gradients, training keeps what every layer computed, so memory grows with the number of layers. Reformer (Kitaev et
# al. 2020, arXiv 2001.04451) splits x into two streams, equation (9) forward and (8) back, where F is attention and G the FFN:
#
#     y₁ = x₁ + F(x₂),   y₂ = x₂ + G(y₁)                  forward
#     x₂ = y₂ - G(y₁),   x₁ = y₁ - F(x₂)                  back
#
# One stream could not be undone, because x + F(x) does not tell x. With two, the input of a layer follows from its output, so
# nothing of the layers in between need be kept. The price: F and G are computed once more.

# %%
D, LAYERS = 64, 24
matrices = rng.standard_normal((2 * LAYERS, D, D)) / np.sqrt(D)


def forward_loop(x1, x2, matrices):
    for F, G in zip(matrices[::2], matrices[1::2]):
        x1 = x1 + np.tanh(x2 @ F.T)
        x2 = x2 + np.tanh(x1 @ G.T)
    return x1, x2


def backward_loop(y1, y2, matrices):
    for F, G in zip(matrices[::2][::-1], matrices[1::2][::-1]):
        y2 = y2 - np.tanh(y1 @ G.T)
        y1 = y1 - np.tanh(y2 @ F.T)
    return y1, y2


returned = {}
for dtype in (np.float32, np.float64):
    x1, x2 = (rng.standard_normal((16, D)).astype(dtype) for _ in range(2))
    parts = matrices.astype(dtype)
    back = backward_loop(*forward_loop(x1, x2, parts), parts)
    returned[np.dtype(dtype).name] = max(distance(back[0], x1), distance(back[1], x2))
print("x that comes back differs by " + ", ".join(f"{error:.0e} in {name}" for name, error in returned.items()))

# %% [markdown]
# The library has this for any functions, with gradients, as `reversible`; `minitv train NAME --stack reversible` uses it. Here
# are the memory of a pass with its gradients, and the largest difference between these gradients and those of an ordinary tape.

# %%
def plain(steps, x1, x2):
    for function, _ in steps:
        x1, x2 = x2, x1 + function(x2)
    return x1, x2


def measured(run, layers):
    """Gradients of the sum of the outputs, and the most memory that was in use, in MB."""
    parameters = [Tensor(matrix, requires_grad=True) for matrix in matrices[: 2 * layers]]
    steps = [(lambda x, W=W: tanh(linear(x, W)), (W,)) for W in parameters]
    streams = [Tensor(x, requires_grad=True) for x in streams_in]
    tracemalloc.start()
    y1, y2 = run(steps, *streams)
    found = gradients((y1 + y2).sum(), [*streams, *parameters])
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return [g.numpy() for g in found], peak


streams_in = rng.standard_normal((2, 256, D)) * 0.1
depths, memory, gradient_error = [4, 8, 16], {"ordinary": [], "reversible": []}, 0.0
for depth in depths:
    (ordinary, more), (again, less) = measured(plain, depth), measured(reversible, depth)
    memory["ordinary"].append(more)
    memory["reversible"].append(less)
    gradient_error = max(gradient_error, *(distance(g, h) for g, h in zip(again, ordinary)))
print("MB with so many layers".ljust(26) + "".join(f"{depth:>8}" for depth in depths))
for name, row in memory.items():
    print(name.ljust(26) + "".join(f"{size:8.1f}" for size in row))
print(f"largest difference of a gradient: {gradient_error:.0e}")

if plt:
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for kind, row in collapse.items():
        axes[0].plot(row, label=kind)
    axes[0].set(title="how alike the tokens become", xlabel="layer", ylabel="mean cosine", ylim=(-0.05, 1.05))
    axes[0].legend(fontsize=8)
    for shift, (name, row) in zip((-0.2, 0.2), (("weights", sizes), ("work of the FFNs", work))):
        first = row["a network in each layer"]
        axes[1].bar(np.arange(3) + shift, [value / first for value in row.values()], width=0.4, label=name)
    axes[1].set(title="a translation model, beside the usual one", xticks=range(3), xticklabels=list(sizes))
    axes[1].legend(fontsize=8)
    axes[1].tick_params(axis="x", labelsize=8)
    for name, row in memory.items():
        axes[2].plot(depths, row, marker="o", label=name)
    axes[2].set(title="memory of a pass with gradients", xlabel="layers", ylabel="MB", ylim=(0, None))
    axes[2].legend(fontsize=8)
    plt.show()

# %% [markdown]
# ## Exercises
#
# 1. Let attention in "I + A - C" learn something: replace `0 * z` by `3 * z @ Wq` in the last line of `layer`. From which
#    factor on do tokens become alike? Then take smaller β and γ in place of `np.ones(1)`.
# 2. Sharing: give `forward_loop` the same matrix G in all layers. Compute its gradient by hand: why is it a sum over the
#    layers?
# 3. Multiply F and G by 10 in both loops of the reversible layers. How exact is x now, and why?
#
# Further: `minitv explain simplified`, `minitv explain one-wide-ffn`, `minitv explain reformer`.
