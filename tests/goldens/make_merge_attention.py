"""Makes merge_attention.npz beside it: two partial attentions merged by PyTorch, in float64 on the CPU.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0
    python tests/goldens/make_merge_attention.py

The call has random outputs and sums; it is named and held as make_goldens.py says.
"""

import numpy as np
import torch
from make_goldens import HERE, Calls


def merged(y, lse, other_y, other_lse):
    """The mean of both outputs, weighted by the sums that their softmaxes divided by."""
    sums = torch.stack([lse, other_lse])
    whole = torch.logsumexp(sums, 0)
    weights = torch.exp(sums - whole)
    return weights[0][..., None] * y + weights[1][..., None] * other_y, whole


def main() -> None:
    calls = Calls(7)
    inputs = {name: calls.normal(2, 3, 5, *width, scale=scale)
              for name, width, scale in (("y", (4,), 1.0), ("lse", (), 2.0), ("other_y", (4,), 1.0), ("other_lse", (), 2.0))}
    calls.add("merge_attention", merged, inputs)
    np.savez_compressed(HERE / "merge_attention.npz", **calls.arrays)


if __name__ == "__main__":
    main()
