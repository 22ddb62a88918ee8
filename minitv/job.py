"""A job of several processes, the ranks, which a launcher (mpiexec, srun) has started: they begin, fail and end together.

The process that the launcher starts does nothing but watch another one, which does the work and which it has made. So it can
say how the worker ended, by a signal for example, before the launcher ends all ranks.

Workers send each other a sign of life twice a second, rank 0 to all and all to rank 0, from a thread of its own:

- A rank that says nothing for SILENCE seconds is stopped, or cut off.
- A rank that others wait for, and that uses no processor for IDLE seconds, is stuck, unless it reads or writes files.
- Where all wait for each other for BUSY seconds, something is wrong with the messages, or with the program.
- A rank that others wait for in a training step, BUSY seconds long and ten times as long as any step before, is stuck too. The
  first step compiles, and may take as long as it likes.

Each of these ends all ranks, with a sentence that names the rank and says how to go on. A rank that fails by itself sends its
sentence to rank 0, which prints it once where all ranks fail alike, and with the name of the rank where one does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import RunError, plain

if TYPE_CHECKING:
    from autograd.ranks import Communicator
    from autograd.ranks.mpi import MPI

BEAT = 0.5  # seconds between signs of life
SILENCE, IDLE, BUSY = 12.0, 18.0, 25.0  # seconds
USED = 0.3  # seconds of processor time within IDLE that show that a rank is computing
GRACE = 1.5  # seconds within which the others fail for the same reason
LONGEST_END = 10.0  # seconds that a rank waits for the others when it ends

NOTHING = "Nothing was saved: start the same command again"  # how to go on before there is a checkpoint

PULSE, FAILURE, END = 1, 2, 3  # what a message is
SIGN = struct.Struct("=d??dd")  # processor time, whether it waits, whether it is at files, seconds a step may take, calls


class Place(NamedTuple):
    """What a launcher says to a process: its rank, how many there are, and the launcher's name."""

    rank: int
    size: int
    launcher: str


def launched() -> Place | None:
    """What the launcher of this process says; None where there is none, or one process alone."""
    for rank, size, launcher in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "mpiexec"),
                                 ("PMI_RANK", "PMI_SIZE", "srun" if "SLURM_STEP_ID" in os.environ else "mpiexec"),
                                 ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun")):
        with contextlib.suppress(KeyError, ValueError):
            place = Place(int(os.environ[rank]), int(os.environ[size]), launcher)
            return place if place.size > 1 else None
    return None


def prefix() -> str:
    """What stands before a command that goes on with this job, such as "mpiexec -n 4 "; nothing where there is none."""
    place = launched()
    return "" if place is None else f"{place.launcher} -n {place.size} "


class Alone:
    """A process that is no part of a job; a Job does more."""

    limit: float | None = None  # seconds that the training step which is going on may take
    settled = False  # whether all ranks end by themselves, and the process must end as usual: MPI says goodbye at its end

    @cached_property
    def ranks(self) -> Communicator:
        """How this process talks with the others."""
        from autograd.ranks import Communicator

        return Communicator()

    @contextlib.contextmanager
    def files(self) -> Iterator[None]:
        """Reading and writing inside may wait for a disk."""
        yield

    def note(self, text: str) -> None:
        """Remember how to go on if a rank ends now."""

    def fail(self, message: str | None, code: int) -> int | None:
        """Say why the command ends (None: a signal stopped it), and return the exit code; None: nothing was said."""
        return None


_here = Alone()


def here() -> Alone:
    """The job of which this process is a part."""
    return _here


def run(command: Callable[[], int], arguments: list[str]) -> int:
    """Run a command in this process, or as a rank of the job that a launcher has started; returns the exit code."""
    place = launched()
    if place is None:
        return command()
    if arguments[:1] != ["train"]:
        word = f"minitv {arguments[0]}" if arguments else "minitv"
        return _refuse(place, f"{word} runs in one process, and {place.launcher} has started {place.size}: leave "
                       f"{place.launcher} out, or use minitv train")
    if not hasattr(os, "fork"):
        return _work(command, place, None)
    sys.stdout.flush()
    sys.stderr.flush()
    (reading, writing), (heard, hearing) = os.pipe(), os.pipe()
    for end in (heard, hearing):
        os.set_blocking(end, False)
    if worker := os.fork():
        os.close(writing)
        return _watch(worker, reading, heard, place)
    os.close(reading)
    signal.set_wakeup_fd(hearing, warn_on_full_buffer=False)
    return _work(command, place, writing)


def _refuse(place: Place, reason: str) -> int:
    """One of the processes says why none of them begins."""
    if place.rank == 0:
        print(f"minitv: error: {plain(reason)}", file=sys.stderr, flush=True)
    return 2


def _name(rank: int, size: int, host: str) -> str:
    return f"rank {rank} of {size} on {host}"


# -- the process that watches ------------------------------------------------------------------------------------------


def _watch(worker: int, reading: int, heard: int, place: Place) -> int:
    """Wait for the worker; say how it ended if it could not do so itself.

    A signal that comes to this process alone is sent on. Most launchers send it to both: ``heard`` has what the worker got.
    """
    told = []

    def forward(number: int, frame: Any) -> None:
        told.append(number)
        time.sleep(0.2)
        arrived = b""
        with contextlib.suppress(BlockingIOError):
            arrived = os.read(heard, 2**16)
        if number not in arrived:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    _, status = os.waitpid(worker, 0)
    said = b""
    while block := os.read(reading, 2**16):
        said += block
    lines = said.decode(errors="replace").split("\n")[:-1]
    if not os.WIFSIGNALED(status):
        code = os.WEXITSTATUS(status)
        if code == 0 or "ended" in lines:
            return code
        how = f"ended with exit code {code} and without a word"
    else:
        number = os.WTERMSIG(status)
        how = f"was ended by {signal.Signals(number).name}"
        how += {signal.SIGKILL: ", as the system does when memory runs out",
                signal.SIGSEGV: ", an error in a library"}.get(number, "")
    time.sleep(0.3)  # a launcher that is ending all ranks has ended this process by now
    if not told:
        notes = [line for line in lines if line != "ended"]
        print(f"minitv: error: {_name(place.rank, place.size, socket.gethostname())} {how}, and so all ranks end. "
              + (notes[-1] if notes else NOTHING), file=sys.stderr, flush=True)
    if not os.WIFSIGNALED(status):
        return code
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)  # the launcher then ends the others, whether they have found each other or not
    return 128 + number


# -- the process that works --------------------------------------------------------------------------------------------


def _work(command: Callable[[], int], place: Place, pipe: int | None) -> int:
    global _here
    from autograd.errors import RankError
    from autograd.ranks import mpi

    say = partial(_say, pipe)
    if reason := mpi.missing():
        say("ended")
        return _refuse(place, f"{place.launcher} has started {place.size} processes, each of which would train alone, since "
                       f"{reason}")
    import mpi4py

    mpi4py.rc.finalize = False  # which waits for ranks that may be gone
    try:
        world = mpi.world()
    except RankError as error:
        say("ended")
        return _refuse(place, f"{place.launcher} has started {place.size} processes, each of which would train alone, since "
                       f"{error}")
    job = _here = Job(world, say)
    if job.ranks.size != place.size:
        say("ended")
        return _refuse(place, f"{place.launcher} has started {place.size} processes, and MPI sees {job.ranks.size}: mpi4py "
                       "uses another MPI than the launcher; take both from one place (under srun, perhaps with --mpi=pmi2)")
    nowhere = None
    if job.ranks.rank:  # rank 0 speaks
        nowhere = sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    job.begin()
    try:
        code = command()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        code = job.fail("an error of the program, which is printed above", 1)
    finally:
        if nowhere is not None:
            nowhere.flush()
    job.end(code)
    return code


def _say(pipe: int | None, line: str) -> None:
    """Tell the process that watches this one."""
    if pipe is not None:
        with contextlib.suppress(OSError):
            os.write(pipe, f"{line}\n".encode())


class _Peer:
    """What is known of another rank: for how long it was not heard of, computed nothing, and others waited for it."""

    def __init__(self) -> None:
        self.silent = self.idle = self.late = self.computed = 0.0
        self.waits = self.files = False
        self.limit = self.calls = 0.0


class Job(Alone):
    """The part of a job that this process is; ``say(line)`` tells the process that watches it."""

    def __init__(self, ranks: MPI, say: Callable[[str], None]):
        self.ranks, self.say = ranks, say
        ranks.waiting = self._look
        self._comm = ranks.comm.Dup()  # of the thread alone
        self.host = socket.gethostname()
        self._looked, self._at_files = -1.0, 0
        self._calls, self._still = 0.0, 0.0  # of all ranks, and for how long nothing was added while all of them wait
        self._note = NOTHING
        self._peers = {rank: _Peer() for rank in (range(1, ranks.size) if ranks.rank == 0 else [0])}
        self._sending: dict[int, Any] = {}
        self._failures: dict[int, tuple[int, str | None, str]] = {}  # code, message and host, by rank
        self._failed_at: float | None = None
        self._awake, self._over, self._decided = threading.Event(), threading.Event(), threading.Event()
        self._code = 1
        self._thread = threading.Thread(target=self._pulse, name="minitv job", daemon=True)

    def begin(self) -> None:
        """Start the signs of life."""
        from mpi4py import MPI

        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            self._thread.start()
        elif self.ranks.rank == 0:
            print("note      this MPI takes no calls from several threads: ranks that hang are not noticed", file=sys.stderr)

    @contextlib.contextmanager
    def files(self) -> Iterator[None]:
        self._at_files += 1
        try:
            yield
        finally:
            self._at_files -= 1

    def note(self, text: str) -> None:
        if text != self._note:
            self._note = text
            self.say(plain(text))

    def fail(self, message: str | None, code: int) -> int:
        self.say("ended")
        if self._thread.is_alive():
            self._failures[self.ranks.rank] = code, message, self.host
            self._awake.set()
            if self._decided.wait(LONGEST_END):
                return self._code
        self._print(self.ranks.rank, code, message, self.host)
        self._abort(code)
        return code

    def end(self, code: int) -> None:
        """Wait for the other ranks, and leave MPI."""
        self.say("ended")
        timer = threading.Timer(LONGEST_END, os._exit, [code])
        timer.daemon = True
        if not self._decided.is_set():
            self.ranks.barrier()
        timer.start()
        self._over.set()
        self._awake.set()
        if self._thread.is_alive():
            self._thread.join()
        from mpi4py import MPI

        MPI.Finalize()
        timer.cancel()
        self.settled = not self._decided.is_set()

    def _look(self) -> None:
        self._looked = time.monotonic()

    def _pulse(self) -> None:
        """The thread: send, receive, judge."""
        parent, before = os.getppid(), time.monotonic()
        while True:
            self._awake.wait(BEAT)
            self._awake.clear()
            if self._over.is_set():
                return
            if os.getppid() != parent:
                os._exit(1)  # who watches is gone, and the launcher ends the others
            try:
                self._send()
                self._receive()
                if self.ranks.rank == 0:
                    self._decide()
                now = time.monotonic()
                if not self._failures:
                    self._judge(min(now - before, 2 * BEAT))  # a job that was stopped as a whole goes on
                before = now
            except Exception as error:
                if not self._over.is_set():
                    name = _name(self.ranks.rank, self.ranks.size, self.host)
                    print(f"minitv: error: {name}: MPI fails: {plain(str(error))}", file=sys.__stderr__, flush=True)
                    os._exit(1)

    def _message(self, to: int, kind: int, content: bytes) -> None:
        self._sending[to, kind] = self._comm.Isend(bytearray(content), to, kind)

    def _send(self) -> None:
        waits = time.monotonic() - self._looked < 2 * BEAT
        sign = SIGN.pack(time.process_time(), waits, bool(self._at_files), self.limit or 0.0, self.ranks.calls)
        for rank in self._peers:
            before = self._sending.get((rank, PULSE))
            if before is None or before.Test():
                self._message(rank, PULSE, sign)
        mine = self._failures.get(self.ranks.rank)
        if mine and self.ranks.rank and (0, FAILURE) not in self._sending:
            self._message(0, FAILURE, json.dumps(mine).encode())

    def _receive(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            content = bytearray(status.Get_count(MPI.BYTE))
            source, kind = status.Get_source(), status.Get_tag()
            self._comm.Recv(content, source, kind)
            if kind == FAILURE:
                code, message, host = json.loads(content.decode())
                self._failures[source] = code, message, host
            elif kind == END:
                self._code = content[0]
                self._decided.set()
            else:
                peer = self._peers[source]
                computed, peer.waits, peer.files, peer.limit, peer.calls = SIGN.unpack(content)
                peer.silent = 0
                if computed - peer.computed > USED:
                    peer.computed, peer.idle = computed, 0.0

    def _decide(self) -> None:
        """Rank 0 says why all ranks end, once all have failed or GRACE is over."""
        if not self._failures or self._decided.is_set():
            return
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        if len(self._failures) < self.ranks.size and now - self._failed_at < GRACE:
            self._awake.set()
            time.sleep(0.02)
            return
        rank, (code, message, host) = next(iter(self._failures.items()))
        if len(self._failures) == self.ranks.size:
            alike = len({failure[1] for failure in self._failures.values()}) == 1
            self._print(None if alike else rank, code, message, host)
            for other in self._peers:
                self._message(other, END, bytes([code]))
            for other in self._peers:
                self._sending[other, END].Wait()
            self._code = code
            self._decided.set()
        else:
            self._print(rank, code, message, host)
            self._abort(code)

    def _print(self, rank: int | None, code: int, message: str | None, host: str) -> None:
        """The one sentence of a failure; what rank 0 says of what was given concerns all."""
        if rank is None or (rank == 0 and (code == 2 or self._note is NOTHING)):
            text = "\nminitv: stopped" if message is None else f"minitv: error: {message}"
        else:
            message = "stopped by a signal" if message is None else message
            text = (f"minitv: error: {_name(rank, self.ranks.size, host)}: {message.rstrip('.')}. All ranks end. {self._note}")
        print(text, file=sys.__stderr__, flush=True)

    def _abort(self, code: int) -> None:
        """End all ranks, when why is said; MPI would print a line of its own."""
        self.say("ended")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        self.ranks.abort(code)

    def _judge(self, seconds: float) -> None:
        """End the job if a rank is gone or stuck; ``seconds`` have passed."""
        peers = self._peers.values()
        mine = time.monotonic() - self._looked < 2 * BEAT
        someone = mine or any(peer.waits for peer in peers)
        turn = 0.0 if self.ranks.rank <= 1 else 4.0  # rank 1 speaks where rank 0 cannot
        calls = self.ranks.calls + sum(peer.calls for peer in peers)
        everyone = self.ranks.rank == 0 and mine and all(peer.waits for peer in peers) and calls == self._calls
        self._calls, self._still = calls, self._still + seconds if everyone else 0.0
        if self._still > BUSY:
            print(f"minitv: error: {self.ranks.size} ranks have waited for each other for {self._still:.0f} s: a message was "
                  f"lost, or the program has an error. All ranks end. {self._note}", file=sys.__stderr__, flush=True)
            self._abort(RunError.code)
        for rank, peer in self._peers.items():
            peer.silent += seconds
            working = someone and not peer.waits and not peer.files
            peer.idle = peer.idle + seconds if working else 0.0
            peer.late = peer.late + seconds if working and peer.limit else 0.0
            what = None
            if peer.silent > SILENCE + turn:
                what = f"has not been heard of for {peer.silent:.0f} s: it is stopped, or cut off from the others"
            elif peer.idle > IDLE + turn:
                what = f"does nothing, and the others have waited for it for {peer.idle:.0f} s"
            elif peer.limit and peer.late > peer.limit + turn:
                what = (f"is {peer.late:.0f} s later at the end of a step than others, ten times as long as any step "
                        "took before")
            if what:
                print(f"minitv: error: rank {rank} of {self.ranks.size} {what}. All ranks end. {self._note}",
                      file=sys.__stderr__, flush=True)
                self._abort(RunError.code)
