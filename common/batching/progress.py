"""Streaming progress of a schedulers' run on stderr: requests done, tokens a second, pages free, time to go."""

import sys
import time
from collections.abc import Sequence

from common.batching.step_loop import StepLoop

PROGRESS_INTERVAL_S = 0.2


class Progress:
    """Requests done, tokens a second, pages free and ETA on stderr, where it is a terminal."""

    def __init__(self, label: str, total: int):
        self.label = label
        self.total = total
        self.bar = None
        self.tokens = 0
        self.next_s = 0.0

    def begin(self, loops: Sequence[StepLoop]) -> None:
        self.loops = loops
        self.start_s = time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=self.label, unit="req", leave=False)

    def __call__(self, loop: StepLoop) -> None:
        if self.bar is None:
            return
        self.tokens += loop.iterations[-1].work.sampled_tokens
        now = time.perf_counter()
        if now < self.next_s:
            return
        self.next_s = now + PROGRESS_INTERVAL_S
        self.bar.n = sum(len(each.completed) for each in self.loops)
        rate = self.tokens / max(1e-9, now - self.start_s)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s, {loop.engine.num_free_pages:,} pages free")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
