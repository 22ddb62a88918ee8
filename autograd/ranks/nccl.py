"""Ranks with a card each: CuPy arrays go from card to card by NCCL, NumPy arrays as another communicator sends them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from ..device import gpu, is_cupy
from ..errors import DeviceError
from . import Communicator

ID = 128  # bytes of the name by which ranks find each other
UINT8 = 1  # ncclUint8: bytes are sent, sums are made in the order of ranks by Communicator


class NCCL(Communicator):
    """The ranks of ``host``, which exchanges NCCL's id and carries NumPy arrays; the current card is this rank's.

    Calls are queued on the current stream, as kernels are. DeviceError where CuPy or NCCL is missing.
    """

    kind = "NCCL"

    def __init__(self, host: Communicator):
        super().__init__(host.rank, host.size)
        self.host, self._cupy = host, gpu()
        try:
            from cupy.cuda import nccl
        except Exception as error:  # CuPy warns of a missing library, and a warning may be an error
            raise DeviceError(f"NCCL cannot be loaded ({error}): pip install nvidia-nccl-cu13, or -cu12") from error
        if not nccl.available:
            raise DeviceError("NCCL is not installed: pip install nvidia-nccl-cu13, or nvidia-nccl-cu12 for an older driver")
        self._nccl = nccl
        name = np.zeros(ID, np.uint8)
        if self.rank == 0:
            name[...] = np.frombuffer(nccl.get_unique_id(), np.uint8)
        host.broadcast(name)
        self._ranks = nccl.NcclCommunicator(self.size, name.tobytes(), self.rank)

    def split(self, color: int) -> Communicator:
        return NCCL(self.host.split(color))

    def barrier(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()
        self.host.barrier()

    def abort(self, code: int = 1) -> NoReturn:
        self.host.abort(code)

    def _exchange(self, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        if not any(is_cupy(array) for array in (*outgoing, *incoming)):
            return self.host._exchange(outgoing, incoming)
        stream = self._cupy.cuda.get_current_stream().ptr
        self._nccl.groupStart()
        for other in range(self.size):
            for call, array in ((self._ranks.send, outgoing[other]), (self._ranks.recv, incoming[other])):
                if array is not None and other != self.rank and array.nbytes:
                    call(array.data.ptr, array.nbytes, UINT8, other, stream)
        self._nccl.groupEnd()
        return None

    def _gather(self, array: Any, out: Any) -> None:
        if not is_cupy(array):
            return self.host._gather(array, out)
        stream = self._cupy.cuda.get_current_stream().ptr
        self._ranks.allGather(array.data.ptr, out.data.ptr, array.nbytes, UINT8, stream)
        return None

    def _broadcast(self, array: Any, root: int) -> None:
        if not is_cupy(array):
            return self.host._broadcast(array, root)
        stream = self._cupy.cuda.get_current_stream().ptr
        self._ranks.bcast(array.data.ptr, array.nbytes, UINT8, root, stream)
        return None
