"""Which part of every weight a rank of a tensor-parallel run holds. No tensors, no processes: ranges alone.

    column split   qkv (whole heads), gate_up, the head: a rank computes some of the outputs, from the whole input
    row split      o_proj, down_proj: a rank computes a partial sum of every output, from its part of the input
    not split      norms and the embedding

A column split followed by a row split needs one sum over the ranks and nothing else: what the first one leaves on a
rank is what the second one reads there. (Shoeybi et al., "Megatron-LM", 2019, section 3.)
"""

from __future__ import annotations

from common.checkpoint import Shard
from common.config import ModelConfig
from common.errors import UserError


def even_parts(total: int, parts: int) -> list[range]:
    """0..total cut into `parts` neighbouring ranges whose sizes differ by at most one, the larger ones first.

    even_parts(7, 3) -> [range(0, 3), range(3, 5), range(5, 7)]
    """
    size, larger = divmod(total, parts)
    starts = [i * size + min(i, larger) for i in range(parts + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:])]


def head_parts(num_heads: int, num_kv_heads: int, parts: int) -> list[tuple[range, range]]:
    """(query heads, KV heads) of each of `parts` ranks; every rank can attend with what it holds alone.

    Up to as many ranks as KV heads: whole groups (a KV head and its query heads), as evenly as they go. More ranks: the
    ranks are divided among the KV heads, and a KV head's query heads among its ranks; the KV head is on each of them.
    """
    group = num_heads // num_kv_heads  # query heads that share a KV head
    if parts <= num_kv_heads:
        return [(range(kv.start * group, kv.stop * group), kv) for kv in even_parts(num_kv_heads, parts)]
    held = []
    for kv_head, ranks in enumerate(even_parts(parts, num_kv_heads)):
        for q in even_parts(group, len(ranks)):
            held.append((range(kv_head * group + q.start, kv_head * group + q.stop), range(kv_head, kv_head + 1)))
    return held


def shard_of(config: ModelConfig, rank: int, world_size: int, group: object | None = None) -> Shard:
    """Rank `rank`'s part of a model. group: what its products are summed over
    (`common.tensor_parallel.collectives.TensorParallel`).

    Raises UserError when there are more ranks than query heads (or feed-forward columns, or vocabulary rows).
    """
    limits = {
        "query heads": config.num_attention_heads,
        "feed-forward columns": config.intermediate_size,
        "vocabulary rows": config.vocab_size,
    }
    for what, count in limits.items():
        if world_size > count:
            raise UserError(f"{world_size} processes cannot share {count} {what}; start at most {count}")
    q_heads, kv_heads = head_parts(config.num_attention_heads, config.num_key_value_heads, world_size)[rank]
    return Shard(
        q_heads=q_heads,
        kv_heads=kv_heads,
        ffn=even_parts(config.intermediate_size, world_size)[rank],
        vocab=even_parts(config.vocab_size, world_size)[rank],
        group=group if world_size > 1 else None,
    )
