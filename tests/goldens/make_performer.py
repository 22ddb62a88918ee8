"""Makes favor.npz: favor of performer-pytorch, in float64 on the CPU.

    pip install what make_goldens.py needs
    pip install --no-deps performer-pytorch==1.1.4 local-attention==1.4.1 axial-positional-embedding==0.2.1 einops==0.8.2
    python tests/goldens/make_performer.py

The entries are those of ops.npz. The package's small numbers that are added to softmax features and to the sums of causal
features are set to 0: with them a causal output depends on later keys. The state after the call, and the calls that begin with
one, are written out in PyTorch.
"""

import math
from functools import partial

import numpy as np
import performer_pytorch.performer_pytorch as package
import torch
import torch.nn.functional as F
from make_goldens import Calls, write

package.softmax_kernel = partial(package.softmax_kernel, eps=0.0)


def log_features(x, projection, features):
    x = x * x.shape[-1] ** -0.25
    dots = x @ projection.T
    return (F.relu(dots) + 1e-3).log() if features == "relu" else dots - x.square().sum(-1, keepdim=True) / 2


def favor() -> dict[str, np.ndarray]:
    """Both feature maps, causal and not; and from a state, with masked keys."""
    calls = Calls(6)
    normal, rng = calls.normal, calls.rng
    batch, heads, length, width, count, out = 2, 2, 9, 4, 6, 3
    torch.manual_seed(0)

    def after(k, v, projection, features, mask=None, mean=None, logsum=None):
        """The state after keys and values."""
        logs = log_features(k, projection, features)
        logs = logs if mask is None else logs.masked_fill(~mask[:, None, :, None], -math.inf)
        if mean is not None:
            logs = torch.cat([logsum[:, :, None], logs], 2)
        weights = logs.softmax(2).transpose(2, 3)  # [B H F T]
        return (weights @ v if mean is None else weights[..., :1] * mean + weights[..., 1:] @ v), logs.logsumexp(2)

    def inputs(scale=1.0):
        return {"q": normal(batch, heads, length, width), "k": normal(batch, heads, length, width, scale=scale),
                "v": normal(batch, heads, length, out)}

    def add(call, function, given, projection, **params):
        calls.add(call, function, given, **params, chunk_size=4)
        calls.arrays[f"{call}/in/projection"] = projection.numpy().copy()  # a constant, which has no gradient

    for features in ("positive", "relu"):
        for causal in (True, False):
            layer = package.FastAttention(width, count, causal=causal, generalized_attention=features == "relu").double()
            layer.projection_matrix.copy_(torch.from_numpy(normal(count, width)))
            if causal:
                layer.causal_linear_fn = partial(package.causal_linear_attention_noncuda, eps=0.0)
            projection = layer.projection_matrix.clone()
            name = f"favor.{features}{'' if causal else '_both'}"
            add(name, lambda q, k, v, layer=layer, projection=projection, features=features:
                (layer(q, k, v), *after(k, v, projection, features)), inputs(), projection, features=features, causal=causal)

    projection = torch.from_numpy(normal(count, width))
    mask = torch.from_numpy(rng.random((batch, length)) < 0.6)

    def continued(q, k, v, mask, mean, logsum):
        logs, ys = log_features(q, projection, "positive"), []
        for t in range(length):
            state = after(k[:, :, : t + 1], v[:, :, : t + 1], projection, "positive", mask[:, : t + 1], mean, logsum)
            ys.append((logs[:, :, t] + state[1]).softmax(-1)[:, :, None] @ state[0])
        return torch.cat(ys, 2), *state

    given = {**inputs(scale=3.0), "mask": mask.numpy(), "mean": normal(batch, heads, count, out),
             "logsum": normal(batch, heads, count)}
    add("favor.continued", continued, given, projection)
    return calls.arrays


if __name__ == "__main__":
    write(favor=favor)
