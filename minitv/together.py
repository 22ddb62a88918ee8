"""What the ranks of a run must have in common before the first step, and what one of them does before the others."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from autograd.cpu.process import cores
from autograd.device import gpu, select, to_numpy
from autograd.ranks import Communicator
from autograd.ranks.nccl import NCCL

from . import __version__, job
from .errors import RunError, UserError, quoted
from .experiment import Experiment
from .lock import LOCK
from .task import Task
from .variants import load, variants

SEEN = 15.0  # seconds; a network file system may show a new file late
OWN = ("threads", "data", "val_data")  # options that each rank may have of its own: data is compared by its content


def check(experiment: Experiment, ranks: Communicator) -> None:
    """UserError for what several ranks cannot do."""
    run = experiment.run
    if ranks.size == 1:
        check_sharing(experiment, ranks)
        if place := job.launched():
            raise UserError(f"{place.launcher} has started {place.size} processes, each of which would train alone: use the "
                            f"command, {place.launcher} -n {place.size} minitv train")
        return
    check_sharing(experiment, ranks)
    lines = ranks.size // run.sequence_ranks
    if lines > run.batch:
        most = run.batch * run.sequence_ranks
        several = f"{lines} ranks" if run.sequence_ranks == 1 else f"{lines} times {run.sequence_ranks} ranks"
        raise UserError(f"--batch {run.batch}: {several} share the sequences of a step, and each needs one, allowed: --batch "
                        f"{lines} or more, or at most {most} rank{'s' * (most > 1)}")
    for name in ("data", "val_data"):
        if experiment.values.get(name) == "-":
            raise UserError(f"--{name.replace('_', '-')} -: standard input reaches one rank alone, allowed: a file or a folder "
                            "that all ranks see")


def check_sharing(experiment: Experiment, ranks: Communicator) -> None:
    """UserError if the ranks of this job cannot share the sequences of an experiment as it asks for."""
    count, model, variant = experiment.run.sequence_ranks, experiment.model, experiment.variant
    option = f"--sequence-ranks {count}"
    if count == 1:
        return
    if not variant.on_ranks:
        able = ", ".join(name for name in variants() if load(name).on_ranks)
        raise UserError(f"{option}: {variant.name} reads whole sequences only, allowed: 1, or one of the variants {able}")
    if ranks.size % count:
        raise UserError(f"{option}: it does not divide the number of ranks, which is {ranks.size}, allowed: a divisor of it; "
                        f"mpiexec -n {count} minitv train ... starts {count}")
    if model.context % count:
        raise UserError(f"{option}: it does not divide --context, which is {model.context}, allowed: a divisor of it")
    if model.width < count:
        raise UserError(f"{option}: there are more ranks than channels, --width is {model.width}")
    if model.dropout:
        raise UserError(f"{option}: ranks would drop other values than one rank does, and --dropout is {model.dropout:g}, "
                        "allowed: 0")
    if model.stack == "reversible":
        raise UserError(f"{option}: a reversible stack computes every layer again, and cannot ask other ranks again; allowed: "
                        "--stack residual")


def card(device: str, ranks: Communicator) -> Communicator:
    """Make this rank's device the current one; what carries arrays that lie there.

    Each rank takes a GPU of those that it sees, which a launcher may have chosen; a GPU that two ranks would share is refused.
    """
    if device == "cpu" or ranks.size == 1:
        select(device)
        return ranks
    runtime, host = gpu().cuda.runtime, socket.gethostname()
    cards = [runtime.deviceGetPCIBusId(number) for number in range(runtime.getDeviceCount())]
    if device == "cuda":
        beside = _beside(ranks, cards)
        if len(beside) > len(cards):
            raise RunError(f"{host} has {len(cards)} GPU{'s' * (len(cards) > 1)} for {len(beside)} ranks, allowed: a rank for "
                           "each GPU")
        device = f"cuda:{beside.index(ranks.rank)}"
    select(device)
    if len(beside := _beside(ranks, cards[runtime.getDevice()])) > 1:
        raise UserError(f"--device {device}: {len(beside)} ranks would share this GPU of {host}, allowed: cuda, with which "
                        "each takes one of its own")
    return NCCL(ranks)


def threads(ranks: Communicator) -> int:
    """The worker threads of this rank where none are asked for: its part of the cores that it shares with other ranks.

    A launcher may have given each rank some of its own.
    """
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return max(1, cores() // len(_beside(ranks, usable)))


def _hosts(ranks: Communicator) -> list[str]:
    return [host.decode() for host in ranks.gather_bytes(socket.gethostname().encode())]


def _beside(ranks: Communicator, what: Any) -> list[int]:
    """The ranks of this machine that name the same cores, or the same GPUs, as this one; they are in order."""
    words = ranks.gather_bytes(json.dumps([socket.gethostname(), what]).encode())
    return [rank for rank, word in enumerate(words) if word == words[ranks.rank]]


@contextmanager
def in_turn(ranks: Communicator) -> Iterator[None]:
    """The first rank of each machine before the others of it, which then find what it has left on the disk."""
    hosts = _hosts(ranks)
    leads = hosts.index(hosts[ranks.rank]) == ranks.rank
    if not leads:
        ranks.barrier()
    try:
        yield
    finally:
        if leads:
            ranks.barrier()


def see(directory: Path, ranks: Communicator) -> None:
    """RunError if a rank does not see the folder that rank 0 holds."""
    def held() -> bytes:
        try:
            return (directory / LOCK).read_bytes()
        except OSError:
            return b""

    if ranks.size == 1:
        return
    expected, end = ranks.gather_bytes(held() if ranks.rank == 0 else b"")[0], time.monotonic() + SEEN
    while held() != expected and time.monotonic() < end:
        time.sleep(0.2)
    blind = [rank for rank, there in enumerate(ranks.gather(np.array(held() == expected))) if not there]
    if blind:
        name = ranks.gather_bytes(os.path.abspath(directory).encode())[0].decode()
        raise RunError(f"the folder {name} of rank 0 is not what rank {blind[0]} of {ranks.size} on "
                       f"{_hosts(ranks)[blind[0]]} sees under that name: all ranks need one folder, on a file system that "
                       "their machines share, for example --out on a network disk")


def program(experiment: Experiment) -> dict[str, Any]:
    """What runs on a rank: versions and options."""
    import numba
    import scipy

    facts = {f"version of {name}": version for name, version in (
        ("minitv", __version__), ("Python", platform.python_version()), ("NumPy", np.__version__),
        ("Numba", numba.__version__), ("SciPy", scipy.__version__))}
    facts |= {f"--{name.replace('_', '-')}": value for name, value in experiment.values.items() if name not in OWN}
    return facts | {"variant": experiment.variant.name, "task": experiment.task.name}


def content(task: Task, weights: Any, step: int) -> dict[str, Any]:
    """What a rank has read and drawn before a step."""
    state = np.frombuffer(json.dumps(task.state(), default=str).encode(), np.uint8)
    arrays = [array for array in task.batch(step) if isinstance(array, np.ndarray)]
    return {"step to go on from": step, "data": checksum(state, *arrays), "weights": checksum(weights)}


def agree(ranks: Communicator, facts: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """RunError, the same on all ranks, if ``facts(*arguments)`` has another value on one of them than on rank 0."""
    if ranks.size == 1:
        return
    everyone = [json.loads(word) for word in ranks.gather_bytes(json.dumps(facts(*arguments), default=str).encode())]
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if value != everyone[0].get(name):
                shown = "" if name in ("data", "weights") else f", {quoted(value)} and not {quoted(everyone[0].get(name))}"
                raise RunError(f"rank {rank} of {ranks.size} on {_hosts(ranks)[rank]} does not have the {name} of rank 0{shown}"
                               ": start all ranks with the same command, from the same installation and the same data")


def checksum(*arrays: Any) -> int:
    """A number that tells arrays of different bits apart."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(to_numpy(array)).reshape(-1).view(np.uint8), value)
    return value
