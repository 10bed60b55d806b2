"""Text while it is generated: a line a request in a terminal, a whole answer when it ends anywhere else."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import TextIO

from common.serving import Request
from common.tokenizer import IncrementalDecoder, Tokenizer


class TextStream:
    """Call it with a request whenever a token of it has been read; `finish` when all are done.

    A single request is written piece by piece. Of several, a terminal has a line for each that shows the end of its
    text and is taken away at the end; without a terminal, `show(request)` is called when one ends.
    """

    def __init__(
        self, tokenizer: Tokenizer, num_requests: int, show: Callable[[Request], None], out: TextIO | None = None
    ) -> None:
        self.out = out or sys.stdout
        self._decoders = [IncrementalDecoder(tokenizer) for _ in range(num_requests)]
        self._texts = [""] * num_requests
        self._show = show
        size = shutil.get_terminal_size()
        self._width = size.columns
        self._single = num_requests == 1
        self._live = not self._single and self.out.isatty() and num_requests < size.lines
        self._shown: set[int] = set()
        self._drawn = False

    def has_text_of(self, request: Request) -> bool:
        """Whether the whole text of the request is on the screen already."""
        return request.request_id in self._shown

    def __call__(self, request: Request) -> None:
        i = request.request_id
        decoder = self._decoders[i]
        piece = decoder.push(request.tokens[-1])
        if request.finish_reason:
            piece += decoder.finish()
        self._texts[i] += piece
        if self._single:
            self.out.write(piece)
            self.out.flush()
        elif self._live:
            self._draw(i)
        if request.finish_reason and not self._live:
            self._shown.add(i)
            self._show(request)

    def _draw(self, i: int) -> None:
        if not self._drawn:
            self.out.write("\n" * len(self._texts))
            self._drawn = True
        up = len(self._texts) - i
        head = f"{i} > "
        text = " ".join(self._texts[i].split())
        room = max(self._width - len(head) - 1, 1)
        # Up to the request's line, the line written anew, and down again to below the last.
        self.out.write(f"\x1b[{up}A\r\x1b[K{head}{text[-room:]}\x1b[{up}B\r")
        self.out.flush()

    def finish(self) -> None:
        """Take the live lines away: the whole answers are printed where they stood."""
        if self._drawn:
            self.out.write(f"\x1b[{len(self._texts)}A\r\x1b[J")
            self.out.flush()
        self._drawn = False
