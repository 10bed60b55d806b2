"""How a rank finds the others: its variables, its device, the run's store, and a greeting by which all know all.

torchrun gives each process its RANK, the WORLD_SIZE and the address of a store; here they are read and checked, the
store is opened, and every rank says who it is. What does not fit (a port in use, a rank that is there twice or not at
all, two sizes) is found out before anything is loaded, as one line.
"""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from typing import Any

from common.errors import UserError

JOIN_S = 60.0  # for all ranks to appear: torch's import alone may take ten seconds on a busy machine
WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_environment(asked: int | None) -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size). `asked`: the world size that the user named, if so.

    Raises UserError for a variable that is missing or makes no sense.
    """
    values = {}
    for name in WORLD_VARIABLES:
        text = os.environ.get(name, "")
        if not text or (name != "MASTER_ADDR" and not text.isdecimal()):
            raise UserError(f"environment variable {name} is {text!r}; start the ranks with torchrun, which sets it")
        values[name] = text
    rank, size = int(values["RANK"]), int(values["WORLD_SIZE"])
    if not 0 <= rank < size:
        raise UserError(f"environment variable RANK is {rank}, WORLD_SIZE {size}: ranks count from 0 to {size - 1}")
    if asked is not None and asked != size:
        raise UserError(f"--world {asked}, but {size} processes were started; give torchrun --nproc-per-node {asked}")
    local = [os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    local_rank, local_size = (int(text) if text.isdecimal() else default for text, default in zip(local, (rank, size)))
    return rank, size, local_rank, local_size


def rank_device(name: str, local_rank: int, local_size: int) -> Any:
    """The device of a rank: the GPU with its local number, or the CPU. Raises UserError where GPUs are too few."""
    import torch

    from common.checkpoint import pick_device

    if name.startswith("cuda:"):
        raise UserError(f"--device {name}: each process takes the GPU of its own number; use --device cuda")
    device = pick_device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if local_size > count:
            raise UserError(
                f"--device {name}: {local_size} processes on this host, {count} GPU(s) visible; start {count}, "
                "or use --device cpu"
            )
        device = torch.device("cuda", local_rank)
    return device


def join(rank: int, size: int, wait_s: float) -> tuple[Any, Any]:
    """The run's store and the heartbeat, once all ranks have said hello and agree how many they are.

    wait_s: for how long the store waits for a value from then on. Raises UserError where the ranks do not meet.
    """
    import torch.distributed as dist

    from common.heartbeat import Heartbeat, describe_self

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=JOIN_S)
    # Under torchrun the launcher holds the store. A restarted run must not read what the attempt before it left there.
    is_holder = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    prefix = f"tlab/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        base = dist.TCPStore(address, port, None, is_holder, timeout, wait_for_workers=False)
        own_connection = dist.TCPStore(address, port, None, False, timeout, wait_for_workers=False)
        store = dist.PrefixStore(prefix, base)
        peers = _greet(store, rank, size, describe_self())
    except (RuntimeError, ValueError) as error:
        raise UserError(_store_error(error, rank, address, port)) from None
    except UserError:
        time.sleep(1.0 if is_holder else 0.0)  # the others read from this process what is wrong
        raise
    base.set_timeout(timedelta(seconds=wait_s))
    return store, Heartbeat(dist.PrefixStore(prefix + "/watch", own_connection), rank, peers)


def _store_error(error: Exception, rank: int, address: str, port: int) -> str:
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text:
        return f"port {port} on {address} is in use; choose another with MASTER_PORT or torchrun --master-port"
    if "imeout" in text or "timed out" in text or "refused" in text:
        return f"rank {rank}: not all ranks met at {address}:{port} within {JOIN_S:.0f} s; is each of them started?"
    return f"rank {rank}: no store at {address}:{port} ({text[:200]}); check MASTER_ADDR and MASTER_PORT"


def _greet(store: Any, rank: int, size: int, me: dict) -> list[dict]:
    """Every rank's description. UserError when a rank is there that counts otherwise, or one does not come."""
    count = store.add(f"taken/{rank}", 1)
    if count > 1:
        raise UserError(f"rank {rank} was started {count} times; give every process a RANK of its own")
    store.set(f"hello/{rank}", json.dumps({**me, "size": size}))
    end = time.monotonic() + JOIN_S
    found: dict[int, dict] = {}
    while len(found) < size:
        for other in range(size):
            if other not in found and store.check([f"hello/{other}"]):
                found[other] = json.loads(store.get(f"hello/{other}"))
                if found[other]["size"] != size:
                    raise UserError(
                        f"rank {rank} was started as one of {size} processes and rank {other} as one of "
                        f"{found[other]['size']}; start all with one WORLD_SIZE"
                    )
        if time.monotonic() > end:
            missing = [other for other in range(size) if other not in found]
            raise UserError(f"ranks {missing} of {size} did not come within {JOIN_S:.0f} s; is each of them started?")
        time.sleep(0.02)
    return [found[other] for other in range(size)]
