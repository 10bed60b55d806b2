"""From the command to the first token: where that time went, part by part.

Kernels are compiled (or fetched from Triton's cache on the disk) when they are first needed, in the middle of whatever
needs them. Triton reports each; what it reports is taken out of the part it happened in and shown as `kernels`, with
how many had to be compiled: none when the cache is warm.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class KernelTimes:
    """Adds up what Triton reports of the kernels it makes ready: a listener in the form that it calls."""

    seconds: float = 0.0
    compiled: int = 0
    cached: int = 0

    def __call__(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        self.seconds += times.total / 1e6  # microseconds
        self.compiled += not cache_hit
        self.cached += cache_hit

    def listen(self) -> KernelTimes:
        """From now on; where there is no Triton, or one that reports nothing, the counts stay 0."""
        with contextlib.suppress(ImportError, AttributeError):
            from triton import knobs

            _ = knobs.compilation.listener  # a Triton without it would take any name and never call it
            knobs.compilation.listener = self
        return self


class StartUp:
    """The parts of a start. began: `clock()` when the command began; what passed until now was imports."""

    def __init__(
        self, began: float, *, clock: Callable[[], float] = time.perf_counter, kernels: KernelTimes | None = None
    ) -> None:
        self._began, self._clock = began, clock
        self._kernels = kernels or KernelTimes().listen()
        self._parts = {"imports": clock() - began}
        self._first_token_s: float | None = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside is `name`, but for the kernels that are made ready on the way."""
        start, kernels = self._clock(), self._kernels.seconds
        yield
        inside = self._kernels.seconds - kernels
        self._parts[name] = self._parts.get(name, 0.0) + max(self._clock() - start - inside, 0.0)

    def ready(self) -> str:
        """The line to print when everything is there for the first request."""
        parts = dict(self._parts)
        if self._kernels.compiled + self._kernels.cached:
            parts[f"kernels ({self._counts()})"] = self._kernels.seconds
        shown = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items() if seconds >= 0.05)
        return f"ready in {self._clock() - self._began:.1f} s: {shown or 'imports 0.0 s'}"

    def token(self) -> None:
        """A token is on the host; only the first is noted."""
        if self._first_token_s is None:
            self._first_token_s = self._clock() - self._began

    def first_token(self) -> str:
        """How long the first token took, and whether kernels had to be compiled for it."""
        if self._first_token_s is None:
            return "no token was computed"
        counts = f" ({self._counts()})" if self._kernels.compiled + self._kernels.cached else ""
        return f"first token {self._first_token_s:.1f} s after the command{counts}"

    def _counts(self) -> str:
        compiled, cached = self._kernels.compiled, self._kernels.cached
        return f"cold: {compiled} compiled, {cached} from the cache" if compiled else f"warm: {cached} from the cache"
