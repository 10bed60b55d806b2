"""A thread in every rank that notices when another rank is gone, and then ends its own process.

A collective waits for all ranks. When one is killed, stopped or stuck, the others may wait for ever: on a GPU a kernel
spins on memory that nobody writes, and no time-out of the process group reaches it. So each rank counts up a number in
the run's store, and watches the numbers of the others. What it finds out it says in one line, then it leaves with
os._exit, which no spinning kernel can hold up; the launcher ends whoever is left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

BEAT_S = 1.0
SILENT_S = 10.0  # without a beat for so long, a rank counts as stopped
GRACE_S = 1.0  # for the first failing rank's own line to come out, and for the launcher to see who was first
LEAVE_S = 5.0
EXIT_CODE = 1


class Heartbeat(threading.Thread):
    """`store`: a connection of its own, since a blocking wait on a shared one would stop the beat.

    peers: rank -> {"host", "pid", "start"} of every rank, as `describe_self` gives it.
    """

    def __init__(self, store, rank: int, peers: list[dict]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.peers = store, rank, peers
        self._launcher = os.getppid()
        self._ended = threading.Event()
        self._deadline: tuple[float, str] | None = None

    # --- called by the main thread -----------------------------------------------------------------------------------
    def expect_within(self, seconds: float | None, what: str = "") -> None:
        """End the process if the main thread does not call again within `seconds`; None takes the limit away.

        For work with collectives in it that the process group's time-out does not watch: a replayed CUDA graph.
        """
        self._deadline = None if seconds is None else (time.monotonic() + seconds, what)

    def post_failure(self, rank: int, text: str) -> tuple[int, str]:
        """Tell all ranks that `rank` failed. Returns the first failure of the run, as (rank, text): all name one."""
        return tuple(json.loads(self.store.compare_set("failure", "", json.dumps([rank, text]))))

    def first_failure(self, wait_s: float = 0.0) -> tuple[int, str] | None:
        """The first failure of the run: (rank, text) that a rank posted, or of a rank whose process is gone."""
        end = time.monotonic() + wait_s
        while True:
            if self.store.check(["failure"]):
                return tuple(json.loads(self.store.get("failure")))
            if gone := [rank for rank in range(len(self.peers)) if self._is_gone(rank)]:
                text = f"its process ({self.peers[gone[0]]['pid']}) is gone: killed, or crashed"
                # A launcher ends its other ranks with the one that failed: seen from another, who was first is unknown.
                text += "".join(f", as is that of rank {rank}" for rank in gone[1:])
                return self.post_failure(gone[0], text)
            if time.monotonic() >= end:
                return None
            time.sleep(0.1)

    def leave(self) -> None:
        """This rank ends as it should: its silence from now on means nothing. Waits for the thread, since Python would
        abort the process if it exited while the thread is inside the store."""
        self._ended.set()
        self.join(LEAVE_S)
        try:
            self.store.set(f"left/{self.rank}", "1")
        except RuntimeError:
            pass  # the store's process has ended before this one: nobody is left to tell

    # --- the thread --------------------------------------------------------------------------------------------------
    def run(self) -> None:
        count = 0
        beats = [""] * len(self.peers)
        now = time.monotonic()
        silent_s = [0.0] * len(self.peers)
        while not self._ended.wait(BEAT_S):
            last, now = now, time.monotonic()
            # Where this process itself stood still, the others may have beaten: that time is not their silence.
            silent_s = [silent + min(now - last, 2 * BEAT_S) for silent in silent_s]
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
                for rank, beat in enumerate(self._read_beats()):
                    if beat != beats[rank]:
                        beats[rank], silent_s[rank] = beat, 0.0
                self._judge(now, silent_s)
            except RuntimeError:
                if not self._ended.is_set():
                    self._end("the run's store does not answer: the launcher or its machine is gone")

    def _read_beats(self) -> list[str]:
        keys = [f"beat/{rank}" for rank in range(len(self.peers))]
        return [self.store.get(key).decode() if self.store.check([key]) else "" for key in keys]

    def _judge(self, now: float, silent_s: list[float]) -> None:
        if os.getppid() != self._launcher:
            self._end("the launcher is gone")
        failure = self.first_failure()
        if failure is not None and failure[0] != self.rank:
            self._ended.wait(
                2 * GRACE_S
            )  # the main thread, if it is not stuck, finds out by itself and leaves in order
            self._end(f"ended because rank {failure[0]} failed first: {failure[1]}")
        for rank, peer in enumerate(self.peers):
            if rank != self.rank and silent_s[rank] > SILENT_S and not self._left(rank):
                text = f"no sign of life for {SILENT_S:.0f} s: stopped, or its machine is gone"
                self.post_failure(rank, text)
                if _is_here(peer) and _is_alive(peer):
                    os.kill(peer["pid"], signal.SIGKILL)  # a stopped process cannot end itself
                self._end(f"ended because of rank {rank} ({peer['host']}, process {peer['pid']}): {text}")
        deadline = self._deadline
        if deadline is not None and now > deadline[0]:
            text = f"{deadline[1]} did not end in time: a collective hangs"
            self.post_failure(self.rank, text)
            self._end(text)

    def _is_gone(self, rank: int) -> bool:
        peer = self.peers[rank]
        return rank != self.rank and _is_here(peer) and not _is_alive(peer) and not self._left(rank)

    def _left(self, rank: int) -> bool:
        return self.store.check([f"left/{rank}"])

    def _end(self, text: str) -> None:
        if self._ended.is_set():
            return
        sys.stderr.write(f"rank {self.rank}: {text}\n")  # one write: other ranks write to the same place
        sys.stderr.flush()
        self._ended.wait(GRACE_S)  # so that the launcher sees the rank that was first end before this one
        if not self._ended.is_set():
            os._exit(EXIT_CODE)


def describe_self() -> dict:
    """Who this process is, for the other ranks: host, process id, and the start time that tells a reused id apart."""
    return {"host": socket.gethostname() + _boot_id(), "pid": os.getpid(), "start": _start_time(os.getpid())}


def _is_here(peer: dict) -> bool:
    return peer["host"] == socket.gethostname() + _boot_id()


def _is_alive(peer: dict) -> bool:
    """Whether that very process runs (or is stopped): not ended, not a zombie, not another one under the same id."""
    try:
        os.kill(peer["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _start_time(peer["pid"]) == peer["start"]


def _start_time(pid: int) -> str:
    """Clock ticks since boot, where /proc tells; "" elsewhere. "ended" for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if not Path("/proc/self/stat").exists() else "ended"
    return "ended" if fields[0] in ("Z", "X") else fields[19]


def _boot_id() -> str:
    """Two containers may share a host name; process ids mean something only inside one of them."""
    try:
        return "/" + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
