"""dilated_attention on a GPU, by attention's kernel; see fused.py."""

from autograd.cuda.source import contiguous

from ..attention import gpu as attention
from .fused import kernel

SOURCE = attention.SOURCE


def supports(q, k, v):
    return attention.supports(q, k, v, sink=None, slopes=None, window=None, segment=None, dilation=1)


def _backward(saved, y, stats, g_y, g_lse):
    return attention.backward((*saved[:-2], contiguous(y.transpose(0, 2, 1, 3)), contiguous(stats)), g_y, g_lse)


forward, backward = kernel(attention, _backward)
