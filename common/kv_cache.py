"""Where keys and values live: `ContiguousKVCache` (a fixed piece of memory a row) and `DistKVPool` (shared pages).

Which page belongs to whom is bookkeeping without tensors and stands in common/pages.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from common.config import ModelConfig
from common.pages import PageAllocator


class ContiguousKVCache:
    """K and V of `batch_size` sequences of up to `max_len` tokens, one tensor a layer: [2, B, Hkv, max_len, d].

    Head-major, so that one head's keys stand one after another and decoding streams them. Zero-filled: some kernels
    multiply unused slots by zero, and zero times NaN is NaN.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (2, batch_size, config.num_key_value_heads, max_len, config.head_dim)
        self.max_len = max_len
        self.lengths = [0] * batch_size
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, counts: list[int]) -> None:
        """Make room for `counts[i]` more tokens in row i. ValueError names the first row that would overflow."""
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + count > self.max_len:
                raise ValueError(f"KV cache row {row}: {length} + {count} tokens, but max_len is {self.max_len}")
        self.lengths = [length + count for length, count in zip(self.lengths, counts)]


class DistKVPool(PageAllocator):
    """A page allocator and the memory of its pages: one zero-filled tensor a layer.

    layers[i]: [capacity + 1, 2, page_size, Hkv, d] ("NHD": token, head, dim), K before V. The page numbered `capacity`
    belongs to nobody: rows that pad a CUDA graph's batch write there.
    head_major: lay the memory out head before token (the shape stays as above). One head's tokens of a page then stand
    together, and gathering pages gives the layout that a CPU streams best.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        head_major: bool = False,
    ) -> None:
        super().__init__(capacity, page_size)
        self.head_major, self.device = head_major, torch.device(device)
        tokens_and_heads = (num_kv_heads, page_size) if head_major else (page_size, num_kv_heads)
        shape = (capacity + 1, 2, *tokens_and_heads, head_dim)
        stored = [_zeros(shape, dtype, self.device) for _ in range(num_layers)]
        self.layers = [layer.transpose(2, 3) if head_major else layer for layer in stored]

    @property
    def scratch_page(self) -> int:
        return self.capacity

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages that can be handed out."""
        return sum(layer[:-1].nbytes for layer in self.layers)

    @staticmethod
    def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        return page_size * config.kv_bytes_per_token(dtype.itemsize)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.zeros; on a CPU of memory that the system hands out, zeroed, when it is first touched. A pool of gigabytes
    then takes no time to make, and no memory before its pages are used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    line = 64  # bytes: a cache line, to which torch aligns what it allocates
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + line, dtype=np.uint8)
    first = -raw.ctypes.data % line
    return torch.from_numpy(raw[first : first + num_bytes]).view(dtype).view(shape)
