"""Makes rope.npz and angles.npz: rotary positions of two packages, and rotary linear attention, in float64 on the CPU.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.24.0 && pip install --no-deps rotary-embedding-torch==0.9.0 einops
    python tests/goldens/make_roformer.py

The entries of rope.npz are those of ops.npz. rotary-embedding-torch and transformers make their tables in float32; here they
turn by angles and positions that they are given in float64.

angles.npz holds what transformers' LLaMA, with a head of 16 channels that was trained at 64 positions, turns by, in float32:

    KIND/angles, KIND/gain    KIND is linear, dynamic (for 256 positions), yarn or llama3, all with the factor 4
    ntk/angles                of rotary-embedding-torch's theta_rescale_factor
    xpos/products             products of its queries and keys with use_xpos, of xpos/q and xpos/k
"""

import numpy as np
import torch
from make_goldens import Calls, write
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.roformer.modeling_roformer import RoFormerSelfAttention

BASE, FACTOR, LENGTH, WIDTH = 10_000.0, 4.0, 64, 16


def frequencies(width: int) -> np.ndarray:
    return BASE ** (-np.arange(0, width, 2) / width)


def rope() -> dict[str, np.ndarray]:
    """Each package with its own pairing; a part of the channels; xPos; offsets; and (19) as a loop over pairs of positions."""
    calls = Calls(11)
    normal, rng = calls.normal, calls.rng

    def tables(width, positions):
        return positions[..., None] * torch.from_numpy(frequencies(width))

    def package(x, *, turned, start, scale=1.0):
        """rotary-embedding-torch: channels beyond ``turned`` stay."""
        angles = tables(turned, torch.arange(start, start + x.shape[2]).double())
        return apply_rotary_emb(angles.repeat_interleave(2, -1), x, scale=scale)

    def roformer(x):
        angles = tables(x.shape[3], torch.arange(x.shape[2]).double())
        both = torch.cat([angles.sin(), angles.cos()], -1)[None, None]
        return RoFormerSelfAttention.apply_rotary_position_embeddings(both, x, x)[0]

    def llama(x, positions):
        angles = tables(x.shape[3], positions.double())
        angles = torch.cat([angles, angles], -1)
        return apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())[0]

    calls.add("rope.package", lambda x: package(x, turned=8, start=100_000), {"x": normal(2, 2, 5, 8)}, angles=frequencies(8),
              start=100_000)
    calls.add("rope.partial", lambda x: package(x, turned=4, start=0), {"x": normal(2, 2, 5, 7)}, angles=frequencies(4))
    zeta = (torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)  # of the package, with use_xpos
    growth = zeta.double() ** (torch.arange(5).double()[:, None] / 512)
    calls.add("rope.xpos", lambda x: package(x, turned=8, start=0, scale=growth.repeat_interleave(2, -1)),
              {"x": normal(2, 2, 5, 8)}, angles=frequencies(8), growth=np.log(zeta.double().numpy()) / 512)
    calls.add("rope.roformer", roformer, {"x": normal(2, 2, 5, 8)}, angles=frequencies(8))
    calls.add("rope.half", llama, {"x": normal(2, 3, 4, 6), "positions": rng.integers(0, 10**6, (2, 4))},
              angles=frequencies(6), pairing="half")

    def linear(q, k, v, state=None, z=None):
        """(19) over all pairs of positions; the state is that of (R_n k_n) before and after, seen from its last position."""
        length, width = q.shape[2], q.shape[3]
        turn = lambda x, start: package(x, turned=width, start=start)  # noqa: E731
        state = torch.zeros(*k.shape[:2], width, v.shape[3]).double() if state is None else state
        z = torch.zeros(*k.shape[:2], width).double() if z is None else z
        rows, turned_q, turned_k = [], turn(q, 1), turn(k, 1)
        for m in range(length):
            numerator, divisor = torch.einsum("bhk,bhkv->bhv", turned_q[:, :, m], state), (q[:, :, m] * z).sum(-1)
            for n in range(m + 1):
                numerator = numerator + (turned_q[:, :, m] * turned_k[:, :, n]).sum(-1, keepdim=True) * v[:, :, n]
                divisor = divisor + (q[:, :, m] * k[:, :, n]).sum(-1)
            rows.append(numerator / divisor[..., None])
        after = state + torch.einsum("bhtk,bhtv->bhkv", turned_k, v)
        angles = tables(width, torch.full((v.shape[3],), -length).double()).repeat_interleave(2, -1)
        after = apply_rotary_emb(angles, after.transpose(2, 3)).transpose(2, 3)
        return torch.stack(rows, 2), after, z + k.sum(2)

    def inputs(carried):
        given = {name: rng.uniform(0.2, 1.5, (2, 2, 6, 4)) for name in "qk"} | {"v": normal(2, 2, 6, 3)}
        return given | ({"state": normal(2, 2, 4, 3), "z": rng.uniform(0.2, 3, (2, 2, 4))} if carried else {})

    for carried in (False, True):
        calls.add(f"rotary_linear.{'carried' if carried else 'first'}", linear, inputs(carried), angles=frequencies(4),
                  chunk_size=4)
    return calls.arrays


def angles() -> dict[str, np.ndarray]:
    arrays = {}
    for kind in ("linear", "dynamic", "yarn", "llama3"):
        parameters = {"rope_type": kind, "rope_theta": BASE, "factor": FACTOR}
        if kind in ("yarn", "llama3"):
            parameters["original_max_position_embeddings"] = LENGTH
        if kind == "llama3":
            parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config = LlamaConfig(hidden_size=4 * WIDTH, num_attention_heads=4, max_position_embeddings=LENGTH,
                             rope_parameters=parameters)
        found, gain = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=4 * LENGTH)
        arrays[f"{kind}/angles"], arrays[f"{kind}/gain"] = found.double().numpy(), np.array(float(gain))
    arrays["ntk/angles"] = RotaryEmbedding(WIDTH, theta_rescale_factor=FACTOR).freqs.detach().double().numpy()
    rng = np.random.default_rng(12)
    arrays["xpos/q"], arrays["xpos/k"] = rng.standard_normal((2, 1, 1, 9, WIDTH))
    q, k = RotaryEmbedding(WIDTH, use_xpos=True).rotate_queries_and_keys(
        *(torch.from_numpy(arrays[f"xpos/{name}"]) for name in "qk"))
    arrays["xpos/products"] = (q @ k.transpose(2, 3)).detach().numpy()
    return arrays


if __name__ == "__main__":
    write(rope=rope, angles=angles)
