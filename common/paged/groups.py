"""Which decodes of a step are attended to together. Plain Python over lengths; no tensors.

A call over one row costs its launch as well as its bytes, and three KV heads do not share two cores evenly; a row that
is padded costs the bytes of its padding. So rows of about one length go together, and the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence


def group_by_length(lengths: Sequence[int], most_padding: int, most_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in groups, longest row first and its length the group's.

    most_padding: tokens by which a row may be padded: as many as cost what a call of its own would.
    most_tokens: of a group, padding counted; a row that is longer alone is a group of its own.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups:
            longest = lengths[groups[-1][0]]
            fits = (len(groups[-1]) + 1) * longest <= most_tokens
            if fits and longest - lengths[row] <= most_padding:
                groups[-1].append(row)
                continue
        groups.append([row])
    return groups
