"""The `attend`s: what tells "no cache", "cached" and "batched" apart, while the decoder stays the same.

An attend is made for one forward pass and called once a layer with the fused q, k, v of all packed tokens. It owns the
tokens' positions, their rotary angles and where K and V are kept:

    split -> rotate -> store -> attention

    Prefill(model, lengths)          every sequence from its first token, nothing kept: full recompute
    Prefill(model, lengths, cache)   the same, K and V kept in a ContiguousKVCache
    Decode(model, cache)             one new token a row, attending over the row's cached tokens
    PaddedDecode(model, cache)       the same over the longest row's length with a mask: what padding costs
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F

from common.config import ModelConfig
from common.kv_cache import ContiguousKVCache
from common.llama import Llama
from common.rope import RotaryTable, rotate

CPU_TILE = 128  # queries; of 64, 128, 256 the one that was best or level at 512 tokens


@lru_cache(maxsize=4)
def rotary_table(config: ModelConfig, device: torch.device) -> RotaryTable:
    """One table a model and device; it is read, never written."""
    return RotaryTable(config, device)


class Attend:
    """The frame that every attend shares. A fused backend overrides `__call__` instead of its parts.

    positions: int32 or int64 [T], each packed token's position in its own sequence.
    """

    def __init__(self, model: Llama, positions: torch.Tensor) -> None:
        self.config = model.config
        self.positions = positions
        self.angles = rotary_table(model.config, model.device).at(positions)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Fused q, k, v of one layer [T, (Hq + 2 Hkv) d] -> attention output [T, Hq d]."""
        q, k, v = self.append(layer, qkv)
        return self.attention(layer, q, k, v).reshape(len(qkv), self.config.q_size)

    def append(self, layer: int, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All but the attention: rotate, and store K and V; gives q, k, v."""
        q, k, v = self.split_and_rotate(qkv)
        self.store(layer, k, v)
        return q, k, v

    def split_and_rotate(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, (Hq + 2 Hkv) d] -> rotated q [T, Hq, d], rotated k [T, Hkv, d], v [T, Hkv, d]."""
        num_heads, num_kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, self.config.head_dim)
        rotated = rotate(heads[:, : num_heads + num_kv_heads], *self.angles)  # q and k in one go
        return rotated[:, :num_heads], rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :]

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep k, v [T, Hkv, d] for later steps. Without a cache: nothing."""

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, d], the new k, v [T, Hkv, d] -> [T, Hq, d]."""
        raise NotImplementedError


class Prefill(Attend):
    """Packed sequences of any lengths, each causal over itself alone, from its first token.

    With `cache` (empty) their K and V are kept; without, this is the full recompute of a decoder with no cache.
    """

    def __init__(self, model: Llama, lengths: list[int], cache: ContiguousKVCache | None = None) -> None:
        if cache is not None:
            if any(cache.lengths):
                raise ValueError("Prefill starts at position 0: its cache must be empty")
            cache.reserve(lengths)
        positions = torch.cat([torch.arange(n, device=model.device) for n in lengths])
        super().__init__(model, positions)
        self.lengths = lengths
        self.cache = cache

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.cache is None:
            return
        keys, values = self.cache.layers[layer]  # [B, Hkv, max_len, d] each
        for row, (new_k, new_v) in enumerate(zip(k.split(self.lengths), v.split(self.lengths))):
            keys[row, :, : len(new_k)] = new_k.transpose(0, 1)
            values[row, :, : len(new_v)] = new_v.transpose(0, 1)

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outputs, start = [], 0
        for length, run in groupby(self.lengths):  # neighbours of one length go as a batch
            count = len(list(run))
            tokens = slice(start, start + count * length)
            outputs.append(causal_attention(*(t[tokens].unflatten(0, (count, length)) for t in (q, k, v))))
            start = tokens.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, S, Hq, d], k, v [B, S, Hkv, d] -> [B * S, Hq, d]; as many queries as keys, so "causal" is unambiguous."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.device.type == "cpu" and q.shape[2] > CPU_TILE:
        out = _tiled_causal(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _tiled_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same, heads before tokens, a tile of queries at a time over the keys up to its end.

    torch's CPU kernel computes the masked half and throws it away (measured: causal as slow as not); tiles skip most of
    it.
    """
    length = q.shape[2]
    outputs = []
    for start in range(0, length, CPU_TILE):
        end = min(start + CPU_TILE, length)
        mask = _tile_mask(start, end, q.dtype)
        queries, keys, values = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        outputs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True))
    return torch.cat(outputs, dim=2)


@lru_cache(maxsize=16)
def _tile_mask(start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """What queries start .. end - 1 add to the scores of keys 0 .. end - 1; every layer of a prompt needs the same."""
    return torch.full((end - start, end), -torch.inf, dtype=dtype).triu(start + 1)


class Decode(Attend):
    """One new token for each of `rows` of the cache (all unless given), each over exactly the tokens it has."""

    def __init__(self, model: Llama, cache: ContiguousKVCache, rows: list[int] | None = None) -> None:
        self.rows = list(range(len(cache.lengths))) if rows is None else rows
        positions = torch.tensor([cache.lengths[row] for row in self.rows], device=model.device)
        chosen = set(self.rows)
        cache.reserve([int(row in chosen) for row in range(len(cache.lengths))])
        super().__init__(model, positions)
        self.cache = cache
        self.row_index = torch.tensor(self.rows, device=model.device)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        keys, values = self.cache.layers[layer]
        if (
            len(self.runs) == 1
        ):  # neighbouring rows at one position: a slice, which a CPU copies faster than it scatters
            first_row, count, length = self.runs[0]
            keys[first_row : first_row + count, :, length - 1] = k
            values[first_row : first_row + count, :, length - 1] = v
        else:
            keys[self.row_index, :, self.positions] = k
            values[self.row_index, :, self.positions] = v

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.cache.layers[layer]
        outputs, start = [], 0
        for first_row, count, length in self.runs:  # rows of one length together: nothing is padded
            rows = slice(first_row, first_row + count)
            outputs.append(decode_attention(q[start : start + count], keys[rows, :, :length], values[rows, :, :length]))
            start += count
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbouring rows of one length, as (first row, number of rows, length)."""
        runs: list[tuple[int, int, int]] = []
        for row in self.rows:
            length = self.cache.lengths[row]
            if runs and runs[-1][0] + runs[-1][1] == row and runs[-1][2] == length:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
            else:
                runs.append((row, 1, length))
        return runs


class PaddedDecode(Decode):
    """Decode as a padded batch does it: every row as long as the longest, the surplus masked away after the work."""

    def __init__(self, model: Llama, cache: ContiguousKVCache, rows: list[int] | None = None) -> None:
        super().__init__(model, cache, rows)
        longest = max(cache.lengths[row] for row in self.rows)
        slots = torch.arange(longest, device=model.device)
        self.visible = (slots <= self.positions.unsqueeze(1)).view(-1, 1, 1, longest)  # [B, 1, 1, longest]

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.cache.layers[layer][:, :, :, : self.visible.shape[-1]]
        if self.rows != list(range(len(keys))):
            keys, values = keys[self.row_index], values[self.row_index]
        return decode_attention(q, keys, values, self.visible)


def decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """q [B, Hq, d] over keys, values [B, Hkv, S, d] -> [B, Hq, d]; `visible` [B, 1, 1, S] masks slots.

    The query heads that share a KV head are passed as its "positions", so that the keys are read once for all of them.
    """
    batch_size, num_heads, head_dim = q.shape
    grouped = q.reshape(batch_size, keys.shape[1], -1, head_dim)  # [B, Hkv, Hq / Hkv, d]
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible)
    return out.reshape(batch_size, num_heads, head_dim)
