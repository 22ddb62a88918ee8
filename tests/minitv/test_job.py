"""Training on several processes under MPI: the same run as on one, and one sentence, soon, whatever becomes of a rank."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from autograd.ranks import Communicator
from autograd.ranks import threads as ranks_of
from minitv import checkpoint, job, together, variants
from minitv.errors import RunError, UserError
from minitv.log import read_log

ROOT = Path(__file__).resolve().parents[2]
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
posix = pytest.mark.skipif(os.name == "nt", reason="signals between processes")
mpi = pytest.mark.skipif(MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
                         reason='there is no MPI: pip install "minitv[mpi]"')
TINY = ["longnet", "--context", "8", "--width", "16", "--layers", "1", "--batch", "4", "--micro-batch", "1", "--threads", "1",
        "--sample-tokens", "8", "--warmup", "0", "--data", "text.txt"]
LONG = [*TINY, "--steps", "100000", "--eval-every", "0", "--save-every", "20", "--log-every", "1"]
AFRESH = [*LONG, "--out", "run", "--overwrite"]
SENTENCE = re.compile("^minitv: error: .*", re.M)


@pytest.fixture
def folder(tmp_path):
    """A folder with a text."""
    words = np.random.default_rng(0).choice(["the", "fox", "jumps", "over", "lazy", "dog", "quick"], 600)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return tmp_path


def start(size: int, *arguments: str, cwd: Path, script: str = "") -> subprocess.Popen:
    """`minitv train` on so many ranks; ``script`` runs in each worker before it, and knows its ``rank``."""
    before = f"""
import os, signal, sys, time
from minitv import job
from minitv.__main__ import run
work = job._work
def worker(command, place, pipe):
    rank = place.rank
    open(f"pid{{rank}}", "w").write(str(os.getpid()))
    def in_step(number, call):
        from minitv.trainer import Trainer
        taken = Trainer.step
        def step(self, batch, step):
            if step == number:
                call()
            return taken(self, batch, step)
        Trainer.step = step
{os.linesep.join("    " + line for line in script.splitlines())}
    return work(command, place, pipe)
job._work = worker
run()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""}
    return subprocess.Popen([MPIEXEC, "-n", str(size), sys.executable, "-c", before, "train", *arguments], cwd=cwd,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen, within: float = 120) -> tuple[int, str]:
    """The exit code and what was printed, once the job has ended."""
    try:
        _, err = process.communicate(timeout=within)  # MPICH's own words on how a job ended go to stdout
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"the job has not ended within {within} s: {process.communicate()[1]}") from None
    assert "Traceback" not in err, err
    return process.returncode, err


def train(size: int, *arguments: str, cwd: Path, script: str = "") -> tuple[int, str]:
    return ended(start(size, *arguments, cwd=cwd, script=script))


def sentence(err: str) -> str:
    """The only sentence of a failure."""
    found = SENTENCE.findall(err)
    assert len(found) == 1, err
    return found[0].removeprefix("minitv: error: ")


def begun(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Wait until the log has a step."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(UserError):
            if (records := read_log(folder / "run")[1]) and records[-1]["step"] >= step:
                return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached: {ended(process, 5)[1]}")


def weights(run: Path) -> dict[str, bytes]:
    saved = checkpoint.load(run)
    return {key: value.tobytes() for part in (saved.model, saved.optimizer) for key, value in part.items()}


# -- without MPI


def test_a_process_without_a_launcher_is_alone(monkeypatch):
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert job.launched() is None and job.run(lambda: 7, ["train"]) == 7
    for variables, place in (({"PMI_RANK": "1", "PMI_SIZE": "3"}, job.Place(1, 3, "mpiexec")),
                             ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None), ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
                             ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, job.Place(0, 2, "mpiexec")),
                             ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, job.Place(2, 4, "srun"))):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert job.launched() == place


@pytest.mark.parametrize("rank", [0, 1])
def test_without_the_extra_one_process_says_what_to_install(monkeypatch, capsys, rank):
    monkeypatch.setenv("PMI_RANK", str(rank))
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.delattr(os, "fork", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "mpi4py" else find(name, *more))
    assert job.run(lambda: pytest.fail("it began"), ["train"]) == 2
    expected = ('minitv: error: mpiexec has started 2 processes, each of which would train alone, since mpi4py is not '
                'installed: pip install "minitv[mpi]"\n')
    assert capsys.readouterr().err == ("" if rank else expected)
    assert job.run(lambda: pytest.fail("it began"), ["sample", "run"]) == 2
    assert capsys.readouterr().err == ("" if rank else "minitv: error: minitv sample runs in one process, and mpiexec has "
                                       "started 2: leave mpiexec out, or use minitv train\n")


def test_what_several_ranks_cannot_do(monkeypatch):
    experiment = variants.load("longnet").configure(batch=2)
    with pytest.raises(UserError, match=re.escape("--batch 2: 3 ranks share the sequences of a step, and each needs one, "
                                                  "allowed: --batch 3 or more, or at most 2 ranks")):
        together.check(experiment, Communicator(0, 3))
    with pytest.raises(UserError, match="--data -: standard input reaches one rank alone"):
        together.check(experiment.replace(data="-"), Communicator(0, 2))
    together.check(experiment, Communicator(0, 2))
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="mpiexec has started 2 processes, each of which would train alone: use the command"):
        together.check(experiment, Communicator())


def test_a_folder_that_not_all_ranks_see(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "SEEN", 0.1)
    folders = [tmp_path / name for name in "abc"]
    for path, holder in zip(folders, ("one", "one", "two"), strict=True):
        path.mkdir()
        (path / together.LOCK).write_text(holder)
    ranks_of.run(2, lambda ranks: together.see(folders[ranks.rank], ranks))
    with pytest.raises(RunError, match=r"the folder .*a of rank 0 is not what rank 2 of 3 on .* sees under that name: all "
                                       "ranks need one folder, on a file system that their machines share"):
        ranks_of.run(3, lambda ranks: together.see(folders[ranks.rank], ranks))


@pytest.mark.parametrize("change, said", [
    (dict(lr=0.1), "does not have the --lr of rank 0, 0.1 and not 0.003"),
    (dict(seed=4), "does not have the --seed of rank 0, 4 and not 0"),
    ("weights", "does not have the weights of rank 0:"),
    ("data", "does not have the data of rank 0:"),
    ("version", "does not have the version of Python of rank 0, '9' and not '3'")])
def test_ranks_that_do_not_agree(change, said, monkeypatch, folder):
    monkeypatch.chdir(folder)
    experiment = variants.load("longnet").configure(batch=2, context=8, data="text.txt", micro_batch=1)
    (folder / "other.txt").write_text((folder / "text.txt").read_text(encoding="utf-8")[::-1], encoding="utf-8")
    task, other = experiment.begin(), experiment.replace(data="other.txt").begin()

    def meet(ranks):
        odd = ranks.rank == 1
        mine = experiment.replace(**change) if odd and isinstance(change, dict) else experiment
        together.agree(ranks, together.program, mine)
        weights = np.full(3, float(odd and change == "weights"))
        together.agree(ranks, together.content, other if odd and change == "data" else task, weights, 0)

    if change == "version":
        monkeypatch.setattr(together.platform, "python_version",
                            lambda: "9" if threading.current_thread().name == "rank 1" else "3")
    with pytest.raises(RunError, match=re.escape(said)) as caught:
        ranks_of.run(2, meet)
    assert "rank 1 of 2 on" in str(caught.value) and "start all ranks with the same command" in str(caught.value)


def test_ranks_share_the_cores_of_a_machine(monkeypatch):
    for first, second, expected in ((range(8), range(8), [4, 4]), (range(3), range(3), [1, 1]), ([5], [5], [1, 1]),
                                    (range(2), range(2, 6), [2, 4])):  # the last ones are given by a launcher
        usable = {"rank 0": set(first), "rank 1": set(second)}
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, usable=usable: usable[threading.current_thread().name],
                            raising=False)
        assert ranks_of.run(2, together.threads) == expected


@pytest.mark.parametrize("seen, device, expected", [
    (["AB", "AB"], "cuda", ["cuda:0", "cuda:1"]),
    (["A", "B"], "cuda", ["cuda:0", "cuda:0"]),  # the launcher shows each rank one
    (["AB", "AB"], "cuda:1", "--device cuda:1: 2 ranks would share this GPU of "),
    (["A", "A"], "cuda", "has 1 GPU for 2 ranks, allowed: a rank for each GPU"),
    (["A", "AB"], "cuda", "--device cuda:0: 2 ranks would share this GPU of ")])
def test_each_rank_takes_a_card_of_its_own(monkeypatch, seen, device, expected):
    selected = {}
    name = threading.current_thread

    class Runtime:
        def getDeviceCount(self):
            return len(seen[int(name().name[-1])])

        def deviceGetPCIBusId(self, number):
            return seen[int(name().name[-1])][number]

        def getDevice(self):
            return int(selected[name().name][-1])

    class Cupy:
        class cuda:
            runtime = Runtime()

    monkeypatch.setattr(together, "gpu", lambda: Cupy)
    monkeypatch.setattr(together, "select", lambda device: selected.update({name().name: device}))
    monkeypatch.setattr(together, "NCCL", lambda ranks: ranks)
    if isinstance(expected, list):
        ranks_of.run(2, lambda ranks: together.card(device, ranks))
        assert [selected[f"rank {rank}"] for rank in range(2)] == expected
    else:
        with pytest.raises((RunError, UserError), match=re.escape(expected)):
            ranks_of.run(2, lambda ranks: together.card(device, ranks))


def test_one_rank_of_a_machine_goes_first():
    order = []

    def go(ranks):
        with together.in_turn(ranks):
            time.sleep(0.05 if ranks.rank == 0 else 0)
            order.append(ranks.rank)

    ranks_of.run(3, go)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


# -- under MPI


@mpi
@pytest.mark.full
def test_ranks_are_the_same_run_and_any_number_of_them_goes_on_with_it(folder):
    """Two ranks that go on as three: the same weights and the same log as one process alone, and files of rank 0 only."""
    options = [*TINY, "--steps", "6", "--eval-every", "3", "--log-every", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "minitv", "train", *options, "--out", "alone"], cwd=folder, env=environment,
                   check=True, capture_output=True)
    code, err = train(2, *options, "--steps", "6", "--out", "run", cwd=folder, script="""
if rank == 1:
    in_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))""")
    assert code == 143 and err.count("stopped after step 4; continue with: mpiexec -n 2 minitv train --resume run") == 1, err
    assert err.count("model     longnet") == 1 and err.count("step 3: held-out loss") == 1
    code, err = train(3, "--resume", "run", cwd=folder)
    assert code == 0, err
    assert weights(folder / "run") == weights(folder / "alone")
    logs = [[{key: value for key, value in record.items() if key not in ("tokens_per_s", "elapsed_s", "peak_mb")}
             for record in read_log(folder / name)[1]] for name in ("alone", "run")]
    assert logs[0] == logs[1]
    assert {path.name for path in (folder / "run").iterdir()} == {path.name for path in (folder / "alone").iterdir()}


@mpi
@pytest.mark.full
def test_ranks_with_other_options_are_found_before_they_wait_for_each_other(folder):
    code, err = train(2, *TINY, "--sequence-ranks", "2", cwd=folder, script="if rank == 1: sys.argv[-1] = '1'")
    assert code == 1 and re.match(r"rank 1 of 2 on \S+ does not have the --sequence-ranks of rank 0, 1 and not 2: start all "
                                  "ranks with the same command", sentence(err)), err


@mpi
@posix
@pytest.mark.full
@pytest.mark.parametrize("how, said", [
    ("os._exit(5)", r"rank 1 of 2 on \S+ ended with exit code 5 and without a word, and so all ranks end"),
    ("os.kill(os.getpid(), signal.SIGSTOP)", r"rank 1 of 2 has not been heard of for \d+ s: it is stopped, or cut off"),
    ("job.here().ranks.barrier()", r"2 ranks have waited for each other for \d+ s: a message was lost"),
    ("time.sleep(1000)", r"rank 1 of 2 does nothing, and the others have waited for it for \d+ s"),
])
def test_a_rank_that_dies_or_hangs_ends_the_job_soon(folder, how, said):
    assert max(job.SILENCE, job.IDLE, job.BUSY) + 2 * job.BEAT < 30
    process = start(2, *LONG, "--out", "run", cwd=folder, script=f"""
job.SILENCE, job.IDLE, job.BUSY = 3, 4, 7
if rank == 1:
    in_step(30, lambda: {how})""")
    begun(process, folder, 30)
    code, err = ended(process, 30)
    assert code != 0 and re.match(said, sentence(err)), err
    assert sentence(err).endswith("Continue with: mpiexec -n 2 minitv train --resume run")


@mpi
@pytest.mark.full
def test_a_rank_that_fails_says_why_and_all_end(folder):
    """What one rank cannot do is told with its name, and what none can do once and without."""
    code, err = train(2, *TINY, "--out", "run", cwd=folder, script="""
if rank == 1:
    from minitv import training
    from minitv.errors import RunError
    def begin(*more):
        raise RunError("the disk is gone")
    training._begin = begin""")
    assert code != 0 and re.fullmatch(r"rank 1 of 2 on \S+: the disk is gone\. All ranks end\. Nothing was saved: start the "
                                      "same command again, with --overwrite", sentence(err)), err
    code, err = train(2, *TINY, "--lr", "no", cwd=folder)
    assert code == 2 and sentence(err).startswith("--lr: 'no' is not a number"), err
    code, err = train(2, *TINY, "--out", "run", cwd=folder, script="""
if rank == 1:
    from minitv.trainer import Trainer
    taken = Trainer._micro_batch
    def micro_batch(self, batch, part, step, *more):
        if step == 2:
            self.model.embed.weight.data[...] = float("nan")
        return taken(self, batch, part, step, *more)
    Trainer._micro_batch = micro_batch""")
    assert code == 1 and re.match(r"step 3 made a number that is not finite, first at the output of \w+.* on rank 1\. No "
                                  "checkpoint was saved", sentence(err)), err


def killed(folder: Path, size: int, seed: int) -> tuple[float, bool]:
    """Kill a random rank at a random moment of a run that goes on; how long the job lived after that, and whether it spoke."""
    rng = random.Random(seed)
    arguments = ["--resume", "run", "--steps", "100000"] if checkpoint.exists(folder / "run") else AFRESH
    for path in folder.glob("pid*"):
        path.unlink()
    process = start(size, *arguments, cwd=folder)
    victim = folder / f"pid{rng.randrange(size)}"
    end = time.monotonic() + 60
    while not (victim.exists() and victim.read_text()):
        assert time.monotonic() < end and process.poll() is None, ended(process, 5)[1]
        time.sleep(0.01)
    time.sleep(rng.choice([rng.random(), 2 + 4 * rng.random()]))  # as it begins, or in its steps
    os.kill(int(victim.read_text()), signal.SIGKILL)
    begun = time.monotonic()
    code, err = ended(process, 30)
    assert code != 0, err
    return time.monotonic() - begun, len(SENTENCE.findall(err)) == 1 and "was ended by SIGKILL" in err


@mpi
@posix
@pytest.mark.full
def test_ranks_that_are_killed_at_any_moment(folder):
    """No job hangs, each says which rank was killed, and what goes on after all that is the run that nothing interrupted.

    MINITV_KILLS=50 is a thorough test, of some minutes.
    """
    kills = int(os.environ.get("MINITV_KILLS", "2"))
    for number in range(kills):
        seconds, spoke = killed(folder, 2 + number % 2, number)
        assert seconds < 30 and spoke
        if checkpoint.exists(folder / "run"):
            step, logged = checkpoint.load(folder / "run").state["step"], read_log(folder / "run")[1][-1]["step"]
            assert logged - step <= 20, "more than an interval between checkpoints was lost"
    last = (checkpoint.load(folder / "run").state["step"] if checkpoint.exists(folder / "run") else 0) // 20 * 20 + 40
    more = ["--resume", "run"] if checkpoint.exists(folder / "run") else AFRESH
    script = f"in_step({last - 1}, lambda: os.kill(os.getpid(), signal.SIGTERM))"
    assert train(2, *more, cwd=folder, script=script)[0] == 143
    assert checkpoint.load(folder / "run").state["step"] == last
    alone = subprocess.run([sys.executable, "-c", "import os, signal; from minitv.trainer import Trainer\n"
                            f"taken = Trainer.step\ndef step(self, batch, step):\n    if step == {last - 1}:\n        "
                            "os.kill(os.getpid(), signal.SIGTERM)\n    return taken(self, batch, step)\n"
                            "Trainer.step = step\nfrom minitv.__main__ import run; run()", "train", *LONG, "--out", "alone"],
                           cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert alone.returncode == 143
    assert weights(folder / "run") == weights(folder / "alone")


@mpi
@posix
@pytest.mark.full
def test_a_signal_to_the_launcher_saves_once(folder):
    """mpiexec sends it to all processes."""
    process = start(2, *LONG, "--out", "run", cwd=folder)
    begun(process, folder, 3)
    process.send_signal(signal.SIGTERM)
    code, err = ended(process, 30)
    saved = checkpoint.load(folder / "run").state["step"]
    assert code != 0, err
    assert err.count(f"stopped after step {saved}; continue with: mpiexec -n 2 minitv train --resume run") == 1, err
    assert err.count("stopping after this step") == 1
