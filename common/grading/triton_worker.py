"""Runs a learner's Triton function on the grader's cases, in a process of its own: WORKER SOURCE JOBS INPUTS OUTPUTS.

It speaks the protocol of harness/harness.h. Without a GPU the kernel runs under Triton's interpreter, whose loads and
stores are checked here against the tensors that the kernel was given: the interpreter itself reads and writes wherever
a pointer leads.
"""

import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def say(text: str) -> None:
    with open(os.environ["TLAB_PROGRESS"], "a") as file:
        file.write(" ".join(text.split()) + "\n")


def check_accesses() -> None:
    """Reports, and leaves out, accesses outside the tensors that a launch was given."""
    import numpy as np
    from triton.runtime import interpreter

    ranges: list[tuple[int, int]] = []
    convert, builder = interpreter.GridExecutor._init_args_hst, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def init_args(self, args, kwargs):
        converted = convert(self, args, kwargs)
        ranges.clear()
        for t in [*converted[0], *converted[1].values()]:
            if hasattr(t, "data_ptr") and t.numel():
                last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
                ranges.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
        return converted

    def inside(pointers, mask, verb):
        at = pointers.data.astype(np.uint64)
        good = np.zeros(at.shape, dtype=bool)
        for low, high in ranges:
            good |= (at >= low) & (at < high)
        wanted = np.asarray(mask.data, dtype=bool)  # a block pointer's mask is a bare array
        outside = wanted & ~good
        if outside.any():
            say(f"finding out-of-bounds the kernel {verb} {int(outside.sum())} elements outside its tensors")
        return interpreter.TensorHandle(wanted & good, interpreter.tl.int1)

    builder.create_masked_load = lambda self, p, mask, *rest: load(self, p, inside(p, mask, "reads"), *rest)
    builder.create_masked_store = lambda self, p, v, mask, *rest: store(self, p, v, inside(p, mask, "writes"), *rest)
    interpreter.GridExecutor._init_args_hst = init_args


class Lacking(Exception):
    """The interpreter has no such thing: not the learner's mistake."""


def stand_in_for_a_gpu() -> None:
    """Under the interpreter: @triton.autotune takes its first configuration, libdevice's functions name themselves."""
    from triton.language.extra import libdevice
    from triton.runtime.autotuner import Autotuner

    def lack(name):
        def function(*args, **kwargs):
            raise Lacking(f"libdevice.{name}")

        return function

    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
    for name in [n for n in vars(libdevice) if callable(getattr(libdevice, n)) and not n.startswith("_")]:
        setattr(libdevice, name, lack(name))


def count_launches() -> list[str]:
    """A list that gets an entry whenever a kernel is taken for a launch: kernel[grid](...)."""
    from triton.runtime.jit import KernelInterface

    launches: list[str] = []
    take = KernelInterface.__getitem__

    def taken(self, grid):
        launches.append("launch")
        return take(self, grid)

    KernelInterface.__getitem__ = taken
    return launches


def lacking(error: BaseException | None) -> str | None:
    """What an exception of the learner's call says that this machine does not have, if it says so."""
    while error is not None:
        if isinstance(error, Lacking):
            return f"{error} (not in Triton's interpreter: grade on a machine with a GPU, or do without it)"
        if "active drivers" in str(error):
            return "a GPU, which a part of Triton that this uses asks for"
        error = error.__cause__
    return None


def fill_new_tensors(torch, words: dict) -> None:
    """torch.empty and its kin give tensors that hold a pattern, so that elements nobody writes can be told."""

    def filled(make):
        def function(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.dtype in words and tensor.numel():
                width, word = words[tensor.dtype]
                flat = torch.full((tensor.numel(),), word, dtype=width, device=tensor.device).view(tensor.dtype)
                tensor.copy_(flat.view(tensor.shape))
            return tensor

        return function

    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, filled(getattr(torch, name)))
    for name in ("new_empty",):
        setattr(torch.Tensor, name, filled(getattr(torch.Tensor, name)))


def lay_out(torch, values, case: dict, device: str):
    """The case's input tensor: its dtype and memory layout (labs/silu_triton.py, `backing`)."""
    from common.grading.labs.silu_triton import two_sides

    x = torch.from_numpy(values).to(getattr(torch, case["dtype"])).to(device)
    n, layout = x.numel(), case["layout"]
    if layout == "transposed":
        return x.view(two_sides(n)).t().contiguous().t()
    if layout == "every second":
        return torch.stack([x, torch.full_like(x, 7.0)], dim=1).view(-1)[::2]
    if layout == "columns":
        rows, cols = two_sides(n)
        wide = torch.full((rows, cols + 3), 7.0, dtype=x.dtype, device=device)
        wide[:, :cols] = x.view(rows, cols)
        return wide[:, :cols]
    if layout == "three dimensions":
        return x.view(6, 5, 7)
    if layout == "misaligned":
        return torch.cat([x[:1], x])[1:]
    if layout == "broadcast":
        return x[: n // 10].expand(10, n // 10)
    return x


def load_function(source: Path, name: str):
    spec = importlib.util.spec_from_file_location("submission", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["submission"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def learner_line(error: BaseException, source: Path) -> str:
    """`line N: Type: message`, the line in the learner's file."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == source]
    where = f"line {frames[-1].lineno}: " if frames else ""
    if "grid_idx" in str(error):  # the interpreter's, of a kernel that is called
        return f"{where}a kernel is launched with its grid in brackets: kernel[grid](...)"
    return f"{where}{type(error).__name__}: {str(error)[:300]}"


def run_case(torch, function, source: Path, values, case: dict, device: str, words: dict, launches: list[str]):
    """The result as float32 words for the grader, or None; findings are said."""
    x = lay_out(torch, values, case, device)
    before = x.clone()
    launches.clear()
    try:
        y = function(x)
        if device == "cuda":
            torch.cuda.synchronize()
    except NotImplementedError:
        say("finding not-implemented raises NotImplementedError")
        return None
    except Exception as error:  # whatever the learner's code raises is an outcome
        lacks = lacking(error)
        say(f"finding blocked {lacks}" if lacks else f"finding exception {learner_line(error, source)}")
        return None
    say("work 1")
    if not launches:
        say("finding no-kernel silu_triton launches none")
    if not isinstance(y, torch.Tensor):
        say(f"finding wrong-result silu_triton returned {type(y).__name__}, not a tensor")
        return None
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        got, want = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (y, x))
        say(f"finding wrong-result it is {got}, the input is {want}")
        return None
    if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        say("finding not-new the result shares the input's memory")
    if not torch.equal(torch.nan_to_num(x), torch.nan_to_num(before)):
        say("finding input-changed the input is not what it was before the call")
    width, word = words[y.dtype]
    y = y.contiguous()
    unwritten = y.view(width).cpu() == word
    result = y.float().cpu()
    result.view(torch.int32)[unwritten] = words[torch.float32][1]
    return result.numpy()


def main(source: Path, jobs: Path, inputs: Path, outputs: Path) -> int:
    sys.path[0] = str(ROOT)  # in place of this folder, whose run.py and build.py are no one else's
    import numpy as np
    import torch

    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.zeros(1, device=device)  # starts the GPU before the first case's time begins
    large = int(os.environ.get("EMU_FILL", "255")) == 0x4B
    words = {  # signed forms of the words in lab.OUTPUT_FILL, and like ones of 16 bits
        torch.float32: (torch.int32, 0x4B4BDEAD if large else 0xFFFFDEAD - (1 << 32)),
        torch.float16: (torch.int16, 0x4BAD if large else 0xFEAD - (1 << 16)),
        torch.bfloat16: (torch.int16, 0x4BAD if large else 0xFFAD - (1 << 16)),
    }
    cases = json.loads((inputs / "cases.json").read_text())
    lines = [line.split() for line in jobs.read_text().splitlines()]
    say(f"begin {lines[0][0]}")
    try:
        if device == "cpu":
            check_accesses()
            stand_in_for_a_gpu()
        launches = count_launches()
        function = load_function(source, "silu_triton")
    except Exception as error:  # a syntax error, a missing import
        say(f"finding import-error {learner_line(error, source)}")
        return 79
    fill_new_tensors(torch, words)
    for number, _, limit, *_ in lines:
        say(f"begin {number}")
        signal.alarm(int(limit))
        values = np.fromfile(inputs / f"{number}.in", dtype=np.float32)
        result = run_case(torch, function, source, values, cases[int(number)], device, words, launches)
        if result is not None:
            result.ravel().tofile(outputs / f"{number}.out")
        signal.alarm(0)
        say(f"end {number}")
    return 0


if __name__ == "__main__":
    os._exit(main(*(Path(a).resolve() for a in sys.argv[1:])))
