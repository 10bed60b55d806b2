"""Where weights come from, and how they become a `Llama`.

`load(None)` takes `$TLAB_MODEL`, else /model/Meta-Llama-3-8B-Instruct where that exists and fits a GPU, else the
embedded model. `load(source)` takes a folder, a hub id, "embedded" or "random:SHAPE". One printed line says which, and
why. Tensors go straight to their dtype and device, one at a time; q, k, v and gate, up are fused on the way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from common.config import SHAPES, ModelConfig
from common.errors import UserError, first_line
from common.kernels.linear import Linear, SplitHead
from common.kernels.rms_norm import Norm
from common.llama import Layer, Llama
from common.memory import free_bytes, human_bytes
from common.tensor_source import WHOLE, RandomSource, SafetensorsSource, TensorSource
from common.tokenizer import ByteTokenizer, PretrainedTokenizer, Tokenizer

DEFAULT_FOLDER = Path("/model/Meta-Llama-3-8B-Instruct")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_CONTEXT = 2**24  # positions are multiplied in float32, where larger ones collapse onto each other
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A resolved model source: what `--model` meant on this machine.

    kind: "folder", "hub", "embedded" or "random". `reason` ends the line "model: ..., from ..., because ...".
    """

    kind: str
    name: str
    reason: str
    folder: Path | None = None
    config: ModelConfig | None = None
    distribution: str = "normal"


@dataclass(frozen=True)
class Shard:
    """The part of every weight that one rank holds, as half-open ranges; `Shard.whole` is one device.

    Query heads, KV heads, feed-forward columns and vocabulary rows are split; norms and the embedding are not.
    common/tensor_parallel/sharding.py has the rules. group: the `common.tensor_parallel.collectives.TensorParallel`
    that sums and gathers, or None.
    """

    q_heads: range
    kv_heads: range
    ffn: range
    vocab: range
    group: object | None = None

    @classmethod
    def whole(cls, config: ModelConfig) -> Shard:
        return cls(
            range(config.num_attention_heads),
            range(config.num_key_value_heads),
            range(config.intermediate_size),
            range(config.vocab_size),
        )


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the first CUDA device where there is one, else the CPU. Raises UserError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: PyTorch sees no CUDA device; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: only {torch.cuda.device_count()} CUDA device(s) here, counted from 0")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU, bfloat16 on a GPU that computes it (capability 8.0), else float16."""
    has_bfloat16 = _has_bfloat16(device)
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: unknown; use auto, {', '.join(DTYPES)}")
    if name == "bfloat16" and not has_bfloat16:
        raise UserError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} cannot compute it; use float16")
    return DTYPES[name]


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)


def resolve(source: str | None, device: torch.device, dtype: torch.dtype, context: int | None = None) -> Source:
    """Decide what `source` means here. Raises UserError where it means nothing."""
    if source is None:
        found = _default_source(device, dtype)
    elif source == "embedded":
        found = Source("embedded", "SmolLM2-135M-Instruct", "--model embedded")
    elif source.startswith("random:"):
        found = _random_source(source)
    elif (folder := _existing_folder(source)) is not None:
        found = Source("folder", source, "--model names the folder", folder=folder)
    elif _HUB_ID.fullmatch(source) and not source.startswith((".", "/", "~")):
        found = Source("hub", source, "--model names a hub id")
    else:
        raise UserError(f"--model {source[:200]}: no such folder; use a folder, a hub id, embedded or random:SHAPE")
    if context is not None:
        if found.kind != "random":
            raise UserError("--context: only random: models have a context to choose; leave it out")
        if context > MAX_CONTEXT:
            raise UserError(f"--context {context}: rotary positions are exact up to {MAX_CONTEXT} only")
        assert found.config is not None
        found = replace(found, config=found.config.with_context(context))
    return found


def _existing_folder(source: str) -> Path | None:
    try:
        folder = Path(source).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a name too long, a home folder that is not there
        return None


def _default_source(device: torch.device, dtype: torch.dtype) -> Source:
    named = os.environ.get("TLAB_MODEL")
    if named:
        try:
            return replace(resolve(named, device, dtype), reason="TLAB_MODEL is set")
        except UserError as error:
            raise UserError(str(error).replace("--model", "TLAB_MODEL", 1)) from None
    embedded = Source("embedded", "SmolLM2-135M-Instruct", f"{DEFAULT_FOLDER} is not there")
    if not DEFAULT_FOLDER.is_dir():
        return embedded
    if device.type == "cpu":
        return replace(embedded, reason="the device is a CPU")
    needed = ModelConfig.from_pretrained(DEFAULT_FOLDER).num_parameters * dtype.itemsize
    if needed > 0.9 * free_bytes(device):
        return replace(embedded, reason=f"{DEFAULT_FOLDER} needs {human_bytes(needed)}, which is not free")
    return Source("folder", str(DEFAULT_FOLDER), "it is there and fits", folder=DEFAULT_FOLDER)


def _random_source(source: str) -> Source:
    _, shape, *rest = source.split(":")
    distribution = rest[0] if rest else "normal"
    if shape not in SHAPES:
        raise UserError(f"--model {source}: unknown shape {shape!r}; shapes: {', '.join(SHAPES)}")
    if len(rest) > 1 or distribution not in RandomSource.DISTRIBUTIONS:
        raise UserError(f"--model {source}: use random:SHAPE, random:SHAPE:normal or random:SHAPE:uniform")
    return Source("random", source, "--model asks for random weights", config=SHAPES[shape], distribution=distribution)


def load(
    source: str | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tp: Callable[[ModelConfig], Shard] | None = None,
    seed: int = 0,
    context: int | None = None,
    quiet: bool = False,
) -> tuple[Llama, Tokenizer]:
    """Make the model and its tokenizer.

    source: see the head of this file. tp: gives this rank's `Shard` of a config (common/distributed.py). seed: of
    random weights. context: positions of a random model. Raises UserError naming the folder, file, field or tensor.
    """
    device = pick_device(device) if isinstance(device, str) else device
    dtype = pick_dtype(dtype, device) if isinstance(dtype, str) else dtype
    found = resolve(source, device, dtype, context)
    folder, origin = folder_of(found), f"{found.name} ({found.kind})"
    if found.kind == "hub":
        origin = f"{found.name} (hub, revision {folder.name})"
    elif found.kind == "random":
        origin = f"{found.name} (seed {seed})"
    config = found.config or ModelConfig.from_pretrained(folder)
    shard = tp(config) if tp else Shard.whole(config)
    _check_memory(config, shard, device, dtype, found.name)
    tensors: TensorSource
    if folder is None:
        tensors = RandomSource(config, device, seed, found.distribution, dtype)
        tokenizer: Tokenizer = ByteTokenizer(config)
    else:
        tensors = SafetensorsSource(folder, config)
        tokenizer = PretrainedTokenizer(folder, config)
    model = build(config, tensors, shard, device, dtype, origin=origin, quiet=quiet)
    if not quiet:
        where = folder if folder is not None else f"a generator (seed {seed}, {found.distribution})"
        millions = config.num_parameters / 1e6
        size = (
            f"{millions:,.{0 if millions >= 10 else 1}f}M parameters, {str(dtype).removeprefix('torch.')} on {device}"
        )
        if dtype == torch.float16 and not _has_bfloat16(device):
            size += ", which has no bfloat16"
        print(f"model: {found.name} ({size}), from {where}, because {found.reason}")
    return model, tokenizer


def folder_of(found: Source) -> Path | None:
    """The folder of a source's files, fetched first where it is not here; None for random weights."""
    if found.kind == "embedded":
        from common import embedded

        return embedded.model_folder()
    return _download(found.name) if found.kind == "hub" else found.folder


def _download(hub_id: str) -> Path:
    """A hub repository's snapshot folder, named by its revision; never code, never pickles.

    The small files come first: a model that is not supported is refused before gigabytes are fetched.
    """
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str, **pinned: str) -> Path:
        try:
            return Path(snapshot_download(hub_id, allow_patterns=list(patterns), **pinned))
        except Exception as error:  # the hub's client raises a dozen kinds; each means "not to be had"
            raise UserError(
                f"--model {hub_id}: no such folder, and the hub did not give it: {first_line(error)}"
            ) from None

    folder = fetch("*.json", "tokenizer.model", "*.jinja")
    ModelConfig.from_pretrained(folder)
    return fetch("*.safetensors", revision=folder.name)


def _check_memory(config: ModelConfig, shard: Shard, device: torch.device, dtype: torch.dtype, name: str) -> None:
    share = len(shard.q_heads) / config.num_attention_heads
    needed = config.num_parameters * dtype.itemsize * share
    if config.tie_word_embeddings:  # the head is held apart from the embedding once it is packed or split
        needed += config.vocab_size * config.hidden_size * dtype.itemsize
    free = free_bytes(device)
    if needed > free:
        raise UserError(
            f"--model {name}: needs about {human_bytes(needed)} on {device}, {human_bytes(free)} are free; "
            "use a smaller model or dtype"
        )


def build(
    config: ModelConfig,
    tensors: TensorSource,
    shard: Shard,
    device: torch.device,
    dtype: torch.dtype,
    *,
    origin: str = "",
    quiet: bool = True,
) -> Llama:
    """Read every tensor's slices of `shard` and assemble the decoder; its config has the shard's head counts."""

    def read(name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> torch.Tensor:
        return tensors.read(name, rows, columns).to(device=device, dtype=dtype)

    def norm(name: str) -> Norm:
        return Norm(read(name), config.rms_norm_eps)

    def fused(names: list[tuple[str, slice]]) -> Linear:
        parts = [(name, rows, len(range(*rows.indices(tensors.shape(name)[0])))) for name, rows in names]
        weight = torch.empty(sum(n for _, _, n in parts), config.hidden_size, dtype=dtype, device=device)
        start = 0
        for name, rows, count in parts:
            weight[start : start + count] = read(name, rows)
            start += count
        return Linear(weight)

    d = config.head_dim
    q, kv = _scaled(shard.q_heads, d), _scaled(shard.kv_heads, d)
    ffn, vocab = _scaled(shard.ffn), _scaled(shard.vocab)

    def layer(i: int) -> Layer:
        p = f"model.layers.{i}."
        a, m = p + "self_attn.", p + "mlp."
        return Layer(
            input_norm=norm(p + "input_layernorm.weight"),
            qkv=fused([(a + "q_proj.weight", q), (a + "k_proj.weight", kv), (a + "v_proj.weight", kv)]),
            o_proj=Linear(read(a + "o_proj.weight", WHOLE, q), group=shard.group),
            post_norm=norm(p + "post_attention_layernorm.weight"),
            gate_up=fused([(m + "gate_proj.weight", ffn), (m + "up_proj.weight", ffn)]),
            down_proj=Linear(read(m + "down_proj.weight", WHOLE, ffn), group=shard.group),
        )

    progress = tqdm(range(config.num_hidden_layers), "loading layers", disable=True if quiet else None, leave=False)
    embed_tokens = read("model.embed_tokens.weight")
    head = embed_tokens[vocab] if config.tie_word_embeddings else read("lm_head.weight", vocab)
    local = replace(config, num_attention_heads=len(shard.q_heads), num_key_value_heads=len(shard.kv_heads))
    return Llama(
        config=local,
        embed_tokens=embed_tokens,
        layers=tuple(layer(i) for i in progress),
        norm=norm("model.norm.weight"),
        lm_head=Linear(head) if shard.group is None else SplitHead(head, shard.group, config.vocab_size),
        origin=origin,
        bytes_read=tensors.bytes_read,
    )


def _scaled(part: range, size: int = 1) -> slice:
    return slice(part.start * size, part.stop * size)
