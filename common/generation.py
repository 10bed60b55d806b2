"""What the generation loops in the scripts share: when to stop, and how long each step took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class StopRule:
    """A row stops after `output_len` tokens or, unless `ignore_eos`, at the first of `eos_token_ids`.

    A length-driven measurement ignores EOS: it is generated like any other token, never masked, so every row has
    exactly `output_len` tokens and so has every peer.
    """

    output_len: int
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def finish_reason(self, tokens: Sequence[int]) -> str | None:
        """ "stop" at an EOS id (which counts as a token), "length" at the limit, None while the row goes on."""
        if not self.ignore_eos and tokens and tokens[-1] in self.eos_token_ids:
            return "stop"
        return "length" if len(tokens) >= self.output_len else None


@dataclass
class StepTimes:
    """Clock stamps of a generation: `start()`, then `step()` after each forward pass. Device work is waited for."""

    device: torch.device
    stamps: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.stamps = [self._now()]

    def step(self) -> None:
        self.stamps.append(self._now())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def num_steps(self) -> int:
        return max(len(self.stamps) - 1, 0)

    def until(self, num_tokens: int) -> float:
        """Seconds from the start until `num_tokens` tokens were there; the first comes from the prefill."""
        return self.stamps[num_tokens] - self.stamps[0]

    @property
    def prefill_s(self) -> float:
        """Seconds of the first step, which reads the prompt and gives the first token."""
        return self.until(1)

    @property
    def total_s(self) -> float:
        return self.stamps[-1] - self.stamps[0]
