"""Where keys and values live: `ContiguousKVCache` (a fixed piece of memory a row).

The paged pool joins it here; which page belongs to whom is bookkeeping without tensors and stands in common/pages.py.
"""

from __future__ import annotations

import torch

from common.config import ModelConfig


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
