"""What an attention backend is given, what it must give back, and how it says that it cannot.

A *case* is a shape: who attends to how much. *Inputs* are tensors of that shape; several sets of one case let a
benchmark read more than a cache holds. A backend's `prepare(case)` does what depends on the shape only (plans, tables)
and its `bind(inputs)` gives a call without arguments, the thing that is timed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from common.attention_bench.options import Heads
from common.errors import UserError

JUNK = 100.0  # fills the slots after a sequence's last token: a backend that reads one is far off, and not by NaN
Call = Callable[[], torch.Tensor]


class Unsupported(Exception):
    """A backend cannot do this case. The message is the reason, in one line."""


@dataclass(frozen=True)
class PrefillInputs:
    """q [Tq, Hq, d]; k, v [Tk, Hkv, d]: the tokens of all sequences side by side."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def clone(self) -> PrefillInputs:
        return PrefillInputs(self.q.clone(), self.k.clone(), self.v.clone())


@dataclass(frozen=True)
class PrefillCase:
    """Causal attention of several sequences, aligned bottom-right: query i of n sees keys 0 .. kv_len - n + i."""

    heads: Heads
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    phase = "prefill"

    def __post_init__(self) -> None:
        if not self.q_lens or len(self.q_lens) != len(self.kv_lens):
            raise ValueError("prefill: as many K/V lengths as query lengths, at least one")
        if any(not 1 <= q <= kv for q, kv in zip(self.q_lens, self.kv_lens)):
            raise ValueError("prefill: every sequence needs 1 <= queries <= keys")

    @property
    def batch(self) -> int:
        return len(self.q_lens)

    @property
    def seq_len(self) -> int | None:
        """The length that all sequences share, queries and keys alike; None where they differ."""
        lengths = {*self.q_lens, *self.kv_lens}
        return lengths.pop() if len(lengths) == 1 else None

    @property
    def flops(self) -> float:
        """4 operations an element of d for each (query, key) pair that the mask keeps; S²/2 pairs of S² when causal.

        The pairs of a sequence with n queries are n·kv_len - n²/2: its S²/2 where n = kv_len = S.
        """
        pairs = sum(q * kv - q * q / 2 for q, kv in zip(self.q_lens, self.kv_lens))
        return 4 * pairs * self.heads.num_heads * self.heads.head_dim

    @property
    def num_bytes(self) -> int:
        """q, k and v read once and the output written once."""
        h = self.heads
        elements = 2 * sum(self.q_lens) * h.num_heads + 2 * sum(self.kv_lens) * h.num_kv_heads
        return elements * h.head_dim * self.dtype.itemsize

    @property
    def input_bytes(self) -> int:
        """What one set of inputs takes in memory."""
        h = self.heads
        elements = sum(self.q_lens) * h.num_heads + 2 * sum(self.kv_lens) * h.num_kv_heads
        return elements * h.head_dim * self.dtype.itemsize

    @functools.cached_property
    def cu_q(self) -> torch.Tensor:
        """int32 [batch + 1] on the device: where each sequence's queries begin, and the end."""
        return _bounds(self.q_lens).to(self.device)

    @functools.cached_property
    def cu_kv(self) -> torch.Tensor:
        return _bounds(self.kv_lens).to(self.device)

    def inputs(self, seed: int = 0) -> PrefillInputs:
        h, generator = self.heads, torch.Generator(self.device).manual_seed(seed)
        q = _randn(self, generator, sum(self.q_lens), h.num_heads, h.head_dim)
        k = _randn(self, generator, sum(self.kv_lens), h.num_kv_heads, h.head_dim)
        return PrefillInputs(q, k, _randn(self, generator, *k.shape))


@dataclass(frozen=True)
class DecodeInputs:
    """q [B, Hq, d], one token a sequence; pages [P, 2, page_size, Hkv, d], K in [:, 0] and V in [:, 1]."""

    case: DecodeCase
    q: torch.Tensor
    pages: torch.Tensor

    def clone(self) -> DecodeInputs:
        return DecodeInputs(self.case, self.q.clone(), self.pages.clone())

    @functools.cached_property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V without pages, [sum of kv_lens, Hkv, d], for backends that keep a sequence in one piece."""
        page, offset = self.case.slots
        return self.pages[page, 0, offset], self.pages[page, 1, offset]

    @functools.cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as [B, Hkv, longest, d]; zeros after a shorter sequence's end."""
        case = self.case
        longest = max(case.kv_lens)
        if all(length == longest for length in case.kv_lens):
            k, v = (x.view(case.batch, longest, *x.shape[1:]).transpose(1, 2).contiguous() for x in self.packed)
            return k, v
        shape = (case.batch, longest, case.heads.num_kv_heads, case.heads.head_dim)
        out = []
        for x in self.packed:
            full = x.new_zeros(shape)
            full[case.mask] = x
            out.append(full.transpose(1, 2).contiguous())
        return out[0], out[1]


@dataclass(frozen=True)
class DecodeCase:
    """One new token a sequence, attending to kv_lens tokens (itself included) that lie in pages in random order."""

    heads: Heads
    kv_lens: tuple[int, ...]
    page_size: int
    dtype: torch.dtype
    device: torch.device
    phase = "decode"

    def __post_init__(self) -> None:
        if not self.kv_lens or min(self.kv_lens) < 1:
            raise ValueError("decode: every sequence needs at least one token")
        if self.page_size < 1:
            raise UserError(f"--page-size {self.page_size}: a page holds at least 1 token")

    @property
    def batch(self) -> int:
        return len(self.kv_lens)

    @property
    def flops(self) -> float:
        return 4 * sum(self.kv_lens) * self.heads.num_heads * self.heads.head_dim

    @property
    def num_bytes(self) -> int:
        """K and V of every real token once, and q and the output. Empty slots of a page count nothing."""
        h = self.heads
        elements = 2 * sum(self.kv_lens) * h.num_kv_heads + 2 * self.batch * h.num_heads
        return elements * h.head_dim * self.dtype.itemsize

    @property
    def pages_per_sequence(self) -> tuple[int, ...]:
        return tuple(-(-length // self.page_size) for length in self.kv_lens)

    @property
    def input_bytes(self) -> int:
        h = self.heads
        elements = 2 * sum(self.pages_per_sequence) * self.page_size * h.num_kv_heads + self.batch * h.num_heads
        return elements * h.head_dim * self.dtype.itemsize

    @functools.cached_property
    def page_ids(self) -> list[int]:
        """The pages of all sequences, sequence by sequence: every page once, shuffled with a fixed seed."""
        ids = list(range(sum(self.pages_per_sequence)))
        random.Random(0).shuffle(ids)
        return ids

    @functools.cached_property
    def page_table(self) -> torch.Tensor:
        """int32 [B, most pages] on the device; 0 where a sequence has no more pages."""
        counts = self.pages_per_sequence
        table = torch.zeros(self.batch, max(counts), dtype=torch.int32)
        begin = 0
        for row, count in enumerate(counts):
            table[row, :count] = torch.tensor(self.page_ids[begin : begin + count], dtype=torch.int32)
            begin += count
        return table.to(self.device)

    @functools.cached_property
    def lengths(self) -> torch.Tensor:
        """int32 [B] on the device."""
        return torch.tensor(self.kv_lens, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def cu_kv(self) -> torch.Tensor:
        return _bounds(self.kv_lens).to(self.device)

    @functools.cached_property
    def cu_q(self) -> torch.Tensor:
        return torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        """bool [B, longest] on the device: which keys of a padded row are real."""
        return torch.arange(max(self.kv_lens), device=self.device)[None, :] < self.lengths[:, None]

    @functools.cached_property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(page, offset) of every token, sequence by sequence."""
        position = torch.arange(max(self.kv_lens), device=self.device).expand(self.batch, -1)
        page = self.page_table.long().gather(1, position // self.page_size)
        return page[self.mask], (position % self.page_size)[self.mask]

    def inputs(self, seed: int = 0) -> DecodeInputs:
        h, generator = self.heads, torch.Generator(self.device).manual_seed(seed)
        q = _randn(self, generator, self.batch, h.num_heads, h.head_dim)
        pages = _randn(self, generator, len(self.page_ids), 2, self.page_size, h.num_kv_heads, h.head_dim)
        begin = 0
        for length, count in zip(self.kv_lens, self.pages_per_sequence):
            begin += count
            if length % self.page_size:
                pages[self.page_ids[begin - 1], :, length % self.page_size :] = JUNK
        return DecodeInputs(self, q, pages)


Case = PrefillCase | DecodeCase


@dataclass(frozen=True)
class Prepared:
    """bind: inputs -> a call that runs the backend on them and returns its output, in any view of [tokens, Hq, d].
    plan: repeats the shape-dependent host work that a server does once a step; None where there is none."""

    bind: Callable[[Any], Call]
    plan: Callable[[], object] | None = None


class Backend:
    """One way to compute attention. Everything about a library stands in its backend's file."""

    name = ""
    phases: tuple[str, ...] = ("prefill", "decode")
    ours = False  # an error in our own kernels is a failed check, a library's refusal is not
    paged = True  # decode reads K/V from pages; False: a sequence in one piece
    max_head_dim: int | None = None
    head_dim_multiple = 1

    def __repr__(self) -> str:
        return self.name

    def missing(self, device: torch.device) -> str | None:
        """Why this backend cannot run on this machine, with the way to get it; None where it can."""
        return None

    def refuses_head_dim(self, head_dim: int) -> str | None:
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"head_dim {head_dim} is above {self.max_head_dim}"
        if head_dim % self.head_dim_multiple:
            return f"head_dim {head_dim} is not a multiple of {self.head_dim_multiple}"
        return None

    def unsupported(self, case: Case) -> str | None:
        """Why this backend cannot do a case, as far as that is known before it is tried."""
        if case.phase not in self.phases:
            return f"does no {case.phase}"
        return self.refuses_head_dim(case.heads.head_dim)

    def workspace_bytes(self, case: Case) -> int:
        """Memory for one call beyond inputs and output, where it is large enough to matter."""
        return 0

    def prepare(self, case: Case) -> Prepared:
        raise NotImplementedError


class CudaBackend(Backend):
    """A backend that needs a CUDA device and a 16-bit dtype, as the libraries of fused kernels do."""

    max_head_dim: int | None = 256
    head_dim_multiple = 8

    def unsupported(self, case: Case) -> str | None:
        if case.dtype not in (torch.float16, torch.bfloat16):
            return f"needs float16 or bfloat16, not {str(case.dtype).removeprefix('torch.')}"
        return super().unsupported(case)

    def missing(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "needs a CUDA device"


def first_tensor(result: Any) -> torch.Tensor:
    """The output of libraries that return it alone in some versions and with the log-sum-exp in others."""
    return result[0] if isinstance(result, (tuple, list)) else result


def _bounds(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _randn(case: Any, generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal in the case's own dtype: a float32 draw of a large cache would need its memory twice over."""
    return torch.randn(*shape, generator=generator, dtype=case.dtype, device=case.device)
