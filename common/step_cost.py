"""What a step must move and compute: the bytes and operations behind MBU, MFU and the ceilings of a breakdown.

Bytes: every weight that is used, read once a step; K/V of the contexts, read; K/V of the new tokens, written. FLOPs:
two a weight and row, four a query-key pair, query head and element. The last layer's o_proj, gate_up, down and the head
work on the sampled rows alone, and are counted so. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from common.config import ModelConfig
from common.roofline import Ceilings
from common.serving import Work

ELEMENTWISE = {"rope+append", "norms", "sampling"}  # parts that are held against the copy ceiling


@dataclass(frozen=True)
class Cost:
    """Bytes moved and operations (a multiply-add is two)."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, ceilings: Ceilings, dtype: str, kind: str = "read") -> float:
        """What the machine needs at least: its bytes at the memory ceiling or its operations at the compute ceiling."""
        by_bytes = self.bytes / (ceilings.memory_gb_per_s(kind) * 1e9)
        return max(by_bytes, self.flops / (ceilings.peak_tflops(dtype) * 1e12))

    def shares(self, seconds: float, ceilings: Ceilings, dtype: str) -> tuple[float, float]:
        """MBU and MFU of work that took `seconds`."""
        mbu = self.bytes / seconds / (ceilings.memory_gb_per_s() * 1e9)
        return mbu, self.flops / seconds / (ceilings.peak_tflops(dtype) * 1e12)


def step_cost(config: ModelConfig, element_size: int, work: Work) -> Cost:
    """One step of the whole model: its products and its attention."""
    parts = part_costs(config, element_size, work)
    cost = sum((parts[name] for name in ("qkv", "o_proj", "gate_up", "down", "head")), Cost())
    new_kv = (work.prefill_tokens + work.decode_tokens) * config.kv_bytes_per_token(element_size)
    read_kv = work.context_tokens * config.kv_bytes_per_token(element_size)
    return cost + Cost(new_kv + read_kv, parts["attention"].flops)


def steps_cost(config: ModelConfig, element_size: int, works: Iterable[Work]) -> Cost:
    """The steps of a run, one after the other."""
    return sum((step_cost(config, element_size, work) for work in works), Cost())


def parts_seconds(
    config: ModelConfig, element_size: int, work: Work, ceilings: Ceilings, dtype: str
) -> dict[str, float]:
    """What each part of a step takes at its own ceiling, seconds. Their sum is a bound that no step beats as long as
    one part runs after the other: nearer to what can be had than `Cost.seconds` of the whole, in which the bytes of one
    part hide behind the operations of another.
    """
    costs = part_costs(config, element_size, work)
    return {name: c.seconds(ceilings, dtype, "copy" if name in ELEMENTWISE else "read") for name, c in costs.items()}


def part_costs(config: ModelConfig, element_size: int, work: Work) -> dict[str, Cost]:
    """The parts of a step that a breakdown shows, over all layers; elementwise parts count what they read and write."""
    c, layers = config, config.num_hidden_layers
    tokens = work.prefill_tokens + work.decode_tokens
    sampled = work.sampled_tokens
    rows = (layers - 1) * tokens + sampled  # rows of all layers behind the attention

    def product(weights: int, num_layers: int, num_rows: int) -> Cost:
        return Cost(weights * num_layers * element_size, 2.0 * weights * num_rows)

    qkv_width = c.q_size + 2 * c.kv_size
    prompt_tokens = work.prefill_tokens * (2 * c.q_size + 2 * c.kv_size)  # q, k, v in, out out
    attention_elements = layers * (prompt_tokens + work.decode_tokens * 2 * c.q_size)
    context_bytes = work.context_tokens * c.kv_bytes_per_token(element_size)
    pairs = work.attended_pairs + work.context_tokens
    head = c.hidden_size * c.vocab_size
    return {
        "qkv": product(c.hidden_size * qkv_width, layers, layers * tokens),
        "rope+append": Cost(2 * layers * tokens * qkv_width * element_size),
        "attention": Cost(attention_elements * element_size + context_bytes, 4.0 * pairs * c.q_size * layers),
        "o_proj": product(c.hidden_size * c.q_size, layers, rows),
        "gate_up": product(c.hidden_size * 2 * c.intermediate_size, layers, rows),
        "down": product(c.hidden_size * c.intermediate_size, layers, rows),
        "norms": Cost(2 * (layers * tokens + rows + sampled) * c.hidden_size * element_size),
        "head": product(head, 1, sampled) if sampled else Cost(),
        "sampling": Cost(4.0 * sampled * c.vocab_size),
    }
