"""Several processes that work as one: launching them, their process group, agreement before the work, a clean end.

    def main(args):
        if not distributed.is_rank():                        # started plainly: start the ranks through torch's launcher
            raise SystemExit(distributed.launch(__file__, 2))
        with distributed.open_world(args) as world:          # this process is a rank
            world.require_same("option", vars(args))
            ...
            rows = world.gather(my_rows)                     # at rank 0; None elsewhere

`torchrun --nproc-per-node N script.py` (and --nnodes M) starts the ranks instead, with no difference to them. NCCL on
GPUs, gloo on CPUs. Only rank 0 prints to stdout. What a rank cannot go on from ends all of them: see
common/heartbeat.py. Small values travel through the run's store, so that no exchange needs a collective.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from common import rendezvous
from common.errors import CheckFailed, UserError
from common.machine import cpu_cores

COLLECTIVE_S = 300.0  # the process group's time-out; loading a checkpoint lies between two collectives
FAIL_S = 15.0  # for a rank that failed to say so and be gone
DESTROY_S = 10.0  # for the process group to end; symmetric memory in a captured graph can hold it up for ever


class PeerFailed(CheckFailed):
    """This rank could not go on because another one failed."""


def is_rank() -> bool:
    """Whether this process was started as one of several: by torchrun, or with its variables set by hand."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def visible_gpus() -> int:
    """How many GPUs this host shows."""
    import torch

    return torch.cuda.device_count()


# --- launching -------------------------------------------------------------------------------------------------------
def launch(script_file: str, world_size: int, argv: Sequence[str] | None = None) -> int:
    """Run `script_file` as `world_size` ranks on this host through torch's elastic launcher; returns the exit code.

    The code is that of the rank that failed first; the ranks print their errors themselves, so only a rank that was
    killed is named here. argv: the script's arguments (default: this process's). The port is any free one.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    sys.stdout.flush()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // world_size)))
    if sys.platform in ("linux", "darwin"):  # all ranks are here: no host name need be resolved
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    logging.disable(logging.CRITICAL)  # the launcher would repeat every failure in five lines of log
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(script_file, *(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"rank {rank} was killed by {name}; the other ranks were ended", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--world`; and errors of a rank begin with its number."""
    parser.add_argument(
        "--world", type=_world_size, metavar="N", help="processes to start (default: 2); under torchrun it must agree"
    )
    if is_rank():
        parser.prog += f" (rank {os.environ['RANK']})"


def _world_size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes from 1 to 1024")
    return int(text)


# --- one rank's view -------------------------------------------------------------------------------------------------
@dataclass
class World:
    """All ranks of a run, seen from one of them. `group` is the process group of all, on `device`."""

    rank: int
    size: int
    device: Any
    group: Any
    store: Any
    heartbeat: Any
    leave_at_once: bool = False  # set where an ordinary way out can hang (symmetric memory)
    _exchanges: int = field(default=0, repr=False)
    _stop: bool = field(default=False, repr=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value (JSON), in the order of ranks; all ranks must call it. Also a barrier."""
        self._exchanges += 1
        keys = [f"exchange/{self._exchanges}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], json.dumps(value))
        return [json.loads(self.store.get(key)) for key in keys]  # each waits until it is there

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value at rank 0, None elsewhere."""
        values = self.exchange(value)
        return values if self.is_first else None

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        return self.exchange(value if self.is_first else None)[0]

    def barrier(self) -> None:
        self.exchange(None)

    def require_same(self, what: str, facts: Mapping[str, Any]) -> None:
        """UserError, on every rank alike, naming the first of `facts` that is not the same on all ranks."""
        plain = json.loads(json.dumps(facts, default=str))
        views = self.exchange(plain)
        for name in sorted({name for view in views for name in view}):
            for rank, view in enumerate(views):
                first, other = views[0].get(name), view.get(name)
                if first != other:
                    raise UserError(
                        f"{what} {name} is {_shown(first)} on rank 0 and {_shown(other)} on rank {rank}; start every "
                        "rank with the same options, code and model"
                    )

    @contextlib.contextmanager
    def interrupts_at_once(self, args: argparse.Namespace) -> Iterator[None]:
        """Around a measuring loop: Ctrl-C only raises a flag, which all ranks read together in `stop_requested`.

        A rank that broke off alone would leave the others waiting in a collective. A second Ctrl-C does break off.
        """

        def note(signum, frame):
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        previous = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
            if self._stop:
                args.interrupted = True
                if self.is_first:
                    print("\ninterrupted: keeping the rows measured so far", file=sys.stderr)

    def stop_requested(self) -> bool:
        """Whether any rank was interrupted; all ranks ask together and get the same answer."""
        self._stop = any(self.exchange(self._stop))
        return self._stop


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def open_world(args: argparse.Namespace, *, world_size: int | None = None) -> Iterator[World]:
    """Join the other ranks; on leaving, end the process group (and, with `leave_at_once`, the process: code after it
    does not run then).

    args.device: auto, cpu or cuda; a rank takes the GPU of its local rank. world_size: what the user asked for, if so.
    An exception ends all ranks: the first one's line is printed, then the others end. Raises UserError for variables,
    ports and sizes that do not fit; `PeerFailed` where another rank failed first.
    """
    import torch
    import torch.distributed as dist

    rank, size, local_rank, local_size = rendezvous.read_environment(world_size)
    device = rendezvous.rank_device(args.device, local_rank, local_size)
    if rank != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one voice: rank 0's, for as long as the process lives)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, heartbeat = rendezvous.join(rank, size, COLLECTIVE_S)
    world = World(rank, size, device, None, dist.PrefixStore("values", store), heartbeat)
    heartbeat.start()
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_S),
            device_id=device if device.type == "cuda" else None,
        )
        world.group = dist.group.WORLD
        world.barrier()
        yield world
        world.barrier()
    except BaseException as error:
        _fail(world, error)
        raise
    _close(world)
    if world.leave_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if getattr(args, "interrupted", False) else 0)


# --- the end ---------------------------------------------------------------------------------------------------------
def _fail(world: World, error: BaseException) -> None:
    """Tell the others, or find out who was first. Raises `PeerFailed` or SystemExit where this rank was not."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    heartbeat = world.heartbeat
    code = error.code if isinstance(error, SystemExit) else None
    if code in (0, None) and isinstance(error, SystemExit):
        return _close(world)
    _end_process_within(FAIL_S)
    if isinstance(error, KeyboardInterrupt):
        heartbeat.leave()
        return None
    text = " ".join(str(error).split()) or type(error).__name__
    own_fault = isinstance(error, (UserError, CheckFailed)) or not _lost_a_peer(error)
    try:
        # A lost connection is some other rank's end: it, or what is left of its process, says why.
        first = None if own_fault else heartbeat.first_failure(wait_s=3.0)
        first = first or heartbeat.post_failure(world.rank, text)
    except RuntimeError:  # the store went with the rank that held it
        first = (world.rank, text)
    heartbeat.leave()
    if first[0] == world.rank:
        with contextlib.suppress(Exception):
            get_error_handler().record_exception(error)  # for torchrun's own report
        return None
    time.sleep(1.0)  # the first rank's line comes first; most often the launcher ends this process meanwhile
    if first[1] == text and own_fault:
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None  # it has been said
    if own_fault:
        return None
    raise PeerFailed(f"ended because rank {first[0]} failed first: {first[1]}") from None


def _end_process_within(seconds: float) -> None:
    """The kernel ends this process then, wherever it is: also inside the store, or where the interpreter takes itself
    down. There a process group whose collective failed can hold it up for ever (gloo's threads still own tensors), the
    heartbeat is silent by then, and a launcher waits for as long as none of its ranks ends."""
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _lost_a_peer(error: BaseException) -> bool:
    """Whether an exception is a collective or the store saying that the other side is gone."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo/", "NCCL", "imed out")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _close(world: World) -> None:
    """End the process group; if that hangs, leave the process deliberately: its results are on the disk."""
    import gc

    import torch
    import torch.distributed as dist

    world.heartbeat.leave()
    if world.device.type == "cuda":
        gc.collect()  # captured graphs hold on to NCCL's communicator, and engines to graphs in a cycle
        torch.cuda.synchronize(world.device)

    def destroy() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    thread = threading.Thread(target=destroy, daemon=True)
    thread.start()
    thread.join(DESTROY_S)
    if thread.is_alive():
        print(f"rank {world.rank}: the process group did not end within {DESTROY_S:.0f} s; leaving", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
