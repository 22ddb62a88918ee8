"""Ranks: the words of a communicator, on threads, under MPI, and with NCCL on a card that is not there."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from autograd.errors import DeviceError, RankError, ShapeError
from autograd.ranks import SMALL, Communicator, pieces
from autograd.ranks.nccl import NCCL
from autograd.ranks.threads import run
from tests.autograd import fake_cupy

ROOT = Path(__file__).resolve().parents[2]


def words(ranks) -> None:
    """Every word, on any kind of communicator, against what it must give."""
    rank, size = ranks.rank, ranks.size
    everyone = [np.random.default_rng(r).standard_normal((3, 5)).astype(np.float32) for r in range(size)]
    mine = everyone[rank].copy()
    gathered = ranks.gather(mine)
    assert gathered.shape == (size, 3, 5) and (gathered == np.stack(everyone)).all()
    assert ranks.gather(np.array(rank)).tolist() == list(range(size))

    expected = everyone[0].copy()
    for other in everyone[1:]:
        expected += other
    ranks.sum(mine)
    assert (mine == expected).all()  # to the bit: in the order of ranks
    large = np.full(SMALL // 4 + 7, 0.1 * (rank + 1), np.float32)
    total = np.float32(0.1)
    for other in range(1, size):
        total += np.float32(0.1 * (other + 1))
    ranks.sum(large)
    assert (large == total).all()

    shares = np.arange(size * 4, dtype=np.float64).reshape(size, 2, 2) + 100 * rank
    want = size * (np.arange(4).reshape(2, 2) + 4 * rank) + 100 * sum(range(size))
    assert (ranks.reduce_scatter(shares) == want).all()
    with pytest.raises(ShapeError, match="one for each of"):
        ranks.reduce_scatter(np.zeros((size + 1, 2)))

    half = np.full(3, rank, np.float16)
    ranks.broadcast(half, size - 1)
    assert half.dtype == np.float16 and (half == size - 1).all()

    following, before = (rank + 1) % size, (rank - 1) % size  # of unlike lengths, and to one rank alone
    outgoing, incoming = [None] * size, [None] * size
    outgoing[following], incoming[before] = np.full(rank + 1, rank, np.int32), np.empty(before + 1, np.int32)
    ranks.exchange(outgoing, incoming)
    assert (incoming[before] == before).all()
    with pytest.raises(ShapeError, match="C-contiguous"):
        ranks.sum(np.zeros((4, 4))[:, ::2])

    assert ranks.gather_bytes(b"x" * rank) == [b"x" * r for r in range(size)]
    part = ranks.split(rank % 2)
    assert (part.rank, part.size) == (rank // 2, len(range(rank % 2, size, 2)))
    assert part.gather(np.array(rank)).tolist() == list(range(rank % 2, size, 2))
    ranks.barrier()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_words_on_threads(size):
    run(size, words)


def test_a_rank_that_is_alone_needs_nobody():
    ranks = Communicator()
    words(ranks)
    assert ranks.sent == 0


def test_bytes_are_counted():
    def count(ranks):
        before = ranks.sent
        ranks.gather(np.zeros(10, np.float32))
        gathered, before = ranks.sent - before, ranks.sent
        ranks.reduce_scatter(np.zeros((4, 10), np.float32))
        scattered, before = ranks.sent - before, ranks.sent
        ranks.sum(np.zeros(SMALL, np.float32))
        return gathered, scattered, ranks.sent - before

    for gathered, scattered, summed in run(4, count):
        assert gathered == scattered == 3 * 40
        assert summed == 2 * 3 * SMALL  # each rank sends three quarters of its numbers, and its quarter of the sum three times


def test_the_first_error_ends_all_ranks():
    def fail(ranks):
        if ranks.rank == 1:
            raise ValueError("rank 1 has had enough")
        part = ranks.split(0) if ranks.rank > 5 else ranks
        part.barrier()

    with pytest.raises(ValueError, match="had enough"):
        run(3, fail)
    with pytest.raises(RankError, match="rank 2 ended the job with code 3"):
        run(3, lambda ranks: ranks.abort(3) if ranks.rank == 2 else ranks.barrier())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_pieces_are_views():
    array = np.zeros((5, 7), np.float32)
    parts = pieces(array, 64)
    assert [part.size for part in parts] == [16, 16, 3]
    parts[1][:] = 1
    assert array.sum() == 16


class Nccl:
    """``cupy.cuda.nccl`` without cards: ranks are threads, which meet by the name that one of them has made."""

    available = True

    def __init__(self, size: int):
        self.names, self.slots, self.barrier = [], {}, threading.Barrier(size, timeout=30)
        self.group = threading.local()
        nccl = self

        class NcclCommunicator:
            def __init__(self, size: int, name: bytes, rank: int):
                assert type(name) is bytes and name in nccl.names and 0 <= rank < size == nccl.barrier.parties
                self.rank = rank

            def send(self, pointer, count, kind, peer, stream):
                nccl.group.calls.append((pointer, None, count, (self.rank, peer), kind))

            def recv(self, pointer, count, kind, peer, stream):
                nccl.group.calls.append((None, pointer, count, (peer, self.rank), kind))

            def allGather(self, pointer, out, count, kind, stream):
                assert kind == 1
                nccl.slots[self.rank] = pointer, count
                nccl.barrier.wait()
                for rank in range(nccl.barrier.parties):
                    assert nccl.slots[rank][1] == count
                    ctypes.memmove(out + rank * count, nccl.slots[rank][0], count)
                nccl.barrier.wait()

            def bcast(self, pointer, count, kind, root, stream):
                assert kind == 1
                nccl.slots[self.rank] = pointer
                nccl.barrier.wait()
                if self.rank != root:
                    ctypes.memmove(pointer, nccl.slots[root], count)
                nccl.barrier.wait()

        self.NcclCommunicator = NcclCommunicator

    def get_unique_id(self) -> bytes:
        self.names.append(os.urandom(128))
        return self.names[-1]

    def groupStart(self):
        self.group.calls = []

    def groupEnd(self):
        for source, _, count, key, kind in self.group.calls:
            assert kind == 1
            if source is not None:
                self.slots[key] = source, count
        self.barrier.wait()
        for _, target, count, key, _ in self.group.calls:
            if target is not None:
                assert self.slots[key][1] == count
                ctypes.memmove(target, self.slots[key][0], count)
        self.barrier.wait()


@pytest.mark.parametrize("size", [1, 3])
def test_nccl_with_a_double(size, monkeypatch):
    """Arrays on cards are exchanged by NCCL alone, with the same sums; those on the host go as before."""
    with fake_cupy.installed("fast") as cupy:
        stream = SimpleNamespace(ptr=7, synchronize=lambda: None)
        monkeypatch.setattr(cupy.cuda, "nccl", Nccl(size), raising=False)
        monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: stream, raising=False)

        def talk(host):
            ranks = NCCL(host)
            values = [np.random.default_rng(r).standard_normal((size, 4)).astype(np.float32) for r in range(size)]
            mine, before = cupy.asarray(values[ranks.rank]), host.sent
            assert (ranks.gather(mine).get() == np.stack(values)).all()
            expected = values[0].copy()
            for other in values[1:]:
                expected += other
            assert (ranks.reduce_scatter(mine).get() == expected[ranks.rank]).all()
            large = cupy.asarray(np.full(SMALL, 0.1 * (ranks.rank + 1), np.float32))
            total = np.float32(0.1)
            for other in range(1, size):
                total += np.float32(0.1 * (other + 1))
            ranks.sum(large)
            assert (large.get() == total).all()
            ranks.sum(mine)
            assert (mine.get() == expected).all()
            ranks.broadcast(mine, size - 1)
            assert host.sent == before, "the host carries nothing of what lies on cards"
            ranks.barrier()
            assert ranks.gather_bytes(b"x" * ranks.rank) == [b"x" * r for r in range(size)]

        run(size, talk)
        monkeypatch.setattr(cupy.cuda.nccl, "available", False)
        with pytest.raises(DeviceError, match="NCCL is not installed: pip install nvidia-nccl-cu13"):
            NCCL(Communicator())


def mpiexec(size: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """A program on so many ranks; the test is left out where there is no MPI."""
    program = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip('there is no MPI: pip install "minitv[mpi]"')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **variables}
    return subprocess.run([program, "-n", str(size), sys.executable, *arguments], capture_output=True, text=True, timeout=60,
                          cwd=ROOT, env=environment)


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 3])
def test_words_under_mpi(size):
    done = mpiexec(size, "-m", "mpi4py", "-c", "from tests.autograd.test_ranks import words; from autograd.ranks import mpi\n"
                   "words(mpi.world())")
    assert done.returncode == 0, done.stderr
