"""What a measuring script does before it measures: refuse bad input, settle the sizes, load the model, know the roof.

exp = experiment.prepare(args, __file__, PRESETS)
exp.model, exp.tokenizer, exp.out, exp.ceilings, exp.provenance(...)
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common import checkpoint, cli, results, roofline
from common.errors import UserError
from common.llama import Llama
from common.tokenizer import Tokenizer


@dataclass(frozen=True)
class Experiment:
    """A script that is ready to measure. `typed` holds the names of the sizes that the user gave; `known_ceilings` what
    the machine allows, where that is known: else `ceilings` measures it when first asked, after the sizes are checked
    and before a pool of pages takes the free memory.
    """

    args: argparse.Namespace
    out: Path
    typed: set[str]
    model: Llama
    tokenizer: Tokenizer
    known_ceilings: roofline.Ceilings | None = None

    @cached_property
    def ceilings(self) -> roofline.Ceilings:
        return self.known_ceilings or roofline.ceilings(self.model.device, self.model.dtype)

    @property
    def dtype_name(self) -> str:
        return roofline.dtype_name(self.model.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one step reads: every linear and the head once; not the embedding."""
        return self.model.config.num_linear_parameters * self.model.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        return self.model.config.kv_bytes_per_token(self.model.dtype.itemsize)

    def floor_s(self, context_tokens: float) -> float:
        """Seconds that one decode step cannot beat: its weights and `context_tokens` of K and V at the read ceiling."""
        num_bytes = self.weight_bytes + context_tokens * self.kv_bytes_per_token
        return num_bytes / (self.ceilings.memory_gb_per_s() * 1e9)

    def provenance(self, **facts: Any) -> dict[str, Any]:
        """Provenance of a result file: the run's options and machine, the model, and `facts`."""
        return results.provenance(
            self.args,
            model=self.model.origin,
            shapes=self.model.config,
            dtype=self.dtype_name,
            device=str(self.model.device),
            ceilings=self.ceilings,
            weight_bytes=self.weight_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token,
            **facts,
        )

    def check_context(self, prompt_tokens: int, output_len: int, what: str) -> None:
        """UserError if prompt and output together pass the model's context; says what fits."""
        context = self.model.config.max_position_embeddings
        if prompt_tokens + output_len > context:
            raise UserError(
                f"{what}: {prompt_tokens} prompt + {output_len} output tokens pass the model's context of {context}; "
                f"at most {max(context - prompt_tokens, 0)} output tokens fit after this prompt"
            )


def prepare(
    args: argparse.Namespace,
    script_file: str,
    presets: Mapping[str, Mapping[str, Any]],
) -> Experiment:
    """Everything before the first measurement, cheapest refusals first. Raises UserError; writes nothing."""
    out = cli.output_dir(args, script_file)
    if getattr(args, "dump_tokens", None):
        cli.check_output_file(args.dump_tokens, "--dump-tokens")
    device = checkpoint.pick_device(args.device)
    dtype = checkpoint.pick_dtype(args.dtype, device)
    typed = cli.apply_preset(args, presets, device.type)
    model, tokenizer = checkpoint.load(args.model, device=device, dtype=dtype, seed=args.seed, context=args.context)
    return Experiment(args, out, typed, model, tokenizer)
