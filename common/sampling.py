"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, each request with its own settings.

Drawing from softmax(logits / T) is taking the argmax of logits / T plus Gumbel noise. The noise here is a hash of
(request seed, position, token id), so a request draws the same tokens whatever batch it is computed in, whichever step
it lands in, and however often it is recomputed. Importing this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave the distribution as it is."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"sampling: temperature {self.temperature} must be 0 (greedy) or above")
        if self.top_k < 0:
            raise UserError(f"sampling: top_k {self.top_k} must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling: top_p {self.top_p} must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"sampling: min_p {self.min_p} must be between 0 (off) and 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


GREEDY = SamplingParams()


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    """Next token of each row: logits [R, V] float32, one SamplingParams and one position a row -> int64 [R].

    `positions` are those of the tokens being drawn. No host synchronisation: everything stays on the logits' device.
    """
    import torch

    if all(p.is_greedy for p in params):
        return logits.argmax(-1)
    device = logits.device

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True).unsqueeze(1)

    # Below float32's range 1 / temperature is infinite. The best logit becomes 0 first, so that dividing by a
    # temperature near 0 leaves 0 and -inf rather than infinities that cancel to NaN.
    temperature = column([max(p.temperature, 1e-37) if p.temperature else 1.0 for p in params], torch.float32)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if any(p.top_k or p.top_p < 1 or p.min_p for p in params):
        top_k = column([p.top_k or logits.shape[1] for p in params], torch.int64)
        top_p = column([p.top_p for p in params], torch.float32)
        min_p = column([p.min_p for p in params], torch.float32)
        scaled = _filtered(scaled, top_k, top_p, min_p)
    seeds = column([_signed(p.seed % (1 << 64)) for p in params], torch.int64)
    noisy = scaled + _gumbel(seeds, column(list(positions), torch.int64), logits.shape[1])
    greedy = column([p.is_greedy for p in params], torch.bool)
    return torch.where(greedy, logits, noisy).argmax(-1)


def _filtered(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Set to -inf what top-k, top-p (applied after top-k) or min-p exclude. The most likely token always stays."""
    import torch

    ordered, order = scaled.sort(-1, descending=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    ordered = ordered.masked_fill(rank >= top_k, -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # the mass of everything more likely
    # A sum of float32 may round to 1 before its tail: top_p 1 is off, and must not cut that tail.
    excluded = ((before >= top_p) & (top_p < 1)) | (probabilities < min_p * probabilities[:, :1])
    excluded[:, 0] = False
    return torch.empty_like(scaled).scatter_(1, order, ordered.masked_fill(excluded, -torch.inf))


def _gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel noise [R, V] from a hash of seed [R, 1], position [R, 1] and token id.

    The hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014), on int64 with wrap-around; 40 of its bits become
    a uniform number u strictly between 0 and 1. Large noise comes from small u, where float32 is finest; near 1, where
    it is coarsest and would round to 1, u is capped.
    """
    import torch

    token_ids = torch.arange(vocab_size, device=seeds.device)
    state = _mix(_mix(seeds + _signed(0x9E3779B97F4A7C15)) + positions)
    bits = _logical_shift(_mix(state + token_ids * _signed(0xD1342543DE82EF95)), 24)
    uniform = ((bits.float() + 0.5) / 2**40).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _logical_shift(x, shift)) * _signed(factor)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: torch.Tensor, shift: int) -> torch.Tensor:
    """>> of a signed integer copies the sign bit; the mask takes it away."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
