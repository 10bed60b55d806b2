"""Which heads and which backends an attention benchmark measures: options, named shapes, names. Imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from common.config import SHAPES
from common.errors import UserError

CONFIGS = ("llama2-7b", "llama3-8b", "llama3-70b")  # measured unless --config or --heads says otherwise
PREFILL_ONLY = ("flashinfer-fa2", "flashinfer-fa3")
DECODE_ONLY = ("torch-gather", "flashinfer-cuda-core", "flashinfer-tensor-core", "triton-balanced")
# In the order of legends; common/attention_bench/backends has one backend under each name.
BACKENDS = (
    *("torch-flash", "torch-cudnn", "torch-efficient", "torch-math", "torch-varlen", "torch-gather"),
    *("flash-attn-2", "flash-attn-3", "flash-attn-4", "vllm-flash-attn-2", "vllm-flash-attn-3"),
    *("flashinfer-fa2", "flashinfer-fa3", "flashinfer-cuda-core", "flashinfer-tensor-core"),
    *("triton", "triton-balanced"),
)
FAMILIES = ("torch", "flash-attn", "vllm", "flashinfer", "triton")


@dataclass(frozen=True)
class Heads:
    """Query heads, K/V heads (each shared by a group of query heads) and the elements of one head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        options = {"num_heads": "--heads", "num_kv_heads": "--kv-heads", "head_dim": "--head-dim"}
        for name, option in options.items():
            if getattr(self, name) < 1:
                raise UserError(f"{option} {getattr(self, name)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"--heads {self.num_heads} is not a multiple of --kv-heads {self.num_kv_heads}: every K/V head serves "
                "the same number of query heads"
            )

    @property
    def group(self) -> int:
        """Query heads that share one K/V head; 1 without grouping."""
        return self.num_heads // self.num_kv_heads


def add_options(parser: argparse.ArgumentParser, phase: str) -> None:
    """--config, --heads, --kv-heads, --head-dim and --backends."""
    group = parser.add_argument_group("shapes and backends")
    group.add_argument(
        "--config", metavar="NAMES", help=f"of {', '.join(SHAPES)}, comma-separated (default: {', '.join(CONFIGS)})"
    )
    group.add_argument("--heads", type=int, metavar="N", help="query heads of a shape of your own")
    group.add_argument("--kv-heads", type=int, metavar="N", help="its K/V heads (default: as many as --heads)")
    group.add_argument("--head-dim", type=int, metavar="N", help="its head size (default: 128)")
    names = ", ".join([*FAMILIES[:-1], *names_of(phase)])
    group.add_argument("--backends", metavar="NAMES", help=f"comma-separated, of {names} (default: all there are)")


def names_of(phase: str) -> list[str]:
    """The backends of "prefill" or "decode"."""
    others = DECODE_ONLY if phase == "prefill" else PREFILL_ONLY
    return [name for name in BACKENDS if name not in others]


def parse_configs(args: argparse.Namespace) -> dict[str, Heads]:
    """Name -> heads of what was asked for. Raises UserError."""
    own = [value for value in (args.heads, args.kv_heads, args.head_dim) if value is not None]
    if own and args.config is not None:
        raise UserError("--config and --heads/--kv-heads/--head-dim: give one or the other")
    if own:
        if args.heads is None:
            raise UserError("--kv-heads and --head-dim describe a shape with --heads N; give --heads too")
        kv_heads = args.heads if args.kv_heads is None else args.kv_heads
        heads = Heads(args.heads, kv_heads, 128 if args.head_dim is None else args.head_dim)
        return {f"heads-{heads.num_heads}-{heads.num_kv_heads}-{heads.head_dim}": heads}
    names = [name.strip() for name in args.config.split(",")] if args.config is not None else CONFIGS
    for name in names:
        if name not in SHAPES:
            raise UserError(f"--config: {name!r} is unknown; choose among {', '.join(SHAPES)}")
    shapes = {name: SHAPES[name] for name in names}
    return {name: Heads(s.num_attention_heads, s.num_key_value_heads, s.head_dim) for name, s in shapes.items()}


def parse_backends(args: argparse.Namespace, phase: str) -> list[str] | None:
    """The names that --backends gives, families spelt out, in the order of legends; None when it was not typed.

    Raises UserError for a name that is none, or that does nothing in this phase.
    """
    if args.backends is None:
        return None
    able, chosen = names_of(phase), set()
    for name in (part.strip() for part in args.backends.split(",")):
        found = [b for b in able if b == name or (name in FAMILIES and b.startswith(name))]
        if not found:
            reason = f"does no {phase}" if name in BACKENDS else "is unknown"
            known = ", ".join([*FAMILIES[:-1], *able])
            raise UserError(f"--backends: {name!r} {reason}; choose among {known}")
        chosen |= set(found)
    return [name for name in able if name in chosen]
