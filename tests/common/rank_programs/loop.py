"""Run by test_distributed.py as several ranks: sums for ever, or as its arguments say.

loop.py [--world N] MODE...: "run" sums until it is ended, "sums:N" N times, "raise:R" ends rank R by a UserError after
some sums, "facts:R" gives rank R another fact, "hang:R" leaves rank R out of the sums, its heart still beating;
"stuck" makes the interpreter's own end take for ever on all ranks; "spin:S" keeps rank 0 waiting for a kernel on a GPU
that waits for ever for what the other rank never writes, S seconds at most. Prints "pid RANK PID" to stderr when all
have met, and "done" at rank 0.
"""

import argparse
import atexit
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from common import cli, distributed, heartbeat
from common.errors import UserError


def spin():
    """Returns when the kernel ends: never."""
    import torch

    from common.tensor_parallel.push_all_reduce import PushAllReduce, buffer_bytes

    buffers = [torch.zeros(buffer_bytes(2) // 8, dtype=torch.int64, device="cuda") for _ in range(2)]
    PushAllReduce(0, buffers).low_latency(torch.ones(2048, dtype=torch.float16, device="cuda"))
    sys.stderr.write("spinning\n")
    torch.cuda.synchronize()


def main(args):
    import torch
    import torch.distributed as dist

    if not distributed.is_rank():
        raise SystemExit(distributed.launch(__file__, args.world or 2))
    modes = dict(mode.split(":") if ":" in mode else (mode, "-1") for mode in args.modes)
    heartbeat.SILENT_S = 4.0
    with distributed.open_world(args, world_size=args.world) as world:
        sys.stderr.write(f"pid {world.rank} {os.getpid()}\n")  # one write: other ranks write to the same file
        world.require_same("fact", {"number": int(modes.get("facts", "-1") == str(world.rank))})
        if "stuck" in modes:
            atexit.register(time.sleep, 600)
        if "spin" in modes:
            world.heartbeat.expect_within(float(modes["spin"]), "the kernel")
            spin() if world.is_first else time.sleep(600)
        count = int(modes.get("sums", 10**9))
        for i in range(count):
            if i == 5 and modes.get("raise") == str(world.rank):
                raise UserError("the sky fell on this rank; hold it up")
            if i == 5 and modes.get("hang"):
                world.heartbeat.expect_within(3.0, "the sum")
                if modes["hang"] == str(world.rank):
                    world.heartbeat.expect_within(None)
                    time.sleep(600)
            x = torch.ones(4) * world.rank
            dist.all_reduce(x, group=world.group)
            assert x[0] == world.size * (world.size - 1) / 2
            time.sleep(0.01)
        print("done", world.gather(world.rank))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("modes", nargs="+")
    parser.add_argument("--debug", action="store_true")
    parser.set_defaults(device="cpu")
    distributed.add_options(parser)
    cli.run(main, parser)
