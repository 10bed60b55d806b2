"""What becomes of a run when one rank goes wrong, with real processes: it ends, soon, saying which rank and why.

Catches: ranks that wait for ever, processes left behind, an error of the second rank to fail in the place of the first,
runs that get in each other's way, ranks that do not belong together.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "rank_programs" / "loop.py"
LIMIT_S = 30
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")


class Run:
    """A started run: its output so far in files, its ranks' process ids."""

    def __init__(self, command, tmp_path, env=None, name="run"):
        self.out, self.err = tmp_path / f"{name}.out", tmp_path / f"{name}.err"
        env = (
            {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
            | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
            | (env or {})
        )
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen([sys.executable, *map(str, command)], stdout=out, stderr=err, env=env)

    def pids(self, count):
        """rank -> process id, once `count` ranks have met."""
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            found = {int(r): int(p) for r, p in re.findall(r"^pid (\d+) (\d+)$", self.err.read_text(), re.MULTILINE)}
            if len(found) == count:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{count} ranks did not meet: {self.err.read_text()}")

    def wait(self, seconds=LIMIT_S):
        """Exit code and the lines of stderr that are no process ids; fails if it takes longer."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler writes where it hangs
            time.sleep(1)
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.err.read_text()}") from None
        lines = [line for line in self.err.read_text().splitlines() if line and not line.startswith("pid ")]
        return code, lines


def torchrun(*options):
    return ["-m", "torch.distributed.run", *options]


def gone(pids, seconds=10):
    """Whether all processes end within `seconds`; kills those that do not."""
    end = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < end:
        left = [pid for pid in left if is_running(pid)]
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not left


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def by_hand(rank, size, port):
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_a_killed_rank_ends_all(tmp_path):
    run = Run([PROGRAM, "run"], tmp_path)
    pids = run.pids(2)
    os.kill(pids[1], signal.SIGKILL)
    code, lines = run.wait()
    assert code == 1
    assert "rank 1" in lines[0] and re.search("killed|gone", lines[0]), lines
    assert any("rank 1 was killed by SIGKILL" in line for line in lines)
    assert gone(pids.values())


def test_a_stopped_rank_ends_all(tmp_path):
    run = Run([PROGRAM, "run"], tmp_path)
    pids = run.pids(2)
    os.kill(pids[0], signal.SIGSTOP)
    code, lines = run.wait()
    assert code == 1
    assert re.search(r"rank 0 .*no sign of life for 4 s: stopped", lines[0]), lines
    assert gone(pids.values())


def test_a_raising_rank_ends_all_with_its_error_first(tmp_path):
    run = Run([PROGRAM, "--world", "3", "raise:2"], tmp_path)
    pids = run.pids(3)
    code, lines = run.wait()
    assert code == 2
    assert lines[0] == "loop.py (rank 2): error: the sky fell on this rank; hold it up"
    assert gone(pids.values())


@pytest.mark.slow
def test_ranks_whose_interpreter_does_not_end_are_ended(tmp_path, free_port):
    """After a failed collective, gloo's threads may hold on to what the interpreter takes down on its way out. Without
    a launcher, as on a node whose ranks have all lost a rank of another: nobody else ends them."""
    runs = [Run([PROGRAM, "run", "stuck"], tmp_path, by_hand(rank, 3, free_port), f"rank{rank}") for rank in range(3)]
    pids = {rank: run.pids(1)[rank] for rank, run in enumerate(runs)}
    os.kill(pids[2], signal.SIGKILL)
    for run in runs[:2]:
        code, lines = run.wait()
        assert code != 0
        assert "rank 2" in lines[0], lines


@pytest.mark.slow
def test_a_rank_that_does_not_join_a_collective_is_found_out(tmp_path):
    """Its heart beats, so only the limit that the others set on their own work can end them."""
    run = Run([PROGRAM, "hang:1"], tmp_path)
    pids = run.pids(2)
    code, lines = run.wait()
    assert code == 1
    assert lines[0] == "rank 0: the sum did not end in time: a collective hangs"
    assert gone(pids.values())


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    run = Run([PROGRAM, "run"], tmp_path)
    pids = run.pids(2)
    run.process.kill()
    assert gone(pids.values())


def test_ranks_with_different_facts_do_not_start(tmp_path):
    run = Run([PROGRAM, "facts:1"], tmp_path)
    code, lines = run.wait(60)
    assert code == 2
    assert len(lines) == 1, lines  # all ranks find the same: one says it
    assert "fact number is 0 on rank 0 and 1 on rank 1; start every rank with the same" in lines[0]


def test_a_port_in_use(tmp_path, free_port):
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", free_port))
        holder.listen()
        code, lines = Run([PROGRAM, "sums:3"], tmp_path, by_hand(0, 1, free_port)).wait(60)
    assert code == 2
    assert f"port {free_port} on 127.0.0.1 is in use; choose another" in lines[-1], lines


@pytest.mark.slow
def test_sizes_that_do_not_agree(tmp_path, free_port):
    runs = [
        Run([PROGRAM, "run"], tmp_path, by_hand(rank, size, free_port), f"rank{rank}")
        for rank, size in ((0, 3), (1, 2))
    ]
    for run in runs:
        code, lines = run.wait(60)
        assert code == 2
        assert re.search("started as one of [23] processes and rank [01] as one of [23]", lines[-1]), lines


@pytest.mark.slow
def test_a_rank_given_twice(tmp_path, free_port):
    runs = [Run([PROGRAM, "run"], tmp_path, by_hand(rank, 3, free_port), f"{i}") for i, rank in enumerate((0, 1, 1))]
    texts = []
    try:
        end = time.monotonic() + 60
        while not any("rank 1 was started 2 times" in text for text in texts):
            assert time.monotonic() < end, texts
            texts = [run.err.read_text() for run in runs]
            time.sleep(0.2)
    finally:
        for run in runs:
            run.process.kill()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "environment variable MASTER_ADDR is ''"),
        ({**by_hand(5, 2, 1), "RANK": "five"}, "environment variable RANK is 'five'"),
        (by_hand(5, 2, 1), "RANK is 5, WORLD_SIZE 2: ranks count from 0 to 1"),
        (by_hand(0, 2, 1), "--world 3, but 2 processes were started"),
    ],
)
def test_variables_that_make_no_sense(variables, message, tmp_path):
    code, lines = Run([PROGRAM, "--world", "3", "sums:1"], tmp_path, variables).wait(60)
    assert code == 2
    assert len(lines) == 1 and message in lines[0], lines


def test_two_runs_at_once(tmp_path):
    runs = [Run([PROGRAM, "sums:50"], tmp_path, name=f"run{i}") for i in range(2)]
    for run in runs:
        code, lines = run.wait(60)
        assert (code, lines) == (0, [])
        assert run.out.read_text() == "done [0, 1]\n"


def two_nodes(tmp_path, port, *modes):
    """Two torchrun agents on this host, each with two ranks, as if they were two machines."""
    runs = []
    for node in range(2):
        options = ["--nnodes=2", "--nproc-per-node=2", f"--node-rank={node}", "--master-addr=127.0.0.1"]
        command = torchrun(*options, f"--master-port={port}", PROGRAM, *modes)
        runs.append(Run(command, tmp_path, name=f"node{node}"))
    return runs


def test_two_launchers_as_two_nodes(tmp_path, free_port):
    runs = two_nodes(tmp_path, free_port, "sums:20")
    for run in runs:
        code, lines = run.wait(90)
        assert code == 0, lines
    assert runs[0].out.read_text() == "done [0, 1, 2, 3]\n"
    assert runs[1].out.read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_on_one_node_ends_both(how, tmp_path, free_port):
    runs = two_nodes(tmp_path, free_port, "run")
    pids = runs[0].pids(2) | runs[1].pids(2)
    os.kill(pids[3], how)
    for run in runs:
        code, lines = run.wait()
        assert code != 0
        first = next(line for line in lines if "rank" in line)
        assert "rank 3" in first or "local_rank: 1" in first, lines
    assert gone(pids.values())
