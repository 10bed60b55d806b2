"""All-reduces in which every rank writes its numbers into the others' memory: one kernel, nothing copied, no barrier.

Each rank owns a receive buffer that the kernels of all ranks can write to (peer access through NVLink). A call is one
launch on every rank: send my slice to all, wait until theirs have come, add up, write the sum.

    low_latency   A 64-bit word carries 32 bits of data and, in its other half, the number of the call. Such a word
                  arrives whole or not at all, so the receiver needs no other signal than the data itself: one trip
                  through the link. It doubles the bytes. (The idea of NCCL's "LL" protocol.)
    push          Plain wide stores, then one flag a slice, released after them and acquired before they are read: the
                  bytes once, for a fence that waits until they have arrived.

Why two halves of the buffer suffice, without a barrier. Program p of every rank sees to slice p, and slices are the
same words in calls of all sizes: larger tensors take more programs. So program p of all ranks form a channel with a
counter of its own, and a call in which p takes part is number n of that channel on every rank, whatever sizes lay in
between and whether it was launched or replayed from a graph. Call n uses half n % 2. A rank writes into that half again
in call n + 2. Before, its program p ended call n + 1, for which it needed words n + 1 of every other rank; those were
sent by that rank's program p of call n + 1, which began when its call n had ended (kernels of a stream follow one
another, and with programmatic dependent launch nothing is read or sent before `gdc_wait`); and call n had then read all
that it received. So nothing is overwritten unread, and a word or flag numbered n cannot be one that is still there from
before: those carry n - 2 or less.

A program waits for the same program of the other ranks, so all of a launch must fit on the device at one time; `fits`
sees to that. Kernels that start early behind them (programmatic dependent launch) do not take that room: they start
when every program of this one has started.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.kernels.runtime import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    num_sms,
    runs_triton,
    tl,
)

WORD = 4  # bytes: the kernels move 32 bits at a time, one float32 or two 16-bit numbers
# A warp a program: its 32 threads vote on what has arrived in one instruction, and write 16 bytes each.
LOW_LATENCY_BLOCK, LOW_LATENCY_WARPS, LOW_LATENCY_PROGRAMS = 64, 1, 1024
PUSH_BLOCK, PUSH_WARPS, PUSH_PROGRAMS = 2048, 8, 512
# Programs of these few registers that every GPU since compute capability 7.5 holds on a multiprocessor at one time.
RESIDENT = {"low_latency": 8, "push": 4}


@jit
def _address(table_ptr, rank, dtype: tl.constexpr):
    """Rank `rank`'s entry in a table of addresses, as a pointer to whole 16-byte pieces."""
    return tl.multiple_of(tl.load(table_ptr + rank).to(tl.pointer_type(dtype)), 16)


@jit
def _unpack(words, DTYPE: tl.constexpr):
    """int32 -> the two 16-bit numbers of each word in float32; of a float32, the same twice."""
    if DTYPE == tl.float32:  # noqa: SIM300
        low = words.to(tl.float32, bitcast=True)
        high = low
    else:
        low = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@jit
def _pack(low, high, DTYPE: tl.constexpr):
    """The opposite of `_unpack`: rounds to DTYPE."""
    if DTYPE == tl.float32:  # noqa: SIM300
        words = low.to(tl.int32, bitcast=True)
    else:
        low_bits = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16) | low_bits
    return words


@jit
def _look(
    x, residual, received, mask, count, SENDER_STRIDE: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr,
    WORLD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One look at what has arrived: int64, the result in the low half, 1 in the high half where a word is missing.

    The sum goes in the order of ranks, so all get the same bits. One tensor, because it is what the waiting loop
    carries: Triton 3.7 fails to compile a loop whose condition alone uses one of several.
    """
    low, high = _unpack(x & 0, DTYPE)
    missing = (x & 0).to(tl.int64)
    for rank in tl.static_range(WORLD):
        if rank == RANK:
            words = x
        else:
            got = tl.load(received + rank * SENDER_STRIDE, mask=mask, other=0, volatile=True)
            missing |= (mask & ((got >> 32).to(tl.int32) != count)).to(tl.int64)
            words = got.to(tl.int32)
        low_of_rank, high_of_rank = _unpack(words, DTYPE)
        low += low_of_rank
        high += high_of_rank
    if ADD:
        low_of_residual, high_of_residual = _unpack(residual, DTYPE)
        low += low_of_residual
        high += high_of_residual
    return (missing << 32) | _pack(low, high, DTYPE).to(tl.uint32, bitcast=True).to(tl.int64)


@jit(varies=["num_words"])
def _low_latency_kernel(
    x_ptr, residual_ptr, out_ptr, peers_ptr, counters_ptr, num_words,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
    ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK words. A receive buffer is [senders, 2 halves, CAPACITY] of int64."""
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    offset = program * BLOCK + tl.arange(0, BLOCK)
    mask = offset < num_words
    own = _address(peers_ptr, RANK, tl.int64)
    if PDL:
        gdc_wait()  # x, the counter and the right to send depend on the kernels before
    count = tl.load(counters_ptr + program) + 1
    x = tl.load(x_ptr + offset, mask=mask, other=0)
    residual = x
    if ADD:
        residual = tl.load(residual_ptr + offset, mask=mask, other=0)
    at = (count & 1) * CAPACITY + offset
    numbered = (count.to(tl.int64) << 32) | x.to(tl.uint32, bitcast=True).to(tl.int64)
    for step in tl.static_range(1, WORLD):  # each rank begins with the next one: no link gets all at once
        peer = _address(peers_ptr, (RANK + step) % WORLD, tl.int64)
        # .wt: a store that the whole system sees, as `volatile` makes a load that asks the whole system.
        tl.store(peer + RANK * (2 * CAPACITY) + at, numbered, mask=mask, cache_modifier=".wt")
    state = _look(x, residual, own + at, mask, count, 2 * CAPACITY, DTYPE, RANK, WORLD, ADD)
    while tl.max((state >> 32).to(tl.int32), axis=0) > 0:
        state = _look(x, residual, own + at, mask, count, 2 * CAPACITY, DTYPE, RANK, WORLD, ADD)
    tl.store(out_ptr + offset, state.to(tl.int32), mask=mask)
    tl.store(counters_ptr + program, count)


@jit(varies=["num_words"])
def _push_kernel(
    x_ptr, residual_ptr, out_ptr, peers_ptr, flags_ptr, counters_ptr, num_words,
    CAPACITY: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr,
    WORLD: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK words. Receive buffers are int32: [senders, 2 halves, CAPACITY] words and
    [senders, 2 halves, PROGRAMS] flags.
    """
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    offset = program * BLOCK + tl.arange(0, BLOCK)
    mask = offset < num_words
    own = _address(peers_ptr, RANK, tl.int32)
    own_flags = _address(flags_ptr, RANK, tl.int32)
    if PDL:
        gdc_wait()
    count = tl.load(counters_ptr + program) + 1
    x = tl.load(x_ptr + offset, mask=mask, other=0)
    low, high = _unpack(x & 0, DTYPE)
    if ADD:
        low_of_residual, high_of_residual = _unpack(tl.load(residual_ptr + offset, mask=mask, other=0), DTYPE)
    at = (count & 1) * CAPACITY + offset
    flag = (count & 1) * PROGRAMS + program
    for step in tl.static_range(1, WORLD):
        peer = _address(peers_ptr, (RANK + step) % WORLD, tl.int32)
        tl.store(peer + RANK * (2 * CAPACITY) + at, x, mask=mask)
    tl.debug_barrier()  # all threads have stored before one of them raises the flags
    for step in tl.static_range(1, WORLD):
        peer_flags = _address(flags_ptr, (RANK + step) % WORLD, tl.int32)
        tl.atomic_xchg(peer_flags + RANK * (2 * PROGRAMS) + flag, count, sem="release", scope="sys")
    for step in tl.static_range(1, WORLD):
        raised = own_flags + ((RANK + step) % WORLD) * (2 * PROGRAMS) + flag
        while tl.atomic_add(raised, 0, sem="acquire", scope="sys") != count:
            pass
    tl.debug_barrier()  # what one thread has acquired is there for all
    for rank in tl.static_range(WORLD):  # in the order of ranks, so all get the same bits
        if rank == RANK:
            words = x
        else:
            words = tl.load(own + rank * (2 * CAPACITY) + at, mask=mask, other=0, cache_modifier=".cg")
        low_of_rank, high_of_rank = _unpack(words, DTYPE)
        low += low_of_rank
        high += high_of_rank
    if ADD:
        low += low_of_residual
        high += high_of_residual
    tl.store(out_ptr + offset, _pack(low, high, DTYPE), mask=mask)
    tl.store(counters_ptr + program, count)


LOW_LATENCY_WORDS = LOW_LATENCY_BLOCK * LOW_LATENCY_PROGRAMS
PUSH_WORDS = PUSH_BLOCK * PUSH_PROGRAMS


def buffer_bytes(world_size: int) -> int:
    """Of one rank's receive buffer: two halves from every sender (its own stays empty) for each algorithm."""
    return 2 * world_size * (8 * LOW_LATENCY_WORDS + WORD * PUSH_WORDS + WORD * PUSH_PROGRAMS)


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not run here, or None. Whether ranks share memory is not asked."""
    if not runs_triton(torch.empty(0, dtype=dtype, device=device)):
        return f"they need Triton and a GPU that computes in {str(dtype).removeprefix('torch.')}"
    return None


class PushAllReduce:
    """Both all-reduces of one rank. All ranks make the same calls in the same order, a rank's in one stream's order.

    buffers: every rank's receive buffer as this rank's kernels address it, `buffer_bytes` long and zero before the
    first call of any rank; kept for as long as this lives. Sequence numbers are 32 bits and wrap around unharmed.
    """

    NAMES = ("low_latency", "push")

    def __init__(self, rank: int, buffers: Sequence[torch.Tensor]) -> None:
        self.rank, self.world_size, self._buffers = rank, len(buffers), buffers
        device = buffers[rank].device
        words = 2 * self.world_size * 8 * LOW_LATENCY_WORDS
        starts = (0, words, words + 2 * self.world_size * WORD * PUSH_WORDS)
        table = [[buffer.data_ptr() + start for buffer in buffers] for start in starts]
        self._numbered, self._plain, self._flags = torch.tensor(table, dtype=torch.int64, device=device)
        # How many calls each program has taken part in.
        self._low_latency_counters = torch.zeros(LOW_LATENCY_PROGRAMS, dtype=torch.int32, device=device)
        self._push_counters = torch.zeros(PUSH_PROGRAMS, dtype=torch.int32, device=device)
        blocks = {"low_latency": (LOW_LATENCY_BLOCK, LOW_LATENCY_PROGRAMS), "push": (PUSH_BLOCK, PUSH_PROGRAMS)}
        self.max_bytes = {
            name: WORD * block * min(programs, RESIDENT[name] * num_sms(device))
            for name, (block, programs) in blocks.items()
        }

    def fits(self, name: str, num_bytes: int) -> bool:
        """Whether the named algorithm takes a tensor of that many bytes: whole words, all programs at one time."""
        return 0 < num_bytes <= self.max_bytes[name] and num_bytes % WORD == 0

    def low_latency(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of x over the ranks (+ residual, the same on all), added in float32 in the order of ranks and rounded
        once; over x where x is contiguous. float16, bfloat16 or float32.
        """
        assert self.fits("low_latency", x.nbytes)
        words, residual_words = _words(x), None if residual is None else _words(residual)
        _low_latency_kernel[(-(-words.numel() // LOW_LATENCY_BLOCK),)](
            words, words if residual is None else residual_words, words, self._numbered, self._low_latency_counters,
            words.numel(), CAPACITY=LOW_LATENCY_WORDS, BLOCK=LOW_LATENCY_BLOCK, ADD=residual is not None,
            **self._options(x, LOW_LATENCY_WARPS),
        )  # fmt: skip
        return words.view(x.dtype).view(x.shape)

    def push(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """As `low_latency`."""
        assert self.fits("push", x.nbytes)
        words, residual_words = _words(x), None if residual is None else _words(residual)
        _push_kernel[(-(-words.numel() // PUSH_BLOCK),)](
            words, words if residual is None else residual_words, words, self._plain, self._flags,
            self._push_counters, words.numel(), CAPACITY=PUSH_WORDS, PROGRAMS=PUSH_PROGRAMS, BLOCK=PUSH_BLOCK,
            ADD=residual is not None, **self._options(x, PUSH_WARPS),
        )  # fmt: skip
        return words.view(x.dtype).view(x.shape)

    def _options(self, x: torch.Tensor, num_warps: int) -> dict:
        dtype = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]
        ranks = {"RANK": self.rank, "WORLD": self.world_size}
        return launch_options(x.device, DTYPE=dtype, num_warps=num_warps, **ranks)


def _words(x: torch.Tensor) -> torch.Tensor:
    """x as int32 words in one dimension, in its own memory where it is contiguous."""
    return x.reshape(-1).view(torch.int32)
