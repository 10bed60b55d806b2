"""Does anything grow while an engine serves? 10,000 steps under the chunked scheduler, with preemptions and stops.

What a server would hand on (the ended requests, the iterations) is taken away after each wave; all else must be what it
was: objects of Python, bytes of tensors, lines and pages.
"""

import gc
import random

import pytest
import torch

from assignment4.Section1.chunked_scheduler import Scheduler
from common.engine import Engine
from common.serving import InputRequest, Request


def wave(engine, model, seed, steps):
    """Serve requests until `steps` steps have run, then let the rest end. Returns the steps and the preemptions."""
    draw = random.Random(seed)
    loop = Scheduler(engine, token_batch_size=24, req_batch_size=6)
    done = preemptions = number = 0
    while done < steps or not loop.finished():
        while done < steps and loop.num_outstanding < 9:
            prompt = [draw.randrange(model.config.vocab_size) for _ in range(draw.randint(1, 40))]
            given = InputRequest(prompt_token_ids=prompt, output_len=draw.randint(1, 30), ignore_eos=False)
            loop.add_req(Request(given, number, eos_token_ids=[5, 6, 7]))
            number += 1
        loop.step()
        done += len(loop.iterations)
        preemptions += sum(r.preemptions for r in loop.completed)
        for kept in (loop.iterations, loop.completed, loop.holds):
            kept.clear()
    loop.close()
    return done, preemptions


def state(engine):
    """What could grow, counted when nothing runs."""
    for _ in range(3):
        gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if type(o) is torch.Tensor and not o.is_mkldnn]  # packed weights hide their storage
    return {
        "objects": len(objects),
        "tensors": len(tensors),
        "bytes": sum(t.untyped_storage().nbytes() for t in tensors),
        "lines": (len(engine._slots), len(engine._free_slots), len(engine._known_pages)),
        "pages": (engine.num_free_pages, len(engine.pool._free), sum(engine.pool._taken)),
    }


@pytest.mark.slow
def test_nothing_grows_over_ten_thousand_steps(lively):
    model = lively[0]
    with torch.inference_mode():
        engine = Engine(model, page_size=4, num_pages=34, max_requests=12)
        wave(engine, model, 1, 1000)  # whatever is made once
        before = state(engine)
        steps, preemptions = wave(engine, model, 2, 10_000)
        after = state(engine)
    assert steps >= 10_000 and preemptions > 50
    # A handful of objects is cached here and there; one a step would be 10,000. The scratch memory of a gather is as
    # large as the largest yet.
    assert after.pop("objects") < before.pop("objects") + 200
    assert after.pop("bytes") < before.pop("bytes") + 50_000
    assert after == before
    assert after["lines"] == (0, 12, 0) and after["pages"] == (34, 34, 0)
