"""Which requests does the next step compute? Continuous batching, and the static batching that it replaced.

Static (naive): take a batch of requests, run it until its longest is done, take the next batch. Rows that end early
leave their slots idle; whether the machine goes on computing them or drops them, no other request may use the slot.

Continuous: decide anew at every step. Requests that ended leave, waiting ones enter, and no slot stays idle while
anybody waits (Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models").

    for r in requests: scheduler.add_req(r)
    scheduler.run(); scheduler.print_completed()
"""

import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assignment4.Section1.continous_engine import leading_prompts, whole_prompts
from common.batching.step_loop import MAX_PROMPT_TOKENS, StepLoop
from common.errors import UserError
from common.pages import pages_for
from common.serving import Chunk, Request, StepEngine


class Scheduler(StepLoop):
    """At every step: all running requests decode, and the oldest waiting ones enter while slots and pages last."""

    policy = "continuous"

    def __init__(self, engine: StepEngine, req_batch_size: int, **options):
        super().__init__(engine, **options)
        self.req_batch_size = at_least_one("req_batch_size", req_batch_size)

    def schedule(self) -> list[Chunk]:
        decoding, free_pages = self.decoding_requests()
        free_slots = self.req_batch_size - len(decoding)
        entering = []
        for request in leading_prompts(list(islice(self.waiting, free_slots)), MAX_PROMPT_TOKENS):
            free_pages -= pages_for(request.num_prefill, self.engine.page_size)
            if free_pages < 0:
                break  # nobody overtakes the oldest, or a large request might wait for ever
            entering.append(self.enter())
        return whole_prompts(decoding, entering)


class NaiveScheduler(StepLoop):
    """A batch runs until its longest request is done. Pages for all of it are set aside when it begins.

    `drop_finished`: rows that ended are not computed any more; without it they go on to the end of the batch, as rows
    of a padded batch do, and what they give is thrown away.
    """

    def __init__(self, engine: StepEngine, req_batch_size: int, *, drop_finished: bool, **options):
        super().__init__(engine, **options)
        self.req_batch_size = at_least_one("req_batch_size", req_batch_size)
        self.drop_finished = drop_finished
        self.policy = "naive, finished rows dropped" if drop_finished else "naive"
        self.batch: list[Request] = []

    def schedule(self) -> list[Chunk]:
        if not any(r.wants_more for r in self.batch):
            while self.in_flight:
                self.read_step()  # the last tokens of the batch
            self.batch = self.next_batch()
        prompts = [r for r in self.batch if r.is_prefilling]
        if prompts:  # all of the batch is read before any of it decodes
            return whole_prompts([], leading_prompts(prompts, MAX_PROMPT_TOKENS))
        return whole_prompts([r for r in self.batch if r.wants_more or not self.drop_finished], [])

    def next_batch(self) -> list[Request]:
        """The oldest waiting requests that fit together, each as long as the longest of them will run."""
        batch: list[Request] = []
        while self.waiting and len(batch) < self.req_batch_size:
            candidates = [*batch, self.waiting[0]]
            longest = max(r.output_len for r in candidates)
            lengths = [r.max_tokens if self.drop_finished else r.num_prompt_tokens + longest - 1 for r in candidates]
            pages = sum(pages_for(length, self.engine.page_size) for length in lengths)
            if pages > self.engine.num_free_pages or max(lengths) > self.engine.max_context:
                break
            batch.append(self.enter())
        return batch

    def leave(self, ended: list[Request], now: float) -> None:
        """The slots of a batch are given back together."""
        if len(ended) == len(self.running):
            super().leave(ended, now)
        elif self.drop_finished:
            for request in ended:
                self.engine.release(request)


def at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{name} must be at least 1, not {value}")
    return value
