# %% [markdown]
# # Filters as long as the text: Hyena and Monarch Mixer
#
# A convolution gives every token a weighted sum of the tokens before it, with weights that depend on the distance alone. How
# can a filter be as long as the text, and cheap, and still let the text decide what passes?

# %%
import numpy as np

from autograd import distance, use
from minitv.ops import long_conv, monarch

try:
    import matplotlib.pyplot as plt
except ImportError:  # the tables have the same numbers as the pictures
    plt = None

rng = np.random.default_rng(0)

# %% [markdown]
# ## The formula
#
# Hyena (Poli et al. 2023, arXiv 2302.10866) convolves each channel with a filter h of T numbers, which are called taps. Tap s
# meets the input s positions ago. Equation (1), and the same as a matrix S with h_{t-s} in row t and column s (2), a Toeplitz
# matrix:
#
#     y_t = Σ_{s ≤ t} h_{t-s} x_s                                                 (1)
#     y = S x                                                                     (2)
#
# These weights are the same for every text. So Hyena multiplies by projections of the input, called gates, before and after.
# With two gates x⁰ and x¹, element by element, equation (4) is
#
#     y_t = x⁰_t Σ_{s ≤ t} h_{t-s} x¹_s v_s                                       (4)
#
# The weight of token s for token t is x⁰_t x¹_s h_{t-s}: a query times a key, as in attention, times a function of the
# distance. All this happens in each channel by itself.
#
# What is lost: the filter has as many taps as the longest text, and there is no state of fixed size. A model that writes keeps
# all its past inputs, because each new token meets each of them.
#
# ## The loop

# %%
T, D = 32, 3
x0, x1, v = rng.standard_normal((3, T, D))  # [T D] each
h = rng.standard_normal((T, D)) * np.exp(-np.arange(T) / 8)[:, None]  # [T D], a filter for each channel


def conv_loop(x, h):
    y = np.zeros_like(x)
    for t in range(len(x)):
        for s in range(t + 1):
            y[t] += h[t - s] * x[s]  # (1)
    return y


def hyena_loop(x0, x1, v, h):
    return x0 * conv_loop(x1 * v, h)  # (4): gate, convolve, gate


# %% [markdown]
# ## The library
#
# The loop takes T² / 2 products for each channel. The Fourier transform turns a convolution into a product: transform both,
# multiply, transform back. A fast transform takes about T log T operations, so this is the form `fft`. The form `monarch`
# computes the same transforms as products of small dense matrices; the second half of this notebook shows how. The form
# `relaxed` gives each output as soon as its input is known, for writing.

# %%
a = x1 * v
expected = conv_loop(a, h)
largest = distance(long_conv.definition(a[None], h)[0][0], expected)
print("largest difference from the loop, relative to the largest output")
print(f"    definition         {largest:.0e}")
for kind, name in (("form", "direct"), ("form", "fft"), ("form", "monarch"), ("form", "relaxed"), ("kernel", "cpu")):
    with use(long_conv, **{kind: name}):
        y, _ = long_conv(a[None], h)  # [1 T D]
    largest = max(largest, distance(y[0], expected))
    print(f"    {kind:6} {name:11} {distance(y[0], expected):.0e}")
S = np.stack([conv_loop(column[:, None], h[:, :1])[:, 0] for column in np.eye(T)], axis=1)  # (2), of channel 0
H = np.diag(x0[:, 0]) @ S @ np.diag(x1[:, 0])  # (4) as a matrix
print(f"as a matrix: difference {distance(H @ v[:, 0], hyena_loop(x0, x1, v, h)[:, 0]):.0e}")

# %% [markdown]
# ## An experiment: the circle
#
# A Fourier transform takes its n points as a circle: behind the last point comes the first. With n = T, late inputs reach early
# outputs around the circle, and a model that is to guess the next token could read it. With n = 2 T - 1 or more, the zeros
# behind the text keep them apart. The last input is changed here; which outputs change?

# %%
changed = a.copy()
changed[-1] += 1.0
leaks = {}
print("points n    wrong by    first output that the last input changes")
for n in (T, 2 * T):
    before, after = (np.fft.irfft(np.fft.rfft(x, n, axis=0) * np.fft.rfft(h, n, axis=0), n, axis=0)[:T] for x in (a, changed))
    leaks[n] = int(np.argmax(np.abs(after - before).max(axis=1) > 1e-9))
    print(f"{n:8}{distance(before, expected):12.0e}{leaks[n]:10} of {T}")

# %% [markdown]
# ## An experiment: a network makes the filter
#
# A filter with T free taps would have as many parameters as the text is long. Hyena computes tap i by a small network of i,
# equation (7), and lets it fade by a window e^(-δ i / T), at another rate δ in each channel. The network reads i / T, cosines
# and sines of i, and its activation is a sine: sin(f · z). Networks learn smooth functions first, but a filter that picks the
# token at one certain distance is not smooth. Here the last layer of such networks learns a filter that picks the token 20
# positions ago, by gradient descent; the other layers stay as they are. How near does it come in 300 steps, with slow and with
# fast sines?

# %%
T, WIDTH, BANDS, PICK, STEPS = 128, 256, 8, 20, 300


def last_hidden_layer(frequency):
    i = np.arange(T) / (T - 1)
    waves = 2 * np.pi * np.linspace(1e-4, BANDS - 1, BANDS) * i[:, None] * (T - 1) / T
    z = np.concatenate([i[:, None], np.cos(waves), -np.sin(waves)], axis=1)  # features of the position [T 2 BANDS + 1]
    layers = np.random.default_rng(1)
    for _ in range(3):
        weight = layers.uniform(-1, 1, (z.shape[1], WIDTH)) / np.sqrt(z.shape[1])
        bias = layers.uniform(-1, 1, WIDTH) / np.sqrt(z.shape[1])
        z = np.sin(frequency * (z @ weight + bias))  # (7)
    return z  # [T WIDTH]


wanted = np.zeros(T)
wanted[PICK] = 1.0
fits, first_filters, errors = {}, {}, {}
print("frequency f   error after training   sign changes of a new filter")
for frequency in (1, 4, 14):
    hidden = last_hidden_layer(frequency)
    last, rate = np.zeros(WIDTH), 1 / np.linalg.norm(hidden, 2) ** 2  # a larger rate would diverge
    for _ in range(STEPS):
        last -= rate * hidden.T @ (hidden @ last - wanted)
    fits[frequency] = hidden @ last
    errors[frequency] = np.linalg.norm(fits[frequency] - wanted)
    first_filters[frequency] = hidden @ np.random.default_rng(2).standard_normal(WIDTH) / np.sqrt(WIDTH)
    changes = np.count_nonzero(np.diff(np.sign(first_filters[frequency])))
    print(f"{frequency:11}{errors[frequency]:21.2f}{changes:25}")

# %% [markdown]
# An error of 1 is that of a filter of zeros. With f = 1 the trained filter is a flat hill; with f = 14, where the paper begins,
# it is one tap.
#
# ## Monarch matrices
#
# A dense matrix of N × N numbers costs N² products. A **Monarch matrix** (Dao et al. 2022, arXiv 2204.00595) has two steps of
# small dense matrices. Write the inputs row by row into a square of √N × √N numbers. Mix each column by a matrix of its own,
# then each row by a matrix of its own. Now every output depends on every input, for 2 N √N products. Monarch Mixer (Fu et al.
# 2023, arXiv 2310.12109) mixes tokens by Y = M₂ (k ∘ (M₁ X)) with two of them, and channels by two more. If M₁ is the Fourier
# transform and M₂ its inverse, this is the convolution (1) with a filter whose transform is k.
#
# The Fourier transform is a Monarch matrix whose small matrices are complex. The form `monarch` above computes it so.

# %%
def monarch_loop(x, first, second):
    Q, P = first.shape[0], first.shape[2]  # N = P Q; here both steps have square blocks
    t = np.stack([first[j] @ x.reshape(P, Q)[:, j] for j in range(Q)], axis=1)  # [P Q], each column by its own matrix
    y = np.stack([second[i] @ t[i] for i in range(P)])  # [P Q], each row by its own matrix
    return y.T.reshape(-1)  # read column by column


P = Q = 4
x, first, second = rng.standard_normal(P * Q), rng.standard_normal((Q, P, P)), rng.standard_normal((P, Q, Q))
expected = monarch_loop(x, first, second)
for name in ("blocks", "dense"):
    with use(monarch, form=name):
        error = distance(monarch(x, first, second), expected)
    largest = max(largest, error)
    print(f"monarch, {name:8} difference {error:.0e}")


def fourier(n):
    return np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n)  # [n n]


twist = np.exp(-2j * np.pi * np.outer(np.arange(P), np.arange(Q)) / (P * Q))  # [P Q]
dft = np.stack([fourier(P)] * Q), np.stack([fourier(Q) * twist[i] for i in range(P)])
transform_error = np.abs(monarch_loop(x, *dft) - np.fft.fft(x)).max()
print(f"the Fourier transform as a Monarch matrix: difference {transform_error:.0e}")

lengths = [256, 1024, 4096, 16384, 65536]
costs = {"direct": [t * t // 2 for t in lengths], "monarch": [3 * 4 * 2 * (2 * t) ** 1.5 for t in lengths],
         "fft": [3 * 2 * 2 * t * np.log2(2 * t) for t in lengths]}  # a complex product is four real ones
print(f"\n{'millions of products':24}" + "".join(f"{t:>9}" for t in lengths))
for name, row in costs.items():
    print(name.ljust(24) + "".join(f"{cost / 1e6:9.2f}" for cost in row))

if plt:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    limit = abs(H).max()
    axes[0].imshow(H, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes[0].set(title="Hyena in one channel: x⁰ h x¹", xlabel="token s", ylabel="token t")
    for frequency, curve in first_filters.items():
        axes[1].plot(curve * np.exp(-3 * np.arange(T) / T), label=f"f = {frequency}")
    axes[1].set(title="new filters, with a window", xlabel="distance")
    for frequency, curve in fits.items():
        axes[2].plot(curve, label=f"f = {frequency}")
    axes[2].set(title=f"trained to pick distance {PICK}", xlabel="distance")
    for name, row in costs.items():
        axes[3].loglog(lengths, row, marker="o", label=name)
    axes[3].set(title="products for one channel", xlabel="tokens T")
    for axis in axes[1:]:
        axis.legend(fontsize=8)
    plt.show()

# %% [markdown]
# Monarch products are more than those of a fast transform, but all of them are products of dense matrices, for which processors
# and above all GPUs are built. For short texts they are even more than the sums of (1).
#
# ## Exercises
#
# 1. An encoder looks ahead too: give `conv_loop` a second filter g, add Σ_{s ≥ t} g_{s-t} x_s, and compare with
#    `long_conv(a[None], h, None, g)`.
# 2. Order 3: give `hyena_loop` one gate and one filter more. Print its matrix: why is it still triangular?
# 3. Fit a filter that is not a single tap, such as `wanted = np.exp(-np.arange(T) / 10)`. Which frequency is best now?
#
# Further: `minitv explain hyena`, `minitv explain monarch-mixer`, `minitv explain monarch`.
