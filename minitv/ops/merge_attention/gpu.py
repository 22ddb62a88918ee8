"""merge_attention on a GPU: a warp a row; see gpu.cu."""

from autograd.cuda.source import Source, contiguous, float32_only, strided, warps
from autograd.device import namespace

SOURCE = Source(__file__)
supports = float32_only


def forward(y, lse, other_y, other_lse):
    """The merged y, laid out as attention's, and lse."""
    xp, (B, H, T, V), lse, other_lse = namespace(y), y.shape, contiguous(lse), contiguous(other_lse)
    (y, ys), (other_y, others) = strided(y), strided(other_y)
    out, out_lse = xp.empty((B, T, H, V), "float32"), xp.empty((B, H, T), "float32")
    saved = y, lse, other_y, other_lse
    SOURCE.launch("mtv_merge_attention_forward", warps(B * H * T), *saved, out, out_lse, B, H, T, V, *ys, *others)
    return (out.transpose(0, 2, 1, 3), out_lse), (saved, (*ys, *others), (B, H, T, V))


def backward(saved, g_y, g_lse):
    """The gradients of all four inputs; those of y are laid out like y."""
    arrays, strides, (B, H, T, V) = saved
    xp = namespace(arrays[1])
    gy, glse, gother_y, gother_lse = (xp.empty(shape, "float32") for shape in ((B, T, H, V), (B, H, T)) * 2)
    g, gs = strided(g_y if g_y is not None else xp.zeros((B, H, T, V), "float32"))
    SOURCE.launch("mtv_merge_attention_backward", warps(B * H * T), *arrays, g, contiguous(g_lse), gy, glse, gother_y,
                  gother_lse, B, H, T, V, g_lse is not None, *strides, *gs)
    return gy.transpose(0, 2, 1, 3), glse, gother_y.transpose(0, 2, 1, 3), gother_lse
