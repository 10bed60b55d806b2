"""The padded way to batch unequal prompts, kept beside the packed one to show what padding costs.

Every prompt is filled up to the longest, so the prefill computes tokens that nobody asked for, and every decode step
attends over as many slots as the longest row has, the surplus masked away after the work is done. The tokens are the
same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.attention import PaddedDecode, Prefill
from common.generation import StepTimes, StopRule
from common.kv_cache import ContiguousKVCache
from common.llama import Llama

PAD = 0  # any id: causal attention keeps real tokens from seeing what stands after them


def generate_padded(
    model: Llama, prompts: Sequence[Sequence[int]], stop: StopRule, times: StepTimes
) -> list[list[int]]:
    """Greedy tokens after each of `prompts`, as one rectangle; finished rows go on computing until all are done."""
    lengths = [len(prompt) for prompt in prompts]
    batch_size, longest = len(prompts), max(lengths)
    cache = ContiguousKVCache(
        model.config, batch_size, longest + stop.output_len, dtype=model.dtype, device=model.device
    )
    outputs: list[list[int]] = [[] for _ in prompts]
    times.start()
    padded = [[*prompt, *[PAD] * (longest - len(prompt))] for prompt in prompts]
    ids = torch.tensor(padded, device=model.device).flatten()  # [B * longest]
    last = torch.tensor([row * longest + n - 1 for row, n in enumerate(lengths)], device=model.device)
    hidden = model.forward(ids, Prefill(model, [longest] * batch_size, cache), rows=last)
    cache.lengths = lengths  # the padding's K and V are overwritten as the rows grow
    while True:
        next_ids = model.logits(hidden).argmax(-1)
        for output, token in zip(outputs, next_ids.tolist()):
            if stop.finish_reason(output) is None:
                output.append(token)
        times.step()
        if all(stop.finish_reason(output) is not None for output in outputs):
            return outputs
        hidden = model.forward(next_ids, PaddedDecode(model, cache))
