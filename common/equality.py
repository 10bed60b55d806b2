"""Are two greedy runs the same? The master test: same tokens, except where the reference itself is all but undecided.

Rounding differs between ways of computing the same thing, so a row may part from the reference at a step where the
reference's two best logits are closer than a tolerance. Such rows are ties: counted and printed, not hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.attention import Prefill
from common.errors import CheckFailed
from common.llama import Llama

FLOAT32_TIE = 1e-4
# In 16 bits: this many times the dtype's rounding (eps), of the largest logit. Measured against float32, the difference
# of the two best logits of random weights in 30 layers is off by 1.6 eps (standard deviation), twice computed 2.3 eps.
HALF_TIE_EPS = 8
MAX_TIE_SHARE = 0.01


@dataclass(frozen=True)
class Difference:
    """A row that parted from the reference at output token `step`, where its two best logits were `margin` apart."""

    row: int
    step: int
    margin: float
    is_tie: bool


def next_logits(model: Llama, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [V] of the token after `tokens`, all of them recomputed: the plainest way there is."""
    last = torch.tensor([len(tokens) - 1], device=model.device)
    ids = torch.tensor(list(tokens), device=model.device)
    return model.logits(model.forward(ids, Prefill(model, [len(tokens)]), last))[0]


def greedy_reference(model: Llama, prompt: Sequence[int], output_len: int) -> list[int]:
    """`output_len` greedy tokens by full recompute; EOS is a token like any other."""
    tokens = list(prompt)
    for _ in range(output_len):
        tokens.append(int(next_logits(model, tokens).argmax()))
    return tokens[len(prompt) :]


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first step at which two rows of tokens differ, over the shorter of the two; None where they do not."""
    return next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), None)


def differences(
    model: Llama, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]
) -> list[Difference]:
    """The rows of `got` that part from `expected` (over the shorter of the two), each judged at its first step."""
    found = []
    for row, (prompt, want, have) in enumerate(zip(prompts, expected, got, strict=True)):
        step = first_difference(want, have)
        if step is None:
            continue
        logits = next_logits(model, [*prompt, *want[:step]])
        best = logits.topk(2).values
        tolerance = FLOAT32_TIE
        if model.dtype != torch.float32:
            tolerance = HALF_TIE_EPS * torch.finfo(model.dtype).eps * float(logits.abs().max())
        margin = float(best[0] - best[1])
        found.append(Difference(row, step, margin, margin < tolerance))
    return found


def peer_sentence(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    name: str,
) -> str:
    """How a peer's greedy tokens compare with ours. In float32 they must be the same (CheckFailed); in 16 bits, where
    two libraries round differently at every step, the rows that part are counted.
    """
    if model.dtype == torch.float32:
        return require_equal(model, prompts, theirs, ours, f"against {name}")
    count = len(differences(model, prompts, theirs, ours))
    return f"against {name}: {count} of {len(prompts)} rows part from its tokens, as rounding to 16 bits may make them"


def require_equal(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    got: Sequence[Sequence[int]],
    what: str,
) -> str:
    """A sentence that says `what` is equal. Raises CheckFailed naming the first row and step that differ for no reason.

    At most 1 % of the rows (one row of a small set) may be ties.
    """
    found = differences(model, prompts, expected, got)
    parted = {d.row for d in found}
    for row, (want, have) in enumerate(zip(expected, got)):
        if row not in parted and len(want) != len(have):
            raise CheckFailed(f"{what}: row {row} has {len(have)} tokens, {len(want)} were expected")
    wrong = [d for d in found if not d.is_tie]
    if wrong:
        d = wrong[0]
        raise CheckFailed(
            f"{what}: row {d.row} differs at output token {d.step} (expected {expected[d.row][d.step]}, got "
            f"{got[d.row][d.step]}; the reference's two best logits are {d.margin:.2g} apart)"
        )
    if len(found) > max(1, MAX_TIE_SHARE * len(prompts)) and model.dtype == torch.float32:
        raise CheckFailed(f"{what}: {len(found)} of {len(prompts)} rows part at near-ties, more than chance explains")
    ties = f" ({len(found)} parted at a near-tie)" if found else ""
    return f"{what}: the same tokens{ties}"
