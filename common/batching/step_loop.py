"""The loop that every scheduler of assignment 4 runs in; a policy only says what the next step computes.

    chunks of step k+1 = schedule()          from what is known, while the device computes step k
    launch step k+1                          returns at once
    read the tokens of step k                waits; requests end here

One step is in flight beyond the one being read, so the device never waits for Python. What that costs: a request that
ends by a token (EOS, a stop string) has one more token computed, which is dropped, and its pages go back when that step
has been read. A request that ends by its length is foreseen and costs nothing.

An engine that computes while it launches (a CPU) has nothing to overlap: each of its steps is read at once.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from common.pages import pages_for
from common.serving import Chunk, InputRequest, Request, Step, StepEngine, Work

MAX_PROMPT_TOKENS = 8192  # of whole prompts in one step, where a policy does not cut them: what a step's memory is for


class Flight(NamedTuple):
    """A launched step that has not been read."""

    step: Step
    work: Work
    launched_s: float
    running: int
    waiting: int
    pages_used: int


class Iteration(NamedTuple):
    """A step that has been read. `running`: requests in it; `waiting`, `pages_used`: when it had been launched."""

    start_s: float
    time_us: float
    work: Work
    running: int
    waiting: int
    pages_used: int


@dataclass(slots=True)
class Hold:
    """A request's stay in a slot of the batch: computed until `finish_s`, the slot given back at `release_s`."""

    slot: int
    request_id: int
    start_s: float
    finish_s: float = 0.0
    release_s: float = 0.0


class StepLoop:
    """Requests wait in order of arrival, run, and end. A subclass sets `policy` and writes `schedule`.

    The engine must be empty: its free pages now are all the pages there are. `on_step(loop)` is called after each step.
    """

    policy = ""

    def __init__(self, engine: StepEngine, *, on_step: Callable[["StepLoop"], None] | None = None):
        self.engine = engine
        self.total_pages = engine.num_free_pages
        self.start_s = engine.now()
        self.on_step = on_step
        self.arriving: list[tuple[float, int, Request]] = []  # a heap: (arrival, order given, request)
        self.waiting: deque[Request] = deque()  # arrived, oldest first
        self.running: list[Request] = []  # oldest first
        self.completed: list[Request] = []  # in order of their ends; refused ones too
        self.in_flight: deque[Flight] = deque()  # at most one while `schedule` runs
        self.iterations: list[Iteration] = []
        self.holds: list[Hold] = []
        self._open_holds: dict[Request, Hold] = {}
        self._slots: dict[Request, int] = {}
        self._free_slots: list[int] = []  # a heap
        self._last_read_s = 0.0
        self._num_added = 0

    # What a policy writes and uses

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; [] when there is nothing to launch before the step in flight is read."""
        raise NotImplementedError

    def decoding_requests(self) -> tuple[list[Request], int]:
        """The running requests that decode next, oldest first, and how many pages they leave free.

        When pages run out the newest request is preempted: its pages go to older ones, and it is computed again later.
        """
        page_size = self.engine.page_size
        while True:
            decoding = [r for r in self.running if r.decodes_next]
            # A decode takes a new page when its token is the first of one.
            needed = [r.num_computed % page_size for r in decoding].count(0)
            if needed <= self.engine.num_free_pages:
                return decoding, self.engine.num_free_pages - needed
            if self.in_flight:
                self.read_step()  # it may end requests, and it may be using the newest one's pages
            else:
                self.preempt_newest()

    def enter(self) -> Request:
        """Move the oldest waiting request to the running ones."""
        request = self.waiting.popleft()
        self.running.append(request)
        slot = heapq.heappop(self._free_slots) if self._free_slots else len(self._slots)
        self._slots[request] = slot
        self._open_holds[request] = Hold(slot, request.request_id, self.now())
        return request

    def preempt_newest(self) -> None:
        """Take the newest request's pages; it waits first in line, so it is still served before all later ones."""
        request = self.running[-1]
        self.engine.release(request)
        self.running.pop()
        request.preempt()
        self.waiting.appendleft(request)
        self.close_hold(request, self.now())

    # What a caller uses

    def now(self) -> float:
        """Seconds since the start of the run: what arrival times count from."""
        return self.engine.now() - self.start_s

    def add_req(self, request: Request | InputRequest) -> Request:
        """Take a request. One that can never fit is refused at once: it is completed, and `refusal` says why."""
        if isinstance(request, InputRequest):
            request = Request(request, self._num_added)
        self._num_added += 1
        pages = pages_for(request.max_tokens, self.engine.page_size)
        if request.max_tokens > self.engine.max_context:
            request.refuse(f"{request.max_tokens} tokens, and the context is {self.engine.max_context}")
        elif pages > self.total_pages:
            request.refuse(f"{request.max_tokens} tokens take {pages} pages, and the pool has {self.total_pages}")
        if request.finish_reason:
            self.completed.append(request)
        else:
            heapq.heappush(self.arriving, (request.arrival_time, self._num_added, request))
        return request

    @property
    def num_outstanding(self) -> int:
        return len(self.running) + len(self.waiting) + len(self.arriving)

    def finished(self) -> bool:
        return not (self.running or self.waiting or self.arriving or self.in_flight)

    def run(self) -> list[Request]:
        """Serve all requests; returns them in order of their ends. Whatever happens, no page stays taken."""
        try:
            while not self.finished():
                self.step()
        finally:
            self.close()
        return self.completed

    def step(self) -> None:
        """Launch the next step, then read the one before it."""
        self._take_arrivals()
        chunks = self.schedule()  # may have read the step in flight, to get its pages
        if chunks:
            self._launch(chunks)
        elif not self.in_flight:
            self._wait_for_arrival()
        behind = 1 if chunks and self.engine.is_asynchronous else 0
        if len(self.in_flight) > behind:
            self.read_step()

    def close(self) -> None:
        """Give all pages back, also in the middle of a run (an exception, Ctrl-C)."""
        try:
            for flight in self.in_flight:
                flight.step.tokens()  # nothing is released under a step that still runs
        finally:
            self.in_flight.clear()
            for request in self.running:
                self.engine.release(request)

    def print_completed(self) -> None:
        """A line a request, in the order of their ends."""
        for request in self.completed:
            if request.finish_reason == "refused":
                print(f"request {request.request_id}: refused: {request.refusal}")
                continue
            print(
                f"request {request.request_id}: {request.num_prompt_tokens} tokens in, "
                f"{request.num_output_tokens} out ({request.finish_reason}), ended at {request.token_times[-1]:.3f} s"
            )

    # Launching and reading

    def _take_arrivals(self) -> None:
        now = self.engine.now()
        # Compared as `_wait_for_arrival` waits: `now - start_s` may round to just before an arrival for ever.
        while self.arriving and self.start_s + self.arriving[0][0] <= now:
            self.waiting.append(heapq.heappop(self.arriving)[2])

    def _wait_for_arrival(self) -> None:
        assert not self.waiting and not self.running, f"{self.policy}: {len(self.waiting)} wait and nothing runs"
        if self.arriving:
            self.engine.wait_until(self.start_s + self.arriving[0][0])

    def _launch(self, chunks: list[Chunk]) -> None:
        work = Work.of(chunks)
        start_s = self.now()
        step = self.engine.launch(chunks)
        for request, _, _ in chunks:
            if not request.wants_more:
                self._vacate(request)  # its last token is on its way: another may enter in the next step
        pages_used = self.total_pages - self.engine.num_free_pages
        self.in_flight.append(Flight(step, work, start_s, len(chunks), len(self.waiting), pages_used))

    def read_step(self) -> None:
        """Wait for the oldest step in flight and take its tokens; requests that end leave."""
        flight = self.in_flight[0]
        tokens = flight.step.tokens()
        now = self.now()
        self.in_flight.popleft()
        # It began when it was launched, or when the step before it ended.
        start_s = max(flight.launched_s, self._last_read_s)
        self._last_read_s = now
        self.iterations.append(
            Iteration(start_s, (now - start_s) * 1e6, flight.work, flight.running, flight.waiting, flight.pages_used)
        )
        self.commit(tokens, now)
        if self.on_step:
            self.on_step(self)

    def commit(self, tokens: dict[Request, int], now: float) -> None:
        """Hand out the tokens of a step read at `now`, and let the requests go that end."""
        for request, token in tokens.items():
            if request.read(token, now):
                self.completed.append(request)
                self._open_holds[request].finish_s = now
                self._vacate(request)
        self.leave([r for r in self.running if r.finish_reason and not r.num_unread], now)

    def leave(self, ended: list[Request], now: float) -> None:
        """Release requests that no launched step computes any more."""
        if ended:
            for request in ended:
                self.engine.release(request)
                self.close_hold(request, now)
            gone = set(ended)
            self.running = [r for r in self.running if r not in gone]

    # Slots: places in the batch, for the timeline

    def _vacate(self, request: Request) -> None:
        slot = self._slots.pop(request, None)
        if slot is not None:
            heapq.heappush(self._free_slots, slot)

    def close_hold(self, request: Request, now: float) -> None:
        self._vacate(request)
        hold = self._open_holds.pop(request)
        hold.finish_s = hold.finish_s or now
        hold.release_s = now
        self.holds.append(hold)
